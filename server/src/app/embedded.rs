//! The worker inside the coordinator's process: the same service on the same wire, over memory instead of a socket.
use crate::worker::Worker;
use hyper_util::rt::TokioIo;
use std::io;
use tokio::{io::DuplexStream, sync::mpsc};
use tokio_stream::{StreamExt, wrappers::ReceiverStream};
use tonic::transport::{Channel, Endpoint, Server, Uri};

/// Bytes in flight in either direction.
const PIPE_BYTES: usize = 1 << 20;

/// Serves `worker` in the background for as long as the channel is used.
pub fn connect(worker: Worker) -> Channel {
    let (accept, incoming) = mpsc::channel::<DuplexStream>(1);
    let router = Server::builder().add_service(worker.service());
    tokio::spawn(async move {
        let incoming = ReceiverStream::new(incoming).map(Ok::<_, io::Error>);
        if let Err(error) = router.serve_with_incoming(incoming).await {
            tracing::error!(error = %error, "the embedded worker stopped");
        }
    });
    let connector = tower::service_fn(move |_: Uri| {
        let accept = accept.clone();
        async move {
            let (ours, theirs) = tokio::io::duplex(PIPE_BYTES);
            accept.send(theirs).await.map_err(|_| io::Error::other("the embedded worker stopped"))?;
            Ok::<_, io::Error>(TokioIo::new(ours))
        }
    });
    Endpoint::from_static("http://embedded").connect_with_connector_lazy(connector)
}
