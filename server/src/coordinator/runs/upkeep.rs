//! The coordinator's periodic work.
use super::registry::Coordinator;
use std::{sync::Arc, time::Duration};
use tokio::time::Instant;

const EVERY: Duration = Duration::from_secs(30);

/// Removes runs that ended and batches whose trainer has gone from memory, and updates the estimate
/// of workers. Runs until it is dropped.
pub async fn upkeep(coordinator: Arc<Coordinator>) {
    let mut ticks = tokio::time::interval(EVERY);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        coordinator
            .open
            .all_open()
            .iter()
            .for_each(|run| run.drop_spare_batches());
        coordinator.deps.sizing.set_gauge(Instant::now());
    }
}
