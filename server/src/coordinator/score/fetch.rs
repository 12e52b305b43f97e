//! Fetches chosen rows from any worker.
use super::slice::ATTEMPTS_MAX;
use crate::{
    coordinator::workers::{
        failover::{Unable, is_lost},
        pool::Pool,
        worker::Worker,
    },
    error::{Error, Result, from_status},
};
use bytes::Bytes;
use futures::StreamExt;
use superbatch_proto::v1::{BlockRows, FetchRowsRequest, Reason, fetch_rows_response};

/// Reads rows anew on any worker, as an Arrow IPC stream in the order of `blocks`.
pub async fn fetch_rows(
    pool: &Pool,
    manifest: &str,
    blocks: Vec<BlockRows>,
    columns: &[String],
) -> Result<Vec<Bytes>> {
    fetch_rows_from_others(pool, manifest, blocks, columns, Unable::default()).await
}

pub async fn fetch_rows_from_others(
    pool: &Pool,
    manifest: &str,
    blocks: Vec<BlockRows>,
    columns: &[String],
    mut unable: Unable,
) -> Result<Vec<Bytes>> {
    let request = FetchRowsRequest {
        dataset_manifest: manifest.to_owned(),
        blocks,
        columns: columns.to_vec(),
    };
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
    let mut stream = worker
        .client()
        .fetch_rows(request)
        .await
        .map_err(lost)?
        .into_inner();
    let mut parts = Vec::new();
    while let Some(response) = stream.next().await {
        match response.map_err(lost)?.message {
            Some(fetch_rows_response::Message::ArrowIpc(part)) => parts.push(part),
            Some(fetch_rows_response::Message::Done(_)) => return Ok(parts),
            None => {}
        }
    }
    Err(Error::new(
        Reason::NoWorkers,
        "the worker ended its stream early",
    ))
}
