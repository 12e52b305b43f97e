//! The plain HTTP side: `/metrics` for Prometheus, `/livez` and `/readyz` for probes. All answer
//! until the process ends.
use super::{Shutdown, bind};
use crate::{
    access::{
        Access, Peer,
        scope::{Need, Scope},
    },
    error::{Error, Result},
    metrics, process,
};
use axum::{
    Extension, Router,
    http::{HeaderMap, StatusCode, header::AUTHORIZATION},
    routing::get,
};
use futures::FutureExt;
use hyper::server::conn::http1;
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    service::TowerToHyperService,
};
use std::{future, net::SocketAddr, sync::Arc, time::Duration};
use superbatch_proto::v1::Reason;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpListener,
    sync::Semaphore,
};

/// See [`Http::head`].
pub(super) const HEAD: Duration = Duration::from_secs(30);
/// Connections at a time; further ones are closed. Scrapers and probes need a few.
const CONNECTIONS_MAX: usize = 64;
/// Largest head of a request, in bytes.
const HEAD_BYTES_MAX: usize = 16 << 10;
/// The wait after a failure to accept, such as too many open files.
const ACCEPT_AGAIN: Duration = Duration::from_millis(100);

pub(super) struct Http {
    listener: TcpListener,
    address: SocketAddr,
    /// How long a request's head may take, and the wait for the next one on a connection.
    head: Duration,
}

impl Http {
    /// Binds the port. `field` is the setting that holds the address.
    pub(super) async fn bind(address: SocketAddr, field: &str) -> Result<Self> {
        let listener = bind(address, field).await?;
        let address = listener
            .local_addr()
            .map_err(|e| Error::internal("a bound socket has no address").because(e))?;
        Ok(Self {
            listener,
            address,
            head: HEAD,
        })
    }

    pub(super) fn address(&self) -> SocketAddr {
        self.address
    }

    /// Serves for as long as it is polled. From `shutdown` on `/readyz` answers 503, so that load
    /// balancers send no new calls, while `/metrics` still shows the calls that are under way.
    /// `/metrics` answers callers that `access` admits.
    pub(super) async fn run(self, shutdown: Shutdown, access: Access) {
        let handle = metrics::install();
        let scraped = move |Extension(peer): Extension<Peer>, headers: HeaderMap| {
            let answer = match admitted(&access, peer, &headers) {
                Ok(()) => {
                    process::observe();
                    (StatusCode::OK, handle.render())
                }
                Err(error) => (refusal(&error), format!("{error}\n")),
            };
            future::ready(answer)
        };
        let router = Router::new()
            .route("/metrics", get(scraped))
            .route("/livez", get(|| async { "ok" }))
            .route("/readyz", get(move || future::ready(readiness(&shutdown))));
        let room = Arc::new(Semaphore::new(CONNECTIONS_MAX));
        loop {
            match self.listener.accept().await {
                Ok((stream, address)) => {
                    let Ok(permit) = room.clone().try_acquire_owned() else {
                        metrics::connections_refused("limit").increment(1);
                        continue;
                    };
                    let peer = Peer {
                        address: Some(address),
                    };
                    let router = router.clone().layer(Extension(peer));
                    let head = self.head;
                    tokio::spawn(async move {
                        serve(stream, router, head).await;
                        drop(permit);
                    });
                }
                Err(error) => {
                    tracing::warn!(%error, "cannot accept a connection for metrics");
                    tokio::time::sleep(ACCEPT_AGAIN).await;
                }
            }
        }
    }
}

/// Serves HTTP/1.1 on one connection. `head` is how long a request's head may take, and the wait
/// for the next one.
pub(super) async fn serve<S>(stream: S, router: Router, head: Duration)
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let mut http = http1::Builder::new();
    http.timer(TokioTimer::new())
        .header_read_timeout(head)
        .max_buf_size(HEAD_BYTES_MAX);
    let service = TowerToHyperService::new(router);
    let served = http.serve_connection(TokioIo::new(stream), service);
    if let Err(error) = served.await {
        tracing::debug!(%error, "an HTTP connection ended early");
    }
}

fn admitted(access: &Access, peer: Peer, headers: &HeaderMap) -> Result<()> {
    let header = headers.get(AUTHORIZATION).and_then(|h| h.to_str().ok());
    access
        .admit(Need::Scope(Scope::Admin), header, peer)
        .map(drop)
}

fn refusal(error: &Error) -> StatusCode {
    match error.reason() {
        Reason::Unauthenticated => StatusCode::UNAUTHORIZED,
        Reason::PermissionDenied => StatusCode::FORBIDDEN,
        _ => StatusCode::TOO_MANY_REQUESTS,
    }
}

fn readiness(shutdown: &Shutdown) -> (StatusCode, &'static str) {
    match shutdown.clone().now_or_never() {
        None => (StatusCode::OK, "ok"),
        Some(()) => (StatusCode::SERVICE_UNAVAILABLE, "stopping"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::access::audit::Audit;
    use tokio::{
        io::{AsyncReadExt, AsyncWriteExt},
        net::TcpStream,
        sync::oneshot,
    };

    /// The status of an answer.
    async fn get(address: SocketAddr, path: &str, header: &str) -> String {
        let mut stream = TcpStream::connect(address).await.unwrap();
        stream
            .write_all(format!("GET {path} HTTP/1.0\r\n{header}\r\n").as_bytes())
            .await
            .unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        answer.split(' ').nth(1).unwrap().to_owned()
    }

    async fn start(access: Access) -> (SocketAddr, oneshot::Sender<()>) {
        start_with(access, HEAD).await
    }

    async fn start_with(access: Access, head: Duration) -> (SocketAddr, oneshot::Sender<()>) {
        let mut http = Http::bind("127.0.0.1:0".parse().unwrap(), "metrics_listen")
            .await
            .unwrap();
        http.head = head;
        let address = http.address();
        let (stop, stopped) = oneshot::channel::<()>();
        tokio::spawn(http.run(stopped.map(drop).boxed().shared(), access));
        (address, stop)
    }

    #[tokio::test]
    async fn a_process_that_stops_is_seen_until_its_end() {
        let (address, stop) = start(Access::allow_everybody(Audit::default())).await;
        for (path, expected) in [("/metrics", "200"), ("/livez", "200"), ("/readyz", "200")] {
            assert_eq!(get(address, path, "").await, expected, "{path}");
        }
        stop.send(()).unwrap();
        for (path, expected) in [("/readyz", "503"), ("/metrics", "200"), ("/livez", "200")] {
            assert_eq!(get(address, path, "").await, expected, "{path}");
        }
    }

    #[tokio::test]
    async fn metrics_may_need_a_token_and_probes_do_not() {
        let (address, _stop) = start(Access::require_secret("secret")).await;
        let good = "Authorization: Bearer secret\r\n";
        let bad = "Authorization: Bearer guess\r\n";
        assert_eq!(get(address, "/metrics", "").await, "401");
        assert_eq!(get(address, "/metrics", bad).await, "401");
        assert_eq!(get(address, "/metrics", good).await, "200");
        assert_eq!(get(address, "/livez", "").await, "200");
    }

    #[tokio::test]
    async fn a_head_that_does_not_end_is_not_waited_for() {
        let everybody = Access::allow_everybody(Audit::default());
        let (address, _stop) = start_with(everybody, Duration::from_millis(20)).await;
        let mut slow = TcpStream::connect(address).await.unwrap();
        slow.write_all(b"GET /metrics HTTP/1.1\r\nx-slow: ")
            .await
            .unwrap();
        let mut answer = Vec::new();
        // It ends, whatever was said.
        drop(slow.read_to_end(&mut answer).await);
        assert!(!answer.starts_with(b"HTTP/1.1 200"));
    }
}
