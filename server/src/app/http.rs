//! The plain HTTP side: `/metrics` for Prometheus, `/livez` and `/readyz` for probes. All answer
//! until the process ends.
use super::{Shutdown, bind};
use crate::{
    error::{Error, Result},
    metrics,
};
use axum::{Router, http::StatusCode, routing::get};
use futures::FutureExt;
use std::{future, net::SocketAddr};
use tokio::net::TcpListener;

pub struct Http {
    listener: TcpListener,
    address: SocketAddr,
}

impl Http {
    /// `field` is the setting that holds the address.
    pub async fn bind(address: SocketAddr, field: &str) -> Result<Self> {
        let listener = bind(address, field).await?;
        let address = listener
            .local_addr()
            .map_err(|e| Error::internal("a bound socket has no address").because(e))?;
        Ok(Self { listener, address })
    }

    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Serves for as long as it is polled. From `shutdown` on `/readyz` says 503, so that nobody
    /// sends new calls; calls that are under way are still to be seen.
    pub async fn run(self, shutdown: Shutdown) {
        let handle = metrics::install();
        let router = Router::new()
            .route("/metrics", get(move || async move { handle.render() }))
            .route("/livez", get(|| async { "ok" }))
            .route("/readyz", get(move || future::ready(readiness(&shutdown))));
        if let Err(error) = axum::serve(self.listener, router).await {
            tracing::error!(error = %error, "serving metrics failed");
        }
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
    use tokio::{
        io::{AsyncReadExt, AsyncWriteExt},
        net::TcpStream,
        sync::oneshot,
    };

    /// The status of an answer.
    async fn get(address: SocketAddr, path: &str) -> String {
        let mut stream = TcpStream::connect(address).await.unwrap();
        stream
            .write_all(format!("GET {path} HTTP/1.0\r\n\r\n").as_bytes())
            .await
            .unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        answer.split(' ').nth(1).unwrap().to_owned()
    }

    #[tokio::test]
    async fn a_process_that_stops_is_seen_until_its_end() {
        let http = Http::bind("127.0.0.1:0".parse().unwrap(), "metrics_listen")
            .await
            .unwrap();
        let address = http.address();
        let (stop, stopped) = oneshot::channel::<()>();
        tokio::spawn(http.run(stopped.map(drop).boxed().shared()));
        for (path, expected) in [("/metrics", "200"), ("/livez", "200"), ("/readyz", "200")] {
            assert_eq!(get(address, path).await, expected, "{path}");
        }
        stop.send(()).unwrap();
        for (path, expected) in [("/readyz", "503"), ("/metrics", "200"), ("/livez", "200")] {
            assert_eq!(get(address, path).await, expected, "{path}");
        }
    }
}
