//! The plain HTTP side: `/metrics` for Prometheus, `/livez` and `/readyz` for probes.
use super::{Shutdown, bind};
use crate::{
    error::{Error, Result},
    metrics,
};
use axum::{Router, routing::get};
use std::net::SocketAddr;
use tokio::net::TcpListener;

pub struct Http {
    listener: TcpListener,
    address: SocketAddr,
}

impl Http {
    /// `field` is the setting that holds the address.
    pub async fn bind(address: SocketAddr, field: &str) -> Result<Self> {
        let listener = bind(address, field).await?;
        let address = listener.local_addr().map_err(|e| Error::internal("a bound socket has no address").because(e))?;
        Ok(Self { listener, address })
    }

    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Serves until `shutdown`.
    pub async fn run(self, shutdown: Shutdown) {
        let handle = metrics::install();
        let router = Router::new()
            .route("/metrics", get(move || async move { handle.render() }))
            .route("/livez", get(|| async { "ok" }))
            .route("/readyz", get(|| async { "ok" }));
        if let Err(error) = axum::serve(self.listener, router).with_graceful_shutdown(shutdown).await {
            tracing::error!(error = %error, "serving metrics failed");
        }
    }
}
