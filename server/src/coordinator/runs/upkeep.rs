//! What a coordinator does by itself, every now and then.
use super::registry::Coordinator;
use std::{sync::Arc, time::Duration};
use tokio::time::Instant;

const EVERY: Duration = Duration::from_secs(30);

/// Lets go of runs that ended, and of batches whose trainer has gone, and tells how many workers
/// there should be. Runs until it is dropped.
pub async fn upkeep(coordinator: Arc<Coordinator>) {
    let mut ticks = tokio::time::interval(EVERY);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        coordinator
            .open_runs()
            .iter()
            .for_each(|run| run.drop_spare_batches());
        coordinator.deps.sizing.set_gauge(Instant::now());
    }
}
