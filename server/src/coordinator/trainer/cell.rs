//! A cell: one step for which ranks wait, and its result. The step's task reports through one watch
//! channel and sees the waiting ranks through another. Neither side holds a lock while it waits.
//!
//! A step belongs to its cell and not to the call that began it. Otherwise the first rank that
//! loses its connection would throw away what all others wait for, and minutes of scoring with it.
//! A call that ends only removes its own entry from the demand. Likewise an error for waiting calls
//! does not end the step, since the weights that it waits for may still come; a rank that asks
//! again finds it further on, and not at its beginning.
use super::{
    patience::{Demand, Need},
    ranks::Asking,
};
use crate::{
    coordinator::serve::ready::Ready,
    error::{Error, Result},
};
use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};
use tokio::{sync::watch, task::AbortHandle, time::Instant};

/// The progress of a step.
#[derive(Debug, Clone)]
pub enum Progress {
    /// Under way. `errors_sent` counts the errors sent to waiting ranks; `message` is the newest.
    /// The count is needed because the state outlives the calls: a call that arrives later, or asks
    /// again, must wait for a new error and not end with the old one.
    Working {
        errors_sent: u64,
        message: Option<Arc<Error>>,
    },
    Ready(Arc<Ready>),
    Failed(Arc<Error>),
}

/// The task's side of a cell: reports progress, and sees which ranks wait.
#[derive(Debug, Clone)]
pub struct Reporter {
    progress: watch::Sender<Progress>,
    demand: watch::Sender<Demand>,
    parked: Arc<AtomicBool>,
}

/// While this value lives, the step waits for the trainer and does no work. A run with only such
/// steps may be put to sleep.
pub struct Parked(Arc<AtomicBool>);

impl Drop for Parked {
    fn drop(&mut self) {
        self.0.store(false, Ordering::SeqCst);
    }
}

impl Reporter {
    pub fn finish(&self, result: Result<Ready>) {
        let end = match result {
            Ok(ready) => Progress::Ready(Arc::new(ready)),
            Err(error) => Progress::Failed(Arc::new(error)),
        };
        self.progress.send_replace(end);
    }

    /// Ends the calls that need this step with `error`; the step goes on.
    pub fn fail_waiting(&self, error: Error) {
        // Calls are removed from the demand before they get the error. They drop their own entries
        // only when their tasks run, some time later. Until then the step's task would still see a
        // stall, and would send the same ranks another error in a busy loop.
        self.demand.send_modify(Demand::leave_all);
        fail_waiting(&self.progress, error);
    }

    /// Marks the step as waiting for the trainer, until the returned value is dropped.
    pub fn begin_waiting_for_trainer(&self) -> Parked {
        self.parked.store(true, Ordering::SeqCst);
        Parked(self.parked.clone())
    }

    pub fn demand(&self) -> watch::Receiver<Demand> {
        self.demand.subscribe()
    }
}

/// A step for which ranks wait. Dropping the cell aborts its task.
#[derive(Debug)]
pub struct Cell {
    progress: watch::Sender<Progress>,
    demand: watch::Sender<Demand>,
    parked: Arc<AtomicBool>,
    task: AbortHandle,
    begun: Instant,
}

impl Cell {
    /// Starts `task` on a new cell.
    pub fn start<F>(task: impl FnOnce(Reporter) -> F) -> Self
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let progress = watch::Sender::new(Progress::Working {
            errors_sent: 0,
            message: None,
        });
        let demand = watch::Sender::new(Demand::default());
        let parked = Arc::<AtomicBool>::default();
        let reporter = Reporter {
            progress: progress.clone(),
            demand: demand.clone(),
            parked: parked.clone(),
        };
        let task = tokio::spawn(task(reporter)).abort_handle();
        Self {
            progress,
            demand,
            parked,
            task,
            begun: Instant::now(),
        }
    }

    pub fn is_failed(&self) -> bool {
        matches!(*self.progress.borrow(), Progress::Failed(_))
    }

    pub fn is_ready(&self) -> bool {
        matches!(*self.progress.borrow(), Progress::Ready(_))
    }

    /// Returns the bytes of the process's memory that its batch takes.
    pub fn bytes(&self) -> u64 {
        match &*self.progress.borrow() {
            Progress::Ready(ready) => ready.bytes(),
            Progress::Working { .. } | Progress::Failed(_) => 0,
        }
    }

    /// Returns whether the step is being decided and does not wait for the trainer.
    pub fn is_at_work(&self) -> bool {
        matches!(*self.progress.borrow(), Progress::Working { .. })
            && !self.parked.load(Ordering::SeqCst)
    }

    /// Returns the time since a rank last asked for the step.
    pub fn idle_for(&self) -> Duration {
        self.demand.borrow().asked.unwrap_or(self.begun).elapsed()
    }

    /// Forgets the demand of an earlier start of the trainer. Its calls that still wait end with
    /// `error`.
    pub fn take_over(&self, error: &Error) {
        self.demand
            .send_modify(|demand| *demand = demand.for_new_start());
        fail_waiting(&self.progress, error.repeat());
    }

    /// Ends the step with `error` for all waiting calls.
    pub fn end(&self, error: &Error) {
        self.task.abort();
        fail(&self.progress, || error.repeat());
    }

    /// Returns whether a call waits here.
    pub fn is_wanted(&self) -> bool {
        self.progress.receiver_count() > 0
    }

    /// Adds a call to the waiting ranks.
    pub fn wait(&self, asking: &Asking, pushing_through: Option<i64>) -> Waiting {
        // Subscribed before `errors_sent` is read: an error that comes in between has a higher
        // count and ends this call, as it should.
        let progress = self.progress.subscribe();
        let errors_sent = match *progress.borrow() {
            Progress::Working { errors_sent, .. } => errors_sent,
            _ => 0,
        };
        let mut call = None;
        self.demand.send_modify(|demand| {
            let (rank, now) = (asking.rank, Instant::now());
            demand.world_size = asking.world_size;
            demand.asked = Some(now);
            // The rank's last word counts. A rank that no longer mentions its push has given it up,
            // and must not keep others waiting for it.
            match pushing_through {
                Some(step) => drop(demand.pushing.insert(rank, step)),
                None => drop(demand.pushing.remove(&rank)),
            }
            if asking.need {
                let stands_still = asking.held == 0;
                call = Some(demand.join(Need { rank, stands_still }, now));
            }
        });
        Waiting {
            progress,
            errors_sent,
            demand: self.demand.clone(),
            call,
        }
    }
}

impl Drop for Cell {
    fn drop(&mut self) {
        self.task.abort();
        // The waiting calls end at once, instead of at their deadlines.
        fail(&self.progress, crate::coordinator::released);
    }
}

fn fail(progress: &watch::Sender<Progress>, error: impl FnOnce() -> Error) {
    progress.send_if_modified(|progress| {
        // A finished step keeps its result: ranks that have not been polled yet still read it,
        // although the cell is dropped.
        let working = matches!(progress, Progress::Working { .. });
        if working {
            *progress = Progress::Failed(Arc::new(error()));
        }
        working
    });
}

fn fail_waiting(progress: &watch::Sender<Progress>, error: Error) {
    progress.send_modify(|progress| {
        if let Progress::Working {
            errors_sent,
            message,
        } = progress
        {
            *errors_sent += 1;
            *message = Some(Arc::new(error));
        }
    });
}

/// One waiting call. Dropping it withdraws the rank's need, also if the connection breaks.
pub struct Waiting {
    progress: watch::Receiver<Progress>,
    errors_sent: u64,
    demand: watch::Sender<Demand>,
    /// The call's number in the step's demand, if it needs the step.
    call: Option<u64>,
}

impl Waiting {
    /// Waits until the step is ready or failed, or until waiting ranks get an error.
    pub async fn ready(mut self) -> Result<Arc<Ready>> {
        let seen = self.errors_sent;
        // Deadlines apply only to calls that need the step: a prefetch waits on.
        let needing = self.call.is_some();
        let done = |progress: &Progress| match progress {
            Progress::Working { errors_sent, .. } => needing && *errors_sent > seen,
            _ => true,
        };
        match self.progress.wait_for(done).await {
            Ok(progress) => match &*progress {
                Progress::Ready(ready) => Ok(ready.clone()),
                Progress::Failed(error) => Err(error.repeat()),
                Progress::Working { message, .. } => Err(message
                    .as_ref()
                    .map_or_else(crate::coordinator::released, |e| e.repeat())),
            },
            Err(_) => Err(crate::coordinator::released()),
        }
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        let Some(call) = self.call else { return };
        self.demand.send_if_modified(|demand| demand.leave(call));
    }
}
