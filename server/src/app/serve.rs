//! `superbatch serve`: a coordinator, by default with a worker in the same process.
use super::{
    Shutdown, embedded,
    ground::{Ground, Sockets},
    health, http,
    page::{RunPage, access},
    tell_build, tls,
    transport::{builder, drain, drain_within, reflection},
};
use crate::{
    access::{Access, audit::Audit},
    allocator,
    config::{Config, CoordinatorConfig, environment},
    coordinator::{
        facts::owner::Identity,
        runs::{deps::Deps, limits::Limits, registry::Coordinator, upkeep::upkeep},
        select::{Selector, local::LocalSelector, remote::WorkerSelector},
        serve::ready::Budget,
        service::{Selection, WorkerPlane},
        workers::{
            pool::{Home, Pool},
            replies::Replies,
        },
    },
    error::Result,
    metrics::{self, Process},
    process,
    storage::{Wrap, metered, nonce},
    worker::Worker,
};
use futures::future::FutureExt;
use std::{future::Future, net::SocketAddr, sync::Arc, time::Duration};
use superbatch_proto::{
    MESSAGE_BYTES_MAX,
    v1::{
        coordinator_service_server::CoordinatorServiceServer,
        selection_service_server::SelectionServiceServer,
    },
};
use tonic::server::NamedService;

/// How many times `ready_bytes_max` the chosen rows of one slice may take. A step of that size is
/// still served, but no other batch is kept in memory beside it.
const ROWS_OF_BUDGET: u64 = 8;
/// The bytes that the chosen rows of one slice may always take. A limit is needed because a worker
/// sends them: a faulty worker could otherwise stream rows until the coordinator's memory is full.
const ROWS_BYTES: u64 = 2 << 30;
/// How long a call waits for the first worker to register.
const WORKER_PATIENCE: Duration = Duration::from_secs(30);

const SERVED: [&str; 2] = [
    SelectionServiceServer::<Selection>::NAME,
    CoordinatorServiceServer::<WorkerPlane>::NAME,
];

/// A coordinator, bound and not yet serving.
pub struct Serve {
    ground: Ground,
    page: Option<RunPage>,
    coordinator: Arc<Coordinator>,
    access: Access,
}

/// Makes the pool of workers, which is empty at first.
fn pool(ground: &Ground) -> Result<Pool> {
    let settings = &ground.config.coordinator;
    let home = Home {
        id: ground.state_id.clone(),
        uri: ground.state.uri().to_owned(),
    };
    let replies = Replies {
        silence_max: Duration::from_secs_f64(settings.worker_silence_seconds),
        rows_bytes_max: settings
            .ready_bytes_max
            .saturating_mul(ROWS_OF_BUDGET)
            .max(ROWS_BYTES),
    };
    let lease = Duration::from_secs_f64(settings.lease_seconds);
    Ok(Pool::new(lease, WORKER_PATIENCE, home)
        .with_replies(replies)
        .dialing(tls::towards_workers(&ground.config.tls)?))
}

impl Serve {
    /// Opens the state, binds the sockets and starts the embedded worker's device.
    ///
    /// # Errors
    /// Every cause that makes the config unusable: a port in use, a store that is unreachable or
    /// overwrites, a missing device.
    pub async fn build(config: Config) -> Result<Self> {
        Self::build_on(config, Arc::new(metered)).await
    }

    /// As [`Serve::build`], on stores that are wrapped by `wrap`.
    ///
    /// # Errors
    /// Those of [`Serve::build`].
    pub async fn build_on(config: Config, wrap: Wrap) -> Result<Self> {
        let sockets = Sockets {
            section: "",
            listen: config.listen,
            metrics_listen: config.metrics_listen,
        };
        let ground = Ground::build(config, sockets, wrap).await?;
        let settings = &ground.config.coordinator;
        let pool = Arc::new(pool(&ground)?);
        metrics::begin(Process::Coordinator);
        let device = if settings.workers_embedded {
            embed(&ground, &pool).await?
        } else {
            allocator::give_back_large_buffers(environment());
            "cpu".to_owned()
        };
        let selector = selector(settings, &pool, &device)?;
        tell_build(&device);
        let advertised = settings.advertise_address.clone();
        let identity = Identity {
            address: advertised.unwrap_or_else(|| ground.uri()),
            instance: nonce(),
            dialer: tls::dialer_towards_processes(&ground.config.tls)?,
        };
        let ready = Budget::new(settings.ready_bytes_max);
        let held = Arc::downgrade(&ready);
        process::budget("ready", settings.ready_bytes_max, move || {
            held.upgrade().map(|ready| ready.bytes())
        });
        let deps = Deps {
            pool,
            selector,
            ready,
            limits: limits(settings),
            sizing: Arc::default(),
        };
        let (stores, state) = (ground.stores.clone(), ground.state.clone());
        let access = access(&ground.config, ground.audit.clone())?;
        let page = page_of(&ground, &access).await;
        let coordinator = Coordinator::new(deps, stores, state, identity);
        Ok(Self {
            ground,
            page,
            coordinator,
            access,
        })
    }

    /// Returns the URI of the run page, if it is served.
    pub fn page_uri(&self) -> Option<String> {
        self.page.as_ref().map(RunPage::uri)
    }

    /// Returns the address for trainers.
    pub fn address(&self) -> SocketAddr {
        self.ground.address
    }

    /// Returns [`Serve::address`] as a URI.
    pub fn uri(&self) -> String {
        self.ground.uri()
    }

    pub fn health_address(&self) -> Option<SocketAddr> {
        self.ground.health.as_ref().map(health::Port::address)
    }

    pub fn metrics_address(&self) -> Option<SocketAddr> {
        self.ground.http.as_ref().map(http::Http::address)
    }

    /// Serves until `shutdown`, then drains within the grace period.
    pub async fn run(self, shutdown: impl Future<Output = ()> + Send + 'static) -> Result<()> {
        let shutdown: Shutdown = shutdown.boxed().shared();
        let (health, health_service) = tonic_health::server::health_reporter();
        health::begin(&health, &SERVED).await;
        let selection = SelectionServiceServer::new(Selection(self.coordinator.clone()))
            .max_decoding_message_size(MESSAGE_BYTES_MAX)
            .max_encoding_message_size(MESSAGE_BYTES_MAX);
        let router = builder(&self.access)
            .add_routes(reflection(&SERVED)?)
            .add_service(health_service.clone())
            .add_service(CoordinatorServiceServer::new(WorkerPlane(
                self.coordinator.clone(),
            )))
            .add_service(selection);
        let coordinator = self.coordinator;
        let grace = self.ground.config.coordinator.grace();
        let for_metrics = if self.ground.config.auth.metrics {
            self.access.clone()
        } else {
            Access::allow_everybody(Audit::default())
        };
        let beside = (health_service, for_metrics);
        let (incoming, mut beside) = self.ground.listen(&shutdown, beside);
        if let Some(page) = self.page {
            beside.spawn(page.run());
        }
        let upkeep = tokio::spawn(upkeep(coordinator.clone()));
        let let_go = async move {
            upkeep.abort();
            coordinator.stop().await;
        };
        let (drained, stopping) = drain(shutdown, health, &SERVED, let_go);
        let served = router.serve_with_incoming_shutdown(incoming, drained);
        drain_within(served, stopping, grace).await
    }
}

/// Opens the run page beside a coordinator. If it cannot be opened, that is logged: training must
/// not fail because of the page.
async fn page_of(ground: &Ground, access: &Access) -> Option<RunPage> {
    ground.config.page_listen?;
    let (state, access) = (ground.state.clone(), access.clone());
    let bound = RunPage::bind(&ground.config, &ground.stores, state, access, false).await;
    bound
        .inspect_err(|error| tracing::warn!(error = error.chain(), "there is no run page"))
        .ok()
}

/// Starts the worker in this process, and returns its device.
async fn embed(ground: &Ground, pool: &Arc<Pool>) -> Result<String> {
    metrics::begin(Process::Worker);
    let stores = ground.stores_of_worker().await?;
    let worker = Worker::new(&ground.config.worker, stores, ground.state.clone())?;
    let device = worker.info().device;
    let (well, embedded) = (worker.is_well(), embedded::connect(worker));
    pool.embed(embedded.clone(), &device);
    let kept = embedded::keep_while_well(pool.clone(), well, embedded, device.clone());
    tokio::spawn(kept);
    Ok(device)
}

/// Makes the selector.
fn selector(
    settings: &CoordinatorConfig,
    pool: &Arc<Pool>,
    embedded: &str,
) -> Result<Arc<dyn Selector>> {
    let on_worker = match settings.selector_device.as_str() {
        "worker" => Some(""),
        "cuda" => Some("cuda"),
        "auto" if embedded.starts_with("cuda") => Some("cuda"),
        _ => None,
    };
    let local = LocalSelector::new(settings.selector_threads as usize)?;
    Ok(match on_worker {
        Some(device) => Arc::new(WorkerSelector {
            pool: pool.clone(),
            local,
            device,
        }),
        None => Arc::new(local),
    })
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
        passed_over_max: settings.passed_over_max,
        ticket_life: Duration::from_secs_f64(settings.ticket_seconds),
    })
}
