//! One slice of a super-batch on one worker: the coordinator's side of a `Score` stream.

use super::{
    fetch::{fetch_rows, keep_rows},
    kept::Kept,
    stream::Live,
    table::Table,
};
use crate::{
    coordinator::{
        plan::{candidate::Candidate, cut},
        workers::{failover::Failover, pool::Pool, replies::Replies, worker::Worker},
    },
    error::{Error, Result, from_status},
    handed::Handover,
};
use std::{collections::HashSet, ops::Range};
use superbatch_proto::v1::{
    Approximation, BlockRows, EmbedDone, EmbeddingDtype, FetchRowsRequest, Hole, ModelRef, Reason,
    RowsForm, ScoreBegin, ScoreRequest, score_request,
};
use tokio::sync::mpsc;

/// The settings that all slices of a step share.
#[derive(Debug, Clone)]
pub struct Job {
    pub run_id: String,
    pub generation: u32,
    pub step: u64,
    pub manifest_digest: String,
    pub micro_batch_rows: u32,
    pub reference: Option<ModelRef>,
    /// Whether few rows of each block are wanted of the reference: its kept embeddings serve, and
    /// no whole block is embedded.
    pub is_sparse: bool,
    /// The learner's folder, if its embeddings will be needed.
    pub learner_model: Option<ModelRef>,
    /// Length of an embedding, if the run knows it.
    pub reference_dim: Option<u32>,
    pub learner_dim: Option<u32>,
    pub embedding_dtype: EmbeddingDtype,
    pub columns: Vec<String>,
    /// Whether rows are only read and checked, and nothing is embedded.
    pub check_only: bool,
    /// What becomes of the chosen rows.
    pub form: RowsForm,
    /// The fidelity of both models; `None` is full.
    pub approximation: Option<Approximation>,
}

/// Embeddings of one model for a slice, in parts that follow each other.
#[derive(Debug, Default)]
pub struct Embeddings {
    pub parts: Vec<Part>,
    pub dim: usize,
    pub done: EmbedDone,
}

/// Embeddings of some rows: [rows, dim] each, little endian in the job's dtype.
#[derive(Debug)]
pub struct Part {
    /// The first of them, among those of the slice that are due.
    pub first: usize,
    pub image: Box<[u8]>,
    pub text: Box<[u8]>,
}

/// A slice in progress. If its worker is lost, everything received so far stays.
pub struct Slice {
    /// The slice's candidates in the super-batch.
    pub range: Range<usize>,
    /// The candidates whose reference embeddings it returns: those of whole blocks. See
    /// [`cut::whole_blocks`].
    pub reference_range: Range<usize>,
    blocks: Vec<BlockRows>,
    /// Rows of its last block that are candidates of the next slices.
    reference_more: Vec<u32>,
    pub holes: Vec<Hole>,
    /// Candidates whose reference embeddings are not finite, over all attempts.
    pub not_finite: HashSet<u32>,
    pub fetch_seconds: f64,
    pub decode_seconds: f64,
    /// Floating-point operations of attempts that were lost.
    pub discarded_flops: f64,
    pub reference: Option<Embeddings>,
    /// Whether the reference's embeddings were taken. A worker that begins again then need not
    /// compute them.
    has_reference: bool,
    pub learner: Option<Embeddings>,
    number: usize,
    live: Option<Live>,
}

impl Slice {
    pub fn new(
        number: usize,
        candidates: &[Candidate],
        range: Range<usize>,
        reference_range: Range<usize>,
    ) -> Self {
        // A slice that lies inside one block, whose beginning is in another slice, returns no
        // reference embeddings, also not of the block's other rows.
        let more = if reference_range.is_empty() {
            0..0
        } else {
            range.end..reference_range.end
        };
        Self {
            blocks: cut::block_rows(&candidates[range.clone()]),
            reference_more: candidates[more]
                .iter()
                .map(|candidate| candidate.row)
                .collect(),
            range,
            reference_range,
            holes: Vec::new(),
            not_finite: HashSet::new(),
            fetch_seconds: 0.0,
            decode_seconds: 0.0,
            discarded_flops: 0.0,
            reference: None,
            has_reference: false,
            learner: None,
            number,
            live: None,
        }
    }

    pub fn take_reference(&mut self) -> Option<Embeddings> {
        self.has_reference = self.reference.is_some();
        self.reference.take()
    }

    pub fn take_learner(&mut self) -> Option<Embeddings> {
        self.learner.take()
    }

    /// Has the slice read, decoded and embedded by the reference. If the worker is lost, another
    /// one takes over.
    ///
    /// # Errors
    /// Workers' errors about data and models, and `NoWorkers`, see [`Failover`].
    pub async fn begin(&mut self, pool: &Pool, job: &Job) -> Result<()> {
        let failover = self.failover(pool, job);
        self.attempt(pool, job, None, failover).await
    }

    /// Has the slice embedded by the learner `model`. Begins again on another worker if the worker
    /// is lost.
    pub async fn embed_learner(&mut self, pool: &Pool, job: &Job, model: &ModelRef) -> Result<()> {
        let mut failover = self.failover(pool, job);
        if let Some(mut live) = self.live.take() {
            match live.learner(self, job, model).await {
                Ok(()) => {
                    self.live = Some(live);
                    return Ok(());
                }
                Err(error) => self.give_up(&live.worker, error, &mut failover)?,
            }
        }
        self.attempt(pool, job, Some(model), failover).await
    }

    /// Returns the chosen rows (numbers within the slice), in the requested order.
    pub async fn rows(
        &mut self,
        pool: &Pool,
        job: &Job,
        form: RowsForm,
        chosen: &[u32],
    ) -> Result<Table> {
        let mut failover = self.failover(pool, job);
        if let Some(mut live) = self.live.take() {
            match live.rows(chosen, form).await {
                Ok(Some(table)) => return Ok(table),
                // The worker is well, and may be asked again.
                Ok(None) => {}
                // The embeddings have arrived and the draw is made. Only the rows are read again,
                // on any worker: a broken stream must never cost a second scoring.
                Err(error) => failover.failed(&live.worker, error)?,
            }
        }
        fetch_rows(pool, self.again(job, form, chosen), failover).await
    }

    /// Returns whether a worker of this process has the rows.
    pub fn is_here(&self) -> bool {
        let live = self.live.as_ref();
        live.is_some_and(|live| live.worker.embedded.is_some())
    }

    /// Returns whether the worker that has the rows can hold them for trainers.
    pub fn serves_tickets(&self) -> bool {
        let live = self.live.as_ref();
        live.is_none_or(|live| live.worker.ticket_key.is_some())
    }

    /// Has the chosen rows held for trainers. Returns `None` if the worker holds too many already.
    /// If they are not held, [`Slice::rows`] has them sent.
    pub async fn keep(&mut self, pool: &Pool, job: &Job, chosen: &[u32]) -> Result<Option<Kept>> {
        let mut failover = self.failover(pool, job);
        if let Some(live) = self.live.take() {
            let worker = live.worker.clone();
            let Some(held) = worker.holding.one() else {
                self.live = Some(live);
                return Ok(None);
            };
            match live.keep(chosen, held).await {
                Ok((kept, live)) => {
                    self.live = live;
                    return Ok(Some(kept));
                }
                Err(error) => failover.failed(&worker, error)?,
            }
        }
        let again = self.again(job, RowsForm::Kept, chosen);
        keep_rows(pool, again, failover).await
    }

    /// Returns the request that reads chosen rows again.
    fn again(&self, job: &Job, form: RowsForm, chosen: &[u32]) -> FetchRowsRequest {
        let flat: Vec<(&BlockRows, u32)> = self
            .blocks
            .iter()
            .flat_map(|block| block.rows.iter().map(move |row| (block, *row)))
            .collect();
        let blocks = chosen.iter().map(|candidate| {
            let (block, row) = flat[*candidate as usize];
            BlockRows {
                source: block.source,
                shard: block.shard,
                block: block.block,
                rows: vec![row],
            }
        });
        FetchRowsRequest {
            dataset_manifest: job.manifest_digest.clone(),
            blocks: blocks.collect(),
            columns: job.columns.clone(),
            form: form.into(),
            run_id: job.run_id.clone(),
            generation: job.generation,
            step: job.step,
        }
    }

    /// Takes the holes of an attempt. If the reference does not embed again, the holes that it
    /// found before stay: this attempt could not find them.
    pub fn take_holes(&mut self, mut found: Vec<Hole>) {
        if self.has_reference {
            let known: HashSet<u32> = found.iter().map(|hole| hole.candidate).collect();
            found.extend(
                self.holes
                    .drain(..)
                    .filter(|hole| !known.contains(&hole.candidate)),
            );
        }
        self.holes = found;
    }

    /// Returns the number of its candidates, and of those of other slices whose reference
    /// embeddings it returns.
    pub fn candidates(&self) -> usize {
        self.range.len() + self.reference_more.len()
    }

    /// Returns the candidates that have no embedding.
    pub fn without_embedding(&self) -> HashSet<u32> {
        let holes = self.holes.iter().map(|hole| hole.candidate);
        holes.chain(self.not_finite.iter().copied()).collect()
    }

    pub fn wants_reference(&self) -> bool {
        !self.has_reference && !self.reference_range.is_empty()
    }

    /// Slices of one step go to different workers, and successive steps begin at different ones:
    /// with fewer slices than workers the first workers would otherwise do all the work.
    fn failover<'a>(&self, pool: &'a Pool, job: &Job) -> Failover<'a> {
        Failover::new(pool).from_turn(self.number + job.step as usize)
    }

    async fn attempt(
        &mut self,
        pool: &Pool,
        job: &Job,
        learner: Option<&ModelRef>,
        mut failover: Failover<'_>,
    ) -> Result<()> {
        loop {
            let worker = failover.worker().await?;
            match self.attempt_on(pool.replies(), &worker, job, learner).await {
                Ok(live) => {
                    self.live = Some(live);
                    return Ok(());
                }
                Err(error) => self.give_up(&worker, error, &mut failover)?,
            }
        }
    }

    async fn attempt_on(
        &mut self,
        replies: Replies,
        worker: &Worker,
        job: &Job,
        learner: Option<&ModelRef>,
    ) -> Result<Live> {
        let begin = ScoreBegin {
            run_id: job.run_id.clone(),
            generation: job.generation,
            step: job.step,
            dataset_manifest: job.manifest_digest.clone(),
            blocks: self.blocks.clone(),
            micro_batch_rows: job.micro_batch_rows,
            reference: job.reference.clone().filter(|_| self.wants_reference()),
            learner_model: job.learner_model.clone(),
            embedding_dtype: job.embedding_dtype as i32,
            columns: job.columns.clone(),
            check_only: job.check_only,
            reference_from: (self.reference_range.start.min(self.range.end) - self.range.start)
                as u32,
            reference_more: self.reference_more.clone(),
            approximation: job.approximation,
            reference_sparse: job.is_sparse,
        };
        let (send, requests) = mpsc::channel(4);
        let request = ScoreRequest {
            message: Some(score_request::Message::Begin(begin)),
        };
        send.try_send(request)
            .map_err(|_| Error::internal("a fresh channel is full"))?;
        let handover = Handover::default();
        let takes = worker.score(requests, &handover);
        let receive = replies
            .within(worker, "that it takes a slice", takes)
            .await?
            .map_err(|status| from_status(status, Reason::NoWorkers))?;
        let mut live = Live {
            worker: worker.clone(),
            send,
            receive,
            handover,
            replies,
            is_full: false,
        };
        live.receive_holes(self, job).await?;
        if let Some(model) = learner {
            live.learner(self, job, model).await?;
        }
        Ok(live)
    }

    /// Notes a worker that is lost or unable. Returns the error if another worker would fail the
    /// same way.
    fn give_up(
        &mut self,
        worker: &Worker,
        error: Error,
        failover: &mut Failover<'_>,
    ) -> Result<()> {
        failover.failed(worker, error)?;
        crate::metrics::slices_rescored().increment(1);
        // The next attempt computes both models' embeddings again. What this one has spent was
        // real, so it is reported as discarded.
        let thrown = [self.reference.take(), self.learner.take()];
        self.discarded_flops += thrown.iter().flatten().map(|e| e.done.flops).sum::<f64>();
        Ok(())
    }
}
