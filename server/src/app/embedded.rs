//! The worker inside the coordinator's process: the same service, over memory instead of a socket.
use crate::{
    coordinator::workers::{
        pool::Pool,
        worker::{Answers, Embedded, InProcess},
    },
    error::Result,
    handed::Handover,
    pushed::Pushed,
    traces::stage,
    worker::Worker,
};
use futures::future::BoxFuture;
use hyper_util::rt::TokioIo;
use std::{io, sync::Arc};
use superbatch_proto::{
    http2,
    v1::{
        FetchRowsRequest, FetchRowsResponse, ModelRef, PrepareModelResponse, ScoreRequest,
        ScoreResponse,
    },
};
use tokio::{
    io::DuplexStream,
    sync::{mpsc, watch},
};
use tokio_stream::{StreamExt, wrappers::ReceiverStream};
use tonic::transport::{Channel, Endpoint, Server, Uri};

/// Bytes in flight in either direction: one part of a stream.
const PIPE_BYTES: usize = 1 << 20;

impl InProcess for Worker {
    fn score(&self, requests: Answers<ScoreRequest>, handover: Handover) -> Answers<ScoreResponse> {
        stage!("score").in_scope(|| Box::pin(self.answer_score(requests, Some(handover))))
    }

    fn fetch_rows(
        &self,
        request: FetchRowsRequest,
        handover: Handover,
    ) -> Answers<FetchRowsResponse> {
        stage!("fetch_rows").in_scope(|| Box::pin(self.answer_fetch_rows(request, Some(handover))))
    }

    fn prepare_pushed(
        &self,
        model: ModelRef,
        pushed: Pushed,
    ) -> BoxFuture<'_, Result<PrepareModelResponse>> {
        Box::pin(self.prepare_pushed(model, pushed))
    }
}

/// Makes `worker` one of this process: rows and embeddings are handed over, other calls go through
/// a channel that is served in the background for as long as it is used.
pub(super) fn connect(worker: Worker) -> Embedded {
    Embedded {
        channel: channel_to(&worker),
        calls: Arc::new(worker),
    }
}

fn channel_to(worker: &Worker) -> Channel {
    let (accept, incoming) = mpsc::channel::<DuplexStream>(1);
    let router = http2::server(Server::builder()).add_service(worker.service());
    tokio::spawn(async move {
        let incoming = ReceiverStream::new(incoming).map(Ok::<_, io::Error>);
        if let Err(error) = router.serve_with_incoming(incoming).await {
            tracing::error!(error = %error, "the embedded worker stopped");
        }
    });
    // Calls with little to carry go over gRPC although the service is in the same process. So the
    // embedded worker and a remote one run the same code, limits and deadlines included.
    let connector = tower::service_fn(move |_: Uri| {
        let accept = accept.clone();
        async move {
            let (ours, theirs) = tokio::io::duplex(PIPE_BYTES);
            accept
                .send(theirs)
                .await
                .map_err(|_| io::Error::other("the embedded worker stopped"))?;
            Ok::<_, io::Error>(TokioIo::new(ours))
        }
    });
    http2::client(Endpoint::from_static("http://embedded")).connect_with_connector_lazy(connector)
}

/// Removes the embedded worker from the pool while its device is hung, as a worker process does by
/// leaving.
pub(super) async fn keep_while_well(
    pool: Arc<Pool>,
    mut is_well: watch::Receiver<bool>,
    embedded: Embedded,
    device: String,
) {
    while is_well.changed().await.is_ok() {
        if *is_well.borrow_and_update() {
            pool.embed(embedded.clone(), &device)
        } else {
            pool.let_embedded_go()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::coordinator::workers::pool::Home;
    use futures::{future, stream};
    use std::time::Duration;
    use superbatch_proto::v1::Reason;

    /// A worker that is asked for nothing.
    struct Idle;

    impl InProcess for Idle {
        fn score(
            &self,
            _requests: Answers<ScoreRequest>,
            _handover: Handover,
        ) -> Answers<ScoreResponse> {
            Box::pin(stream::empty())
        }

        fn fetch_rows(
            &self,
            _request: FetchRowsRequest,
            _handover: Handover,
        ) -> Answers<FetchRowsResponse> {
            Box::pin(stream::empty())
        }

        fn prepare_pushed(
            &self,
            _model: ModelRef,
            _pushed: Pushed,
        ) -> BoxFuture<'_, Result<PrepareModelResponse>> {
            Box::pin(future::pending())
        }
    }

    #[tokio::test]
    async fn a_hung_device_leaves_the_pool_and_comes_back() {
        let pool = Arc::new(Pool::new(
            Duration::from_secs(1),
            Duration::ZERO,
            Home::default(),
        ));
        let embedded = Embedded {
            channel: Endpoint::from_static("http://embedded").connect_lazy(),
            calls: Arc::new(Idle),
        };
        pool.embed(embedded.clone(), "cuda:0");
        for is_well in [false, true] {
            let (tell, told) = watch::channel(!is_well);
            tell.send_replace(is_well);
            // What was told before is heard still.
            drop(tell);
            keep_while_well(pool.clone(), told, embedded.clone(), "cuda:0".to_owned()).await;
            assert_eq!(
                pool.one_on("cuda").await.map_err(|e| e.reason()).err(),
                (!is_well).then_some(Reason::NoWorkers)
            );
        }
    }
}
