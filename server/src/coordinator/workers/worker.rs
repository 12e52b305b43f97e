//! One scoring worker, as its coordinator sees it.
use crate::{
    bounds::CALLS_MAX, error, handed::Handover, pushed::Pushed, ticket::TicketKey, traces::carrying,
};
use futures::{Stream, StreamExt, future::BoxFuture};
use std::{fmt, pin::Pin, sync::Arc};
use superbatch_proto::{
    MESSAGE_BYTES_MAX,
    v1::{
        FetchRowsRequest, FetchRowsResponse, ModelRef, PrepareModelResponse, ScoreRequest,
        ScoreResponse, worker_service_client::WorkerServiceClient,
    },
};
use superbatch_transport::Authorized;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Result, transport::Channel};

/// The messages that answer one call.
pub type Answers<T> = Pin<Box<dyn Stream<Item = Result<T>> + Send + Sync>>;

/// The calls that carry rows, embeddings and weights, answered by a worker in this process.
///
/// Rows that are wanted whole are put into the handover, before the message that they are done:
/// nothing is encoded, and most are not copied. On a connection each row is gathered, written into
/// a buffer, cut into frames, and put together again.
pub trait InProcess: Send + Sync {
    fn score(&self, requests: Answers<ScoreRequest>, handover: Handover) -> Answers<ScoreResponse>;

    fn fetch_rows(
        &self,
        request: FetchRowsRequest,
        handover: Handover,
    ) -> Answers<FetchRowsResponse>;

    /// As `PrepareModel`, for weights in memory.
    fn prepare_pushed(
        &self,
        model: ModelRef,
        pushed: Pushed,
    ) -> BoxFuture<'_, error::Result<PrepareModelResponse>>;
}

/// The worker that lives in this process.
#[derive(Clone)]
pub struct Embedded {
    /// For calls with little to carry.
    pub channel: Channel,
    pub calls: Arc<dyn InProcess>,
}

impl fmt::Debug for Embedded {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Embedded")
    }
}

/// Most calls of one worker that stay open because they hold rows: half of the calls that a
/// connection may have, so that new slices never wait for held ones.
const HOLDING_MAX: usize = CALLS_MAX as usize / 2;

/// The calls on one connection that stay open because they hold rows.
#[derive(Debug, Clone)]
pub struct Holding(Arc<Semaphore>);

impl Default for Holding {
    fn default() -> Self {
        Self(Arc::new(Semaphore::new(HOLDING_MAX)))
    }
}

impl Holding {
    /// Takes one of them; `None` if there are too many.
    pub fn one(&self) -> Option<OwnedSemaphorePermit> {
        self.0.clone().try_acquire_owned().ok()
    }
}

/// A connection to one worker. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Worker {
    pub address: String,
    /// Id of the worker's process: another process may take over the same address.
    pub incarnation: String,
    pub device: String,
    pub channel: Authorized,
    /// Set if the worker lives in this process.
    pub embedded: Option<Embedded>,
    /// Calls that stay open because they hold rows.
    pub holding: Holding,
    /// Signs tickets for rows that it holds; `None` if it serves none.
    pub ticket_key: Option<TicketKey>,
}

impl Worker {
    /// Returns whether both are the same process.
    pub fn is(&self, other: &Self) -> bool {
        (&self.address, &self.incarnation) == (&other.address, &other.incarnation)
    }

    pub fn client(&self) -> WorkerServiceClient<Authorized> {
        WorkerServiceClient::new(self.channel.clone())
            .max_decoding_message_size(MESSAGE_BYTES_MAX)
            .max_encoding_message_size(MESSAGE_BYTES_MAX)
    }

    /// Begins a `Score` call. A worker of this process puts rows into `handover`.
    pub async fn score(
        &self,
        requests: mpsc::Receiver<ScoreRequest>,
        handover: &Handover,
    ) -> Result<Answers<ScoreResponse>> {
        let requests = ReceiverStream::new(requests);
        if let Some(here) = &self.embedded {
            return Ok(here
                .calls
                .score(Box::pin(requests.map(Ok)), handover.clone()));
        }
        let answers = self.client().score(carrying(requests)).await?;
        Ok(Box::pin(answers.into_inner()))
    }

    /// Begins a `FetchRows` call. A worker of this process puts rows into `handover`.
    pub async fn fetch_rows(
        &self,
        request: FetchRowsRequest,
        handover: &Handover,
    ) -> Result<Answers<FetchRowsResponse>> {
        if let Some(here) = &self.embedded {
            return Ok(here.calls.fetch_rows(request, handover.clone()));
        }
        let answers = self.client().fetch_rows(carrying(request)).await?;
        Ok(Box::pin(answers.into_inner()))
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use superbatch_transport::Bearer;
    use tonic::transport::Endpoint;

    /// A worker at an address where nothing listens.
    pub(crate) fn unreachable(ticket_key: Option<TicketKey>) -> Worker {
        let channel = Endpoint::from_static("http://127.0.0.1:1").connect_lazy();
        Worker {
            address: "http://127.0.0.1:1".into(),
            incarnation: String::new(),
            device: String::new(),
            channel: Authorized::new(channel, Bearer::default()),
            embedded: None,
            holding: Holding::default(),
            ticket_key,
        }
    }

    #[test]
    fn held_rows_leave_half_of_a_connection_to_slices() {
        let holding = Holding::default();
        let connection = holding.clone();
        let mut open: Vec<_> = (0..HOLDING_MAX).map_while(|_| holding.one()).collect();
        assert_eq!(open.len(), HOLDING_MAX);
        assert!(connection.one().is_none(), "all clones are one connection");
        assert!(
            Holding::default().one().is_some(),
            "another worker's is not"
        );
        open.pop();
        assert!(connection.one().is_some());
    }
}
