//! The processes: a coordinator with its embedded worker (`superbatch serve`), and a worker
//! (`superbatch worker`). All wiring is here: every part gets its config and the parts that it
//! needs.
mod embedded;
mod ground;
mod health;
mod http;
mod listen;
mod page;
mod replay;
mod serve;
mod tls;
mod transport;
// Without LibTorch no worker can be made, so the code after it is unreachable.
#[cfg_attr(not(feature = "torch"), allow(unused_variables))]
mod work;

use self::ground::bind;
pub use self::{page::RunPage, replay::replayer, serve::Serve, work::Work};
use crate::{
    config::{Config, TlsConfig},
    error::{Error, Result},
    metrics,
    traces::{self, Traces},
};
use futures::future::{BoxFuture, Shared};
use superbatch_transport::Dialer;

/// A future that ends when the process should end.
type Shutdown = Shared<BoxFuture<'static, ()>>;

/// Checks that the files of these settings can be used.
///
/// # Errors
/// `InvalidArgument`, naming the file.
pub fn check_tls(config: &TlsConfig) -> Result<()> {
    tls::listening(config, &[b"h2"])?;
    tls::dialer_towards_processes(config).map(drop)
}

/// Returns the dialer with which these settings connect to other processes.
///
/// # Errors
/// `InvalidArgument` if a file that is set cannot be used.
pub fn dialer(config: &TlsConfig) -> Result<Dialer> {
    tls::dialer_towards_processes(config)
}

/// Starts exporting traces of the service `process`; `None` if no collector is set. No connection
/// is made before the first trace. To be called on a runtime.
///
/// # Errors
/// `InvalidArgument`, with the field.
pub fn start_traces(config: &Config, process: &'static str) -> Result<Option<Traces>> {
    let Some(collector) = &config.traces.otlp_endpoint else {
        return Ok(None);
    };
    let dialer = tls::dialer_towards_processes(&config.tls)?;
    let channel = dialer.connect_lazy(collector, |endpoint| {
        endpoint
            .connect_timeout(traces::EXPORT_MAX)
            .timeout(traces::EXPORT_MAX)
    });
    let channel = channel.map_err(|e| {
        let message = format!("traces.otlp_endpoint is {collector:?}, which is no URI");
        Error::invalid("traces.otlp_endpoint", message).because(e)
    })?;
    Traces::start(channel, config.traces.sample_ratio, process).map(Some)
}

fn tell_build(device: &str) {
    let kind = if device.starts_with("cuda") {
        "cuda"
    } else {
        "cpu"
    };
    metrics::build_info(env!("CARGO_PKG_VERSION"), kind).set(1.0);
}
