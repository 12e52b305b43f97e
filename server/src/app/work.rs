//! `superbatch worker`: a scoring worker in a process of its own.
use super::{
    Shutdown,
    ground::{Ground, Sockets},
    health, tell_build, tls,
    transport::{builder, drain, drain_within, reflection, tell_health},
};
use crate::{
    access::{Access, audit::Audit, tokens::new_secret},
    config::{Config, WorkerRoleConfig},
    error::{Error, Result},
    metrics::{self, Process},
    storage::{Wrap, metered, nonce},
    worker::{Superior, Worker, keep_registered},
};
use futures::future::FutureExt;
use std::{future::Future, net::SocketAddr, sync::Arc};
use superbatch_proto::v1::{
    RegisterRequest, delivery_service_server::DeliveryServiceServer,
    worker_service_server::WorkerServiceServer,
};
use superbatch_transport::{Authorized, Bearer};
use tokio::sync::{Notify, oneshot};
use tonic::server::NamedService;

const WORKED: [&str; 2] = [
    WorkerServiceServer::<Worker>::NAME,
    DeliveryServiceServer::<Worker>::NAME,
];

/// A scoring worker, bound and ready to run.
pub struct Work {
    ground: Ground,
    worker: Worker,
}

impl Work {
    /// As [`Serve::build`], for a worker.
    pub async fn build(config: Config) -> Result<Self> {
        Self::build_on(config, Arc::new(metered)).await
    }

    /// As [`Serve::build_on`], for a worker.
    pub async fn build_on(config: Config, wrap: Wrap) -> Result<Self> {
        let WorkerRoleConfig {
            listen,
            metrics_listen,
            ..
        } = config.worker_role;
        let sockets = Sockets {
            section: "worker_role.",
            listen,
            metrics_listen,
        };
        let ground = Ground::build(config, sockets, wrap).await?;
        let stores = ground.stores_of_worker().await?;
        let worker = Worker::new(&ground.config.worker, stores, ground.state.clone())?;
        metrics::begin(Process::Worker);
        tell_build(&worker.info().device);
        Ok(Self { ground, worker })
    }

    /// Returns the address for the coordinator.
    pub fn address(&self) -> SocketAddr {
        self.ground.address
    }

    /// Returns [`Work::address`] as a URI.
    pub fn uri(&self) -> String {
        self.ground.uri()
    }

    pub fn metrics_address(&self) -> Option<SocketAddr> {
        self.ground.http.as_ref().map(super::http::Http::address)
    }

    /// Scores until `shutdown`: stays registered, then leaves and drains.
    ///
    /// # Errors
    /// The coordinator's refusal of the worker. The worker then ends as it does at `shutdown`.
    pub async fn run(self, shutdown: impl Future<Output = ()> + Send + 'static) -> Result<()> {
        let refused = Arc::new(Notify::new());
        let until = refused.clone();
        let shutdown = async move {
            tokio::select! {
                () = shutdown => {}
                () = until.notified() => {}
            }
        };
        let shutdown: Shutdown = shutdown.boxed().shared();
        let (health, health_service) = tonic_health::server::health_reporter();
        health::begin(&health, &WORKED).await;
        // Sent to the coordinator only, at registration. It is new at each start, so an old
        // coordinator or a copied log cannot call this worker.
        let secret = new_secret();
        let (keeping, well) = (
            self.keep_registered(&secret, shutdown.clone())?,
            self.worker.is_well(),
        );
        let registered =
            tokio::spawn(async move { keeping.await.inspect_err(|_| refused.notify_one()) });
        let telling_health = tokio::spawn(tell_health(well, health.clone(), &WORKED));
        let router = builder(&Access::require_secret(&secret))
            .add_routes(reflection(&WORKED)?)
            .add_service(health_service.clone())
            .add_service(self.worker.service())
            .add_service(self.worker.delivery());
        let grace = self.ground.config.coordinator.grace();
        let beside = (health_service, Access::allow_everybody(Audit::default()));
        let (incoming, _beside) = self.ground.listen(&shutdown, beside);
        let (worker, (tell, ended)) = (self.worker.clone(), oneshot::channel());
        let leave = async move {
            // Registration has reported that the worker leaves. If its task panicked, the panic was
            // logged.
            let _ = tell.send(registered.await.unwrap_or(Ok(())));
            telling_health.abort();
            worker.stop();
        };
        let (drained, stopping) = drain(shutdown, health, &WORKED, leave);
        let served = router.serve_with_incoming_shutdown(incoming, drained);
        drain_within(served, stopping, grace).await?;
        // If the worker did not leave by itself, there is no refusal to return.
        ended.await.unwrap_or(Ok(()))
    }

    fn keep_registered(
        &self,
        secret: &str,
        shutdown: Shutdown,
    ) -> Result<impl Future<Output = Result<()>> + Send + use<>> {
        let (role, ground) = (&self.ground.config.worker_role, &self.ground);
        let registration = RegisterRequest {
            address: role
                .advertise_address
                .clone()
                .unwrap_or_else(|| ground.uri()),
            incarnation: nonce(),
            device: self.worker.info().device,
            leaving: false,
            build: env!("CARGO_PKG_VERSION").to_owned(),
            state_id: ground.state_id.clone(),
            state_uri: ground.state.uri().to_owned(),
            token: secret.to_owned(),
            ticket_key: self.worker.ticket_key(),
        };
        let bearer = match &role.token_file {
            Some(path) => Bearer::file(path.clone())
                .map_err(|e| Error::invalid("worker_role.token_file", e.to_string()))?,
            None => Bearer::default(),
        };
        let dialer = tls::dialer_towards_processes(&ground.config.tls)?;
        let channel = dialer.connect_lazy(&role.coordinator, |endpoint| endpoint);
        let channel = channel.map_err(|e| {
            let message = format!(
                "worker_role.coordinator is '{}'; give http://host:port",
                role.coordinator
            );
            Error::invalid("worker_role.coordinator", message).because(e)
        })?;
        let coordinator = Superior {
            uri: role.coordinator.clone(),
            channel: Authorized::new(channel, bearer),
        };
        Ok(keep_registered(
            coordinator,
            registration,
            self.worker.is_well(),
            shutdown,
        ))
    }
}
