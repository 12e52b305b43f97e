//! Fetches chosen rows from any worker.
use crate::{
    coordinator::workers::{
        failover::Failover,
        pool::Pool,
        replies::{Replies, unsound},
        worker::Worker,
    },
    error::{Error, Result, from_status},
};
use bytes::Bytes;
use futures::StreamExt;
use superbatch_proto::v1::{BlockRows, FetchRowsRequest, Reason, fetch_rows_response};

/// Reads rows again on any worker, as an Arrow IPC stream in the order of `blocks`.
pub async fn fetch_rows(
    pool: &Pool,
    manifest: &str,
    blocks: Vec<BlockRows>,
    columns: &[String],
) -> Result<Vec<Bytes>> {
    let failover = Failover::new(pool);
    fetch_rows_from_others(pool, manifest, blocks, columns, failover).await
}

pub async fn fetch_rows_from_others(
    pool: &Pool,
    manifest: &str,
    blocks: Vec<BlockRows>,
    columns: &[String],
    mut failover: Failover<'_>,
) -> Result<Vec<Bytes>> {
    let request = FetchRowsRequest {
        dataset_manifest: manifest.to_owned(),
        blocks,
        columns: columns.to_vec(),
    };
    loop {
        let worker = failover.worker().await?;
        match fetch_rows_from(pool.replies(), &worker, request.clone()).await {
            Err(error) => failover.failed(&worker, error)?,
            Ok(parts) => return Ok(parts),
        }
    }
}

async fn fetch_rows_from(
    replies: Replies,
    worker: &Worker,
    request: FetchRowsRequest,
) -> Result<Vec<Bytes>> {
    let lost = |status| from_status(status, Reason::NoWorkers);
    let wanted: usize = request.blocks.iter().map(|block| block.rows.len()).sum();
    let mut client = worker.client();
    let mut stream = replies
        .within(worker, "that it reads rows", client.fetch_rows(request))
        .await?
        .map_err(lost)?
        .into_inner();
    let (mut parts, mut bytes) = (Vec::new(), 0);
    while let Some(response) = replies.within(worker, "rows", stream.next()).await? {
        match response.map_err(lost)?.message {
            Some(fetch_rows_response::Message::ArrowIpc(part)) => {
                bytes += part.len() as u64;
                replies.check_rows_bytes(bytes)?;
                parts.push(part);
            }
            Some(fetch_rows_response::Message::Done(done)) if done.rows as usize == wanted => {
                return Ok(parts);
            }
            Some(fetch_rows_response::Message::Done(done)) => {
                return Err(unsound(format_args!("{} of {wanted} rows", done.rows)));
            }
            None => {}
        }
    }
    Err(Error::new(
        Reason::NoWorkers,
        "the worker ended its stream early",
    ))
}
