//! Operator commands, and the options that all commands share.
pub mod docs;
pub mod doctor;
#[cfg(feature = "torch")]
pub mod embed;
pub mod ending;
pub mod health;
pub mod index;
#[cfg(feature = "torch")]
pub mod inspect;
mod progress;
pub mod receipts;
pub mod replay;
pub mod runs;
pub mod select;
mod service;
pub mod state;
mod table;
pub mod token;
pub mod top;
mod user;
pub mod weights;

use crate::{
    config::{self, Config, LogConfig, LogFormat},
    error::{Error, Result},
    logging,
    storage::{Location, Stores},
    traces::{self, Traces},
};
use clap::Args;
use std::{
    io::{IsTerminal, Write},
    net::SocketAddr,
    num::NonZeroUsize,
    path::PathBuf,
};
use tracing_subscriber::{EnvFilter, Layer, layer::SubscriberExt, util::SubscriberInitExt};

/// The sources of settings, for every command that has settings.
#[derive(Debug, Clone, Default, Args)]
pub struct ConfigArgs {
    /// YAML file of settings (docs/configuration.md lists them; `superbatch check-config
    /// --defaults` prints one). Without a file the defaults hold; environment variables
    /// SUPERBATCH_<KEY>, with `__` between levels, come before both
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Where runs, receipts and weights are kept: a URI such as s3://bucket/prefix, or a path.
    /// Comes before `state` of the settings [default: ./superbatch-state]
    #[arg(long, value_name = "URI")]
    pub state: Option<String>,
}

/// Options of `superbatch serve`.
#[derive(Debug, Clone, Args)]
pub struct ServeArgs {
    #[command(flatten)]
    settings: ConfigArgs,
    /// Address that trainers connect to; port 0 takes a free one. Comes before `listen` of the
    /// settings [default: 127.0.0.1:50051]
    #[arg(long, value_name = "IP:PORT", value_parser = config::address)]
    listen: Option<SocketAddr>,
    /// What the embedded worker scores on: auto, cpu, cuda or cuda:N. Comes before `worker.device`
    /// [default: auto]
    #[arg(long, value_name = "DEVICE")]
    device: Option<String>,
}

/// Options of `superbatch worker`.
#[derive(Debug, Clone, Args)]
pub struct WorkerArgs {
    #[command(flatten)]
    settings: ConfigArgs,
    /// The coordinator to work for. Comes before `worker_role.coordinator` [default:
    /// http://127.0.0.1:50051]
    #[arg(long, value_name = "URI")]
    coordinator: Option<String>,
    /// Address that the coordinator reaches this worker at; port 0 takes a free one. Comes before
    /// `worker_role.listen` [default: 127.0.0.1:50052]
    #[arg(long, value_name = "IP:PORT", value_parser = config::address)]
    listen: Option<SocketAddr>,
    /// What to score on: auto, cpu, cuda or cuda:N. Comes before `worker.device` [default: auto]
    #[arg(long, value_name = "DEVICE")]
    device: Option<String>,
}

/// Options of `superbatch page`.
#[derive(Debug, Clone, Args)]
pub struct PageArgs {
    #[command(flatten)]
    settings: ConfigArgs,
    /// Address to serve the page on; port 0 takes a free one. Comes before `page_listen` of the
    /// settings [default: 127.0.0.1:9465]
    #[arg(long, value_name = "IP:PORT", value_parser = config::address)]
    listen: Option<SocketAddr>,
}

/// Options of `superbatch check-config`.
#[derive(Debug, Clone, Args)]
pub struct CheckArgs {
    #[command(flatten)]
    settings: ConfigArgs,
    /// Print a file of all defaults instead, each under its meaning: a start for your own
    #[arg(long, conflicts_with_all = ["config", "state"])]
    defaults: bool,
}

impl ConfigArgs {
    /// Returns the config: from the file, then the environment, then these options.
    ///
    /// # Errors
    /// `InvalidArgument`, with the `field`.
    pub fn load(&self) -> Result<Config> {
        self.load_with(|_| {})
    }

    fn load_with(&self, set: impl FnOnce(&mut Config)) -> Result<Config> {
        let mut config = Config::load(self.config.as_deref(), config::environment())?;
        if let Some(state) = &self.state {
            config.state.clone_from(state);
        }
        set(&mut config);
        config.validate()?;
        Ok(config)
    }
}

impl ServeArgs {
    /// As [`ConfigArgs::load`].
    pub fn load(self) -> Result<Config> {
        let Self {
            settings,
            listen,
            device,
        } = self;
        settings.load_with(|config| {
            config.listen = listen.unwrap_or(config.listen);
            if let Some(device) = device {
                config.worker.device = device;
            }
        })
    }
}

impl PageArgs {
    /// As [`ConfigArgs::load`].
    pub fn load(self) -> Result<Config> {
        self.settings
            .load_with(|config| config.page_listen = self.listen.or(config.page_listen))
    }
}

impl WorkerArgs {
    /// As [`ConfigArgs::load`].
    pub fn load(self) -> Result<Config> {
        let Self {
            settings,
            coordinator,
            listen,
            device,
        } = self;
        settings.load_with(|config| {
            config.worker_role.listen = listen.unwrap_or(config.worker_role.listen);
            if let Some(coordinator) = coordinator {
                config.worker_role.coordinator = coordinator;
            }
            if let Some(device) = device {
                config.worker.device = device;
            }
        })
    }
}

/// Returns the config with all defaults filled in, as YAML, without secrets.
pub fn check_config(args: &CheckArgs) -> Result<String> {
    if args.defaults {
        return Ok(config::commented_yaml());
    }
    let mut config = args.settings.load()?;
    config.storage.hide_secrets();
    let yaml = serde_yaml_ng::to_string(&config);
    let yaml = yaml.map_err(|e| Error::internal("a config cannot be printed").because(e))?;
    Ok(format!("# ok\n{yaml}"))
}

/// Starts logging to standard error, and `traces` if there are any.
///
/// # Errors
/// `InvalidArgument` if the filter cannot be read.
pub fn start_logging(config: &LogConfig, traces: Option<&Traces>) -> Result<()> {
    let filter = EnvFilter::try_new(logging::capped(&config.filter)).map_err(|e| {
        Error::invalid(
            "log.filter",
            format!("'{}' is no log filter", config.filter),
        )
        .because(e)
    })?;
    // Without traces no layer wants their spans, and none is made.
    let untraced = format!("{}=off", traces::TARGET).parse();
    let filter = filter.add_directive(untraced.expect("a directive"));
    let lines = tracing_subscriber::fmt::layer()
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal());
    let lines = match config.format {
        LogFormat::Json => lines.json().boxed(),
        LogFormat::Text => lines.boxed(),
    };
    let lines = lines.with_filter(filter).boxed();
    let layers: Vec<_> = [lines]
        .into_iter()
        .chain(traces.map(Traces::layer))
        .collect();
    tracing_subscriber::registry().with(layers).init();
    Ok(())
}

/// Prints this process's address to standard output, for people and for scripts that wait for the
/// line.
pub fn announce(what: &str, uri: &str, metrics: Option<SocketAddr>) {
    let mut lines = format!("superbatch {what} on {uri}\n");
    if let Some(metrics) = metrics {
        lines.push_str(&format!("superbatch metrics on http://{metrics}/metrics\n"));
    }
    print_lines(&lines);
}

/// Prints the address of the run page.
pub fn announce_page(uri: String) {
    print_lines(&format!("superbatch run page on {uri}\n"));
}

/// Prints lines. A failure is ignored: a service whose standard output is closed must serve all the
/// same.
fn print_lines(lines: &str) {
    if let Err(error) = print(lines) {
        tracing::warn!(error = %error, "cannot write to standard output");
    }
}

/// Writes to standard output. A reader that has seen enough (`superbatch receipts RUN | head`) is
/// no failure.
pub fn print(text: &str) -> std::io::Result<()> {
    let mut out = std::io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => Ok(()),
        done => done,
    }
}

/// Parses a count from the command line.
fn at_least_one(text: &str) -> Result<NonZeroUsize, String> {
    text.parse()
        .map_err(|_| "give a whole number, at least 1".to_owned())
}

/// Opens the state that the config names.
pub fn open_state(config: &Config) -> Result<(Stores, Location)> {
    let stores = Stores::new(config.storage.clone());
    let state = stores.open(&config.state_uri()?)?;
    Ok((stores, state))
}
