//! Fetches chosen rows from any worker.
use super::{kept::Kept, table::Table};
use crate::{
    coordinator::workers::{
        failover::Failover,
        pool::Pool,
        replies::{Replies, unsound},
        worker::{Answers, Worker},
    },
    error::{Error, Result, from_status},
    handed::Handover,
};
use futures::StreamExt;
use std::any::Any;
use superbatch_proto::v1::{FetchRowsRequest, FetchRowsResponse, Reason, fetch_rows_response};
use tonic::Status;

/// Reads rows again on the worker that `failover` names, in the order of `blocks`.
pub async fn fetch_rows(
    pool: &Pool,
    request: FetchRowsRequest,
    mut failover: Failover<'_>,
) -> Result<Table> {
    loop {
        let worker = failover.worker().await?;
        match fetch_rows_from(pool.replies(), &worker, request.clone()).await {
            Err(error) => failover.failed(&worker, error)?,
            Ok(table) => return Ok(table),
        }
    }
}

/// Has rows read again and held for trainers on the worker that `failover` names. Returns `None` if
/// it holds too many already.
pub async fn keep_rows(
    pool: &Pool,
    request: FetchRowsRequest,
    mut failover: Failover<'_>,
) -> Result<Option<Kept>> {
    loop {
        let worker = failover.worker().await?;
        let Some(held) = worker.holding.one() else {
            return Ok(None);
        };
        match keep_rows_on(pool.replies(), &worker, request.clone(), held).await {
            Err(error) => failover.failed(&worker, error)?,
            Ok(kept) => return Ok(Some(kept)),
        }
    }
}

fn wanted(request: &FetchRowsRequest) -> usize {
    request.blocks.iter().map(|block| block.rows.len()).sum()
}

fn lost(status: Status) -> Error {
    from_status(status, Reason::NoWorkers)
}

async fn rows_of(
    replies: &Replies,
    worker: &Worker,
    request: FetchRowsRequest,
    handover: &Handover,
) -> Result<Answers<FetchRowsResponse>> {
    let reads = worker.fetch_rows(request, handover);
    let stream = replies.within(worker, "that it reads rows", reads).await?;
    stream.map_err(lost)
}

async fn keep_rows_on(
    replies: Replies,
    worker: &Worker,
    request: FetchRowsRequest,
    held: impl Any + Send,
) -> Result<Kept> {
    let wanted = wanted(&request);
    let mut stream = rows_of(&replies, worker, request, &Handover::default()).await?;
    let next = replies.within(worker, "that it holds rows", stream.next());
    match next
        .await?
        .transpose()
        .map_err(lost)?
        .and_then(|r| r.message)
    {
        Some(fetch_rows_response::Message::Kept(kept)) => {
            Kept::new(worker, &kept, wanted, replies, (stream, held))
        }
        _ => Err(unsound("something else where it was to hold rows")),
    }
}

async fn fetch_rows_from(
    replies: Replies,
    worker: &Worker,
    request: FetchRowsRequest,
) -> Result<Table> {
    let wanted = wanted(&request);
    let handover = Handover::default();
    let mut stream = rows_of(&replies, worker, request, &handover).await?;
    let (mut parts, mut bytes) = (Vec::new(), 0);
    while let Some(response) = replies.within(worker, "rows", stream.next()).await? {
        match response.map_err(lost)?.message {
            Some(fetch_rows_response::Message::ArrowIpc(part)) => {
                replies.count_rows(&mut bytes, &part)?;
                parts.push(part);
            }
            Some(fetch_rows_response::Message::Done(done)) if done.rows as usize == wanted => {
                return Table::of_call(replies, &handover, parts, wanted).await;
            }
            Some(fetch_rows_response::Message::Done(done)) => {
                return Err(unsound(format_args!("{} of {wanted} rows", done.rows)));
            }
            Some(fetch_rows_response::Message::Kept(_)) => {
                return Err(unsound("a number of rows where the rows were due"));
            }
            None => return Err(unsound("an empty message")),
        }
    }
    Err(Error::new(
        Reason::NoWorkers,
        "the worker ended its stream early",
    ))
}
