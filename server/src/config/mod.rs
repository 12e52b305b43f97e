//! The server's whole configuration: one YAML file, with environment variables before it. Only this
//! module reads the environment. Every field's comment is its text in `docs/configuration.md`, and
//! `Default` is the only place of its default.
mod load;
mod reach;
mod reference;
mod seconds;
mod security;
#[cfg(test)]
mod tests;
mod traces;

use crate::{
    error::{Error, Result},
    storage::{StorageConfig, can_hold_state},
};
pub use load::environment;
pub use reference::{commented_yaml, reference};
use schemars::JsonSchema;
pub use security::{AuditConfig, AuthConfig, TlsConfig};
use serde::{Deserialize, Serialize};
use std::{
    net::{IpAddr, Ipv4Addr, SocketAddr},
    path::PathBuf,
    time::Duration,
};
pub use traces::TracesConfig;
use url::Url;

/// The form of an address to listen on.
const ADDRESS: &str = "an IP address and port such as 127.0.0.1:50051";

/// Everything that an operator can set.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Address and port where trainers, workers and operators reach a coordinator. Port 0 takes any
    /// free one.
    pub listen: SocketAddr,
    /// Address and port of `/metrics`, `/livez` and `/readyz`, over plain HTTP. `null` serves none
    /// of them.
    pub metrics_listen: Option<SocketAddr>,
    /// Address and port of `grpc.health.v1.Health` alone, without TLS and tokens, for probes:
    /// services `liveness`, `readiness` and those of the process. `null` serves it with the other
    /// services only.
    pub health_listen: Option<SocketAddr>,
    /// Address and port of the run page (docs/page.md). If `auth.tokens_file` is set, readers need
    /// a token with scope `read`; off loopback it uses `tls`. `null` serves none.
    pub page_listen: Option<SocketAddr>,
    /// Connections to `listen` (`worker_role.listen` of a worker) at a time. Further ones are
    /// closed.
    pub connections_max: u32,
    /// Whether every host that can reach the ports may use them. Without it, listening beyond this
    /// machine needs `tls.cert` and, for a coordinator, `auth.tokens_file`. Set it only on networks
    /// that you trust completely.
    pub allow_insecure: bool,
    /// Where all state is kept (runs, receipts, weights, reference embeddings): a URI such as
    /// `s3://bucket/prefix`, or a path.
    pub state: String,
    /// Object storage.
    pub storage: StorageConfig,
    /// The coordinator (`superbatch serve`).
    pub coordinator: CoordinatorConfig,
    /// Scoring, embedded or in a worker of its own.
    pub worker: crate::worker::WorkerConfig,
    /// A worker of its own (`superbatch worker`).
    pub worker_role: WorkerRoleConfig,
    /// Encryption of connections.
    pub tls: TlsConfig,
    /// Who may call.
    pub auth: AuthConfig,
    /// The log of changes and refused calls.
    pub audit: AuditConfig,
    /// Traces of steps for an OpenTelemetry collector.
    pub traces: TracesConfig,
    /// Logs, on standard error.
    pub log: LogConfig,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            listen: loopback(50051),
            metrics_listen: Some(loopback(9464)),
            health_listen: None,
            page_listen: Some(loopback(9465)),
            connections_max: 4096,
            allow_insecure: false,
            state: "./superbatch-state".into(),
            storage: StorageConfig::default(),
            coordinator: CoordinatorConfig::default(),
            worker: crate::worker::WorkerConfig::default(),
            worker_role: WorkerRoleConfig::default(),
            tls: TlsConfig::default(),
            auth: AuthConfig::default(),
            audit: AuditConfig::default(),
            traces: TracesConfig::default(),
            log: LogConfig::default(),
        }
    }
}

/// What a coordinator may use, and how long it waits.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct CoordinatorConfig {
    /// URI by which trainers and other coordinators reach this one, such as
    /// `http://superbatch-0.superbatch:50051`. `null` is made of `listen`, which must then be an
    /// address that others can reach, not `0.0.0.0`.
    pub advertise_address: Option<String>,
    /// Whether a worker runs in the coordinator's process.
    pub workers_embedded: bool,
    /// The device of selection: `native` (the coordinator's CPU), `worker` (any worker's device),
    /// `cuda` (a worker with a CUDA device), or `auto`: `cuda` if the embedded worker has one, else
    /// `native`.
    pub selector_device: String,
    /// Threads of selection on the coordinator's CPU. 0 is one for each core.
    pub selector_threads: u32,
    /// How long calls may finish at shutdown, in seconds. The process ends at most 6 seconds later,
    /// in which it writes the last lines of its logs and sends the last traces.
    pub grace_seconds: f64,
    /// How long a needed step waits for weights before its run's fallback applies, in seconds. The
    /// default for runs that give none.
    pub need_deadline_seconds: f64,
    /// How long a worker counts as alive after its last registration, in seconds.
    pub lease_seconds: f64,
    /// How long a live worker may be silent while a slice, a model or a selection is awaited from
    /// it, in seconds. After that it counts as lost, and another worker does its work. It must
    /// exceed the time that a worker needs for the largest slice.
    pub worker_silence_seconds: f64,
    /// Largest push of weights, in bytes. A push is held in memory until it is whole, and a second
    /// time while it is joined.
    pub push_bytes_max: u64,
    /// How long a rank that has sent its part of a push waits for the others, and how long a push
    /// may be silent, in seconds.
    pub push_deadline_seconds: f64,
    /// Memory for chosen batches that wait for their trainer, in bytes. A batch that does not fit
    /// is read again when a rank asks for it. While there is room, what ranks were sent is kept
    /// beside it until all have gone on, for ranks that ask again.
    pub ready_bytes_max: u64,
    /// Most open runs in this coordinator's memory. For one more, the run that has been idle
    /// longest is put to sleep until the next call of a trainer; calls that only read it leave it
    /// asleep.
    pub max_runs: u32,
    /// Newest snapshots of pushed weights that are kept of each run, besides those with which its
    /// next steps are scored. A rewind that chooses anew needs the weights of its step.
    pub snapshots_kept: u32,
    /// Most candidates passed over that a step's receipt lists, never more than were chosen: those
    /// of the best own scores, and a sample of the others. 0 lists none.
    pub passed_over_max: u32,
    /// How long a ticket for rows on a worker holds (runs with `delivery` direct), in seconds. The
    /// clocks of coordinator and workers must differ by less.
    pub ticket_seconds: f64,
    /// Largest super-batch that a run may ask for, in rows.
    pub super_batch_size_max: u32,
    /// Largest sub-batch that a run may ask for, in rows.
    pub sub_batch_size_max: u32,
}

impl CoordinatorConfig {
    /// Returns `grace_seconds`.
    pub fn grace(&self) -> Duration {
        Duration::from_secs_f64(self.grace_seconds)
    }
}

impl Default for CoordinatorConfig {
    fn default() -> Self {
        Self {
            advertise_address: None,
            workers_embedded: true,
            selector_device: "auto".into(),
            selector_threads: 0,
            grace_seconds: 30.0,
            need_deadline_seconds: 60.0,
            lease_seconds: 15.0,
            worker_silence_seconds: 1800.0,
            push_bytes_max: 8 << 30,
            push_deadline_seconds: 300.0,
            ready_bytes_max: 1 << 30,
            max_runs: 64,
            snapshots_kept: 32,
            passed_over_max: 256,
            ticket_seconds: 60.0,
            super_batch_size_max: 1 << 20,
            sub_batch_size_max: 1 << 17,
        }
    }
}

/// A worker in a process of its own.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct WorkerRoleConfig {
    /// URI of the coordinator to work for.
    pub coordinator: String,
    /// Address and port where the coordinator reaches this worker. Port 0 takes any free one.
    pub listen: SocketAddr,
    /// URI by which the coordinator reaches this worker. `null` is made of `listen`, which must
    /// then be an address that the coordinator can reach, not `0.0.0.0`.
    pub advertise_address: Option<String>,
    /// File with the token that this worker registers with; it needs scope `worker`. `null`
    /// registers without one.
    pub token_file: Option<PathBuf>,
    /// Address and port of this worker's `/metrics`, `/livez` and `/readyz`, over plain HTTP.
    /// `null` serves none of them.
    pub metrics_listen: Option<SocketAddr>,
}

impl Default for WorkerRoleConfig {
    fn default() -> Self {
        Self {
            coordinator: "http://127.0.0.1:50051".into(),
            listen: loopback(50052),
            advertise_address: None,
            token_file: None,
            metrics_listen: None,
        }
    }
}

/// Logs.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct LogConfig {
    /// The format of log lines.
    pub format: LogFormat,
    /// What is logged: a level (`error`, `warn`, `info`, `debug`, `trace`), or levels by module as
    /// in `info,superbatch_server::coordinator=debug`.
    pub filter: String,
}

impl Default for LogConfig {
    fn default() -> Self {
        Self {
            format: LogFormat::Text,
            filter: "info".into(),
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    Text,
    Json,
}

/// Parses an address from the command line. A host name is refused: it may have several addresses.
pub fn address(text: &str) -> Result<SocketAddr, String> {
    text.parse().map_err(|_| format!("give {ADDRESS}"))
}

fn loopback(port: u16) -> SocketAddr {
    SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), port)
}

impl Config {
    /// Refuses settings that cannot work or are not safe.
    ///
    /// # Errors
    /// `InvalidArgument`, with the `field`; `UriNotAllowed` for an empty allow-list off loopback.
    pub fn validate(&self) -> Result<()> {
        self.validate_reach()?;
        self.validate_advertised()?;
        can_hold_state(&self.state_uri()?).map_err(|e| {
            Error::invalid(
                "state",
                format!("state cannot be {:?}: {}", self.state, e.chain()),
            )
        })?;
        self.storage.validate()?;
        self.traces.validate()?;
        let c = &self.coordinator;
        seconds::check(self)?;
        #[cfg(feature = "torch")]
        self.worker.validate()?;
        let counts = [
            ("coordinator.push_bytes_max", c.push_bytes_max),
            ("coordinator.ready_bytes_max", c.ready_bytes_max),
            ("storage.ids_bytes_max", self.storage.ids_bytes_max),
            ("coordinator.max_runs", c.max_runs.into()),
            ("connections_max", self.connections_max.into()),
            (
                "coordinator.super_batch_size_max",
                c.super_batch_size_max.into(),
            ),
            (
                "coordinator.sub_batch_size_max",
                c.sub_batch_size_max.into(),
            ),
        ];
        if let Some((field, _)) = counts.into_iter().find(|(_, count)| *count == 0) {
            return Err(Error::invalid(
                field,
                format!("{field} is 0; set it to 1 or more"),
            ));
        }
        if c.sub_batch_size_max > c.super_batch_size_max {
            let message = "coordinator.sub_batch_size_max exceeds coordinator.super_batch_size_max";
            return Err(Error::invalid("coordinator.sub_batch_size_max", message));
        }
        let device = c.selector_device.as_str();
        if ["auto", "native", "worker", "cuda"].contains(&device) {
            return Ok(());
        }
        let is_planned = device == "torch" || device.starts_with("cuda:");
        let problem = if is_planned {
            ", which is not built yet"
        } else {
            ""
        };
        let message = format!(
            "coordinator.selector_device is {device:?}{problem}; use auto, native, worker or cuda"
        );
        Err(Error::invalid("coordinator.selector_device", message))
    }

    /// Returns the URI of the state. A path becomes a `file:` URI, relative to the working
    /// directory.
    pub fn state_uri(&self) -> Result<String> {
        if self.state.contains("://") {
            return Ok(self.state.clone());
        }
        let unusable = || {
            Error::invalid(
                "state",
                format!(
                    "state is {:?}, which is neither a URI nor a path",
                    self.state
                ),
            )
        };
        let path = std::path::absolute(&self.state).map_err(|e| unusable().because(e))?;
        Ok(Url::from_file_path(path).map_err(|()| unusable())?.into())
    }
}
