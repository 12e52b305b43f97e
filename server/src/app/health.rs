//! `grpc.health.v1.Health` on a plain port of its own, for probes that know neither TLS nor tokens.
//! It says whether this process serves, and nothing else.
use super::{
    listen::{self, Bounds},
    transport,
};
use crate::error::{Error, Result};
use std::net::SocketAddr;
use tokio::net::TcpListener;
use tonic_health::{
    ServingStatus,
    pb::health_server::{Health, HealthServer},
    server::HealthReporter,
};

/// The service name that reports SERVING as long as the process lives.
pub(super) const LIVENESS: &str = "liveness";
/// The service name that reports SERVING as long as the process takes calls.
pub(super) const READINESS: &str = "readiness";
/// Probes need few connections.
const CONNECTIONS_MAX: usize = 64;

pub(super) struct Port {
    listener: TcpListener,
    address: SocketAddr,
}

impl Port {
    pub(super) async fn bind(address: SocketAddr) -> Result<Self> {
        let listener = super::bind(address, "health_listen").await?;
        let address = listener
            .local_addr()
            .map_err(|e| Error::internal("a bound socket has no address").because(e))?;
        Ok(Self { listener, address })
    }

    pub(super) fn address(&self) -> SocketAddr {
        self.address
    }

    /// Serves for as long as it is polled, also while the process drains.
    pub(super) async fn run(self, health: HealthServer<impl Health>) {
        let incoming = listen::incoming(self.listener, None, Bounds::of(CONNECTIONS_MAX));
        let server = transport::probes().add_service(health);
        if let Err(error) = server.serve_with_incoming(incoming).await {
            tracing::error!(%error, "serving health failed");
        }
    }
}

/// Reports that the process serves.
pub(super) async fn begin(health: &HealthReporter, services: &[&str]) {
    for name in services.iter().copied().chain([LIVENESS, READINESS]) {
        health
            .set_service_status(name, ServingStatus::Serving)
            .await;
    }
}
