//! A super-batch under way: its slices on the workers, stage by stage.
use super::{
    output,
    plan::{self, Candidate},
    pool::Pool,
    slice::{Embeddings, Job, Slice, element_bytes},
};
use crate::error::{Error, Result};
use arrow::{
    array::{Array, AsArray, RecordBatch, UInt32Array},
    compute::{concat_batches, take_record_batch},
};
use futures::future::try_join_all;
use std::sync::Arc;
use superbatch_proto::v1::{EmbeddingDtype, Hole, ModelRef};

/// Column of the workers' rows that holds their content hash.
pub const CONTENT_HASH: &str = "_superbatch_content_hash";

/// Candidates of one step on their way through the workers.
pub struct Scoring {
    pool: Arc<Pool>,
    job: Job,
    slices: Vec<Slice>,
    candidates: usize,
}

/// One model's embeddings of all candidates, rounded to the run's dtype and widened to f32.
#[derive(Debug, Default)]
pub struct Scored {
    /// [candidates, dim] each, row-major, L2-normalised; zero for holes.
    pub image: Vec<f32>,
    pub text: Vec<f32>,
    pub dim: usize,
    pub scale: f64,
    pub bias: Option<f64>,
    pub digest: String,
    pub device: String,
    pub flops: f64,
    pub seconds: f64,
    /// Candidates whose embeddings are not finite.
    pub not_finite: Vec<u32>,
}

/// Chosen rows in the order drawn: the output's data columns, and each row's content hash.
#[derive(Debug, Clone)]
pub struct Rows {
    pub data: RecordBatch,
    pub hashes: Vec<Vec<u8>>,
}

impl Scoring {
    /// Reads, decodes and (unless `check_only`) embeds `candidates` with the reference, shared among all workers there are.
    ///
    /// # Errors
    /// As the workers say; `NoWorkers`.
    pub async fn begin(pool: Arc<Pool>, job: Job, candidates: &[Candidate]) -> Result<Self> {
        let workers = pool.wait_live().await?.len();
        let ranges = plan::slices(candidates.len(), workers, job.micro_batch_rows as usize);
        let slice = |(number, range): (usize, std::ops::Range<usize>)| {
            Slice::new(number, range.clone(), plan::block_rows(&candidates[range]))
        };
        let mut slices: Vec<Slice> = ranges.into_iter().enumerate().map(slice).collect();
        try_join_all(slices.iter_mut().map(|slice| slice.begin(&pool, &job))).await?;
        Ok(Self { pool, job, slices, candidates: candidates.len() })
    }

    /// Rows that cannot be used, by candidate number.
    pub fn holes(&self) -> Vec<Hole> {
        let at =
            |slice: &Slice, hole: &Hole| Hole { candidate: hole.candidate + slice.range.start as u32, ..hole.clone() };
        self.slices.iter().flat_map(|slice| slice.holes.iter().map(move |hole| at(slice, hole))).collect()
    }

    /// (fetch, decode) seconds of the slowest slice.
    pub fn read_seconds(&self) -> (f64, f64) {
        let slowest = |of: fn(&Slice) -> f64| self.slices.iter().map(of).fold(0.0, f64::max);
        (slowest(|s| s.fetch_seconds), slowest(|s| s.decode_seconds))
    }

    /// Operations that were spent on workers which were lost.
    pub fn discarded_flops(&self) -> f64 {
        self.slices.iter().map(|s| s.discarded_flops).sum()
    }

    /// The reference's embeddings, where it was asked.
    pub fn reference(&self) -> Result<Option<Scored>> {
        self.gather(|slice| slice.reference.as_ref())
    }

    /// Has all candidates embedded by the learner `model`.
    pub async fn learner(&mut self, model: &ModelRef) -> Result<Scored> {
        let (pool, job) = (&self.pool, &self.job);
        try_join_all(self.slices.iter_mut().map(|slice| slice.embed_learner(pool, job, model))).await?;
        self.gather(|slice| slice.learner.as_ref())?
            .ok_or_else(|| Error::internal("the learner's embeddings are missing"))
    }

    /// The bytes of the chosen candidates, in the order given.
    pub async fn rows(&mut self, chosen: &[u32]) -> Result<Rows> {
        let mut wanted: Vec<(usize, Vec<u32>)> = Vec::new();
        let mut place = vec![0u32; chosen.len()];
        let mut base = 0;
        for (number, slice) in self.slices.iter().enumerate() {
            let inside = chosen.iter().enumerate().filter(|(_, c)| slice.range.contains(&(**c as usize)));
            let mut local = Vec::new();
            for (drawn, candidate) in inside {
                place[drawn] = base + local.len() as u32;
                local.push(candidate - slice.range.start as u32);
            }
            base += local.len() as u32;
            wanted.push((number, local));
        }
        let (pool, job) = (&self.pool, &self.job);
        let asked = self.slices.iter_mut().zip(&wanted).filter(|(_, (_, local))| !local.is_empty());
        let streams = try_join_all(asked.map(|(slice, (_, local))| slice.rows(pool, job, local))).await?;
        let batches = streams.into_iter().map(|bytes| output::read_stream(bytes.into())).collect::<Result<Vec<_>>>()?;
        join(&batches, &UInt32Array::from(place))
    }

    fn gather(&self, of: impl Fn(&Slice) -> Option<&Embeddings>) -> Result<Option<Scored>> {
        let Some(first) = self.slices.first().and_then(&of) else { return Ok(None) };
        let (dim, element) = (first.dim, element_bytes(self.job.embedding_dtype));
        let mut all = Scored {
            image: Vec::with_capacity(self.candidates * dim),
            text: Vec::with_capacity(self.candidates * dim),
            dim,
            scale: first.done.logit_scale,
            bias: first.done.logit_bias,
            digest: first.done.model_digest.clone(),
            device: first.done.device.clone(),
            ..Default::default()
        };
        for slice in &self.slices {
            let part = of(slice).filter(|p| p.dim == dim && p.done.model_digest == all.digest);
            let Some(part) = part else {
                return Err(Error::internal("workers answered with different models for one step"));
            };
            debug_assert_eq!(part.image.len(), slice.range.len() * dim * element);
            widen(&part.image, self.job.embedding_dtype, &mut all.image);
            widen(&part.text, self.job.embedding_dtype, &mut all.text);
            all.flops += part.done.flops;
            all.seconds = all.seconds.max(part.done.seconds);
            all.not_finite.extend(part.done.not_finite.iter().map(|c| c + slice.range.start as u32));
        }
        Ok(Some(all))
    }
}

/// Splits the content hashes off rows that a worker sent, reordered by `order`.
pub fn join(batches: &[RecordBatch], order: &UInt32Array) -> Result<Rows> {
    let all = concat(batches, order)?;
    let at = all.schema().index_of(CONTENT_HASH).map_err(broken)?;
    let column = all.column(at);
    let hashes = match column.as_binary_opt::<i32>() {
        Some(binary) => (0..binary.len()).map(|i| binary.value(i).to_vec()).collect(),
        None => {
            let fixed = column.as_fixed_size_binary_opt();
            let fixed = fixed.ok_or_else(|| Error::internal(format!("{CONTENT_HASH} is no binary column")))?;
            (0..fixed.len()).map(|i| fixed.value(i).to_vec()).collect()
        }
    };
    let others: Vec<usize> = (0..all.num_columns()).filter(|i| *i != at).collect();
    Ok(Rows { data: all.project(&others).map_err(broken)?, hashes })
}

/// All rows of `batches`, reordered by `order`.
pub fn concat(batches: &[RecordBatch], order: &UInt32Array) -> Result<RecordBatch> {
    let schema = batches.first().ok_or_else(|| Error::internal("no rows were chosen"))?.schema();
    take_record_batch(&concat_batches(&schema, batches).map_err(broken)?, order).map_err(broken)
}

fn broken(error: arrow::error::ArrowError) -> Error {
    Error::internal("workers sent rows that do not fit together").because(error)
}

fn widen(bytes: &[u8], dtype: EmbeddingDtype, into: &mut Vec<f32>) {
    if dtype == EmbeddingDtype::F32 {
        into.extend(bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])));
    } else {
        into.extend(bytes.chunks_exact(2).map(|b| half::f16::from_le_bytes([b[0], b[1]]).to_f32()));
    }
}
