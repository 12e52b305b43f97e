//! The connection of a command to a service that runs.
use crate::error::{Error, Result, from_status};
use std::{path::Path, time::Duration};
use superbatch_proto::v1::{Reason, selection_service_client::SelectionServiceClient};
use superbatch_transport::{Authorized, Bearer, Dialer, Trust};
use tonic::{Response, Status};

/// The service as its trainers see it.
pub(super) type Client = SelectionServiceClient<Authorized>;

/// Returns a client of the service at `address`. The first call makes the connection.
///
/// # Errors
/// `InvalidArgument` if the address, the authority `ca` or the token cannot be used.
pub(super) fn client(
    address: &str,
    ca: Option<&Path>,
    token_file: Option<&Path>,
) -> Result<Client> {
    let dialer = Dialer::new(Trust {
        ca: ca.map(Path::to_owned),
        ..Trust::default()
    });
    let bearer = match token_file {
        Some(path) => Bearer::file(path.to_owned()),
        None => Ok(Bearer::default()),
    };
    let bearer = bearer.map_err(|e| Error::invalid("token_file", e.to_string()))?;
    let channel = dialer.connect_lazy(address, |endpoint| endpoint);
    let channel = channel.map_err(|e| {
        let message = format!("{address} is no http://host:port");
        Error::invalid("address", message).because(e)
    })?;
    Ok(SelectionServiceClient::new(Authorized::new(
        channel, bearer,
    )))
}

/// Waits for an answer, `patience` at the longest.
///
/// # Errors
/// `NoWorkers` if the service does not answer; its own refusal.
pub(super) async fn answered<T>(
    patience: Duration,
    call: impl Future<Output = Result<Response<T>, Status>>,
) -> Result<T> {
    let answer = tokio::time::timeout(patience, call).await;
    let answer =
        answer.map_err(|_| Error::new(Reason::NoWorkers, "the service does not answer"))?;
    let answer = answer.map_err(|status| from_status(status, Reason::NoWorkers))?;
    Ok(answer.into_inner())
}
