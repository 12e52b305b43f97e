//! What a worker of its own needs beside a state and a device: its coordinator, and a token.
use super::Check;
use crate::{
    access::tokens::has_form,
    app,
    config::{Config, WorkerRoleConfig},
    error::{Error, Result, from_status},
    storage::nonce,
};
use std::time::Duration;
use superbatch_proto::v1::{
    Reason, RegisterRequest, coordinator_service_client::CoordinatorServiceClient,
};
use superbatch_transport::{Authorized, Bearer};

/// Longest wait for the coordinator.
const PATIENCE: Duration = Duration::from_secs(10);

pub(super) async fn checks(config: &Config) -> [Check; 2] {
    let token = token_file(&config.worker_role);
    let coordinator = coordinator(config).await;
    [
        ("worker_role.token_file".into(), token),
        ("worker_role.coordinator".into(), coordinator),
    ]
}

/// Returns the token that a worker registers with.
fn bearer(role: &WorkerRoleConfig) -> Result<Bearer> {
    let unusable = |e: superbatch_transport::Error| {
        let message = format!("{e}; `superbatch token new NAME --scopes worker` prints one");
        Error::invalid("worker_role.token_file", message)
    };
    match &role.token_file {
        Some(path) => Bearer::file(path.clone()).map_err(unusable),
        None => Ok(Bearer::default()),
    }
}

/// Checks that the file of the token can be read, and holds one.
fn token_file(role: &WorkerRoleConfig) -> Result<String> {
    bearer(role)?;
    let Some(path) = &role.token_file else {
        return Ok("none; the worker registers without one".into());
    };
    let text = std::fs::read_to_string(path).unwrap_or_default();
    Ok(if has_form(text.trim()) {
        format!("{} holds a token", path.display())
    } else {
        // The file of tokens holds hashes of any texts, so that others' secrets may be tokens too.
        format!(
            "{} can be read, and what it holds was not made by `superbatch token new`",
            path.display()
        )
    })
}

/// Checks that the coordinator answers, and takes the token.
async fn coordinator(config: &Config) -> Result<String> {
    let (role, dialer) = (&config.worker_role, app::dialer(&config.tls)?);
    let (uri, bearer) = (&role.coordinator, bearer(role)?);
    let unreachable = |what: &str| {
        let message =
            format!("{uri} {what}; start `superbatch serve` there, or set worker_role.coordinator");
        Error::new(Reason::NoWorkers, message)
    };
    let asked = async {
        let channel = dialer.connect(uri, |endpoint| endpoint).await;
        let channel = channel.map_err(|e| unreachable("cannot be reached").because(e))?;
        // A worker that leaves, under an address that none has: it needs the token that a worker
        // registers with, and changes nothing.
        let leaving = RegisterRequest {
            address: format!("doctor-{}", nonce()),
            leaving: true,
            ..RegisterRequest::default()
        };
        let mut client = CoordinatorServiceClient::new(Authorized::new(channel, bearer));
        client.register(leaving).await.map_err(|status| {
            let error = from_status(status, Reason::NoWorkers).about(uri);
            match dialer.last_fault() {
                Some(fault) => error.because(fault),
                None => error,
            }
        })
    };
    let answer = tokio::time::timeout(PATIENCE, asked).await;
    answer.map_err(|_| unreachable("does not answer"))??;
    Ok(format!("{uri} would register this worker"))
}
