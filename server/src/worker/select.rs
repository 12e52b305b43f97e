//! Joint selection on this worker's device.
use super::engine::Engine;
use crate::error::{Error, Result};
use futures::Stream;
use superbatch_proto::v1::{Reason, SelectRequest, SelectResponse};
use tonic::Status;

pub(super) async fn select(
    _engine: &Engine,
    _requests: impl Stream<Item = Result<SelectRequest, Status>>,
) -> Result<SelectResponse> {
    let message = "selection on a worker is not built yet; let the coordinator select";
    Err(Error::new(Reason::Unimplemented, message).with("feature", "Select"))
}
