//! The processes: a coordinator with its embedded worker (`superbatch serve`), and a worker (`superbatch worker`). Wiring is
//! here and nowhere else; every part gets its config and what it stands on.
mod embedded;
mod http;

use crate::{
    config::{Config, CoordinatorConfig, WorkerRoleConfig},
    coordinator::{
        limits::Limits,
        owner::Identity,
        pool::Pool,
        ready::Budget,
        registry::Coordinator,
        run::Deps,
        selector::{LocalSelector, Selector, WorkerSelector},
        service::{Selection, WorkerPlane},
        upkeep::upkeep,
    },
    error::{Error, Result},
    metrics,
    storage::{Location, Stores, Wrap, metered, nonce, probe},
    worker::{Worker, keep_registered},
};
use futures::future::{BoxFuture, FutureExt, Shared};
use rand::SeedableRng;
use std::{future::Future, net::SocketAddr, sync::Arc, time::Duration};
use superbatch_proto::{
    CONNECTION_WINDOW_BYTES, FRAME_BYTES_MAX, MESSAGE_BYTES_MAX, STREAM_WINDOW_BYTES,
    v1::{
        FILE_DESCRIPTOR_SET, Reason, RegisterRequest, coordinator_service_server::CoordinatorServiceServer,
        selection_service_server::SelectionServiceServer, worker_service_server::WorkerServiceServer,
    },
};
use tokio::{
    net::TcpListener,
    sync::{oneshot, watch},
};
use tonic::{
    Code, Status,
    body::Body,
    codegen::http::Response,
    server::NamedService,
    service::Routes,
    transport::{Endpoint, Server, server::TcpIncoming},
};
use tonic_health::server::HealthReporter;
use tower::{
    layer::util::{Identity as NoLayer, Stack},
    util::MapResponseLayer,
};

/// How long a call waits for a first worker.
const WORKER_PATIENCE: Duration = Duration::from_secs(30);

/// A future that ends when the process should.
type Shutdown = Shared<BoxFuture<'static, ()>>;

/// Where a process listens, and the section of the config that says so.
struct Sockets {
    section: &'static str,
    listen: SocketAddr,
    metrics_listen: Option<SocketAddr>,
}

/// What both kinds of process stand on.
struct Ground {
    config: Config,
    stores: Stores,
    state: Location,
    listener: TcpListener,
    address: SocketAddr,
    http: Option<http::Http>,
}

impl Ground {
    async fn build(config: Config, sockets: Sockets, wrap: Wrap) -> Result<Self> {
        let Sockets { section, listen, metrics_listen } = sockets;
        config.validate()?;
        // Before anything is counted.
        metrics::install();
        let stores = Stores::wrapped(config.storage.clone(), wrap);
        let state = stores.open(&config.state_uri()?)?;
        probe(&state).await?;
        let listener = bind(listen, &format!("{section}listen")).await?;
        let address = listener.local_addr().map_err(|e| Error::internal("a bound socket has no address").because(e))?;
        let http = match metrics_listen {
            Some(listen) => Some(http::Http::bind(listen, &format!("{section}metrics_listen")).await?),
            None => None,
        };
        Ok(Self { config, stores, state, listener, address, http })
    }
}

/// A coordinator, bound and ready to run.
pub struct Serve {
    ground: Ground,
    coordinator: Arc<Coordinator>,
}

impl Serve {
    /// Opens the state, binds the sockets and starts the embedded worker's device.
    ///
    /// # Errors
    /// Whatever makes the config unusable: a port in use, a store that is unreachable or overwrites, a device that is not there.
    pub async fn build(config: Config) -> Result<Self> {
        Self::build_on(config, Arc::new(metered)).await
    }

    /// As [`Serve::build`], on stores that are wrapped by `wrap`.
    ///
    /// # Errors
    /// Those of [`Serve::build`].
    pub async fn build_on(config: Config, wrap: Wrap) -> Result<Self> {
        let sockets = Sockets { section: "", listen: config.listen, metrics_listen: config.metrics_listen };
        let ground = Ground::build(config, sockets, wrap).await?;
        let settings = &ground.config.coordinator;
        let pool = Arc::new(Pool::new(Duration::from_secs_f64(settings.lease_seconds), WORKER_PATIENCE));
        let mut device = "cpu".to_owned();
        if settings.workers_embedded {
            let worker = Worker::new(&ground.config.worker, ground.stores.clone(), ground.state.clone())?;
            device = worker.info().device;
            let (well, channel) = (worker.is_well(), embedded::connect(worker));
            pool.embed(channel.clone(), &device);
            tokio::spawn(embedded::keep_while_well(pool.clone(), well, channel, device.clone()));
        }
        let on_worker = match settings.selector_device.as_str() {
            "worker" => Some(""),
            "cuda" => Some("cuda"),
            "auto" if device.starts_with("cuda") => Some("cuda"),
            _ => None,
        };
        let local = LocalSelector::new(0)?;
        let selector: Arc<dyn Selector> = match on_worker {
            Some(device) => Arc::new(WorkerSelector { pool: pool.clone(), local, device }),
            None => Arc::new(local),
        };
        tell_build(&device);
        let advertised = settings.advertise_address.clone();
        let identity =
            Identity { address: advertised.unwrap_or_else(|| format!("http://{}", ground.address)), instance: nonce() };
        let deps = Deps {
            pool,
            selector,
            ready: Budget::new(settings.ready_bytes_max),
            limits: limits(settings),
            sizing: Arc::default(),
        };
        let (stores, state) = (ground.stores.clone(), ground.state.clone());
        let coordinator = Coordinator::new(deps, stores, state, identity);
        Ok(Self { ground, coordinator })
    }

    /// Where trainers connect.
    pub fn address(&self) -> SocketAddr {
        self.ground.address
    }

    pub fn metrics_address(&self) -> Option<SocketAddr> {
        self.ground.http.as_ref().map(http::Http::address)
    }

    /// Serves until `shutdown`, then drains within the grace period.
    pub async fn run(self, shutdown: impl Future<Output = ()> + Send + 'static) -> Result<()> {
        let shutdown: Shutdown = shutdown.boxed().shared();
        let (health, health_service) = tonic_health::server::health_reporter();
        health.set_serving::<SelectionServiceServer<Selection>>().await;
        let selection = SelectionServiceServer::new(Selection(self.coordinator.clone()))
            .max_decoding_message_size(MESSAGE_BYTES_MAX)
            .max_encoding_message_size(MESSAGE_BYTES_MAX);
        let router = builder()
            .add_routes(reflection()?)
            .add_service(health_service)
            .add_service(CoordinatorServiceServer::new(WorkerPlane(self.coordinator.clone())))
            .add_service(selection);
        let coordinator = self.coordinator;
        let grace = Duration::from_secs_f64(self.ground.config.coordinator.grace_seconds);
        let http = self.ground.http.map(|http| tokio::spawn(http.run(shutdown.clone())));
        let upkeep = tokio::spawn(upkeep(coordinator.clone()));
        let let_go = async move {
            upkeep.abort();
            coordinator.stop().await;
        };
        let (drained, stopping) = drain(shutdown, health, SelectionServiceServer::<Selection>::NAME, let_go);
        let served = router
            .serve_with_incoming_shutdown(TcpIncoming::from(self.ground.listener).with_nodelay(Some(true)), drained);
        within(served, stopping, grace).await?;
        if let Some(http) = http {
            http.abort();
        }
        Ok(())
    }
}

/// A scoring worker, bound and ready to run.
pub struct Work {
    ground: Ground,
    worker: Worker,
}

impl Work {
    /// As [`Serve::build`], for a worker.
    pub async fn build(config: Config) -> Result<Self> {
        let WorkerRoleConfig { listen, metrics_listen, .. } = config.worker_role;
        let sockets = Sockets { section: "worker_role.", listen, metrics_listen };
        let ground = Ground::build(config, sockets, Arc::new(metered)).await?;
        let worker = Worker::new(&ground.config.worker, ground.stores.clone(), ground.state.clone())?;
        tell_build(&worker.info().device);
        Ok(Self { ground, worker })
    }

    /// Where the coordinator connects.
    pub fn address(&self) -> SocketAddr {
        self.ground.address
    }

    pub fn metrics_address(&self) -> Option<SocketAddr> {
        self.ground.http.as_ref().map(http::Http::address)
    }

    /// Scores until `shutdown`: stays registered, then leaves and drains.
    pub async fn run(self, shutdown: impl Future<Output = ()> + Send + 'static) -> Result<()> {
        let shutdown: Shutdown = shutdown.boxed().shared();
        let (health, health_service) = tonic_health::server::health_reporter();
        health.set_serving::<WorkerServiceServer<Worker>>().await;
        let role = &self.ground.config.worker_role;
        let advertised = role.advertise_address.clone();
        let registration = RegisterRequest {
            address: advertised.unwrap_or_else(|| format!("http://{}", self.ground.address)),
            incarnation: nonce(),
            device: self.worker.info().device,
            leaving: false,
            build: env!("CARGO_PKG_VERSION").to_owned(),
        };
        let coordinator = Endpoint::from_shared(role.coordinator.clone()).map_err(|e| {
            let message = format!("worker_role.coordinator is '{}'; give http://host:port", role.coordinator);
            Error::invalid("worker_role.coordinator", message).because(e)
        })?;
        let rng = rand::rngs::StdRng::from_os_rng();
        let well = self.worker.is_well();
        let registered = tokio::spawn(keep_registered(coordinator, registration, well.clone(), rng, shutdown.clone()));
        let told = tokio::spawn(tell_health(well, health.clone()));
        let router = builder().add_routes(reflection()?).add_service(health_service).add_service(self.worker.service());
        let grace = Duration::from_secs_f64(self.ground.config.coordinator.grace_seconds);
        let http = self.ground.http.map(|http| tokio::spawn(http.run(shutdown.clone())));
        let worker = self.worker.clone();
        let leave = async move {
            // It has told the coordinator that it goes; a task that failed has told its log.
            drop(registered.await);
            told.abort();
            worker.stop();
        };
        let (drained, stopping) = drain(shutdown, health, WorkerServiceServer::<Worker>::NAME, leave);
        let served = router
            .serve_with_incoming_shutdown(TcpIncoming::from(self.ground.listener).with_nodelay(Some(true)), drained);
        within(served, stopping, grace).await?;
        if let Some(http) = http {
            http.abort();
        }
        Ok(())
    }
}

/// Not serving while the device is hung.
async fn tell_health(mut is_well: watch::Receiver<bool>, health: HealthReporter) {
    while is_well.changed().await.is_ok() {
        let serving = match *is_well.borrow_and_update() {
            true => tonic_health::ServingStatus::Serving,
            false => tonic_health::ServingStatus::NotServing,
        };
        for name in [WorkerServiceServer::<Worker>::NAME, ""] {
            health.set_service_status(name, serving).await;
        }
    }
}

fn tell_build(device: &str) {
    let kind = if device.starts_with("cuda") { "cuda" } else { "cpu" };
    metrics::build_info(env!("CARGO_PKG_VERSION"), kind).set(1.0);
}

fn limits(settings: &CoordinatorConfig) -> Arc<Limits> {
    Arc::new(Limits {
        super_batch_size_max: settings.super_batch_size_max,
        sub_batch_size_max: settings.sub_batch_size_max,
        push_bytes_max: settings.push_bytes_max,
        push_deadline: Duration::from_secs_f64(settings.push_deadline_seconds),
        runs_max: settings.max_runs as usize,
        need_deadline_seconds: settings.need_deadline_seconds,
        snapshots_kept: settings.snapshots_kept.into(),
    })
}

type Mended = MapResponseLayer<fn(Response<Body>) -> Response<Body>>;

fn builder() -> Server<Stack<Mended, NoLayer>> {
    let server = Server::builder()
        .http2_keepalive_interval(Some(Duration::from_secs(20)))
        .initial_stream_window_size(STREAM_WINDOW_BYTES)
        .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
        .max_frame_size(FRAME_BYTES_MAX);
    server.layer(MapResponseLayer::new(too_large))
}

/// Gives the transport's refusal of a message over its limit a reason: it comes as OUT_OF_RANGE without any, which is the code
/// of the end of the data.
fn too_large(response: Response<Body>) -> Response<Body> {
    match Status::from_header_map(response.headers()) {
        Some(status) if status.code() == Code::OutOfRange && status.details().is_empty() => {
            let message = format!("{}; send less at a time", status.message());
            Status::from(Error::new(Reason::MessageTooLarge, message)).into_http()
        }
        _ => response,
    }
}

/// Reflection, under its name of today and the one that older clients know.
fn reflection() -> Result<Routes> {
    let descriptors = || {
        tonic_reflection::server::Builder::configure()
            .register_encoded_file_descriptor_set(FILE_DESCRIPTOR_SET)
            .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
    };
    let damaged = |e| Error::internal("the protocol's descriptors are damaged").because(e);
    let (v1, v1alpha) = (descriptors().build_v1().map_err(damaged)?, descriptors().build_v1alpha().map_err(damaged)?);
    Ok(Routes::new(v1).add_service(v1alpha))
}

/// The order of a shutdown: NOT_SERVING first, then let go of what waits, then stop accepting. The receiver tells when it began.
fn drain(
    shutdown: Shutdown,
    mut health: HealthReporter,
    service: &'static str,
    let_go: impl Future<Output = ()> + Send + 'static,
) -> (impl Future<Output = ()> + Send, oneshot::Receiver<()>) {
    let (began, stopping) = oneshot::channel();
    let drained = async move {
        shutdown.await;
        tracing::info!("draining");
        // The empty name is the whole server's.
        for name in [service, ""] {
            health.set_service_status(name, tonic_health::ServingStatus::NotServing).await;
        }
        // A receiver that is gone needs no telling.
        let _ = began.send(());
        let_go.await;
        // Else clients that watch the health would hold the process for the whole grace period.
        for name in [service, ""] {
            health.clear_service_status(name).await;
        }
    };
    (drained, stopping)
}

async fn within(
    served: impl Future<Output = Result<(), tonic::transport::Error>>,
    stopping: oneshot::Receiver<()>,
    grace: Duration,
) -> Result<()> {
    let patience = async {
        match stopping.await {
            Ok(()) => tokio::time::sleep(grace).await,
            Err(_) => std::future::pending().await,
        }
    };
    tokio::select! {
        ended = served => ended.map_err(|e| Error::internal("serving failed").because(e)),
        () = patience => {
            tracing::warn!(seconds = grace.as_secs_f64(), "calls were still open after the grace period");
            Ok(())
        }
    }
}

async fn bind(address: SocketAddr, field: &str) -> Result<TcpListener> {
    TcpListener::bind(address).await.map_err(|e| {
        let message = format!("cannot listen on {address}; stop what uses that port, or set `{field}` to another");
        Error::invalid(field, message).because(e)
    })
}
