//! The connection to a service, and what can be asked without a run.
use crate::{Error, Result, Retry, Run, retry};
use std::{sync::Arc, time::Duration};
use superbatch_proto::{CONNECTION_WINDOW_BYTES, MESSAGE_BYTES_MAX, STREAM_WINDOW_BYTES, ids, v1};
use tonic::{
    Response, Status,
    transport::{Channel, Endpoint},
};

pub(crate) type Api = v1::selection_service_client::SelectionServiceClient<Channel>;

/// How to connect.
#[derive(Debug, Clone)]
pub struct ConnectConfig {
    /// For one attempt to connect, at start and whenever the connection was lost.
    pub connect_timeout: Duration,
    /// How faults that pass are met, once connected.
    pub retry: Retry,
}

impl Default for ConnectConfig {
    fn default() -> Self {
        Self { connect_timeout: Duration::from_secs(10), retry: Retry::default() }
    }
}

/// A connection to a Superbatch service. Cheap to clone; clones share the connection, which restores itself.
#[derive(Debug, Clone)]
pub struct Client {
    api: Api,
    pub(crate) retry: Arc<Retry>,
}

impl Client {
    /// Connects to `uri`, such as `http://127.0.0.1:50051`, with the default [`ConnectConfig`].
    ///
    /// One attempt: an absent service is reported at once, as [`Error::Connect`].
    pub async fn connect(uri: impl AsRef<str>) -> Result<Self> {
        Self::connect_with(uri, ConnectConfig::default()).await
    }

    /// [`Client::connect`], with settings.
    pub async fn connect_with(uri: impl AsRef<str>, config: ConnectConfig) -> Result<Self> {
        let uri = uri.as_ref();
        let endpoint = endpoint(uri, config.connect_timeout)?;
        let channel = endpoint.connect().await.map_err(|source| Error::Connect { uri: uri.to_owned(), source })?;
        let api =
            Api::new(channel).max_decoding_message_size(MESSAGE_BYTES_MAX).max_encoding_message_size(MESSAGE_BYTES_MAX);
        Ok(Self { api, retry: Arc::new(config.retry) })
    }

    /// Opens a run, or joins it: all ranks of a trainer open the same id with the same spec.
    pub async fn open_run(&self, run_id: impl Into<String>, spec: v1::RunSpec) -> Result<Run> {
        let run_id = run_id.into();
        if !ids::is_run_id(&run_id) {
            let rule = "letters, digits, '-', '_' and '.', not starting with a dot, at most 128";
            return Err(Error::invalid("run_id", format!("{run_id:?} cannot name a run: use {rule}")));
        }
        let request = v1::OpenRunRequest { run_id: run_id.clone(), spec: Some(spec) };
        let opened = self.call(request, |mut api, request| async move { api.open_run(request).await }).await?;
        Run::new(self.clone(), run_id, opened)
    }

    /// Everything known about a run, without joining it.
    pub async fn get_run(&self, run_id: impl Into<String>) -> Result<v1::RunInfo> {
        let request = v1::GetRunRequest { run_id: run_id.into() };
        let response = self.call(request, |mut api, request| async move { api.get_run(request).await }).await?;
        response.run.ok_or_else(|| Error::from(Status::internal("GetRun answered without a run")))
    }

    /// All runs that the service knows.
    pub async fn list_runs(&self) -> Result<Vec<v1::RunSummary>> {
        let response =
            self.call(v1::ListRunsRequest {}, |mut api, request| async move { api.list_runs(request).await }).await?;
        Ok(response.runs)
    }

    pub(crate) fn api(&self) -> Api {
        self.api.clone()
    }

    /// A unary call that may be repeated.
    pub(crate) async fn call<Q: Clone, A, F>(&self, request: Q, rpc: impl Fn(Api, Q) -> F) -> Result<A>
    where
        F: Future<Output = Result<Response<A>, Status>>,
    {
        let attempt = || {
            let answer = rpc(self.api(), request.clone());
            async { Ok(answer.await?.into_inner()) }
        };
        retry::call(&self.retry, attempt).await
    }
}

fn endpoint(uri: &str, connect_timeout: Duration) -> Result<Endpoint> {
    if !uri.starts_with("http://") {
        let hint = "write it as http://HOST:PORT (TLS is not built yet)";
        return Err(Error::invalid("uri", format!("cannot connect to {uri:?}: {hint}")));
    }
    let endpoint = Endpoint::from_shared(uri.to_owned())
        .and_then(|endpoint| endpoint.user_agent(concat!("superbatch-client/", env!("CARGO_PKG_VERSION"))))
        .map_err(|source| Error::Connect { uri: uri.to_owned(), source })?;
    // Pings find a peer that vanished while a call waits for its answer.
    Ok(endpoint
        .connect_timeout(connect_timeout)
        .tcp_nodelay(true)
        .initial_stream_window_size(STREAM_WINDOW_BYTES)
        .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
        .http2_keep_alive_interval(Duration::from_secs(20))
        .keep_alive_timeout(Duration::from_secs(20))
        .keep_alive_while_idle(true))
}
