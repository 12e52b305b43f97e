//! The messages of a `Score` stream.
use crate::{
    error::{Error, Result},
    worker::engine::{Engine, shutting_down},
};
use bytes::Bytes;
use futures::{Stream, TryStreamExt};
use superbatch_proto::v1::{
    Reason, ScoreRequest, ScoreResponse, score_request, score_response::Message,
};
use tonic::Status;

pub(crate) async fn next(
    engine: &Engine,
    requests: &mut (impl Stream<Item = Result<ScoreRequest, Status>> + Unpin),
) -> Result<Option<score_request::Message>> {
    let request = tokio::select! {
        // The next message may be minutes away: the coordinator waits for weights. A worker that
        // shuts down must not wait for it. A message that is there already is taken first, so that
        // a slice that was nearly done is finished.
        biased;
        request = requests.try_next() => request,
        () = engine.stopping.cancelled() => return Err(shutting_down()),
    };
    let request = request.map_err(|status| crate::error::from_status(status, Reason::Internal))?;
    let Some(request) = request else {
        return Ok(None);
    };
    request
        .message
        .map(Some)
        .ok_or_else(|| Error::invalid("message", "a ScoreRequest without a message"))
}

pub(crate) fn answer(message: Message) -> ScoreResponse {
    ScoreResponse {
        message: Some(message),
    }
}

pub(crate) fn arrow_ipc(part: Bytes) -> ScoreResponse {
    answer(Message::ArrowIpc(part))
}
