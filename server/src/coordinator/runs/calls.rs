//! Counts the calls of a run, which hold it in memory.
use std::sync::{Mutex, MutexGuard};
use tokio::time::Instant;

/// The calls of one run.
#[derive(Debug)]
pub struct Calls(Mutex<Count>);

#[derive(Debug)]
pub struct Count {
    pub under_way: u64,
    /// When a call last began or ended.
    pub changed: Instant,
    /// When a trainer last asked for a step, announced a push, pushed or reported losses; `None` of
    /// a run that people only look at.
    trained: Option<Instant>,
}

impl Default for Calls {
    fn default() -> Self {
        Self(Mutex::new(Count {
            under_way: 0,
            changed: Instant::now(),
            trained: None,
        }))
    }
}

impl Calls {
    /// Returns since when no call has been under way; `None` while one is.
    pub fn idle_since(&self) -> Option<Instant> {
        let count = self.count();
        (count.under_way == 0).then_some(count.changed)
    }

    /// Notes a call of a trainer.
    pub fn train(&self) {
        self.count().trained = Some(Instant::now());
    }

    /// Returns when a trainer called last.
    pub fn trained(&self) -> Option<Instant> {
        self.count().trained
    }

    pub fn count(&self) -> MutexGuard<'_, Count> {
        self.0.lock().expect("no panic while held")
    }
}
