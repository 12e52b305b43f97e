//! The connection to a service, and the calls that need no open run.
use crate::{Credentials, Error, Result, Retry, Run, error, retry, workers::Workers};
use std::{
    io,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};
use superbatch_proto::{MESSAGE_BYTES_MAX, http2, ids, v1};
use superbatch_transport::{Authorized, Dialer};
use tokio::time::{Instant, sleep};
use tonic::{
    Response, Status,
    transport::{Channel, Endpoint},
};
use tonic_health::pb::{HealthCheckRequest, health_client::HealthClient};

pub(crate) type Api = v1::selection_service_client::SelectionServiceClient<Authorized>;

/// Settings of a connection.
#[derive(Debug, Clone)]
pub struct ConnectConfig {
    /// Limit for one attempt to connect, at the start and after each loss of the connection.
    pub connect_timeout: Duration,
    /// How long [`Client::connect_with`] tries again while nobody listens at the address, as while
    /// a coordinator restarts. One more attempt may follow. Zero, the default, makes one attempt.
    pub connect_wait: Duration,
    /// How often calls are retried, once connected.
    pub retry: Retry,
    /// Silence after which the service is pinged, and how long its answer may take. So a service
    /// that hangs is noticed after twice this time. Shortened to `retry.elapsed_max`, but not below
    /// 5 s.
    pub keep_alive: Duration,
    /// The client's certificates and token. Fields that are not given are taken from the
    /// environment.
    pub credentials: Credentials,
}

/// The lower bound of [`ConnectConfig::keep_alive`]: on a slow line the answer to a ping waits
/// behind an upload, and a shorter limit would break sound connections.
const KEEP_ALIVE_SHORTENED_MIN: Duration = Duration::from_secs(5);

/// The longest pause between two attempts to reach a service that is not there.
const CONNECT_PAUSE_MAX: Duration = Duration::from_millis(500);

/// The longest wait for a connection to a worker: the coordinator has its rows too.
const WORKER_CONNECT_MAX: Duration = Duration::from_secs(3);

impl Default for ConnectConfig {
    fn default() -> Self {
        let keep_alive = Duration::from_secs(20);
        Self {
            connect_timeout: Duration::from_secs(10),
            connect_wait: Duration::ZERO,
            retry: Retry::default(),
            keep_alive,
            credentials: Credentials::default(),
        }
    }
}

impl ConnectConfig {
    fn keep_alive(&self) -> Duration {
        self.keep_alive
            .min(self.retry.elapsed_max.max(KEEP_ALIVE_SHORTENED_MIN))
    }
}

/// A connection to a Superbatch service. Cheap to clone; clones share the connection, which
/// restores itself.
#[derive(Debug, Clone)]
pub struct Client {
    api: Api,
    /// As `api`, for calls whose answers are not read by tonic alone.
    pub(crate) calls: Authorized,
    health: HealthClient<Authorized>,
    pub(crate) link: Arc<Link>,
}

/// The fixed properties of a connection.
#[derive(Debug)]
pub(crate) struct Link {
    uri: String,
    pub retry: Retry,
    /// Longest silence of the service before a call to it breaks.
    pub silence_max: Duration,
    pub workers: Workers,
}

impl Client {
    /// Connects to `uri`, such as `http://127.0.0.1:50051`, with the default [`ConnectConfig`].
    ///
    /// One attempt: an absent service is reported at once, as [`Error::Connect`].
    /// [`ConnectConfig::connect_wait`] waits for it.
    pub async fn connect(uri: impl AsRef<str>) -> Result<Self> {
        Self::connect_with(uri, ConnectConfig::default()).await
    }

    /// As [`Client::connect`], with settings.
    pub async fn connect_with(uri: impl AsRef<str>, config: ConnectConfig) -> Result<Self> {
        let uri = uri.as_ref();
        let (dialer, bearer) = config.credentials.clone().or_environment().open(uri)?;
        let for_workers = config.clone();
        let workers = Workers::new(
            dialer.clone(),
            config.credentials.allows_plain_workers(uri),
            Box::new(move |endpoint| {
                let connect_timeout = for_workers.connect_timeout.min(WORKER_CONNECT_MAX);
                tuned(endpoint, &for_workers).connect_timeout(connect_timeout)
            }),
        );
        let channel = dialed(&dialer, uri, &config).await?;
        let authorized = Authorized::new(channel, bearer);
        let health = HealthClient::new(authorized.clone());
        let api = Api::new(authorized.clone())
            .max_decoding_message_size(MESSAGE_BYTES_MAX)
            .max_encoding_message_size(MESSAGE_BYTES_MAX);
        let silence_max = 2 * config.keep_alive();
        let client = Self {
            api,
            calls: authorized,
            health,
            link: Arc::new(Link {
                uri: uri.to_owned(),
                retry: config.retry,
                silence_max,
                workers,
            }),
        };
        if uri.starts_with("https:") {
            // Under TLS 1.3 a client has finished its handshake before the service checks its
            // certificate. So a refused certificate shows only at the first call, which is made
            // here.
            let answers = client.answers().await;
            answers.map_err(|error| error.because_of(dialer.last_fault()))?;
        }
        Ok(client)
    }

    /// Opens a run, or joins it: all ranks of a trainer open the same id with the same spec.
    pub async fn open_run(&self, run_id: impl Into<String>, spec: v1::RunSpec) -> Result<Run> {
        let run_id = run_id.into();
        if !ids::is_run_id(&run_id) {
            let rule = "letters, digits, '-', '_' and '.', not starting with a dot, at most 128";
            return Err(Error::invalid(
                "run_id",
                format!("{run_id:?} cannot name a run: use {rule}"),
            ));
        }
        let request = v1::OpenRunRequest {
            run_id: run_id.clone(),
            spec: Some(spec),
        };
        let opened = self
            .call(request, |mut api, request| async move {
                api.open_run(request).await
            })
            .await?;
        Run::new(self.clone(), run_id, opened)
    }

    /// Returns everything known about a run, without joining it.
    pub async fn get_run(&self, run_id: impl Into<String>) -> Result<v1::RunInfo> {
        self.get_run_resumed(run_id.into(), None).await
    }

    /// As [`Client::get_run`], for a trainer that goes on at `resume_step`.
    pub(crate) async fn get_run_resumed(
        &self,
        run_id: String,
        resume_step: Option<u64>,
    ) -> Result<v1::RunInfo> {
        let request = v1::GetRunRequest {
            run_id,
            resume_step,
        };
        let response = self
            .call(request, |mut api, request| async move {
                api.get_run(request).await
            })
            .await?;
        response
            .run
            .ok_or_else(|| Error::from(Status::internal("GetRun answered without a run")))
    }

    /// Lists all runs that the service knows.
    pub async fn list_runs(&self) -> Result<Vec<v1::RunSummary>> {
        let response = self
            .call(v1::ListRunsRequest {}, |mut api, request| async move {
                api.list_runs(request).await
            })
            .await?;
        Ok(response.runs)
    }

    /// Returns how many batches of runs with direct delivery came from workers, and how many from
    /// the coordinator because a worker had failed.
    pub fn direct_batches(&self) -> (u64, u64) {
        let workers = &self.link.workers;
        let count = |of: &AtomicU64| of.load(Ordering::Relaxed);
        (count(&workers.direct), count(&workers.fallbacks))
    }

    /// Ends a run for all ranks: no further steps or pushes. Its receipts stay. Closing a closed
    /// run changes nothing.
    pub async fn close_run(&self, run_id: impl Into<String>) -> Result<()> {
        let request = v1::CloseRunRequest {
            run_id: run_id.into(),
        };
        self.call(request, |mut api, request| async move {
            api.close_run(request).await
        })
        .await
        .map(|_| ())
    }

    pub(crate) fn api(&self) -> Api {
        self.api.clone()
    }

    /// Makes a unary call that may be repeated.
    pub(crate) async fn call<Q: Clone, A, F>(
        &self,
        request: Q,
        rpc: impl Fn(Api, Q) -> F,
    ) -> Result<A>
    where
        F: Future<Output = Result<Response<A>, Status>>,
    {
        let attempt = || {
            let answer = rpc(self.api(), request.clone());
            async { Ok(answer.await?.into_inner()) }
        };
        retry::call(self, attempt).await
    }

    /// Checks that the service answers at all. Any answer will do, also a refusal.
    pub(crate) async fn answers(&self) -> Result<()> {
        match self
            .health
            .clone()
            .check(HealthCheckRequest::default())
            .await
            .map_err(|status| self.located(status.into()))
        {
            Err(error @ Error::Broken { .. }) => Err(error),
            _ => Ok(()),
        }
    }

    /// Returns the error, with the service's address if there was no answer.
    pub(crate) fn located(&self, error: Error) -> Error {
        match error {
            Error::Transport(status) if error::is_unanswered(&status) => Error::Broken {
                uri: self.link.uri.clone(),
                status,
            },
            other => other,
        }
    }
}

/// Connects, as soon as somebody listens there.
async fn dialed(dialer: &Dialer, uri: &str, config: &ConnectConfig) -> Result<Channel> {
    let (began, mut failures) = (Instant::now(), 0);
    loop {
        let attempt = dialer.connect(uri, |endpoint| tuned(endpoint, config));
        let source = match attempt.await {
            Ok(channel) => return Ok(channel),
            Err(source) => source,
        };
        let left = config.connect_wait.saturating_sub(began.elapsed());
        if left.is_zero() || !is_absence(&source) {
            return Err(Error::Connect {
                uri: uri.to_owned(),
                source,
            });
        }
        failures += 1;
        let delay = config.retry.delay(failures, &mut rand::rng());
        tracing::debug!(uri, failures, "no service is there yet");
        sleep(delay.min(CONNECT_PAUSE_MAX).min(left)).await;
    }
}

/// The faults of an address at which nobody listens for now.
const ABSENCES: [io::ErrorKind; 7] = [
    io::ErrorKind::BrokenPipe,
    io::ErrorKind::ConnectionAborted,
    io::ErrorKind::ConnectionRefused,
    io::ErrorKind::ConnectionReset,
    io::ErrorKind::HostUnreachable,
    io::ErrorKind::NetworkUnreachable,
    io::ErrorKind::UnexpectedEof,
];

/// Returns whether nobody listens at an address for now. A certificate that is refused, or a name
/// that nobody knows, is not mended by waiting.
fn is_absence(error: &(dyn std::error::Error + 'static)) -> bool {
    let causes = std::iter::successors(Some(error), |&cause| cause.source());
    let mut faults = causes.filter_map(|cause| cause.downcast_ref::<io::Error>());
    faults.any(|fault| ABSENCES.contains(&fault.kind()))
}

fn tuned(endpoint: Endpoint, config: &ConnectConfig) -> Endpoint {
    // The name consists of letters, a slash, digits and dots, so it is always a valid header.
    let named = endpoint
        .clone()
        .user_agent(concat!("superbatch-client/", env!("CARGO_PKG_VERSION")))
        .unwrap_or(endpoint);
    // Pings detect a peer that vanished while a call waits for its answer.
    http2::client(named)
        .connect_timeout(config.connect_timeout)
        .tcp_nodelay(true)
        .http2_keep_alive_interval(config.keep_alive())
        .keep_alive_timeout(config.keep_alive())
        .keep_alive_while_idle(true)
}

#[cfg(test)]
mod tests {
    use super::*;
    use superbatch_transport::testing::frame_bytes_max;

    #[tokio::test]
    async fn a_part_of_rows_may_come_in_one_frame() {
        let config = ConnectConfig::default();
        let accepted = frame_bytes_max(|endpoint| tuned(endpoint, &config)).await;
        assert_eq!(accepted.unwrap(), Some(http2::FRAME_BYTES_MAX));
    }
}
