//! The stream to the worker of a slice: what is sent, and what must come back, in which order.
use super::{
    received::Received,
    slice::{Embeddings, Job, Slice},
};
use crate::{
    coordinator::workers::{
        replies::{Replies, checked_holes, unsound},
        worker::Worker,
    },
    error::{Error, Result, from_status},
};
use bytes::Bytes;
use futures::StreamExt;
use std::ops::Range;
use superbatch_proto::v1::{
    ChosenRows, LearnerGo, ModelRef, Reason, ScoreRequest, ScoreResponse, Tower, score_request,
    score_response::Message,
};
use tokio::sync::mpsc;
use tonic::Streaming;

pub struct Live {
    pub worker: Worker,
    pub send: mpsc::Sender<ScoreRequest>,
    pub receive: Streaming<ScoreResponse>,
    pub replies: Replies,
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

impl Live {
    pub async fn receive_holes(&mut self, slice: &mut Slice, job: &Job) -> Result<()> {
        match self.next("its rows").await? {
            Message::Holes(holes) => {
                let found = checked_holes(holes.holes, slice.candidates())?;
                slice.fetch_seconds += seconds(holes.fetch_seconds);
                slice.decode_seconds += seconds(holes.decode_seconds);
                slice.take_holes(found);
            }
            other => return Err(unexpected("holes", &other)),
        }
        if job.reference.is_some() && slice.wants_reference() && !job.check_only {
            let rows = slice.reference_range.start - slice.range.start
                ..slice.reference_range.end - slice.range.start;
            let found = self
                .embeddings(Tower::Reference, rows, job.reference_dim, slice, job)
                .await?;
            slice.not_finite.extend(&found.done.not_finite);
            slice.reference = Some(found);
        }
        Ok(())
    }

    pub async fn learner(&mut self, slice: &mut Slice, job: &Job, model: &ModelRef) -> Result<()> {
        self.send(score_request::Message::Learner(LearnerGo {
            learner: Some(model.clone()),
        }))
        .await?;
        let rows = 0..slice.range.len();
        slice.learner = Some(
            self.embeddings(Tower::Learner, rows, job.learner_dim, slice, job)
                .await?,
        );
        Ok(())
    }

    pub async fn rows(&mut self, chosen: &[u32]) -> Result<Vec<Bytes>> {
        self.send(score_request::Message::Chosen(ChosenRows {
            candidates: chosen.to_vec(),
        }))
        .await?;
        let (mut parts, mut bytes) = (Vec::new(), 0);
        loop {
            match self.next("the chosen rows").await? {
                Message::ArrowIpc(part) => {
                    bytes += part.len() as u64;
                    self.replies.check_rows_bytes(bytes)?;
                    parts.push(part);
                }
                Message::RowsDone(done) if done.rows as usize == chosen.len() => return Ok(parts),
                Message::RowsDone(done) => {
                    let wanted = chosen.len();
                    return Err(unsound(format_args!("{} of {wanted} rows", done.rows)));
                }
                other => return Err(unexpected("rows", &other)),
            }
        }
    }

    async fn embeddings(
        &mut self,
        tower: Tower,
        rows: Range<usize>,
        dim: Option<u32>,
        slice: &Slice,
        job: &Job,
    ) -> Result<Embeddings> {
        let mut received = Received::new(rows, job.embedding_dtype, dim);
        loop {
            match self.next("embeddings").await? {
                Message::Embedding(part) if part.tower == tower as i32 => received.place(&part)?,
                // The end is taken only of the tower that is due. Completeness is then judged here,
                // by the rows that arrived, and not by the worker's word.
                Message::Done(done) if done.tower == tower as i32 => {
                    let has_none = slice.without_embedding();
                    return received.finish(done, slice.candidates(), |c| has_none.contains(&c));
                }
                other => return Err(unexpected("embeddings", &other)),
            }
        }
    }

    async fn send(&mut self, message: score_request::Message) -> Result<()> {
        let request = ScoreRequest {
            message: Some(message),
        };
        let sent = self
            .replies
            .within(&self.worker, "that it reads", self.send.send(request));
        sent.await?
            .map_err(|_| Error::new(Reason::NoWorkers, "the worker ended its stream"))
    }

    async fn next(&mut self, what: &str) -> Result<Message> {
        let ended = || Error::new(Reason::NoWorkers, "the worker ended its stream early");
        let next = self.replies.within(&self.worker, what, self.receive.next());
        let response = next.await?.ok_or_else(ended)?;
        let response = response.map_err(|status| from_status(status, Reason::NoWorkers))?;
        response
            .message
            .ok_or_else(|| Error::internal("the worker sent an empty message"))
    }
}

/// Returns a worker's reported seconds for the accounts. A wrong number must not spoil a sum, and
/// is no reason to lose a slice.
fn seconds(said: f64) -> f64 {
    if said.is_finite() { said.max(0.0) } else { 0.0 }
}
