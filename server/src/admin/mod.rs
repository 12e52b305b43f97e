//! Operator commands, and what all commands share.
pub mod docs;
pub mod index;
pub mod receipts;
pub mod runs;
pub mod select;
mod table;

use crate::{
    config::{self, Config, LogConfig, LogFormat},
    error::{Error, Result},
    storage::{Location, Stores},
};
use clap::Args;
use std::{io::IsTerminal, net::SocketAddr, path::PathBuf};
use tracing_subscriber::EnvFilter;

/// Options of every command.
#[derive(Args)]
pub struct Common {
    /// YAML file (see docs/configuration.md). Without one the embedded defaults hold; environment variables named
    /// SUPERBATCH_<KEY>, with `__` between levels, come before both.
    #[arg(long, global = true, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Where state is, as a URI: overrides `state` of the config.
    #[arg(long, global = true, value_name = "URI")]
    pub state: Option<String>,
    /// Address to listen on: overrides `listen` (or `worker_role.listen`). Port 0 takes a free one.
    #[arg(long, global = true, value_name = "HOST:PORT")]
    pub listen: Option<SocketAddr>,
    /// Address of the coordinator, for `worker`: overrides `worker_role.coordinator`.
    #[arg(long, global = true, value_name = "URI")]
    pub coordinator: Option<String>,
    /// Device for scoring: auto, cpu, cuda or cuda:N. Overrides `worker.device`.
    #[arg(long, global = true, value_name = "DEVICE")]
    pub device: Option<String>,
}

impl Common {
    /// The config: file, then environment, then these options.
    pub fn load(&self) -> Result<Config> {
        let mut config = Config::load(self.config.as_deref(), config::environment())?;
        if let Some(state) = &self.state {
            config.state.clone_from(state);
        }
        if let Some(listen) = self.listen {
            config.listen = listen;
            config.worker_role.listen = listen;
        }
        if let Some(coordinator) = &self.coordinator {
            config.worker_role.coordinator.clone_from(coordinator);
        }
        if let Some(device) = &self.device {
            config.worker.device.clone_from(device);
        }
        config.validate()?;
        Ok(config)
    }
}

/// The config with all defaults filled in, as YAML.
pub fn check_config(config: &Config) -> Result<String> {
    let yaml =
        serde_yaml_ng::to_string(config).map_err(|e| Error::internal("a config cannot be printed").because(e))?;
    Ok(format!("# ok\n{yaml}"))
}

/// Starts logging to standard error.
pub fn start_logging(config: &LogConfig) -> Result<()> {
    let filter = EnvFilter::try_new(&config.filter)
        .map_err(|e| Error::invalid("log.filter", format!("'{}' is no log filter", config.filter)).because(e))?;
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal());
    match config.format {
        LogFormat::Json => builder.json().init(),
        LogFormat::Text => builder.init(),
    }
    Ok(())
}

/// Says on standard output where this process is reached, for people and for scripts that wait for it.
pub fn announce(what: &str, address: SocketAddr, metrics: Option<SocketAddr>) {
    println!("superbatch {what} on http://{address}");
    if let Some(metrics) = metrics {
        println!("superbatch metrics on http://{metrics}/metrics");
    }
}

/// Ends when the process is asked to stop: SIGTERM or Ctrl-C.
pub async fn terminated() {
    use tokio::signal::unix::{SignalKind, signal};
    let Ok(mut terminate) = signal(SignalKind::terminate()) else {
        tracing::error!("cannot listen for SIGTERM");
        return std::future::pending().await;
    };
    tokio::select! {
        _ = terminate.recv() => {}
        _ = tokio::signal::ctrl_c() => {}
    }
}

/// The state that the config names.
pub fn open_state(config: &Config) -> Result<(Stores, Location)> {
    let stores = Stores::new(config.storage.clone());
    let state = stores.open(&config.state_uri()?)?;
    Ok((stores, state))
}
