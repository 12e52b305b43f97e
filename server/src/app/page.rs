//! The run page: beside a coordinator, or as a process of its own on a state (`superbatch page`).
use super::{
    bind,
    http::{HEAD, serve},
    listen::{Bounds, Certificates, incoming},
    replay::PageReplays,
    tls,
};
use crate::{
    access::{Access, audit::Audit, reload::Reloading, tokens::Tokens},
    config::Config,
    dataset::Manifest,
    error::{Error, Result},
    metrics,
    page::{Blocks, Gate, Page, Replays},
    storage::{Location, Stores, Wrap, metered},
    worker::BlockReader,
};
use arrow::array::RecordBatch;
use async_trait::async_trait;
use axum::Extension;
use std::{net::SocketAddr, sync::Arc};
use tokio::net::TcpListener;
use tokio_stream::StreamExt;

/// Connections of readers at a time; a browser holds some six.
const CONNECTIONS_MAX: usize = 256;
/// Memory for blocks of data that were read to show pictures and captions.
const BLOCKS_BYTES: usize = 128 << 20;

/// Reads blocks of data with the worker's reader.
struct DataBlocks(BlockReader);

#[async_trait]
impl Blocks for DataBlocks {
    async fn block(
        &self,
        manifest: &Manifest,
        source: u32,
        shard: u32,
        block: u32,
        picture: Option<u32>,
    ) -> Result<Arc<RecordBatch>> {
        let whole = self.0.read(manifest, source, shard, block, &[]).await?;
        let Some(row) = picture else {
            return Ok(whole.batch);
        };
        let pictured = self.0.with_images(&whole, &[row]).await?;
        let batch = pictured.into_iter().next().map(|found| found.batch);
        Ok(batch.unwrap_or(whole.batch))
    }
}

/// Returns who may call: holders of tokens, or every caller if no tokens are set.
pub(super) fn access(config: &Config, audit: Audit) -> Result<Access> {
    let Some(path) = config.auth.tokens_file.clone() else {
        return Ok(Access::allow_everybody(audit));
    };
    let files = vec![path.clone()];
    let tokens = Reloading::start("tokens", files, move || Tokens::read(&path))?;
    Ok(Access::tokens(tokens, audit))
}

/// The run page, bound and not yet serving.
pub struct RunPage {
    page: Arc<Page>,
    listener: TcpListener,
    address: SocketAddr,
    certificates: Certificates,
    access: Access,
}

impl RunPage {
    /// Binds a page. `access` is who may look; `can_replay` says whether it computes steps again,
    /// by the settings of a worker.
    pub(super) async fn bind(
        config: &Config,
        stores: &Stores,
        state: Location,
        access: Access,
        can_replay: bool,
    ) -> Result<Self> {
        let none = || {
            Error::invalid(
                "page_listen",
                "page_listen is null; give an address such as 127.0.0.1:9465",
            )
        };
        let listen = config.page_listen.ok_or_else(none)?;
        let listener = bind(listen, "page_listen").await?;
        let address = listener
            .local_addr()
            .map_err(|e| Error::internal("a bound socket has no address").because(e))?;
        let blocks = DataBlocks(BlockReader::new(stores.clone(), BLOCKS_BYTES));
        let replays = can_replay.then(|| -> Arc<dyn Replays> {
            let (stores, state) = (stores.clone(), state.clone());
            Arc::new(PageReplays::new(config.clone(), stores, state))
        });
        let page = Arc::new(Page::new(state, Box::new(blocks), replays));
        // On this machine the page stays plain, for tunnels: its address has no certificate.
        let certificates = if address.ip().is_loopback() {
            None
        } else {
            tls::listening(&config.tls, &[b"http/1.1"])?
        };
        Ok(Self {
            page,
            listener,
            address,
            certificates,
            access,
        })
    }

    /// Makes a page on the config's state, which it only reads. The service of that state need not
    /// run.
    ///
    /// # Errors
    /// `InvalidArgument` if the state cannot be opened, the port is taken, or `page_listen` is
    /// null.
    pub async fn build(config: &Config) -> Result<Self> {
        metrics::install();
        let wrap: Wrap = Arc::new(metered);
        let stores = Stores::wrapped(config.storage.clone(), wrap);
        let state = stores.open(&config.state_uri()?)?;
        let access = access(config, Audit::default())?;
        Self::bind(config, &stores, state, access, true).await
    }

    pub fn uri(&self) -> String {
        let scheme = if self.certificates.is_some() {
            "https"
        } else {
            "http"
        };
        format!("{scheme}://{}", self.address)
    }

    /// Serves for as long as it is polled.
    pub async fn run(self) {
        let router = self.page.router(Gate::new(self.address.ip(), self.access));
        let bounds = Bounds::of(CONNECTIONS_MAX);
        let mut connections = incoming(self.listener, self.certificates, bounds);
        while let Some(Ok(connection)) = connections.next().await {
            let router = router.clone().layer(Extension(connection.peer()));
            tokio::spawn(serve(connection, router, HEAD));
        }
    }
}
