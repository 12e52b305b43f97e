//! A super-batch on its way through the workers: its slices, stage by stage.
use super::{
    claims::{Claim, Claims},
    scored::{Rows, Scored, other_file},
    slice::{Embeddings, Job, Slice},
    table::Table,
};
use crate::{
    blocking::blocking,
    coordinator::{
        plan::{candidate::Candidate, cut},
        workers::{pool::Pool, replies::unsound},
    },
    error::{Error, Result},
    selection::{Embedded, Values},
};
use arrow::array::{Array, AsArray};
use bytes::Bytes;
use futures::future::try_join_all;
use std::{collections::BTreeMap, sync::Arc, time::Duration};
use superbatch_proto::v1::{EmbeddingDtype, Hole, ModelRef, Reason};

/// Column of the workers' rows that holds their content hash.
pub const CONTENT_HASH: &str = "_superbatch_content_hash";

/// How long a slice waits for a block that another slice computes, before it computes the block
/// itself.
const CLAIM_PATIENCE: Duration = Duration::from_secs(30);

/// The candidates of one step on their way through the workers.
pub struct Scoring {
    pool: Arc<Pool>,
    job: Job,
    slices: Vec<Slice>,
    candidates: usize,
}

impl Scoring {
    /// Reads, decodes and (unless `check_only`) embeds `candidates` with the reference, shared
    /// among all live workers. Waits for a block whose reference embeddings another step is
    /// computing.
    ///
    /// # Errors
    /// The workers' errors; `NoWorkers`.
    pub async fn begin(
        pool: Arc<Pool>,
        claims: &Claims,
        job: Job,
        candidates: &[Candidate],
    ) -> Result<Self> {
        let workers = pool.wait_live().await?.len();
        let ranges = cut::slices(candidates.len(), workers, job.micro_batch_rows as usize);
        let asks_reference = job.reference.is_some() && !job.check_only;
        let whole = if asks_reference {
            cut::whole_blocks(candidates, &ranges)
        } else {
            ranges.clone()
        };
        let slices = ranges.into_iter().zip(whole).enumerate();
        let mut slices: Vec<Slice> = slices
            .map(|(number, (range, whole))| Slice::new(number, candidates, range, whole))
            .collect();
        let embeds = |slice: &Slice| {
            if asks_reference {
                slice.reference_range.clone()
            } else {
                0..0
            }
        };
        let claims: Vec<Claim> = slices
            .iter()
            .map(|slice| claims.claim(&candidates[embeds(slice)]))
            .collect();
        let slices_and_claims = slices.iter_mut().zip(claims);
        try_join_all(slices_and_claims.map(|(slice, claim)| begin(slice, claim, &pool, &job)))
            .await?;
        Ok(Self {
            pool,
            job,
            slices,
            candidates: candidates.len(),
        })
    }

    /// Returns the rows that cannot be used, by candidate number.
    pub fn holes(&self) -> Vec<Hole> {
        let at = |slice: &Slice, hole: &Hole| Hole {
            candidate: hole.candidate + slice.range.start as u32,
            ..hole.clone()
        };
        self.slices
            .iter()
            .flat_map(|slice| slice.holes.iter().map(move |hole| at(slice, hole)))
            .collect()
    }

    /// Returns the number of slices.
    pub fn slices(&self) -> usize {
        self.slices.len()
    }

    /// Returns the (fetch, decode) seconds of the slowest slice.
    pub fn read_seconds(&self) -> (f64, f64) {
        let slowest = |of: fn(&Slice) -> f64| self.slices.iter().map(of).fold(0.0, f64::max);
        (slowest(|s| s.fetch_seconds), slowest(|s| s.decode_seconds))
    }

    /// Returns the FLOPs spent on workers that were lost.
    pub fn discarded_flops(&self) -> f64 {
        self.slices.iter().map(|s| s.discarded_flops).sum()
    }

    /// Takes the reference's embeddings, if it embeds. To be called once.
    pub fn reference(&mut self) -> Result<Option<Scored>> {
        self.gather(Slice::take_reference)
    }

    /// Has all candidates embedded by the learner `model`.
    pub async fn learner(&mut self, model: &ModelRef) -> Result<Scored> {
        let (pool, job) = (&self.pool, &self.job);
        try_join_all(
            self.slices
                .iter_mut()
                .map(|slice| slice.embed_learner(pool, job, model)),
        )
        .await?;
        self.gather(Slice::take_learner)?
            .ok_or_else(|| Error::internal("the learner's embeddings are missing"))
    }

    /// Returns the rows of the chosen candidates, in the given order.
    pub async fn rows(&mut self, chosen: &[u32]) -> Result<Rows> {
        let mut wanted: Vec<(usize, Vec<u32>)> = Vec::new();
        let mut place = vec![0u32; chosen.len()];
        let mut base = 0;
        for (number, slice) in self.slices.iter().enumerate() {
            let inside = chosen
                .iter()
                .enumerate()
                .filter(|(_, c)| slice.range.contains(&(**c as usize)));
            let mut inside: Vec<_> = inside.collect();
            // In the order of storage neighbouring rows can be sent as one piece of a block,
            // without a copy. `place` restores the order of the draw afterwards.
            inside.sort_unstable_by_key(|(_, candidate)| **candidate);
            let mut local = Vec::new();
            for (drawn, candidate) in inside {
                place[drawn] = base + local.len() as u32;
                local.push(candidate - slice.range.start as u32);
            }
            base += local.len() as u32;
            wanted.push((number, local));
        }
        let (pool, job) = (&self.pool, &self.job);
        let asked = self
            .slices
            .iter_mut()
            .zip(&wanted)
            .filter(|(_, (_, local))| !local.is_empty());
        let streams =
            try_join_all(asked.map(|(slice, (_, local))| slice.rows(pool, job, local))).await?;
        let due = wanted
            .iter()
            .map(|(_, local)| local.len())
            .filter(|rows| *rows > 0);
        let (streams, due): (Vec<_>, Vec<_>) = (streams, due.collect());
        blocking("joining rows", move || joined(streams, due, &place)).await
    }

    /// Joins the slices' embeddings, and frees them there.
    fn gather(
        &mut self,
        take: impl Fn(&mut Slice) -> Option<Embeddings>,
    ) -> Result<Option<Scored>> {
        let mut all: Option<Scored> = None;
        for slice in &mut self.slices {
            let (start, part) = (slice.range.start as u32, take(slice));
            let Some(part) = part else { continue };
            let all =
                all.get_or_insert_with(|| empty(&part, self.job.embedding_dtype, self.candidates));
            let files: BTreeMap<String, String> = part.done.files.clone().into_iter().collect();
            // Workers load models by themselves, at different times. If a folder was replaced in
            // between, half of the super-batch would be scored by another model. Scores of two
            // models cannot be compared, and the draw would prefer one half of the data for no
            // reason.
            if let Some(file) = other_file(&all.files, &files) {
                return Err(changed(file));
            }
            let same = part.done.model_digest == all.digest
                && part.done.compute_dtype() == all.compute_dtype;
            if !same || part.dim != all.embedded.dim {
                return Err(differs());
            }
            all.embedded.image.append(&part.image);
            all.embedded.text.append(&part.text);
            all.flops += part.done.flops;
            all.text_flops += part.done.text_flops;
            all.seconds = all.seconds.max(part.done.seconds);
            all.not_finite
                .extend(part.done.not_finite.iter().map(|c| c + start));
        }
        match all {
            // Some slice has no embeddings.
            Some(all) if all.embedded.image.len() != self.candidates * all.embedded.dim => {
                Err(differs())
            }
            all => Ok(all),
        }
    }
}

async fn begin(slice: &mut Slice, mut claim: Claim, pool: &Pool, job: &Job) -> Result<()> {
    claim.wait(CLAIM_PATIENCE).await;
    slice.begin(pool, job).await?;
    claim.made();
    Ok(())
}

fn empty(part: &Embeddings, dtype: EmbeddingDtype, candidates: usize) -> Scored {
    let values = || Values::with_capacity(dtype, candidates * part.dim);
    Scored {
        embedded: Embedded {
            image: values(),
            text: values(),
            dim: part.dim,
        },
        scale: part.done.logit_scale,
        bias: part.done.logit_bias,
        digest: part.done.model_digest.clone(),
        files: part.done.files.clone().into_iter().collect(),
        compute_dtype: part.done.compute_dtype(),
        device: part.done.device.clone(),
        flops: 0.0,
        text_flops: 0.0,
        seconds: 0.0,
        not_finite: Vec::new(),
    }
}

fn changed(file: &str) -> Error {
    let message = format!(
        "{file} of a model folder was changed while its run went on: some workers hold the old \
        one, some the new; put it back \
         and start the workers anew"
    );
    Error::new(Reason::ModelInvalid, message).with("file", file)
}

fn differs() -> Error {
    Error::internal("workers answered with different models or arithmetic for one step")
}

/// Joins the rows of all slices, `due` of each, in the order of `place`.
fn joined(streams: Vec<Vec<Bytes>>, due: Vec<usize>, place: &[u32]) -> Result<Rows> {
    let mut tables = streams.into_iter().zip(due).map(|(parts, due)| {
        let table = Table::from_stream(parts)?;
        match table.rows() == due {
            true => Ok(table),
            // A slice with one row too few or too many would shift the rows of all later slices:
            // every one of them would be served under another row's id and score.
            false => Err(unsound(format_args!("{} of {due} rows", table.rows()))),
        }
    });
    let mut all = tables
        .next()
        .ok_or_else(|| Error::internal("no rows were chosen"))??;
    tables.try_for_each(|table| all.append(table?))?;
    hashed(all.reordered(place))
}

/// Reads the content hashes from the rows that workers sent. The column stays in the table; the
/// output schema does not name it.
///
/// # Errors
/// `Internal` if the column is missing.
pub fn hashed(data: Table) -> Result<Rows> {
    let all: Vec<usize> = (0..data.rows()).collect();
    let column = data.column(CONTENT_HASH, &all)?;
    let fixed = column.as_fixed_size_binary_opt();
    let fixed =
        fixed.ok_or_else(|| Error::internal(format!("{CONTENT_HASH} is no column of hashes")))?;
    let hashes = (0..fixed.len())
        .map(|row| fixed.value(row).to_vec())
        .collect();
    Ok(Rows { data, hashes })
}
