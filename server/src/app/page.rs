//! The run page: beside a coordinator, or as a process of its own on a state (`superbatch page`).
use super::bind;
use crate::{
    config::Config,
    dataset::Manifest,
    error::{Error, Result},
    metrics,
    page::{Blocks, Gate, Page},
    storage::{Location, Stores, Wrap, metered},
    worker::BlockReader,
};
use arrow::array::RecordBatch;
use async_trait::async_trait;
use std::{net::SocketAddr, sync::Arc};
use tokio::net::TcpListener;

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
    ) -> Result<Arc<RecordBatch>> {
        self.0.read(manifest, source, shard, block, &[]).await
    }
}

/// The run page, bound and ready to run.
pub struct RunPage {
    page: Arc<Page>,
    listener: TcpListener,
    address: SocketAddr,
}

impl RunPage {
    pub(super) async fn bind(stores: &Stores, state: Location, listen: SocketAddr) -> Result<Self> {
        let listener = bind(listen, "page_listen").await?;
        let address = listener
            .local_addr()
            .map_err(|e| Error::internal("a bound socket has no address").because(e))?;
        let blocks = DataBlocks(BlockReader::new(stores.clone(), BLOCKS_BYTES));
        let page = Arc::new(Page::new(state, Box::new(blocks)));
        Ok(Self {
            page,
            listener,
            address,
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
        let none = || {
            Error::invalid(
                "page_listen",
                "page_listen is null; give an address such as 127.0.0.1:9465",
            )
        };
        Self::bind(&stores, state, config.page_listen.ok_or_else(none)?).await
    }

    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Serves for as long as it is polled.
    pub async fn run(self) {
        self.page
            .serve(self.listener, Gate::new(self.address.ip()))
            .await;
    }
}
