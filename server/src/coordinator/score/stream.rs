//! The stream to the worker that holds a slice: what is sent, what must come back.
use super::slice::{Embeddings, Job, Slice};
use crate::{
    coordinator::workers::worker::Worker,
    error::{Error, Result, from_status},
};
use bytes::Bytes;
use futures::StreamExt;
use std::ops::Range;
use superbatch_proto::v1::{
    ChosenRows, EmbeddingDtype, EmbeddingPart, LearnerGo, ModelRef, Reason, ScoreRequest,
    ScoreResponse, Tower, score_request, score_response::Message,
};
use tokio::sync::mpsc;
use tonic::Streaming;

pub struct Live {
    pub worker: Worker,
    pub send: mpsc::Sender<ScoreRequest>,
    pub receive: Streaming<ScoreResponse>,
}

/// Bytes of one embedding element.
fn element_bytes(dtype: EmbeddingDtype) -> usize {
    if dtype == EmbeddingDtype::F32 { 4 } else { 2 }
}

/// Puts a part where it belongs among `rows`, numbered within the slice.
fn place(
    into: &mut Embeddings,
    part: &EmbeddingPart,
    rows: &Range<usize>,
    element: usize,
) -> Result<()> {
    let dim = part.dim as usize;
    if into.image.is_empty() {
        into.dim = dim;
        into.image = vec![0; rows.len() * dim * element];
        into.text = vec![0; rows.len() * dim * element];
    }
    let first = (part.first as usize).wrapping_sub(rows.start);
    let fits = dim == into.dim && first < rows.len() && first + part.rows as usize <= rows.len();
    let (start, end) = match fits {
        true => (
            first * dim * element,
            (first + part.rows as usize) * dim * element,
        ),
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
    pub async fn begun(&mut self, slice: &mut Slice, job: &Job) -> Result<()> {
        match self.next().await? {
            Message::Holes(holes) => {
                slice.fetch_seconds += holes.fetch_seconds;
                slice.decode_seconds += holes.decode_seconds;
                slice.take_holes(holes.holes);
            }
            other => return Err(unexpected("holes", &other)),
        }
        if job.reference.is_some() && slice.wants_reference() && !job.check_only {
            let rows = slice.reference_range.start - slice.range.start
                ..slice.reference_range.end - slice.range.start;
            slice.reference = Some(self.embeddings(Tower::Reference, rows, job).await?);
        }
        Ok(())
    }

    pub async fn learner(&mut self, slice: &mut Slice, job: &Job, model: &ModelRef) -> Result<()> {
        self.send(score_request::Message::Learner(LearnerGo {
            learner: Some(model.clone()),
        }))
        .await?;
        slice.learner = Some(
            self.embeddings(Tower::Learner, 0..slice.range.len(), job)
                .await?,
        );
        Ok(())
    }

    pub async fn rows(&mut self, chosen: &[u32]) -> Result<Vec<Bytes>> {
        self.send(score_request::Message::Chosen(ChosenRows {
            candidates: chosen.to_vec(),
        }))
        .await?;
        let mut parts = Vec::new();
        loop {
            match self.next().await? {
                Message::ArrowIpc(part) => parts.push(part),
                Message::RowsDone(_) => return Ok(parts),
                other => return Err(unexpected("rows", &other)),
            }
        }
    }

    async fn embeddings(
        &mut self,
        tower: Tower,
        rows: Range<usize>,
        job: &Job,
    ) -> Result<Embeddings> {
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
        let request = ScoreRequest {
            message: Some(message),
        };
        self.send
            .send(request)
            .await
            .map_err(|_| Error::new(Reason::NoWorkers, "the worker ended its stream"))
    }

    async fn next(&mut self) -> Result<Message> {
        let ended = || Error::new(Reason::NoWorkers, "the worker ended its stream early");
        let response = self.receive.next().await.ok_or_else(ended)?;
        let response = response.map_err(|status| from_status(status, Reason::NoWorkers))?;
        response
            .message
            .ok_or_else(|| Error::internal("the worker sent an empty message"))
    }
}
