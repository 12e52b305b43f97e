//! The coordinator's periodic work.
use super::registry::Coordinator;
use crate::storage::is_deleted;
use std::{sync::Arc, time::Duration};
use tokio::time::Instant;

const EVERY: Duration = Duration::from_secs(30);
/// Looks in a row that find no state before it counts as deleted. A network file system may show
/// nothing for a moment, and letting all runs go ends their trainers.
const LOOKS: u32 = 2;

/// Removes runs that ended and batches whose trainer has gone from memory, and all runs if the
/// state was deleted: what is in memory alone must not be served. Updates the estimate of workers.
/// Runs until it is dropped.
pub async fn upkeep(coordinator: Arc<Coordinator>) {
    let mut ticks = tokio::time::interval(EVERY);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut missing = 0;
    loop {
        ticks.tick().await;
        missing = if is_deleted(&coordinator.state).await {
            missing + 1
        } else {
            0
        };
        if missing >= LOOKS {
            tracing::error!(
                state = coordinator.state.uri(),
                "the state is gone: its runs, receipts and weights were deleted while the service \
                runs; put it back, or stop the service and start with an empty state"
            );
            coordinator.open.release_all();
        }
        coordinator
            .open
            .all_open()
            .iter()
            .for_each(|run| run.drop_spare_batches());
        coordinator.deps.sizing.set_gauge(Instant::now());
    }
}
