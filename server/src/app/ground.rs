//! The parts that both kinds of process need: settings, storage and sockets.
use super::{
    Shutdown, health, http,
    listen::{self, Bounds, Certificates, Socket},
    tls,
};
use crate::{
    access::{Access, audit::Audit},
    config::Config,
    error::{Error, Result},
    metrics,
    storage::{Location, Stores, Wrap, probe},
};
use std::{io, net::SocketAddr};
use tokio::{
    net::TcpListener,
    signal::unix::{SignalKind, signal},
    task::JoinSet,
};
use tokio_stream::wrappers::ReceiverStream;
use tonic_health::pb::health_server::{Health, HealthServer};

/// Where a process listens, and the section of the config with these settings.
pub(super) struct Sockets {
    pub section: &'static str,
    pub listen: SocketAddr,
    pub metrics_listen: Option<SocketAddr>,
}

/// The parts that both kinds of process need.
pub(super) struct Ground {
    pub config: Config,
    pub stores: Stores,
    pub state: Location,
    /// See [`probe`].
    pub state_id: String,
    pub listener: TcpListener,
    pub address: SocketAddr,
    pub http: Option<http::Http>,
    pub health: Option<health::Port>,
    pub audit: Audit,
    certificates: Certificates,
}

impl Ground {
    pub(super) async fn build(config: Config, sockets: Sockets, wrap: Wrap) -> Result<Self> {
        let Sockets {
            section,
            listen,
            metrics_listen,
        } = sockets;
        config.validate()?;
        ignore_file_size_limit();
        // Installed first: a metric that is counted before the recorder exists is lost.
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
        let health = match config.health_listen {
            Some(listen) => Some(health::Port::bind(listen).await?),
            None => None,
        };
        if let Some(port) = &health {
            tracing::info!(address = %port.address(), "health_listen");
        }
        let certificates = tls::listening(&config.tls, &[b"h2"])?;
        let audit = Audit::open(config.audit.file.as_deref())?;
        if !listen.ip().is_loopback() && config.allow_insecure {
            let has_tokens = config.auth.tokens_file.is_some();
            let has_tls = certificates.is_some();
            tracing::warn!(%address, has_tls, has_tokens, "allow_insecure: others may reach this \
            port");
        }
        Ok(Self {
            config,
            stores,
            state,
            state_id,
            listener,
            address,
            http,
            health,
            audit,
            certificates,
        })
    }

    /// Returns the URI of the port for other processes.
    pub(super) fn uri(&self) -> String {
        let is_tls = self.certificates.is_some();
        let scheme = if is_tls { "https" } else { "http" };
        format!("{scheme}://{}", self.address)
    }

    /// Returns the stores for a worker of this process: with its cache on disk, if it has one.
    ///
    /// # Errors
    /// `InvalidArgument` if another process has the cache's folder, or it cannot be used.
    pub(super) async fn stores_of_worker(&self) -> Result<Stores> {
        let worker = &self.config.worker;
        match &worker.disk_cache_dir {
            None => Ok(self.stores.clone()),
            Some(folder) => {
                let bytes_max = worker.disk_cache_bytes;
                self.stores.caching_in(folder.clone(), bytes_max).await
            }
        }
    }

    /// Opens the ports. Returns the connections of the main port, and the tasks that serve the
    /// other ports until they are dropped.
    pub(super) fn listen<H: Health>(
        self,
        shutdown: &Shutdown,
        (health, for_metrics): (HealthServer<H>, Access),
    ) -> (ReceiverStream<io::Result<Socket>>, JoinSet<()>) {
        let mut beside = JoinSet::new();
        if let Some(http) = self.http {
            beside.spawn(http.run(shutdown.clone(), for_metrics));
        }
        if let Some(port) = self.health {
            beside.spawn(port.run(health));
        }
        let bounds = Bounds::of(self.config.connections_max as usize);
        let incoming = listen::incoming(self.listener, self.certificates, bounds);
        (incoming, beside)
    }
}

/// Makes a write beyond the limit on a file's size (`ulimit -f`) fail with an error. By default the
/// kernel sends SIGXFSZ, which ends the process without a message.
fn ignore_file_size_limit() {
    /// SIGXFSZ, on Linux and macOS.
    const FILE_SIZE: i32 = 25;
    // tokio's handler replaces the default action for the life of the process, also after this
    // stream is dropped.
    if let Err(error) = signal(SignalKind::from_raw(FILE_SIZE)) {
        tracing::warn!(%error, "cannot ignore SIGXFSZ");
    }
}

pub(super) async fn bind(address: SocketAddr, field: &str) -> Result<TcpListener> {
    TcpListener::bind(address).await.map_err(|e| {
        let message = format!(
            "cannot listen on {address}; stop what uses that port, or set `{field}` to another"
        );
        Error::invalid(field, message).because(e)
    })
}
