//! The connection of a command to a service that runs.
use crate::error::{Error, Result, from_status};
use std::{path::Path, time::Duration};
use superbatch_proto::v1::{Reason, selection_service_client::SelectionServiceClient};
use superbatch_transport::{Authorized, Bearer, Dialer, Trust};
use tonic::{Request, Response, Status, service::Interceptor};

/// The service as its trainers see it.
pub(super) type Client = SelectionServiceClient<Authorized>;

/// Returns the token in a file, read again when it changes; without a file, none.
///
/// # Errors
/// `InvalidArgument` if it cannot be used.
pub(super) fn bearer(token_file: Option<&Path>) -> Result<Bearer> {
    let bearer = match token_file {
        Some(path) => Bearer::file(path.to_owned()),
        None => Ok(Bearer::default()),
    };
    bearer.map_err(|e| Error::invalid("token_file", e.to_string()))
}

/// Returns the header `authorization` with the token, for calls that are no gRPC.
pub(super) fn header(bearer: &Bearer) -> Option<String> {
    let carrying = bearer.clone().call(Request::new(())).ok()?;
    let value = carrying.metadata().get("authorization")?;
    Some(value.to_str().ok()?.to_owned())
}

/// Returns a client of the service at `address`. The first call makes the connection.
///
/// # Errors
/// `InvalidArgument` if the address, the authority `ca` or the token cannot be used.
pub(super) fn client(
    address: &str,
    ca: Option<&Path>,
    token_file: Option<&Path>,
) -> Result<Client> {
    client_with(address, ca, bearer(token_file)?)
}

/// As [`client`], with a token.
///
/// # Errors
/// Those of [`client`].
pub(super) fn client_with(address: &str, ca: Option<&Path>, bearer: Bearer) -> Result<Client> {
    let dialer = Dialer::new(Trust {
        ca: ca.map(Path::to_owned),
        ..Trust::default()
    });
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_is_a_header_too() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("token");
        std::fs::write(&file, "sbt_1\n").unwrap();
        let shown = header(&bearer(Some(&file)).unwrap());
        assert_eq!(shown.as_deref(), Some("Bearer sbt_1"));
        assert_eq!(header(&bearer(None).unwrap()), None);
        std::fs::write(&file, "two words").unwrap();
        let refused = bearer(Some(&file)).unwrap_err();
        assert_eq!(refused.value("field"), Some("token_file"));
    }
}
