//! The worker inside the coordinator's process: the same service on the same wire, over memory
//! instead of a socket.
use crate::{coordinator::workers::pool::Pool, worker::Worker};
use hyper_util::rt::TokioIo;
use std::{io, sync::Arc};
use superbatch_proto::{CONNECTION_WINDOW_BYTES, FRAME_BYTES_MAX, STREAM_WINDOW_BYTES};
use tokio::{
    io::DuplexStream,
    sync::{mpsc, watch},
};
use tokio_stream::{StreamExt, wrappers::ReceiverStream};
use tonic::transport::{Channel, Endpoint, Server, Uri};

/// Bytes in flight in either direction: one part of a stream.
const PIPE_BYTES: usize = 1 << 20;

/// Serves `worker` in the background for as long as the channel is used.
pub fn connect(worker: Worker) -> Channel {
    let (accept, incoming) = mpsc::channel::<DuplexStream>(1);
    let mut server = Server::builder()
        .initial_stream_window_size(STREAM_WINDOW_BYTES)
        .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
        .max_frame_size(FRAME_BYTES_MAX);
    let router = server.add_service(worker.service());
    tokio::spawn(async move {
        let incoming = ReceiverStream::new(incoming).map(Ok::<_, io::Error>);
        if let Err(error) = router.serve_with_incoming(incoming).await {
            tracing::error!(error = %error, "the embedded worker stopped");
        }
    });
    // The service is called over gRPC although it is in the same process. So the embedded worker
    // and a remote one run the same code, limits and deadlines included, and a test of one is a
    // test of both.
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
    Endpoint::from_static("http://embedded")
        .initial_stream_window_size(STREAM_WINDOW_BYTES)
        .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
        .connect_with_connector_lazy(connector)
}

/// Removes the embedded worker from the pool while its device is hung, as a worker process does by
/// leaving.
pub async fn keep_while_well(
    pool: Arc<Pool>,
    mut is_well: watch::Receiver<bool>,
    channel: Channel,
    device: String,
) {
    while is_well.changed().await.is_ok() {
        match *is_well.borrow_and_update() {
            true => pool.embed(channel.clone(), &device),
            false => pool.let_embedded_go(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::coordinator::workers::pool::Home;
    use std::time::Duration;
    use superbatch_proto::v1::Reason;

    #[tokio::test]
    async fn a_hung_device_leaves_the_pool_and_comes_back() {
        let pool = Arc::new(Pool::new(
            Duration::from_secs(1),
            Duration::ZERO,
            Home::default(),
        ));
        let channel = Endpoint::from_static("http://embedded").connect_lazy();
        pool.embed(channel.clone(), "cuda:0");
        for is_well in [false, true] {
            let (tell, told) = watch::channel(!is_well);
            tell.send_replace(is_well);
            // What was told before is heard still.
            drop(tell);
            keep_while_well(pool.clone(), told, channel.clone(), "cuda:0".to_owned()).await;
            assert_eq!(
                pool.one_on("cuda").await.map_err(|e| e.reason()).err(),
                (!is_well).then_some(Reason::NoWorkers)
            );
        }
    }
}
