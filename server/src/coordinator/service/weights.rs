//! Pushes and lists of weights.
use crate::{
    bounds::VERSIONS_MAX,
    coordinator::{
        runs::registry::Coordinator,
        weights::{TensorFile, by_uri},
    },
    error::{Error, Result},
};
use superbatch_proto::v1::{
    ListWeightsRequest, ListWeightsResponse, PushStart, PushWeightsRequest, Reason,
    RollBackWeightsResponse, WeightsVersion,
};
use tonic::Streaming;

/// Versions that are listed if the request does not say how many.
const VERSIONS_LISTED: usize = 100;

pub(super) async fn list(
    coordinator: &Coordinator,
    request: &ListWeightsRequest,
) -> Result<ListWeightsResponse> {
    let newest = match request.newest as usize {
        0 => VERSIONS_LISTED,
        newest => newest.min(VERSIONS_MAX),
    };
    let versions = coordinator.weights(&request.run_id, newest).await?;
    Ok(ListWeightsResponse { versions })
}

pub(super) fn rolled_back(
    (version, taken_back_through): (WeightsVersion, u64),
) -> RollBackWeightsResponse {
    RollBackWeightsResponse {
        version: Some(version),
        taken_back_through,
    }
}

pub(super) async fn push(
    coordinator: &Coordinator,
    start: PushStart,
    stream: Streaming<PushWeightsRequest>,
) -> Result<WeightsVersion> {
    let run = coordinator.run(&start.run_id).await?;
    if start.snapshot_uri.is_empty() {
        return run.push(start, stream).await;
    }
    drop(stream);
    by_uri::check(&start)?;
    let file = coordinator.stores.open_allowed(&start.snapshot_uri)?;
    let (uri, bytes_max) = (
        start.snapshot_uri.clone(),
        coordinator.deps.limits.push_bytes_max,
    );
    let open = async move {
        let file = TensorFile::open(file, bytes_max).await?;
        file.ok_or_else(|| {
            let message = format!("there is no file at {uri}");
            Error::new(Reason::WeightsRefused, message).with("uri", uri)
        })
    };
    let messages = by_uri::messages(open, start.snapshot_blake3.clone());
    run.push(start, messages).await
}
