//! The processes: a coordinator with its embedded worker (`superbatch serve`), and a worker
//! (`superbatch worker`). Wiring is here and nowhere else; every part gets its config and what it
//! stands on.
mod embedded;
mod http;
mod page;
mod transport;
// Without LibTorch there is no worker, and what follows its making is never reached.
#[cfg_attr(not(feature = "torch"), allow(unused_variables))]
mod work;

pub use page::RunPage;

use self::transport::builder;
use self::transport::drain;
use self::transport::reflection;
use self::transport::within;
use crate::{
    config::{Config, CoordinatorConfig},
    coordinator::{
        facts::owner::Identity,
        runs::{limits::Limits, parts::Deps, registry::Coordinator, upkeep::upkeep},
        select::{Selector, local::LocalSelector, remote::WorkerSelector},
        serve::ready::Budget,
        service::{Selection, WorkerPlane},
        workers::{
            pool::{Home, Pool},
            replies::Replies,
        },
    },
    error::{Error, Result},
    metrics::{self, Process},
    storage::{Location, Stores, Wrap, metered, nonce, probe},
    worker::Worker,
};
use futures::future::{BoxFuture, FutureExt, Shared};
use std::{future::Future, net::SocketAddr, sync::Arc, time::Duration};
use superbatch_proto::{
    MESSAGE_BYTES_MAX,
    v1::{
        coordinator_service_server::CoordinatorServiceServer,
        selection_service_server::SelectionServiceServer,
        worker_service_server::WorkerServiceServer,
    },
};
use tokio::{
    net::TcpListener,
    signal::unix::{SignalKind, signal},
};
use tonic::{server::NamedService, transport::server::TcpIncoming};
pub use work::Work;

/// The chosen rows of one slice may take so many times the memory for batches that wait: such a
/// step is served, and nothing is kept beside it.
const ROWS_OF_BUDGET: u64 = 8;
/// How long a call waits for a first worker.
const WORKER_PATIENCE: Duration = Duration::from_secs(30);

/// The services of a coordinator, and of a worker.
const SERVED: [&str; 2] = [
    SelectionServiceServer::<Selection>::NAME,
    CoordinatorServiceServer::<WorkerPlane>::NAME,
];
const WORKED: [&str; 1] = [WorkerServiceServer::<Worker>::NAME];

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
    /// See [`probe`].
    state_id: String,
    listener: TcpListener,
    address: SocketAddr,
    http: Option<http::Http>,
}

impl Ground {
    async fn build(config: Config, sockets: Sockets, wrap: Wrap) -> Result<Self> {
        let Sockets {
            section,
            listen,
            metrics_listen,
        } = sockets;
        config.validate()?;
        ignore_file_size_limit();
        // Before anything is counted.
        metrics::install();
        let stores = Stores::wrapped(config.storage.clone(), wrap);
        let state = stores.open(&config.state_uri()?)?;
        let state_id = probe(&state).await?;
        tracing::info!(state = state.uri(), id = state_id, "state opened");
        let listener = bind(listen, &format!("{section}listen")).await?;
        let address = listener
            .local_addr()
            .map_err(|e| Error::internal("a bound socket has no address").because(e))?;
        let http = match metrics_listen {
            Some(listen) => {
                Some(http::Http::bind(listen, &format!("{section}metrics_listen")).await?)
            }
            None => None,
        };
        Ok(Self {
            config,
            stores,
            state,
            state_id,
            listener,
            address,
            http,
        })
    }
}

/// A coordinator, bound and ready to run.
pub struct Serve {
    ground: Ground,
    page: Option<RunPage>,
    coordinator: Arc<Coordinator>,
}

/// The workers that this process may use: none yet.
fn pool(ground: &Ground) -> Pool {
    let settings = &ground.config.coordinator;
    let home = Home {
        id: ground.state_id.clone(),
        uri: ground.state.uri().to_owned(),
    };
    let replies = Replies {
        silence_max: Duration::from_secs_f64(settings.worker_silence_seconds),
        rows_bytes_max: settings.ready_bytes_max.saturating_mul(ROWS_OF_BUDGET),
    };
    let lease = Duration::from_secs_f64(settings.lease_seconds);
    Pool::new(lease, WORKER_PATIENCE, home).with_replies(replies)
}

impl Serve {
    /// Opens the state, binds the sockets and starts the embedded worker's device.
    ///
    /// # Errors
    /// Whatever makes the config unusable: a port in use, a store that is unreachable or
    /// overwrites, a device that is not there.
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
        let pool = Arc::new(pool(&ground));
        metrics::begin(Process::Coordinator);
        let mut device = "cpu".to_owned();
        if settings.workers_embedded {
            metrics::begin(Process::Worker);
            let worker = Worker::new(
                &ground.config.worker,
                ground.stores.clone(),
                ground.state.clone(),
            )?;
            device = worker.info().device;
            let (well, channel) = (worker.is_well(), embedded::connect(worker));
            pool.embed(channel.clone(), &device);
            tokio::spawn(embedded::keep_while_well(
                pool.clone(),
                well,
                channel,
                device.clone(),
            ));
        }
        let on_worker = match settings.selector_device.as_str() {
            "worker" => Some(""),
            "cuda" => Some("cuda"),
            "auto" if device.starts_with("cuda") => Some("cuda"),
            _ => None,
        };
        let local = LocalSelector::new(settings.selector_threads as usize)?;
        let selector: Arc<dyn Selector> = match on_worker {
            Some(device) => Arc::new(WorkerSelector {
                pool: pool.clone(),
                local,
                device,
            }),
            None => Arc::new(local),
        };
        tell_build(&device);
        let advertised = settings.advertise_address.clone();
        let identity = Identity {
            address: advertised.unwrap_or_else(|| format!("http://{}", ground.address)),
            instance: nonce(),
        };
        let deps = Deps {
            pool,
            selector,
            ready: Budget::new(settings.ready_bytes_max),
            limits: limits(settings),
            sizing: Arc::default(),
        };
        let (stores, state) = (ground.stores.clone(), ground.state.clone());
        let page = page_of(&ground).await;
        let coordinator = Coordinator::new(deps, stores, state, identity);
        Ok(Self {
            ground,
            page,
            coordinator,
        })
    }

    /// Where the run page is served, if it is.
    pub fn page_address(&self) -> Option<SocketAddr> {
        self.page.as_ref().map(RunPage::address)
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
        for name in SERVED {
            health
                .set_service_status(name, tonic_health::ServingStatus::Serving)
                .await;
        }
        let selection = SelectionServiceServer::new(Selection(self.coordinator.clone()))
            .max_decoding_message_size(MESSAGE_BYTES_MAX)
            .max_encoding_message_size(MESSAGE_BYTES_MAX);
        let router = builder()
            .add_routes(reflection(&SERVED)?)
            .add_service(health_service)
            .add_service(CoordinatorServiceServer::new(WorkerPlane(
                self.coordinator.clone(),
            )))
            .add_service(selection);
        let coordinator = self.coordinator;
        let grace = Duration::from_secs_f64(self.ground.config.coordinator.grace_seconds);
        let http = self
            .ground
            .http
            .map(|http| tokio::spawn(http.run(shutdown.clone())));
        let page = self.page.map(|page| tokio::spawn(page.run()));
        let upkeep = tokio::spawn(upkeep(coordinator.clone()));
        let let_go = async move {
            upkeep.abort();
            coordinator.stop().await;
        };
        let (drained, stopping) = drain(shutdown, health, &SERVED, let_go);
        let incoming = TcpIncoming::from(self.ground.listener).with_nodelay(Some(true));
        let served = router.serve_with_incoming_shutdown(incoming, drained);
        within(served, stopping, grace).await?;
        [http, page]
            .into_iter()
            .flatten()
            .for_each(|served| served.abort());
        Ok(())
    }
}

/// The run page beside a coordinator. Nothing that trainers need fails by it.
async fn page_of(ground: &Ground) -> Option<RunPage> {
    let listen = ground.config.page_listen?;
    let bound = RunPage::bind(&ground.stores, ground.state.clone(), listen).await;
    bound
        .inspect_err(|error| tracing::warn!(error = error.chain(), "there is no run page"))
        .ok()
}

fn tell_build(device: &str) {
    let kind = if device.starts_with("cuda") {
        "cuda"
    } else {
        "cpu"
    };
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
        passed_over_max: settings.passed_over_max,
    })
}

/// Lets a write beyond the limit on a file's size (`ulimit -f`) fail, so that it is reported; by
/// itself the signal ends the process without a word.
fn ignore_file_size_limit() {
    /// SIGXFSZ, on Linux and macOS.
    const FILE_SIZE: i32 = 25;
    // Once it is listened to it does nothing else, for the life of the process.
    if let Err(error) = signal(SignalKind::from_raw(FILE_SIZE)) {
        tracing::warn!(%error, "cannot ignore SIGXFSZ");
    }
}

async fn bind(address: SocketAddr, field: &str) -> Result<TcpListener> {
    TcpListener::bind(address).await.map_err(|e| {
        let message = format!(
            "cannot listen on {address}; stop what uses that port, or set `{field}` to another"
        );
        Error::invalid(field, message).because(e)
    })
}
