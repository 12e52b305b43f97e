//! Fetches the rows of a batch from the workers that hold them, several at once.
use super::assemble::Batch;
use crate::{Client, Error, Result, error::is_unanswered, workers::Api};
use arrow::{
    array::{Array, ArrayRef, RecordBatch},
    compute::interleave,
    datatypes::{Field, Schema, SchemaRef},
};
use bytes::Bytes;
use futures::future::try_join_all;
use std::{sync::Arc, time::Duration};
use superbatch_proto::{
    Checksum, arrow_stream,
    columns::CONTENT_HASH,
    v1::{FetchTicketRequest, Ticket, TicketDone, fetch_ticket_response::Message},
};
use tokio::time::timeout;
use tonic::{Code, Status};

/// How long a worker may be silent before the coordinator is asked instead.
const SILENCE_MAX: Duration = Duration::from_secs(20);
/// How long the rows of one worker may take, beside the time for their bytes at the slowest rate.
const FETCH_MIN: Duration = Duration::from_secs(60);
/// The slowest rate at which a worker is still waited for, in bytes a second.
const RATE_MIN: u64 = 4 << 20;
/// Most bytes of a stream whose length was not announced.
const UNANNOUNCED_MAX: u64 = 2 << 30;
/// Times that a stream is resumed. It is asked of one worker only, and the coordinator has the rows
/// too.
const RESUMES_MAX: u32 = 2;

/// Returns the whole batch. `own` has what the coordinator sent.
///
/// # Errors
/// The first failure of a worker. The batch is then asked of the coordinator.
pub(super) async fn complete(client: &Client, own: Batch, tickets: &[Ticket]) -> Result<Batch> {
    let step = own.step;
    let fetches = tickets.iter().map(|ticket| rows_of(client, ticket, step));
    let rows = try_join_all(fetches).await?;
    let places: Vec<Vec<u32>> = tickets.iter().map(|ticket| ticket.rows.clone()).collect();
    // Images are copied to their places, which may take long.
    let joined = tokio::task::spawn_blocking(move || {
        let record_batch = join(&own.record_batch, rows, &places)?;
        Ok(Batch {
            record_batch,
            ..own
        })
    });
    joined
        .await
        .map_err(|_| Error::Stopped)?
        .map_err(|what: String| Error::Corrupt { step, what })
}

async fn rows_of(client: &Client, ticket: &Ticket, step: u64) -> Result<Vec<RecordBatch>> {
    let workers = &client.link.workers;
    let api = workers.line(ticket)?;
    let late = |_| Err(Status::deadline_exceeded("the worker is too slow"));
    let limit = patience(bytes_max(ticket));
    match timeout(limit, whole(api, ticket))
        .await
        .unwrap_or_else(late)
    {
        Ok((received, done)) => {
            workers.note_answer(ticket, true);
            received
                .finish(&done, ticket.rows.len())
                .map_err(|what| Error::Corrupt { step, what })
        }
        Err(status) => {
            workers.note_answer(ticket, !is_unanswered(&status));
            Err(status.into())
        }
    }
}

/// Returns the most bytes that the stream of a ticket may have. Coordinators of older builds
/// announce none.
fn bytes_max(ticket: &Ticket) -> u64 {
    match ticket.stream_bytes_max {
        0 => UNANNOUNCED_MAX,
        announced => announced,
    }
}

/// Returns the time that a stream of at most so many bytes may take.
fn patience(bytes_max: u64) -> Duration {
    FETCH_MIN + Duration::from_secs(bytes_max / RATE_MIN)
}

/// Receives the whole stream of a ticket.
async fn whole(api: Api, ticket: &Ticket) -> Result<(Received, TicketDone), Status> {
    let mut received = Received::new(bytes_max(ticket));
    let mut resumes = 0;
    loop {
        let before = received.bytes;
        match fetch(api.clone(), ticket, &mut received).await {
            Ok(done) => return Ok((received, done)),
            // It sends more than it may; asking again would bring no less.
            Err(status) if status.code() == Code::ResourceExhausted => return Err(status),
            // A stream that broke on its way goes on where it broke, and one that did not begin is
            // given up.
            Err(_) if received.bytes > before && resumes < RESUMES_MAX => resumes += 1,
            Err(status) => return Err(status),
        }
    }
}

async fn fetch(
    mut api: Api,
    ticket: &Ticket,
    received: &mut Received,
) -> Result<TicketDone, Status> {
    let silent = |_| Status::deadline_exceeded("the worker is silent");
    let request = FetchTicketRequest {
        ticket: ticket.ticket.clone(),
        resume_offset: received.bytes,
    };
    let answer = timeout(SILENCE_MAX, api.fetch_ticket(request)).await;
    let mut stream = answer.map_err(silent)??.into_inner();
    loop {
        let next = timeout(SILENCE_MAX, stream.message()).await;
        match next.map_err(silent)??.and_then(|next| next.message) {
            Some(Message::ArrowIpc(part)) => received.push(part)?,
            Some(Message::Done(done)) => return Ok(done),
            None => return Err(Status::unavailable("the worker ended its stream early")),
        }
    }
}

/// The bytes of one worker's stream so far.
pub(super) struct Received {
    parts: Vec<Bytes>,
    bytes: u64,
    bytes_max: u64,
    checksum: Checksum,
}

impl Received {
    pub(super) fn new(bytes_max: u64) -> Self {
        Self {
            parts: Vec::new(),
            bytes: 0,
            bytes_max,
            checksum: Checksum::default(),
        }
    }

    /// # Errors
    /// `ResourceExhausted` beyond the bytes that the coordinator has announced.
    pub(super) fn push(&mut self, part: Bytes) -> Result<(), Status> {
        let bytes = self.bytes + part.len() as u64;
        if bytes > self.bytes_max {
            let max = self.bytes_max;
            let message = format!("a worker sends more than the {max} bytes of its ticket");
            return Err(Status::resource_exhausted(message));
        }
        self.checksum.update(&part);
        self.bytes = bytes;
        self.parts.push(part);
        Ok(())
    }

    pub(super) fn finish(
        self,
        done: &TicketDone,
        wanted: usize,
    ) -> Result<Vec<RecordBatch>, String> {
        if self.bytes != done.stream_bytes {
            let (bytes, all) = (self.bytes, done.stream_bytes);
            return Err(format!("a worker sent {bytes} of {all} bytes"));
        }
        if self.checksum.finish()[..] != done.xxh3[..] {
            return Err("the checksum of a worker's rows does not match".to_owned());
        }
        let (_, batches) = arrow_stream::read(self.parts).map_err(|e| e.to_string())?;
        let rows: usize = batches.iter().map(RecordBatch::num_rows).sum();
        if rows == wanted && done.rows as usize == wanted {
            Ok(batches)
        } else {
            Err(format!("a worker sent {rows} of {wanted} rows"))
        }
    }
}

/// Joins the workers' rows and the coordinator's columns. `places` are the rows of the batch that
/// each worker sent.
pub(super) fn join(
    own: &RecordBatch,
    workers: Vec<Vec<RecordBatch>>,
    places: &[Vec<u32>],
) -> Result<RecordBatch, String> {
    // Before memory is taken for them: of columns without values, a few bytes are any number of
    // rows.
    let placed: usize = places.iter().map(Vec::len).sum();
    if own.num_rows() > placed {
        return Err("a row of the batch is in no ticket".to_owned());
    }
    let mut found: Vec<Option<(usize, usize)>> = vec![None; own.num_rows()];
    let mut batches = Vec::new();
    for (rows, places) in workers.into_iter().zip(places) {
        let mut places = places.iter();
        for batch in rows {
            for (row, place) in (0..batch.num_rows()).zip(&mut places) {
                match found.get_mut(*place as usize) {
                    Some(free @ None) => *free = Some((batches.len(), row)),
                    _ => {
                        return Err(format!(
                            "row {place} of the batch is in two tickets, or none"
                        ));
                    }
                }
            }
            batches.push(batch);
        }
    }
    let found: Option<Vec<(usize, usize)>> = found.into_iter().collect();
    let found = found.ok_or("a row of the batch is in no ticket")?;
    let first = batches.first().ok_or("no worker sent rows")?.schema();
    if batches.iter().any(|batch| batch.schema() != first) {
        return Err("workers sent rows of different schemas".to_owned());
    }
    let gather = |name: &str| -> Result<ArrayRef, String> {
        let arrays: Option<Vec<&dyn Array>> = batches
            .iter()
            .map(|batch| batch.column_by_name(name).map(AsRef::as_ref))
            .collect();
        let arrays = arrays.ok_or_else(|| format!("a worker's rows lack {name}"))?;
        interleave(&arrays, &found).map_err(|e| e.to_string())
    };
    let chosen = own
        .column_by_name(CONTENT_HASH)
        .ok_or("no content hashes came")?;
    if gather(CONTENT_HASH)?.to_data() != chosen.to_data() {
        return Err("a worker sent other rows than those that were chosen".to_owned());
    }
    let (mut fields, mut columns) = (Vec::new(), Vec::new());
    for field in without_hash(&first) {
        columns.push(gather(field.name())?);
        fields.push(field);
    }
    for field in without_hash(&own.schema()) {
        columns.extend(own.column_by_name(field.name()).cloned());
        fields.push(field);
    }
    RecordBatch::try_new(Arc::new(Schema::new(fields)), columns).map_err(|e| e.to_string())
}

fn without_hash(schema: &SchemaRef) -> Vec<Arc<Field>> {
    let fields = schema
        .fields()
        .iter()
        .filter(|field| field.name() != CONTENT_HASH);
    fields.cloned().collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use arrow::array::{AsArray, FixedSizeBinaryArray, RecordBatchOptions, StringArray};

    fn hashes(rows: &[u8]) -> ArrayRef {
        let values = rows.iter().map(|row| Some([*row; 16]));
        Arc::new(FixedSizeBinaryArray::try_from_sparse_iter_with_size(values, 16).unwrap())
    }

    fn sent(rows: &[u8]) -> RecordBatch {
        let captions = rows.iter().map(|row| format!("caption {row}"));
        let captions: ArrayRef = Arc::new(StringArray::from_iter_values(captions));
        RecordBatch::try_from_iter([("caption", captions), (CONTENT_HASH, hashes(rows))]).unwrap()
    }

    fn own(rows: &[u8]) -> RecordBatch {
        let ids = rows.iter().map(|row| format!("#{row}"));
        let ids: ArrayRef = Arc::new(StringArray::from_iter_values(ids));
        RecordBatch::try_from_iter([("_superbatch_id", ids), (CONTENT_HASH, hashes(rows))]).unwrap()
    }

    #[test]
    fn rows_come_to_their_places() {
        let workers = vec![vec![sent(&[7]), sent(&[9])], vec![sent(&[8])]];
        let joined = join(&own(&[9, 8, 7]), workers, &[vec![2, 0], vec![1]]).unwrap();
        let texts = |name: &str| -> Vec<String> {
            let column = joined[name].as_string::<i32>();
            column.iter().flatten().map(str::to_owned).collect()
        };
        assert_eq!(texts("caption"), ["caption 9", "caption 8", "caption 7"]);
        assert_eq!(texts("_superbatch_id"), ["#9", "#8", "#7"]);
        assert_eq!(joined.num_columns(), 2, "hashes are no part of a batch");
    }

    #[test]
    fn a_stream_ends_at_the_bytes_of_its_ticket() {
        let mut received = Received::new(3);
        for _ in 0..3 {
            received.push(Bytes::from_static(b"x")).unwrap();
        }
        let beyond = received.push(Bytes::from_static(b"x")).unwrap_err();
        assert_eq!(beyond.code(), Code::ResourceExhausted);
        assert_eq!((received.bytes, received.parts.len()), (3, 3));
        let of = |stream_bytes_max| {
            bytes_max(&Ticket {
                stream_bytes_max,
                ..Default::default()
            })
        };
        assert_eq!((of(3), of(0)), (3, UNANNOUNCED_MAX));
    }

    #[test]
    fn a_longer_stream_may_take_longer_and_none_for_ever() {
        assert_eq!(patience(0), FETCH_MIN);
        assert_eq!(patience(RATE_MIN * 5), FETCH_MIN + Duration::from_secs(5));
        assert!(patience(u64::MAX) < Duration::MAX);
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let refusal = |own: &[u8], rows: &[u8], places: &[u32]| {
            join(&self::own(own), vec![vec![sent(rows)]], &[places.to_vec()]).unwrap_err()
        };
        assert!(refusal(&[1, 2], &[1, 3], &[0, 1]).contains("other rows"));
        assert!(refusal(&[1, 2], &[1, 2], &[0, 0]).contains("two tickets"));
        assert!(refusal(&[1, 2], &[1, 2], &[0, 2]).contains("or none"));
        assert!(refusal(&[1, 2], &[1], &[0]).contains("in no ticket"));
        assert!(join(&own(&[]), Vec::new(), &[]).is_err());
    }

    /// Rows without columns take no byte, so that a stream of a few may name any number.
    #[test]
    fn rows_that_no_ticket_names_take_no_memory() {
        let rows = RecordBatchOptions::new().with_row_count(Some(1 << 50));
        let schema = Arc::new(Schema::empty());
        let own = RecordBatch::try_new_with_options(schema, Vec::new(), &rows).unwrap();
        let error = join(&own, vec![vec![sent(&[1])]], &[vec![0]]).unwrap_err();
        assert!(error.contains("in no ticket"), "{error}");
    }
}
