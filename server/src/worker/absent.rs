//! The worker of a build without LibTorch, which can only be a coordinator. It has the worker's
//! interface, so that `app` needs no second form; only [`Worker::new`] fails.
mod config;
/// With the part of `kept` below, what the run page reads blocks with.
#[allow(dead_code, reason = "the rest of it is the worker's")]
mod inputs {
    pub(super) mod captions;
    pub(super) mod images;
}
#[allow(dead_code, reason = "the rest of it is the worker's")]
mod kept {
    mod cache;
    pub(super) mod read;
}
mod register;

pub use config::WorkerConfig;
pub use kept::read::BlockReader;
pub use register::{Superior, keep_registered};

use crate::{
    error::{Error, Result},
    handed::Handover,
    pushed::Pushed,
    storage::{Location, Stores},
};
use futures::stream::{Empty, Stream};
use superbatch_proto::v1::{
    FetchRowsRequest, FetchRowsResponse, FetchTicketRequest, FetchTicketResponse, ModelRef,
    PrepareModelRequest, PrepareModelResponse, Reason, ScoreRequest, ScoreResponse, SelectRequest,
    SelectResponse,
    delivery_service_server::{DeliveryService, DeliveryServiceServer},
    worker_service_server::{WorkerService, WorkerServiceServer},
};
use tokio::sync::watch;
use tonic::{Request, Response, Status, Streaming};

/// A worker that cannot exist: the type has no values.
#[derive(Clone)]
pub enum Worker {}

impl Worker {
    /// # Errors
    /// `DeviceUnavailable`, always.
    pub fn new(_config: &WorkerConfig, _stores: Stores, _state: Location) -> Result<Self> {
        let message = "this build has no LibTorch, so it cannot score: set \
        coordinator.workers_embedded to false, and run \
                       `superbatch worker` from a build with LibTorch beside it";
        Err(Error::new(Reason::DeviceUnavailable, message))
    }

    pub fn service(&self) -> WorkerServiceServer<Self> {
        match *self {}
    }

    pub fn delivery(&self) -> DeliveryServiceServer<Self> {
        match *self {}
    }

    pub fn ticket_key(&self) -> bytes::Bytes {
        match *self {}
    }

    pub fn info(&self) -> WorkerInfo {
        match *self {}
    }

    pub fn is_well(&self) -> watch::Receiver<bool> {
        match *self {}
    }

    pub fn answer_score(
        &self,
        _requests: impl Stream<Item = Result<ScoreRequest, Status>> + Send + 'static,
        _handover: Option<Handover>,
    ) -> Nothing<ScoreResponse> {
        match *self {}
    }

    pub fn answer_fetch_rows(
        &self,
        _request: FetchRowsRequest,
        _handover: Option<Handover>,
    ) -> Nothing<FetchRowsResponse> {
        match *self {}
    }

    pub(crate) async fn prepare_pushed(
        &self,
        _model: ModelRef,
        _pushed: Pushed,
    ) -> Result<PrepareModelResponse> {
        match *self {}
    }

    pub fn stop(&self) {
        match *self {}
    }
}

/// What a worker reports about itself.
pub struct WorkerInfo {
    pub device: String,
    pub threads: usize,
}

/// The stream of calls in a build without LibTorch: always empty.
pub type Nothing<T> = Empty<Result<T, Status>>;

#[tonic::async_trait]
impl WorkerService for Worker {
    type ScoreStream = Nothing<ScoreResponse>;
    type FetchRowsStream = Nothing<FetchRowsResponse>;

    async fn prepare_model(
        &self,
        _request: Request<PrepareModelRequest>,
    ) -> Result<Response<PrepareModelResponse>, Status> {
        match *self {}
    }

    async fn score(
        &self,
        _request: Request<Streaming<ScoreRequest>>,
    ) -> Result<Response<Self::ScoreStream>, Status> {
        match *self {}
    }

    async fn fetch_rows(
        &self,
        _request: Request<FetchRowsRequest>,
    ) -> Result<Response<Self::FetchRowsStream>, Status> {
        match *self {}
    }

    async fn select(
        &self,
        _request: Request<Streaming<SelectRequest>>,
    ) -> Result<Response<SelectResponse>, Status> {
        match *self {}
    }
}

#[tonic::async_trait]
impl DeliveryService for Worker {
    type FetchTicketStream = Nothing<FetchTicketResponse>;

    async fn fetch_ticket(
        &self,
        _request: Request<FetchTicketRequest>,
    ) -> Result<Response<Self::FetchTicketStream>, Status> {
        match *self {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::StorageConfig;

    #[test]
    fn a_build_without_libtorch_says_what_to_do() {
        let stores = Stores::new(StorageConfig::default());
        let state = stores.open("memory:///state").unwrap();
        let error = Worker::new(&WorkerConfig::default(), stores, state)
            .err()
            .unwrap();
        assert_eq!(error.reason(), Reason::DeviceUnavailable);
        assert!(error.to_string().contains("workers_embedded"), "{error}");
    }
}
