//! A super-batch on its way through the workers: its slices, stage by stage.
use super::{
    claims::{Claim, Claims},
    gather::gathered,
    kept::{self, Data, Kept},
    scored::{Rows, Scored},
    slice::{Embeddings, Job, Slice},
    table::Table,
};
use crate::{
    blocking::blocking,
    coordinator::{
        plan::{candidate::Candidate, cut},
        workers::pool::Pool,
    },
    error::{Error, Result},
    traces::stage,
};
use arrow::array::{Array, AsArray};
use futures::future::try_join_all;
use std::{sync::Arc, time::Duration};
use superbatch_proto::{
    columns::CONTENT_HASH,
    v1::{Hole, ModelRef, RowsForm},
};
use tracing::Instrument;

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
        mut job: Job,
        candidates: &[Candidate],
    ) -> Result<Self> {
        let live = pool.wait_live().await?;
        // A batch comes one way. The worker of this process has no address for trainers.
        if job.form == RowsForm::Kept && live.iter().any(|w| w.ticket_key.is_none()) {
            job.form = RowsForm::Whole;
        }
        let workers = live.len();
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
        // What is embedded of a block in part is not kept, so other steps are not to wait for it.
        // Which blocks are large is the workers' affair: of those they wait once, for the first.
        let embeds = |slice: &Slice| {
            if asks_reference && !job.is_sparse {
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
        let begun = slices_and_claims.map(|(slice, claim)| {
            let span = stage!("slice", rows = slice.range.len() as i64);
            begin(slice, claim, &pool, &job).instrument(span)
        });
        try_join_all(begun).await?;
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
    pub async fn reference(&mut self) -> Result<Option<Scored>> {
        self.gather(Slice::take_reference).await
    }

    /// Has all candidates embedded by the learner `model`.
    pub async fn learner(&mut self, model: &ModelRef) -> Result<Scored> {
        let (pool, job) = (&self.pool, &self.job);
        let embedded = self.slices.iter_mut().map(|slice| {
            let span = stage!("embed_learner", rows = slice.range.len() as i64);
            slice.embed_learner(pool, job, model).instrument(span)
        });
        try_join_all(embedded).await?;
        self.gather(Slice::take_learner)
            .await?
            .ok_or_else(|| Error::internal("the learner's embeddings are missing"))
    }

    /// Returns the rows of the chosen candidates, in the given order. Rank by rank they are served
    /// in the order of `served`, which has a number for each.
    ///
    /// # Errors
    /// Those of workers; `changed` of a candidate whose row is not the one that was scored.
    pub async fn rows(
        &mut self,
        chosen: &[u32],
        served: &[usize],
        changed: impl Fn(usize) -> Error,
    ) -> Result<Rows> {
        let (wanted, place) = self.wanted(chosen, served);
        if self.job.form != RowsForm::Kept {
            return self.sent(self.job.form, &wanted, place).await;
        }
        // A batch comes one way: if one worker serves no tickets, no other need hold its rows.
        if !asked(&mut self.slices, &wanted).all(|(slice, _)| slice.serves_tickets()) {
            return self.sent(RowsForm::Whole, &wanted, place).await;
        }
        let (pool, job) = (&self.pool, &self.job);
        let answers = asked(&mut self.slices, &wanted);
        let answers = answers.map(|(slice, local)| slice.keep(pool, job, local));
        let kept: Vec<Option<Kept>> = try_join_all(answers).await?;
        let is_held = |kept: &Option<Kept>| kept.as_ref().is_some_and(|kept| kept.part.is_some());
        if kept.iter().all(is_held) {
            let (data, hashes) = kept::joined(kept.into_iter().flatten().collect(), &place);
            return Ok(Rows { data, hashes });
        }
        // Workers that have no room have the rows at hand still; those that hold theirs let go of
        // them and read them again.
        let known = kept
            .into_iter()
            .zip(&wanted)
            .flat_map(|(kept, (_, local))| {
                let hashes = kept.map(|kept| kept.hashes.into_iter().map(Some).collect());
                hashes.unwrap_or_else(|| vec![None; local.len()])
            });
        let known: Vec<Option<Vec<u8>>> = known.collect();
        let rows = self.sent(RowsForm::Whole, &wanted, place.clone()).await?;
        let mut pairs = place.iter().zip(&rows.hashes);
        let differs = |(place, found): (&u32, &Vec<u8>)| {
            let known = known[*place as usize].as_ref();
            known.is_some_and(|known| known != found)
        };
        match pairs.position(differs) {
            Some(n) => Err(changed(chosen[n] as usize)),
            None => Ok(rows),
        }
    }

    /// Returns the numbers in each slice of the chosen candidates that lie in it, and of each
    /// chosen one its place among all that the slices return.
    fn wanted(&self, chosen: &[u32], served: &[usize]) -> (Vec<(usize, Vec<u32>)>, Vec<u32>) {
        let mut wanted: Vec<(usize, Vec<u32>)> = Vec::new();
        let mut place = vec![0u32; chosen.len()];
        let mut base = 0;
        let is_whole = self.job.form == RowsForm::Whole;
        for (number, slice) in self.slices.iter().enumerate() {
            let inside = chosen
                .iter()
                .enumerate()
                .filter(|(_, c)| slice.range.contains(&(**c as usize)));
            let mut inside: Vec<_> = inside.collect();
            // In the order of storage neighbouring rows can be sent as one piece of a block,
            // without a copy. A worker of this process, which hands whole rows over, copies most of
            // them once, and need not do it again for ranks if it does so in their order. `place`
            // restores the order of the draw afterwards.
            if is_whole && slice.is_here() {
                inside.sort_unstable_by_key(|(drawn, _)| served.get(*drawn));
            } else {
                inside.sort_unstable_by_key(|(_, candidate)| **candidate);
            }
            let mut local = Vec::new();
            for (drawn, candidate) in inside {
                place[drawn] = base + local.len() as u32;
                local.push(candidate - slice.range.start as u32);
            }
            base += local.len() as u32;
            wanted.push((number, local));
        }
        wanted.retain(|(_, local)| !local.is_empty());
        (wanted, place)
    }

    /// Has the rows of slices sent, in the order of `place`.
    async fn sent(
        &mut self,
        form: RowsForm,
        wanted: &[(usize, Vec<u32>)],
        place: Vec<u32>,
    ) -> Result<Rows> {
        let (pool, job) = (&self.pool, &self.job);
        let answers = asked(&mut self.slices, wanted);
        let answers = answers.map(|(slice, local)| slice.rows(pool, job, form, local));
        let tables = try_join_all(answers).await?;
        blocking("joining rows", move || joined(tables, &place)).await
    }

    /// Joins the slices' embeddings, and frees them there. They are hundreds of megabytes in a
    /// large super-batch, so they are joined off the async threads.
    async fn gather(
        &mut self,
        take: impl Fn(&mut Slice) -> Option<Embeddings>,
    ) -> Result<Option<Scored>> {
        let taken = self.slices.iter_mut().filter_map(|slice| {
            let part = take(slice)?;
            Some((slice.range.start as u32, part))
        });
        let parts: Vec<(u32, Embeddings)> = taken.collect();
        let (dtype, candidates) = (self.job.embedding_dtype, self.candidates);
        let join = move || gathered(parts, dtype, candidates);
        blocking("joining embeddings", join).await
    }
}

/// Returns the slices of which rows are wanted, by rising number, with these rows.
fn asked<'a>(
    slices: &'a mut [Slice],
    wanted: &'a [(usize, Vec<u32>)],
) -> impl Iterator<Item = (&'a mut Slice, &'a [u32])> {
    let mut wanted = wanted.iter().peekable();
    let numbered = slices.iter_mut().enumerate();
    numbered.filter_map(move |(number, slice)| {
        let (_, local) = wanted.next_if(|(of, _)| *of == number)?;
        Some((slice, local.as_slice()))
    })
}

async fn begin(slice: &mut Slice, mut claim: Claim, pool: &Pool, job: &Job) -> Result<()> {
    claim.wait(CLAIM_PATIENCE).await;
    slice.begin(pool, job).await?;
    claim.made();
    Ok(())
}

/// Joins the rows of several slices, in the order of `place`.
///
/// # Errors
/// `Internal` if there are none, or of different columns.
pub fn joined(tables: Vec<Table>, place: &[u32]) -> Result<Rows> {
    let mut tables = tables.into_iter();
    let mut all = tables
        .next()
        .ok_or_else(|| Error::internal("no rows were chosen"))?;
    tables.try_for_each(|table| all.append(table))?;
    hashed(all.reordered(place))
}

/// Reads the content hashes from the rows that workers sent. The column stays in the table; the
/// output schema does not name it.
///
/// # Errors
/// `Internal` if the column is missing.
fn hashed(data: Table) -> Result<Rows> {
    let hashes = hashes(&data)?;
    Ok(Rows {
        data: Data::Here(data),
        hashes,
    })
}

/// As [`hashed`].
///
/// # Errors
/// As [`hashed`].
pub fn hashes(data: &Table) -> Result<Vec<Vec<u8>>> {
    let all: Vec<usize> = (0..data.rows()).collect();
    let column = data.column(CONTENT_HASH, &all)?;
    let fixed = column.as_fixed_size_binary_opt();
    let fixed =
        fixed.ok_or_else(|| Error::internal(format!("{CONTENT_HASH} is no column of hashes")))?;
    Ok((0..fixed.len())
        .map(|row| fixed.value(row).to_vec())
        .collect())
}

#[cfg(test)]
mod tests;
