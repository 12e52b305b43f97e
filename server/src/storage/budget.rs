//! How long, and how often, one call goes on asking a store.
//!
//! Several layers may try again: a fact whose outcome is not known, the commit that writes it, the
//! caller. If each had patience of its own, they would multiply: five attempts under four under
//! three are sixty, and a lock that is held meanwhile is held for the product of all waits. So one
//! budget is made where the call begins, and travels down with it.
use crate::error::{Error, Result};
use backon::{BackoffBuilder, ExponentialBackoff, ExponentialBuilder};
use std::time::Duration;
use superbatch_proto::{RETRIED_SECONDS, v1::Reason};
use tokio::time::{Instant, timeout_at};

/// Most time that one call retries.
const WHOLE: Duration = Duration::from_secs(300);
/// Most time that a start retries.
const START: Duration = Duration::from_secs(20);
/// Most time of a single request. If it has no answer by then, its effect is read back and it is
/// tried again.
const REQUEST: Duration = Duration::from_secs(60);
/// Most time of a read that is made while a lock is held.
const LOOK: Duration = Duration::from_secs(20);
const FIRST_PAUSE: Duration = Duration::from_millis(250);
/// How many times the pause doubles.
const DOUBLINGS: u32 = 5;

/// Attempts and time that are left.
#[derive(Debug)]
pub struct Budget {
    begun: Instant,
    until: Instant,
    pauses: ExponentialBackoff,
}

impl Default for Budget {
    fn default() -> Self {
        Self::of(WHOLE, FIRST_PAUSE)
    }
}

impl Budget {
    /// Attempts of one call, over all layers. With their pauses, about three minutes: as long as a
    /// store's client goes on where it retries by itself.
    pub const ATTEMPTS_MAX: usize = 26;

    /// Returns the budget of a process's start. It is short: no call waits for the process yet, and
    /// an operator who gave a folder that cannot be written to should read so at once.
    pub(super) fn of_start() -> Self {
        Self::of(START, FIRST_PAUSE)
    }

    /// Makes a budget as long as `whole`, with a first pause of about `first`; the next ones are
    /// longer.
    pub fn of(whole: Duration, first: Duration) -> Self {
        let pauses = ExponentialBuilder::default()
            .with_min_delay(first)
            .with_max_delay(first * 2_u32.pow(DOUBLINGS))
            .with_max_times(Self::ATTEMPTS_MAX - 1)
            .with_jitter();
        Self {
            begun: Instant::now(),
            until: Instant::now() + whole,
            pauses: pauses.build(),
        }
    }

    /// Waits until the next attempt may begin. Returns `false` if no attempt is left; the caller
    /// then returns its last error.
    pub async fn pause(&mut self) -> bool {
        let Some(pause) = self.pauses.next() else {
            return false;
        };
        if Instant::now() + pause >= self.until {
            return false;
        }
        tokio::time::sleep(pause).await;
        true
    }

    /// Waits for what asks no store, such as a lock. That time is not counted: a call that comes
    /// late to the store because others were before it has as much left as they had.
    pub async fn uncounted<T>(&mut self, wait: impl Future<Output = T>) -> T {
        let begun = Instant::now();
        let done = wait.await;
        let waited = begun.elapsed();
        self.until += waited;
        self.begun += waited;
        done
    }

    /// Adds to a final error how long was tried. The caller's client counts that time as its own:
    /// one that then tried again with all its patience would multiply the two.
    pub fn spent(&self, error: Error) -> Error {
        let seconds = self.begun.elapsed().as_secs_f64();
        error.with(RETRIED_SECONDS, format!("{seconds:.3}"))
    }

    /// Waits for one request; `None` if it has no answer in time, so that its outcome is not
    /// known.
    pub async fn request<T>(&self, request: impl Future<Output = T>) -> Option<T> {
        let until = self.until.min(Instant::now() + REQUEST);
        timeout_at(until, request).await.ok()
    }

    /// Waits for a read while others wait for the caller's lock. The store's own client goes on for
    /// minutes with one read that fails; here it has to be given up sooner, so that the lock is
    /// free while this call pauses.
    ///
    /// # Errors
    /// Those of the read; `StorageUnreachable` if it has no answer in time.
    pub async fn look<T>(&self, read: impl Future<Output = Result<T>>) -> Result<T> {
        let until = self.until.min(Instant::now() + LOOK);
        timeout_at(until, read).await.unwrap_or_else(|_| {
            let seconds = LOOK.as_secs();
            let message = format!("the store has not answered a read within {seconds} s");
            Err(Error::new(Reason::StorageUnreachable, message))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn waiting_for_others_costs_no_patience() {
        let mut budget = Budget::of(Duration::from_secs(60), Duration::from_secs(1));
        let (begun, until) = (budget.begun, budget.until);
        let others = async {
            let start = Instant::now();
            while Instant::now() == start {}
        };
        budget.uncounted(others).await;
        assert!(budget.begun > begun && budget.until > until);
    }

    #[tokio::test]
    async fn a_read_under_a_lock_ends_and_may_be_tried_again() {
        let budget = Budget::of(Duration::from_millis(1), FIRST_PAUSE);
        let never = std::future::pending::<Result<()>>();
        let error = budget.look(never).await.unwrap_err();
        assert!(crate::storage::is_passing(&error), "{error}");
        assert_eq!(budget.look(async { Ok(7) }).await.unwrap(), 7);
    }
}
