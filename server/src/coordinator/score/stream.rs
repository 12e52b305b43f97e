//! The stream to the worker of a slice: what is sent, and what must come back, in which order.
use super::{
    kept::Kept,
    received::Received,
    slice::{Embeddings, Job, Slice},
    table::Table,
};
use crate::{
    coordinator::workers::{
        replies::{Replies, checked_holes, unsound},
        worker::{Answers, Worker},
    },
    error::{Error, Result, from_status},
    handed::Handover,
};
use futures::StreamExt;
use std::{any::Any, ops::Range};
use superbatch_proto::v1::{
    ChosenRows, LearnerGo, ModelRef, Reason, RowsForm, ScoreRequest, ScoreResponse, Tower,
    score_request, score_response::Message,
};
use tokio::sync::mpsc;

pub struct Live {
    pub worker: Worker,
    pub send: mpsc::Sender<ScoreRequest>,
    pub receive: Answers<ScoreResponse>,
    /// Where a worker of this process puts rows.
    pub handover: Handover,
    pub replies: Replies,
    /// Whether it said that it has no room for the chosen rows.
    pub is_full: bool,
}

fn unexpected(wanted: &str, got: &Message) -> Error {
    let got = match got {
        Message::Holes(_) => "holes",
        Message::Embedding(_) => "an embedding",
        Message::Done(_) => "the end of embeddings",
        Message::ArrowIpc(_) => "rows",
        Message::RowsDone(_) => "the end of rows",
        Message::Kept(_) => "a number of rows that it holds",
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

    async fn choose(&mut self, chosen: &[u32], form: RowsForm) -> Result<()> {
        let chosen = ChosenRows {
            candidates: chosen.to_vec(),
            form: form.into(),
        };
        self.send(score_request::Message::Chosen(chosen)).await
    }

    /// Has the worker hold the chosen rows for trainers. If it has no room for them, they may be
    /// asked for by [`Live::rows`] of the stream that is returned.
    pub async fn keep(
        mut self,
        chosen: &[u32],
        held: impl Any + Send,
    ) -> Result<(Kept, Option<Self>)> {
        self.choose(chosen, RowsForm::Kept).await?;
        match self.next("that it holds the chosen rows").await? {
            Message::Kept(kept) => {
                let (worker, replies, wanted) = (self.worker.clone(), self.replies, chosen.len());
                if kept.id == 0 {
                    let kept = Kept::new(&worker, &kept, wanted, replies, ())?;
                    self.is_full = true;
                    return Ok((kept, Some(self)));
                }
                let kept = Kept::new(&worker, &kept, wanted, replies, (self, held))?;
                Ok((kept, None))
            }
            other => Err(unexpected("a number of rows that it holds", &other)),
        }
    }

    /// Returns the chosen rows; `None` if the stream ended because the worker has no room to hold
    /// them. Workers of older builds end it then, and nothing is wrong with them.
    pub async fn rows(&mut self, chosen: &[u32], form: RowsForm) -> Result<Option<Table>> {
        match self.choose(chosen, form).await {
            Err(_) if self.is_full && self.send.is_closed() => return Ok(None),
            chosen => chosen?,
        }
        let (mut parts, mut bytes) = (Vec::new(), 0);
        loop {
            let message = match self.next_or_end("the chosen rows").await? {
                Some(message) => message,
                None if self.is_full && parts.is_empty() => return Ok(None),
                None => return Err(ended()),
            };
            match message {
                Message::ArrowIpc(part) => {
                    self.replies.count_rows(&mut bytes, &part)?;
                    parts.push(part);
                }
                Message::RowsDone(done) if done.rows as usize == chosen.len() => {
                    let table = Table::of_call(self.replies, &self.handover, parts, chosen.len());
                    return table.await.map(Some);
                }
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
        self.next_or_end(what).await?.ok_or_else(ended)
    }

    /// Returns the next message; `None` at the end of the stream.
    async fn next_or_end(&mut self, what: &str) -> Result<Option<Message>> {
        let next = self.replies.within(&self.worker, what, self.receive.next());
        let Some(response) = next.await? else {
            return Ok(None);
        };
        let response = response.map_err(|status| from_status(status, Reason::NoWorkers))?;
        let message = response.message;
        let message = message.ok_or_else(|| Error::internal("the worker sent an empty message"))?;
        Ok(Some(message))
    }
}

fn ended() -> Error {
    Error::new(Reason::NoWorkers, "the worker ended its stream early")
}

/// Returns a worker's reported seconds for the accounts. A wrong number must not spoil a sum, and
/// is no reason to lose a slice.
fn seconds(said: f64) -> f64 {
    if said.is_finite() { said.max(0.0) } else { 0.0 }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{coordinator::workers::worker::tests::unreachable, handed, ticket::TicketKey};
    use arrow::{
        array::{ArrayRef, AsArray, RecordBatch, UInt32Array},
        datatypes::UInt32Type,
    };
    use futures::stream;
    use std::sync::Arc;
    use superbatch_proto::v1::{KeptRows, RowsDone};

    /// A worker that sends `messages` and then ends the stream; the receiver is what it reads.
    fn live(messages: Vec<Message>) -> (Live, mpsc::Receiver<ScoreRequest>) {
        let answers = messages.into_iter().map(|message| {
            Ok(ScoreResponse {
                message: Some(message),
            })
        });
        let (send, reads) = mpsc::channel(4);
        let live = Live {
            worker: unreachable(Some(TicketKey::random())),
            send,
            receive: Box::pin(stream::iter(answers.collect::<Vec<_>>())),
            handover: Handover::default(),
            replies: Replies::default(),
            is_full: false,
        };
        (live, reads)
    }

    /// Rows as a worker of this process hands them over: some of a batch that has others too.
    fn handed(places: &[(usize, usize)]) -> handed::Rows {
        let numbers: ArrayRef = Arc::new(UInt32Array::from_iter_values(0..8));
        let batch = RecordBatch::try_from_iter([("n", numbers)]).unwrap();
        handed::Rows {
            schema: batch.schema(),
            bytes: batch.get_array_memory_size(),
            batches: vec![batch],
            places: places.to_vec(),
            value_bytes: 4 * places.len() as u64,
        }
    }

    #[tokio::test]
    async fn rows_that_are_handed_over_need_no_messages() {
        let done = |rows| {
            Message::RowsDone(RowsDone {
                rows,
                rows_read_again: 0,
            })
        };
        let (mut live, _reads) = live(vec![done(3)]);
        live.handover.put(handed(&[(0, 5), (0, 1), (0, 2)]));
        let rows = live.rows(&[7, 8, 9], RowsForm::Whole).await;
        let rows = rows.unwrap().unwrap();
        let numbers = rows.column("n", &[0, 1, 2]).unwrap();
        let numbers = numbers.as_primitive::<UInt32Type>().values();
        assert_eq!(numbers[..], [5, 1, 2]);
        assert_eq!(rows.bytes(), handed(&[]).bytes);

        // Fewer than it says, and more than a slice may have.
        let (mut live, _reads) = self::live(vec![done(2), done(2)]);
        live.handover.put(handed(&[(0, 5)]));
        assert!(live.rows(&[7, 8], RowsForm::Whole).await.is_err());
        live.replies.rows_bytes_max = 7;
        live.handover.put(handed(&[(0, 5), (0, 1)]));
        let error = live.rows(&[7, 8], RowsForm::Whole).await.unwrap_err();
        assert_eq!(error.reason(), Reason::MessageTooLarge);
    }

    #[tokio::test]
    async fn a_worker_that_ends_its_stream_for_want_of_room_is_well() {
        let full = || {
            Message::Kept(KeptRows {
                id: 0,
                content_hashes: vec![0; 16].into(),
                bytes: 0,
            })
        };
        // It reads on, or has gone already when the rows are asked for.
        for reads_on in [true, false] {
            let (live, reads) = live(vec![full()]);
            let (kept, live) = live.keep(&[0], ()).await.unwrap();
            assert!(kept.part.is_none());
            let _reads = reads_on.then_some(reads);
            let rows = live.unwrap().rows(&[0], RowsForm::Whole).await;
            assert!(rows.unwrap().is_none());
        }
        let part = Message::ArrowIpc(vec![0; 8].into());
        for sent in [vec![full(), part], Vec::new()] {
            let (live, _reads) = live(sent.clone());
            let mut live = if sent.is_empty() {
                live
            } else {
                live.keep(&[0], ()).await.unwrap().1.unwrap()
            };
            let error = live.rows(&[0], RowsForm::Whole).await.unwrap_err();
            assert_eq!(error.reason(), Reason::NoWorkers, "rows that break off");
        }
    }
}
