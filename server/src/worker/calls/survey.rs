//! The first pass over a slice's blocks: reads and decodes rows, finds bad ones, and gets the
//! reference's embeddings.
use super::{
    beside::{self, Candidates},
    embed::Shape,
    extent::Extent,
    slice::{Slice, SliceBlock},
};
use crate::{
    error::{Error, Result},
    fidelity::Fidelity,
    metrics,
    worker::{
        engine::Engine,
        inputs::{
            captions,
            model_inputs::Inputs,
            preprocess::RowFault,
            row::{Prepared, PreparedRow},
        },
        kept::{
            embeddings::Embeddings,
            read::ReadBlock,
            retained::Kept,
            sidecar::{self, BlockEmbeddings, BlockKey},
        },
        loader::Loaded,
    },
};
use arrow::record_batch::RecordBatch;
use futures::{FutureExt, StreamExt, TryStreamExt, stream};
use std::{collections::HashMap, sync::Arc};
use superbatch_proto::v1::BadRowReason;
use tokio::time::Instant;

/// Blocks of a slice, and micro-batches of a block, that are under way at the same time: while one
/// is embedded, the next is decoded and a third is read. More would only hold more memory.
pub(crate) const AHEAD: usize = 3;

/// What to do with each block.
pub(crate) struct Task {
    pub step: u64,
    pub shape: Shape,
    /// The fidelity at which both models embed.
    pub fidelity: Fidelity,
    pub reference: Option<Arc<Loaded>>,
    /// Which rows of a block the reference embeds.
    pub extent: Extent,
    /// How rows are prepared for the learner, or only checked.
    pub inputs: Option<Arc<Inputs>>,
    /// Whether the learner will embed the same rows, so that they are kept decoded.
    pub keep_ready: bool,
}

/// The result of the pass over one block.
#[derive(Default)]
pub(crate) struct Surveyed {
    /// (n-th candidate of the block, fault). Rows of other slices are numbered after the
    /// candidates.
    pub faults: Vec<(usize, RowFault)>,
    pub reference: Option<Arc<BlockEmbeddings>>,
    /// The rows that `reference` has, which rise; `None` if it has all rows of the block.
    pub reference_rows: Option<Vec<u32>>,
    /// The candidates' rows, if there was room. Those whose images lie beside the file are kept by
    /// the slice.
    pub raw: Option<Candidates>,
    /// Whether the block was read. A block whose reference embeddings are stored need not be.
    pub was_read: bool,
    /// Whether the reference embeddings were made, and not found. A block without a usable row
    /// costs no operations, and is always made.
    pub was_embedded: bool,
    /// Decoded rows by candidate of the block, if there was room.
    pub ready: Vec<Option<Kept<Arc<Prepared>>>>,
    pub spent: Spent,
}

/// The cost of the pass.
#[derive(Default, Clone, Copy)]
pub(crate) struct Spent {
    pub fetch_seconds: f64,
    pub decode_seconds: f64,
    pub embed_seconds: f64,
    /// Rows that the reference embedded, padding included.
    pub rows_embedded: usize,
    /// Operations of their captions.
    pub text_flops: f64,
}

/// Surveys the blocks, in order.
pub(crate) async fn survey(engine: &Engine, slice: &Slice, task: &Task) -> Result<Vec<Surveyed>> {
    // Boxed and collected, here and below: the compiler cannot prove otherwise that these futures
    // are Send.
    let blocks: Vec<_> = slice
        .blocks
        .iter()
        .map(|block| Pass::new(engine, slice, block, task).run().boxed())
        .collect();
    stream::iter(blocks).buffered(AHEAD).try_collect().await
}

/// The pass over one block.
struct Pass<'a> {
    engine: &'a Engine,
    slice: &'a Slice,
    block: &'a SliceBlock,
    task: &'a Task,
    whole: Option<ReadBlock>,
    found: Surveyed,
    /// Candidates that need no decoding any more.
    settled: Vec<bool>,
}

impl<'a> Pass<'a> {
    fn new(engine: &'a Engine, slice: &'a Slice, block: &'a SliceBlock, task: &'a Task) -> Self {
        let rows = block.rows.len();
        let found = Surveyed {
            ready: (0..rows).map(|_| None).collect(),
            ..Default::default()
        };
        Self {
            engine,
            slice,
            block,
            task,
            whole: None,
            found,
            settled: vec![false; rows],
        }
    }

    async fn run(mut self) -> Result<Surveyed> {
        if let Some(model) = self
            .task
            .reference
            .as_ref()
            .filter(|_| self.slice.gives_reference(self.block))
        {
            self.reference(model).await?;
        }
        if let Some(inputs) = &self.task.inputs {
            self.read().await?;
            self.candidates(inputs).await?;
        }
        let whole = self.whole.take();
        if let Some(whole) = whole.filter(|whole| !whole.has_images_beside()) {
            let waits = self.task.reference.is_some() || self.task.keep_ready;
            let (slice, engine) = (self.slice, self.engine);
            let kept = slice.keep_candidates(engine, self.block, &whole, waits);
            self.found.raw = kept.await?;
        }
        Ok(self.found)
    }

    async fn read(&mut self) -> Result<ReadBlock> {
        if let Some(whole) = &self.whole {
            return Ok(whole.clone());
        }
        let started = Instant::now();
        let whole = self.slice.read(self.engine, self.block).await?;
        self.found.spent.fetch_seconds += started.elapsed().as_secs_f64();
        self.found.was_read = true;
        self.whole = Some(whole.clone());
        Ok(whole)
    }

    /// Gets the reference's embeddings of the whole block, or at least those of the candidates.
    async fn reference(&mut self, model: &Arc<Loaded>) -> Result<()> {
        let Self {
            engine,
            slice,
            block,
            task,
            ..
        } = *self;
        let shape = sidecar::Shape {
            rows: block.block_rows,
            dim: model.info.embedding_dim,
            dtype: task.shape.dtype,
        };
        let key = BlockKey {
            rows: slice.rows_digest(block),
            shard: block.shard,
            block: block.block,
            model_digest: &model.info.digest,
            inputs_digest: model.inputs.digest,
            fidelity: task.fidelity,
            dtype: shape.dtype,
            compute: model.info.key.compute,
            limits: engine.pool.limits(),
        };
        let (sidecar, key) = (&engine.sidecar, key.object());
        let wanted = task.extent.rows(block);
        let embedded = wanted.as_ref().map_or(block.block_rows, Vec::len) as u64;
        let found = match wanted {
            None => {
                let all = (0..block.block_rows as u32).collect();
                sidecar.get(&key, shape, self.embed(model, all)).await?
            }
            Some(wanted) => match sidecar.find(&key, shape).await? {
                Some(kept) => kept,
                None => {
                    let made = self.embed(model, wanted.clone()).await?;
                    self.found.reference_rows = Some(wanted);
                    Arc::new(made)
                }
            },
        };
        match self.found.spent.rows_embedded {
            0 => metrics::reference_rows_cached().increment(block.rows.len() as u64),
            _ => metrics::reference_rows_computed().increment(embedded),
        }
        let faults: HashMap<u32, &RowFault> = found
            .faults
            .iter()
            .map(|(row, fault)| (*row, fault))
            .collect();
        for (n, row) in block.reference_rows().enumerate() {
            if let Some(fault) = faults.get(&row) {
                if let Some(settled) = self.settled.get_mut(n) {
                    *settled = true;
                }
                self.found.faults.push((n, (*fault).clone()));
            }
        }
        self.found.reference = Some(found);
        Ok(())
    }

    /// Returns the candidates that are kept for the learner as they are decoded for the reference,
    /// by their rows. If both prepare rows alike, decoding them a second time would cost about 4 ms
    /// of a core.
    fn wanted(&self, model: &Loaded) -> HashMap<u32, usize> {
        let is_alike = |inputs: &Arc<Inputs>| inputs.digest == model.inputs.digest;
        let shares = self.task.keep_ready && self.task.inputs.as_ref().is_some_and(is_alike);
        let rows = self.block.rows.iter().enumerate().filter(|_| shares);
        rows.map(|(n, row)| (*row, n)).collect()
    }

    /// Embeds `rows` of the block, which rise. The others have no embeddings.
    async fn embed(&mut self, model: &Arc<Loaded>, rows: Vec<u32>) -> Result<BlockEmbeddings> {
        self.found.was_embedded = true;
        let whole = &self.read().await?;
        let Self {
            engine,
            slice,
            block,
            task,
            ..
        } = *self;
        let wanted = self.wanted(model);
        let (dim, dtype) = (model.info.embedding_dim, task.shape.dtype);
        let mut embeddings = Embeddings::zeros(rows.len(), dim, dtype);
        let mut faults = Vec::new();
        let micro_batches = task.shape.micro_batches(rows.len()).map(|range| {
            let these = &rows[range.clone()];
            let prepare = slice.prepare(engine, block, whole, these, &model.inputs);
            async move { Ok::<_, Error>((range.start, prepare.await?)) }.boxed()
        });
        let mut micro_batches = stream::iter(micro_batches).buffered(AHEAD);
        while let Some((first, prepared)) = micro_batches.try_next().await? {
            let ready = self.found.spent.take(prepared);
            for (row, prepared) in rows[first..].iter().zip(&ready) {
                if let Some(n) = wanted.get(row) {
                    self.settle(*n, prepared);
                }
                faults.extend(prepared.as_ref().err().map(|fault| (*row, fault.clone())));
            }
            let done = task
                .shape
                .embed(engine, model, &ready, &mut embeddings, first)
                .await?;
            let bad = done.not_finite.iter().map(|row| rows[first + row]);
            faults.extend(bad.map(|row| (row, not_finite())));
            self.found.spent.embed_seconds += done.seconds;
            self.found.spent.rows_embedded += task.shape.computed(ready.len());
            self.found.spent.text_flops += done.text_flops;
        }
        drop(micro_batches);
        faults.sort_unstable_by_key(|(row, _)| *row);
        let origin = crate::origin::Origin {
            rows: slice.rows_digest(block).to_owned(),
            model: model.info.digest.clone(),
        };
        Ok(BlockEmbeddings {
            embeddings,
            faults,
            origin: Some(origin),
        })
    }

    /// Decodes the candidates that may have faults not known yet, and those that the learner will
    /// want, as far as there is room.
    async fn candidates(&mut self, inputs: &Arc<Inputs>) -> Result<()> {
        let Self {
            engine,
            slice,
            block,
            task,
            ..
        } = *self;
        let whole = &self.read().await?;
        let same_inputs = task
            .reference
            .as_ref()
            .is_some_and(|model| model.inputs.digest == inputs.digest);
        let faults_known = same_inputs && self.found.reference.is_some();
        self.check_columns(&whole.batch);
        let open: Vec<usize> = (0..block.rows.len())
            .filter(|n| !self.settled[*n])
            .collect();
        let groups = open.chunks(task.shape.micro_batch_rows).map(|group| {
            let rows: Vec<u32> = group.iter().map(|n| block.rows[*n]).collect();
            async move {
                let prepared = slice.prepare(engine, block, whole, &rows, inputs);
                Ok::<_, Error>((group, prepared.await?))
            }
            .boxed()
        });
        let mut groups = stream::iter(groups.collect::<Vec<_>>()).buffered(AHEAD);
        while let Some((group, prepared)) = groups.try_next().await? {
            let rows = self.found.spent.take(prepared);
            for (n, prepared) in group.iter().zip(&rows) {
                self.settle(*n, prepared);
                self.found
                    .faults
                    .extend(prepared.as_ref().err().map(|fault| (*n, fault.clone())));
            }
            let no_room = group
                .iter()
                .zip(&rows)
                .any(|(n, row)| row.is_ok() && self.found.ready[*n].is_none());
            // The faults are known from the reference's pass and the memory for decoded images is
            // full: more decoding now would be thrown away and done again for the learner. If the
            // faults are not known, the pass goes on, since the holes must be complete.
            if faults_known && no_room {
                break;
            }
        }
        Ok(())
    }

    /// Finds candidates with an extra column whose text is not UTF-8. The sidecar's faults do not
    /// tell: another run may have stored them, which does not deliver this column.
    fn check_columns(&mut self, whole: &RecordBatch) {
        for (n, row) in self.block.rows.iter().enumerate() {
            let Some(column) = captions::invalid_column(whole, *row as usize) else {
                continue;
            };
            if self.found.faults.iter().all(|(known, _)| *known != n) {
                let detail = format!("the text in column '{column}' is not UTF-8");
                let fault = RowFault::new(BadRowReason::ColumnInvalid, detail);
                self.found.faults.push((n, fault));
            }
            self.found.ready[n] = None;
            self.settled[n] = true;
        }
    }

    /// Notes that a candidate is decoded, and keeps it for the learner if there is room.
    fn settle(&mut self, n: usize, prepared: &PreparedRow) {
        self.settled[n] = true;
        if let (true, Ok(prepared)) = (self.task.keep_ready, prepared) {
            self.found.ready[n] =
                self.engine
                    .ready
                    .keep(self.task.step, prepared.bytes(), prepared.clone());
        }
    }
}

fn not_finite() -> RowFault {
    RowFault::new(
        BadRowReason::EmbeddingNotFinite,
        "the reference's embedding is not finite",
    )
}

impl Spent {
    /// Adds what rows have taken, and returns them.
    fn take(&mut self, prepared: beside::Prepared) -> Vec<PreparedRow> {
        self.fetch_seconds += prepared.fetch_seconds;
        self.decode_seconds += prepared.decode_seconds;
        prepared.rows
    }
}

impl std::iter::Sum for Spent {
    fn sum<I: Iterator<Item = Self>>(all: I) -> Self {
        all.fold(Self::default(), |a, b| Self {
            fetch_seconds: a.fetch_seconds + b.fetch_seconds,
            decode_seconds: a.decode_seconds + b.decode_seconds,
            embed_seconds: a.embed_seconds + b.embed_seconds,
            rows_embedded: a.rows_embedded + b.rows_embedded,
            text_flops: a.text_flops + b.text_flops,
        })
    }
}
