//! The runs that this process holds in memory, at most so many.
//!
//! A run that sleeps has lost nothing but time. A run that is in memory although another
//! coordinator owns it is worse: it answers from a past that is over, and no error ever ends that.
//! So a run leaves memory at the first sign of another owner, and each removal names the very
//! object: while one call finds the sign, another may have loaded the run again, and removing that
//! sound one would end the calls of its trainer.
use super::{lease::Lease, run::Run};
use crate::{
    coordinator::facts::owner::{Identity, is_twin},
    error::{Error, Result},
    metrics,
};
use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex, MutexGuard,
        atomic::{AtomicBool, Ordering},
    },
};
use superbatch_proto::v1::Reason;
use tokio::time::Instant;

/// Runs by id. Where there are too many, one is put to sleep: it leaves memory, its durable state
/// stays, and the next call that names it loads it again, as after a restart.
pub struct OpenRuns {
    runs: Mutex<HashMap<String, Arc<Run>>>,
    runs_max: usize,
    /// This process, as an owner of runs.
    identity: Identity,
    stopping: AtomicBool,
}

impl OpenRuns {
    pub fn new(runs_max: usize, identity: Identity) -> Arc<Self> {
        Arc::new(Self {
            runs: Mutex::default(),
            runs_max,
            identity,
            stopping: AtomicBool::new(false),
        })
    }

    pub fn find(&self, id: &str) -> Option<Arc<Run>> {
        self.lock().get(id).cloned()
    }

    /// As [`OpenRuns::find`], in the hands of a call.
    pub fn lease(self: &Arc<Self>, id: &str) -> Option<Lease> {
        // Counted under the lock; otherwise the run could be put to sleep between the two.
        let runs = self.lock();
        Some(Lease::new(runs.get(id)?.clone(), self.clone()))
    }

    /// Keeps a run in memory; where there are too many, another one is put to sleep.
    ///
    /// # Errors
    /// `Overloaded` if all are busy; `ShuttingDown`.
    pub fn insert(self: &Arc<Self>, run: Arc<Run>) -> Result<Lease> {
        let mut runs = self.lock();
        let sleeps = if run.is_open() {
            self.room(&runs)?
        } else {
            None
        };
        let slept = sleeps.and_then(|id| runs.remove(&id));
        runs.insert(run.id.clone(), run.clone());
        metrics::open_runs().set(runs.len() as f64);
        let lease = Lease::new(run, self.clone());
        drop(runs);
        if let Some(slept) = slept {
            slept.stop();
            tracing::info!(run = slept.id, "run put to sleep");
        }
        Ok(lease)
    }

    /// Lets go of a run: another coordinator owns it, or it has to be read anew.
    pub fn release(&self, run: &Run) {
        let mut runs = self.lock();
        // The run may have been loaded again in the meantime. Only this very object is removed: its
        // successor is sound.
        if runs
            .get(&run.id)
            .is_some_and(|known| std::ptr::eq(known.as_ref(), run))
        {
            runs.remove(&run.id);
            metrics::open_runs().set(runs.len() as f64);
        }
        drop(runs);
        run.stop();
    }

    /// Lets go of all runs: the next call of each reads what the state holds.
    pub fn release_all(&self) {
        let runs: Vec<_> = self.lock().drain().map(|(_, run)| run).collect();
        runs.iter().for_each(|run| run.stop());
        metrics::open_runs().set(0.0);
    }

    /// Returns the open runs. Removes those that have ended.
    pub fn all_open(&self) -> Vec<Arc<Run>> {
        let mut runs = self.lock();
        runs.retain(|_, run| {
            let open = run.is_open();
            if !open {
                run.stop();
            }
            open
        });
        metrics::open_runs().set(runs.len() as f64);
        runs.values().cloned().collect()
    }

    /// Takes all of them out, and lets no other in from now on.
    pub fn close(&self) -> Vec<Arc<Run>> {
        self.stopping.store(true, Ordering::SeqCst);
        self.lock().drain().map(|(_, run)| run).collect()
    }

    /// # Errors
    /// Those of [`OpenRuns::insert`].
    pub fn check_room(&self) -> Result<()> {
        self.room(&self.lock()).map(drop)
    }

    pub fn is_own_address(&self, address: &str) -> bool {
        self.identity.address == address
    }

    /// Logs that another process took `run` over under this one's address, if `error` says so.
    pub fn report_twin(&self, run: &Run, error: &Error) {
        if is_twin(error, &self.identity) {
            tracing::error!(
                run = run.id,
                address = self.identity.address,
                "another coordinator took the run over under this one's address; unless this \
                process was about to end, two advertise the same address: give each its own \
                coordinator.advertise_address"
            );
        }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<String, Arc<Run>>> {
        self.runs.lock().expect("no panic while held")
    }

    /// Returns the run to evict; `None` if there is room.
    fn room(&self, runs: &HashMap<String, Arc<Run>>) -> Result<Option<String>> {
        if self.stopping.load(Ordering::SeqCst) {
            return Err(Error::new(
                Reason::ShuttingDown,
                "the service stops; ask again in a while",
            ));
        }
        let most = self.runs_max;
        let open = || runs.iter().filter(|(_, run)| run.is_open());
        if open().count() < most {
            return Ok(None);
        }
        let idle = open().map(|(id, run)| (id, run.calls.trained(), run.idle_since()));
        let sleeps = run_to_evict(idle).cloned().map(Some);
        sleeps.ok_or_else(|| {
            let message = format!(
                "{most} runs are open and at work, so that none can be put to sleep; close one, \
                or raise coordinator.max_runs"
            );
            Error::new(Reason::Overloaded, message)
        })
    }
}

/// Returns the run to put to sleep, of (id, when a trainer called last, since when it has been
/// idle): those that people only look at go before those that train. Otherwise a client that polls
/// more runs than fit would put the one to sleep whose trainer is between two steps.
fn run_to_evict<'a>(
    runs: impl Iterator<Item = (&'a String, Option<Instant>, Option<Instant>)>,
) -> Option<&'a String> {
    runs.filter_map(|(id, trained, since)| Some((trained, since?, id)))
        .min()
        .map(|(_, _, id)| id)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn the_least_recently_used_run_sleeps_and_a_busy_one_never() {
        let now = Instant::now();
        let after = |seconds| Some(now + Duration::from_secs(seconds));
        let first = |idle: &[Option<Instant>]| {
            let ids: Vec<String> = (0..idle.len()).map(|n| n.to_string()).collect();
            let runs = ids.iter().zip(idle.iter().copied());
            run_to_evict(runs.map(|(id, since)| (id, None, since))).cloned()
        };
        assert_eq!(
            first(&[after(3), after(1), None, after(2)]).as_deref(),
            Some("1")
        );
        assert_eq!(first(&[None, None]), None);
    }

    #[test]
    fn a_run_that_is_only_looked_at_sleeps_before_one_that_trains() {
        let now = Instant::now();
        let after = |seconds| Some(now + Duration::from_secs(seconds));
        let [trains, polled, older] = ["trains", "polled", "older"].map(str::to_owned);
        let runs = [
            (&trains, after(1), after(1)),
            (&polled, None, after(9)),
            (&older, after(0), after(2)),
        ];
        assert_eq!(run_to_evict(runs.into_iter()), Some(&polled));
        let two = runs.into_iter().filter(|(id, ..)| **id != polled);
        assert_eq!(run_to_evict(two), Some(&older));
    }
}
