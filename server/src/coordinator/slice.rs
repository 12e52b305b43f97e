//! One slice of a super-batch on one worker: the coordinator's side of a `Score` stream.
mod unable;

pub use unable::Unable;

use super::{
    plan::{self, Candidate},
    pool::{Pool, Worker},
};
use crate::error::{Error, Result, from_status};
use bytes::Bytes;
use futures::StreamExt;
use std::{collections::HashSet, ops::Range};
use superbatch_proto::v1::{
    BlockRows, ChosenRows, EmbedDone, EmbeddingDtype, EmbeddingPart, FetchRowsRequest, Hole, LearnerGo, ModelRef,
    Reason, ScoreBegin, ScoreRequest, ScoreResponse, Tower, fetch_rows_response, score_request,
    score_response::Message,
};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Streaming;

/// Workers that may be lost under one slice before the step fails.
const ATTEMPTS_MAX: usize = 5;

/// What all slices of a step have in common.
#[derive(Debug, Clone)]
pub struct Job {
    pub run_id: String,
    pub generation: u32,
    pub step: u64,
    pub manifest_digest: String,
    pub micro_batch_rows: u32,
    pub reference: Option<ModelRef>,
    /// The learner's folder, where its embeddings will be asked for.
    pub learner_model: Option<ModelRef>,
    pub embedding_dtype: EmbeddingDtype,
    pub columns: Vec<String>,
    /// Read and check rows, embed nothing.
    pub check_only: bool,
}

/// Embeddings of one model for a slice, as they came: [rows, dim], little endian in the job's dtype.
#[derive(Debug, Default)]
pub struct Embeddings {
    pub image: Vec<u8>,
    pub text: Vec<u8>,
    pub dim: usize,
    pub done: EmbedDone,
}

/// A slice in progress. What it has received stays when its worker is lost.
pub struct Slice {
    /// Its candidates in the super-batch.
    pub range: Range<usize>,
    /// The candidates whose reference embeddings it gives: those of whole blocks. See [`plan::whole_blocks`].
    pub reference_range: Range<usize>,
    blocks: Vec<BlockRows>,
    /// Rows of its last block that are candidates of the next slices.
    reference_more: Vec<u32>,
    pub holes: Vec<Hole>,
    pub fetch_seconds: f64,
    pub decode_seconds: f64,
    /// Floating-point operations of attempts that were lost.
    pub discarded_flops: f64,
    reference: Option<Embeddings>,
    /// The reference's embeddings were taken: a worker that has to begin again need not make them again.
    has_reference: bool,
    learner: Option<Embeddings>,
    number: usize,
    live: Option<Live>,
}

struct Live {
    worker: Worker,
    send: mpsc::Sender<ScoreRequest>,
    receive: Streaming<ScoreResponse>,
}

impl Slice {
    pub fn new(number: usize, candidates: &[Candidate], range: Range<usize>, reference_range: Range<usize>) -> Self {
        // A slice that lies inside one block gives none of the reference's embeddings, and nothing of the block's rest.
        let more = if reference_range.is_empty() { 0..0 } else { range.end..reference_range.end };
        Self {
            blocks: plan::block_rows(&candidates[range.clone()]),
            reference_more: candidates[more].iter().map(|candidate| candidate.row).collect(),
            range,
            reference_range,
            holes: Vec::new(),
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

    /// Has the slice read, decoded and embedded by the reference, on another worker where one is lost.
    ///
    /// # Errors
    /// What workers say of data and models, see [`Unable`]; `NoWorkers` after [`ATTEMPTS_MAX`] lost workers.
    pub async fn begin(&mut self, pool: &Pool, job: &Job) -> Result<()> {
        self.attempt(pool, job, None, Unable::default()).await
    }

    /// Has the slice embedded by the learner `model`; begins again where the worker is lost.
    pub async fn embed_learner(&mut self, pool: &Pool, job: &Job, model: &ModelRef) -> Result<()> {
        let mut unable = Unable::default();
        if let Some(mut live) = self.live.take() {
            match live.learner(self, job, model).await {
                Ok(()) => {
                    self.live = Some(live);
                    return Ok(());
                }
                Err(error) => self.give_up(pool, job, &live.worker, error, &mut unable)?,
            }
        }
        self.attempt(pool, job, Some(model), unable).await
    }

    /// The chosen rows (numbers within the slice, in the order wanted) as an Arrow IPC stream.
    pub async fn rows(&mut self, pool: &Pool, job: &Job, chosen: &[u32]) -> Result<Vec<Bytes>> {
        let mut unable = Unable::default();
        if let Some(mut live) = self.live.take() {
            match live.rows(chosen).await {
                Ok(bytes) => return Ok(bytes),
                // What it embedded is here already: only the rows have to be read again.
                Err(error) if is_lost(&error) => pool.lost(&live.worker),
                Err(error) => unable.note(&live.worker, error)?,
            }
        }
        let flat: Vec<(usize, u32)> =
            self.blocks.iter().enumerate().flat_map(|(b, block)| block.rows.iter().map(move |row| (b, *row))).collect();
        let blocks = chosen.iter().map(|candidate| {
            let (b, row) = flat[*candidate as usize];
            BlockRows { rows: vec![row], ..self.blocks[b].clone() }
        });
        fetch_rows_from_others(pool, &job.manifest_digest, blocks.collect(), &job.columns, unable).await
    }

    /// Holes of an attempt. Those that the reference found stay where it is not asked again.
    fn take_holes(&mut self, mut found: Vec<Hole>) {
        if self.has_reference {
            let known: HashSet<u32> = found.iter().map(|hole| hole.candidate).collect();
            found.extend(self.holes.drain(..).filter(|hole| !known.contains(&hole.candidate)));
        }
        self.holes = found;
    }

    fn wants_reference(&self) -> bool {
        !self.has_reference && !self.reference_range.is_empty()
    }

    async fn attempt(&mut self, pool: &Pool, job: &Job, learner: Option<&ModelRef>, mut unable: Unable) -> Result<()> {
        for attempt in 0..ATTEMPTS_MAX {
            let workers = pool.wait_live().await?;
            let turn = self.number + attempt + job.step as usize;
            let worker = unable.other(workers, turn)?;
            match self.attempt_on(&worker, job, learner).await {
                Ok(live) => {
                    self.live = Some(live);
                    return Ok(());
                }
                Err(error) if attempt + 1 == ATTEMPTS_MAX => return Err(error),
                Err(error) => self.give_up(pool, job, &worker, error, &mut unable)?,
            }
        }
        Err(Error::new(Reason::NoWorkers, "all scoring workers were lost"))
    }

    async fn attempt_on(&mut self, worker: &Worker, job: &Job, learner: Option<&ModelRef>) -> Result<Live> {
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
            reference_from: (self.reference_range.start.min(self.range.end) - self.range.start) as u32,
            reference_more: self.reference_more.clone(),
        };
        let (send, requests) = mpsc::channel(4);
        let request = ScoreRequest { message: Some(score_request::Message::Begin(begin)) };
        send.try_send(request).map_err(|_| Error::internal("a fresh channel is full"))?;
        let answer = worker.client().score(ReceiverStream::new(requests)).await;
        let receive = answer.map_err(|status| from_status(status, Reason::NoWorkers))?.into_inner();
        let mut live = Live { worker: worker.clone(), send, receive };
        live.begun(self, job).await?;
        if let Some(model) = learner {
            live.learner(self, job, model).await?;
        }
        Ok(live)
    }

    /// Notes a worker that is lost or unable; passes on an error that another worker would make, too.
    fn give_up(&mut self, pool: &Pool, job: &Job, worker: &Worker, error: Error, unable: &mut Unable) -> Result<()> {
        if is_lost(&error) {
            let (run, step, worker_at) = (&job.run_id, job.step, &worker.address);
            tracing::warn!(run, step, worker = worker_at, error = error.chain(), "slice goes to another worker");
            pool.lost(worker);
        } else {
            unable.note(worker, error)?;
        }
        crate::metrics::slices_rescored().increment(1);
        let thrown = [self.reference.take(), self.learner.take()];
        self.discarded_flops += thrown.iter().flatten().map(|e| e.done.flops).sum::<f64>();
        Ok(())
    }
}

impl Live {
    async fn begun(&mut self, slice: &mut Slice, job: &Job) -> Result<()> {
        match self.next().await? {
            Message::Holes(holes) => {
                slice.fetch_seconds += holes.fetch_seconds;
                slice.decode_seconds += holes.decode_seconds;
                slice.take_holes(holes.holes);
            }
            other => return Err(unexpected("holes", &other)),
        }
        if job.reference.is_some() && slice.wants_reference() && !job.check_only {
            let rows = slice.reference_range.start - slice.range.start..slice.reference_range.end - slice.range.start;
            slice.reference = Some(self.embeddings(Tower::Reference, rows, job).await?);
        }
        Ok(())
    }

    async fn learner(&mut self, slice: &mut Slice, job: &Job, model: &ModelRef) -> Result<()> {
        self.send(score_request::Message::Learner(LearnerGo { learner: Some(model.clone()) })).await?;
        slice.learner = Some(self.embeddings(Tower::Learner, 0..slice.range.len(), job).await?);
        Ok(())
    }

    async fn rows(&mut self, chosen: &[u32]) -> Result<Vec<Bytes>> {
        self.send(score_request::Message::Chosen(ChosenRows { candidates: chosen.to_vec() })).await?;
        let mut parts = Vec::new();
        loop {
            match self.next().await? {
                Message::ArrowIpc(part) => parts.push(part),
                Message::RowsDone(_) => return Ok(parts),
                other => return Err(unexpected("rows", &other)),
            }
        }
    }

    async fn embeddings(&mut self, tower: Tower, rows: Range<usize>, job: &Job) -> Result<Embeddings> {
        let mut found = Embeddings::default();
        loop {
            match self.next().await? {
                Message::Embedding(part) if part.tower == tower as i32 => {
                    place(&mut found, &part, &rows, element_bytes(job.embedding_dtype))?;
                }
                Message::Done(done) if done.tower == tower as i32 => {
                    found.done = done;
                    return Ok(found);
                }
                other => return Err(unexpected("embeddings", &other)),
            }
        }
    }

    async fn send(&mut self, message: score_request::Message) -> Result<()> {
        let request = ScoreRequest { message: Some(message) };
        self.send.send(request).await.map_err(|_| Error::new(Reason::NoWorkers, "the worker ended its stream"))
    }

    async fn next(&mut self) -> Result<Message> {
        let ended = || Error::new(Reason::NoWorkers, "the worker ended its stream early");
        let response = self.receive.next().await.ok_or_else(ended)?;
        let response = response.map_err(|status| from_status(status, Reason::NoWorkers))?;
        response.message.ok_or_else(|| Error::internal("the worker sent an empty message"))
    }
}

/// Reads rows anew on any worker, as an Arrow IPC stream in the order of `blocks`.
pub async fn fetch_rows(pool: &Pool, manifest: &str, blocks: Vec<BlockRows>, columns: &[String]) -> Result<Vec<Bytes>> {
    fetch_rows_from_others(pool, manifest, blocks, columns, Unable::default()).await
}

async fn fetch_rows_from_others(
    pool: &Pool,
    manifest: &str,
    blocks: Vec<BlockRows>,
    columns: &[String],
    mut unable: Unable,
) -> Result<Vec<Bytes>> {
    let request = FetchRowsRequest { dataset_manifest: manifest.to_owned(), blocks, columns: columns.to_vec() };
    let mut attempt = 0;
    loop {
        let worker = pool.other(&mut unable).await?;
        match fetch_rows_from(&worker, request.clone()).await {
            Err(error) if is_lost(&error) && attempt + 1 < ATTEMPTS_MAX => {
                pool.lost(&worker);
                attempt += 1;
            }
            Err(error) => unable.note(&worker, error)?,
            Ok(parts) => return Ok(parts),
        }
    }
}

async fn fetch_rows_from(worker: &Worker, request: FetchRowsRequest) -> Result<Vec<Bytes>> {
    let lost = |status| from_status(status, Reason::NoWorkers);
    let mut stream = worker.client().fetch_rows(request).await.map_err(lost)?.into_inner();
    let mut parts = Vec::new();
    while let Some(response) = stream.next().await {
        match response.map_err(lost)?.message {
            Some(fetch_rows_response::Message::ArrowIpc(part)) => parts.push(part),
            Some(fetch_rows_response::Message::Done(_)) => return Ok(parts),
            None => {}
        }
    }
    Err(Error::new(Reason::NoWorkers, "the worker ended its stream early"))
}

/// Bytes of one embedding element.
fn element_bytes(dtype: EmbeddingDtype) -> usize {
    if dtype == EmbeddingDtype::F32 { 4 } else { 2 }
}

/// Puts a part where it belongs among `rows`, numbered within the slice.
fn place(into: &mut Embeddings, part: &EmbeddingPart, rows: &Range<usize>, element: usize) -> Result<()> {
    let dim = part.dim as usize;
    if into.image.is_empty() {
        into.dim = dim;
        into.image = vec![0; rows.len() * dim * element];
        into.text = vec![0; rows.len() * dim * element];
    }
    let first = (part.first as usize).wrapping_sub(rows.start);
    let fits = dim == into.dim && first < rows.len() && first + part.rows as usize <= rows.len();
    let (start, end) = match fits {
        true => (first * dim * element, (first + part.rows as usize) * dim * element),
        false => (0, 0),
    };
    if !fits || part.image.len() != end - start || part.text.len() != end - start {
        return Err(Error::internal(format!(
            "a worker sent embeddings of rows {}+{} out of shape",
            part.first, part.rows
        )));
    }
    let copy = |to: &mut [u8], from: &Bytes| to.copy_from_slice(from);
    copy(&mut into.image[start..end], &part.image);
    copy(&mut into.text[start..end], &part.text);
    Ok(())
}

/// Whether another worker may do better: this one is gone or going, or its device is.
pub fn is_lost(error: &Error) -> bool {
    matches!(error.reason(), Reason::NoWorkers | Reason::ShuttingDown | Reason::DeviceUnavailable)
}

fn unexpected(wanted: &str, got: &Message) -> Error {
    let got = match got {
        Message::Holes(_) => "holes",
        Message::Embedding(_) => "an embedding",
        Message::Done(_) => "the end of embeddings",
        Message::ArrowIpc(_) => "rows",
        Message::RowsDone(_) => "the end of rows",
    };
    Error::internal(format!("a worker sent {got} where {wanted} were due"))
}
