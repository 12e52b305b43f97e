//! The parts of a replay: a scoring worker and a selector in this process, without a service.
use super::embedded;
use crate::{
    config::Config,
    coordinator::{
        replay::{Change, Past, Replayer, pairs::Pairs, redraw::Redrawn},
        select::local::LocalSelector,
        workers::pool::{Home, Pool},
    },
    dataset::Scores,
    error::Result,
    page::Replays,
    storage::{Location, Stores},
    worker::Worker,
};
use async_trait::async_trait;
use std::{sync::Arc, time::Duration};
use tokio::sync::OnceCell;

/// The worker is here or never.
const PATIENCE: Duration = Duration::from_secs(1);

/// Starts a worker in this process, and returns what replays need.
///
/// # Errors
/// `DeviceUnavailable`; those of starting threads.
pub fn replayer(config: &Config, stores: &Stores, state: &Location) -> Result<Replayer> {
    let worker = Worker::new(&config.worker, stores.clone(), state.clone())?;
    let device = worker.info().device;
    let pool = Pool::new(Duration::from_secs(3600), PATIENCE, Home::default());
    pool.embed(embedded::connect(worker), &device);
    Ok(Replayer {
        pool: Arc::new(pool),
        selector: Arc::new(LocalSelector::new(
            config.coordinator.selector_threads as usize,
        )?),
        scores: Scores::new(stores.clone(), state.clone()),
    })
}

/// Replays for the run page, with a worker that starts at the first.
pub(super) struct PageReplays {
    config: Config,
    stores: Stores,
    state: Location,
    replayer: OnceCell<Replayer>,
}

impl PageReplays {
    pub(super) fn new(config: Config, stores: Stores, state: Location) -> Self {
        Self {
            config,
            stores,
            state,
            replayer: OnceCell::new(),
        }
    }

    async fn replayer(&self) -> Result<&Replayer> {
        let start = || async { replayer(&self.config, &self.stores, &self.state) };
        self.replayer.get_or_try_init(start).await
    }
}

#[async_trait]
impl Replays for PageReplays {
    async fn redraw(&self, past: &Past, change: &Change) -> Result<Redrawn> {
        self.replayer().await?.redraw(past, change).await
    }

    async fn pairs(&self, past: &Past, most: usize) -> Result<Pairs> {
        self.replayer().await?.pairs(past, most).await
    }
}
