//! The processes: a coordinator with its embedded worker (`superbatch serve`), and a worker
//! (`superbatch worker`). All wiring is here: every part gets its config and the parts that it
//! needs.
mod embedded;
mod ground;
mod health;
mod http;
mod listen;
mod page;
mod serve;
mod tls;
mod transport;
// Without LibTorch no worker can be made, so the code after it is unreachable.
#[cfg_attr(not(feature = "torch"), allow(unused_variables))]
mod work;

use self::ground::bind;
pub use self::{page::RunPage, serve::Serve, work::Work};
use crate::{config::TlsConfig, error::Result, metrics};
use futures::future::{BoxFuture, Shared};

/// A future that ends when the process should end.
type Shutdown = Shared<BoxFuture<'static, ()>>;

/// Checks that the files of these settings can be used.
///
/// # Errors
/// `InvalidArgument`, naming the file.
pub fn check_tls(config: &TlsConfig) -> Result<()> {
    tls::listening(config)?;
    tls::dialer_towards_processes(config).map(drop)
}

fn tell_build(device: &str) {
    let kind = if device.starts_with("cuda") {
        "cuda"
    } else {
        "cpu"
    };
    metrics::build_info(env!("CARGO_PKG_VERSION"), kind).set(1.0);
}
