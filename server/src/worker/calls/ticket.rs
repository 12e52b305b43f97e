//! Serves trainers the rows that are held for them.
use super::{
    answers::{Answers, answer_with},
    rows::{Form, RowWriter, send_rows},
};
use crate::{
    error::{Error, Result},
    metrics,
    worker::{
        engine::Engine,
        kept::{held::Lent, ticket_calls::Admitted},
    },
};
use arrow::datatypes::{Schema, SchemaRef};
use bytes::Bytes;
use futures::{FutureExt, StreamExt, stream::BoxStream};
use std::{
    sync::Arc,
    time::{Duration, SystemTime},
};
use superbatch_proto::{
    Checksum, reason_name,
    v1::{
        FetchTicketRequest, FetchTicketResponse, Reason, TicketDone, fetch_ticket_response::Message,
    },
};
use tokio::time::timeout;
use tonic::Status;

/// How long a trainer may leave one part unread.
const PART_MAX: Duration = Duration::from_secs(30);

/// The answer to one `FetchTicket` call.
pub(crate) type TicketStream = BoxStream<'static, Result<FetchTicketResponse, Status>>;

/// Serves one `FetchTicket` call: sends the rows of a ticket in its order. The rows are freed if
/// the caller stops reading; the call counts until the caller has left, since parts that it has not
/// read stay in memory.
///
/// # Errors
/// `TicketRefused`, `RowsNotKept`, `Overloaded`; on its way, `InvalidArgument` if `resume_offset`
/// is beyond the stream, and `Overloaded` if the caller reads too slowly.
pub(crate) async fn fetch_ticket(
    engine: Arc<Engine>,
    request: FetchTicketRequest,
) -> Result<TicketStream> {
    let (lent, admitted) = open(&engine, &request.ticket).await.inspect_err(count)?;
    let work = |answers: Answers<_>| {
        async move {
            let answers = answers.each_within(PART_MAX);
            let sent = send(&engine, lent, request.resume_offset, &answers);
            let late = |_| {
                let message = "the caller reads too slowly for the time that rows are held";
                Err(Error::new(Reason::Overloaded, message))
            };
            let sent = timeout(engine.held.held_max(), sent).await;
            let sent = sent.unwrap_or_else(late).inspect_err(count);
            sent.inspect(|()| metrics::tickets("ok").increment(1))
        }
        .boxed()
    };
    let parts = answer_with(work).map(move |part| {
        let _while_open = &admitted;
        part
    });
    Ok(parts.boxed())
}

fn count(error: &Error) {
    metrics::tickets(reason_name(error.reason())).increment(1);
}

/// Admits the call and returns the ticket's rows.
async fn open(engine: &Engine, ticket: &[u8]) -> Result<(Lent, Admitted)> {
    let claims = engine.ticket_key.open(ticket, SystemTime::now())?;
    let admitted = engine.ticket_calls.admit(ticket).await?;
    let lent = engine.held.rows(&claims)?;
    if lent.rows.is_empty() {
        return Err(Error::invalid("ticket", "the ticket is for no rows"));
    }
    Ok((lent, admitted))
}

async fn send(
    engine: &Engine,
    lent: Lent,
    resume_offset: u64,
    answers: &Answers<FetchTicketResponse>,
) -> Result<()> {
    let rows = &lent.rows;
    let schema = data_schema(&rows[0].batch.schema());
    let writer = RowWriter::new(&schema, Form::Hashed)?;
    let mut stream = Stream::from_offset(resume_offset);
    let wrap = |part| stream.pass(part);
    let writer = send_rows(writer, rows, &engine.pool, answers, wrap).await?;
    for part in writer.finish()? {
        if let Some(message) = stream.pass(part) {
            answers.send(message).await?;
        }
    }
    if resume_offset > stream.bytes {
        let message = format!(
            "resume_offset {resume_offset} is beyond the stream's {} bytes",
            stream.bytes
        );
        return Err(Error::invalid("resume_offset", message));
    }
    let done = TicketDone {
        rows: rows.len() as u32,
        stream_bytes: stream.bytes,
        xxh3: Bytes::copy_from_slice(&stream.checksum.finish()),
    };
    answers.send(answer(Message::Done(done))).await
}

/// Returns the schema without the hashes, which the writer adds.
fn data_schema(held: &SchemaRef) -> SchemaRef {
    let fields = held.fields();
    let data = fields.iter().take(fields.len().saturating_sub(1)).cloned();
    Arc::new(Schema::new(data.collect::<Vec<_>>()))
}

/// The stream of a ticket on its way: the checksum is of all of it, sent is what comes after the
/// offset.
struct Stream {
    checksum: Checksum,
    bytes: u64,
    /// Bytes that the caller has.
    skip: u64,
}

impl Stream {
    fn from_offset(offset: u64) -> Self {
        Self {
            checksum: Checksum::default(),
            bytes: 0,
            skip: offset,
        }
    }

    fn pass(&mut self, mut part: Bytes) -> Option<FetchTicketResponse> {
        self.checksum.update(&part);
        self.bytes += part.len() as u64;
        let skipped = self.skip.min(part.len() as u64);
        self.skip -= skipped;
        let rest = part.split_off(skipped as usize);
        metrics::direct_bytes().increment(rest.len() as u64);
        (!rest.is_empty()).then(|| answer(Message::ArrowIpc(rest)))
    }
}

fn answer(message: Message) -> FetchTicketResponse {
    FetchTicketResponse {
        message: Some(message),
    }
}
