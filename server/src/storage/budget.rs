//! How long, and how often, one call goes on asking a store.
//!
//! Several layers may try again: a fact whose outcome is not known, the commit that writes it, the
//! caller. If each had patience of its own, they would multiply: five attempts under four under
//! three are sixty, and a lock that is held meanwhile is held for the product of all waits. So one
//! budget is made where the call begins, and travels down with it.
use backon::{BackoffBuilder, ExponentialBackoff, ExponentialBuilder};
use std::time::Duration;
use tokio::time::{Instant, timeout_at};

/// Attempts of one call, over all layers.
pub const ATTEMPTS_MAX: usize = 8;
/// The longest that one call goes on. It is more than the store's own client takes to give up.
const WHOLE: Duration = Duration::from_secs(300);
/// The longest single request: what has no answer by then is read back and tried again.
const REQUEST: Duration = Duration::from_secs(60);
const FIRST_PAUSE: Duration = Duration::from_millis(250);
const PAUSE_MAX: Duration = Duration::from_secs(8);

/// Attempts and time that are left.
#[derive(Debug)]
pub struct Budget {
    until: Instant,
    pauses: ExponentialBackoff,
}

impl Default for Budget {
    fn default() -> Self {
        Self::of(WHOLE, FIRST_PAUSE)
    }
}

impl Budget {
    /// As long as `whole`, with a first pause of about `first`; the next ones are longer.
    pub fn of(whole: Duration, first: Duration) -> Self {
        let pauses = ExponentialBuilder::default()
            .with_min_delay(first)
            .with_max_delay(PAUSE_MAX)
            .with_max_times(ATTEMPTS_MAX - 1)
            .with_jitter();
        Self {
            until: Instant::now() + whole,
            pauses: pauses.build(),
        }
    }

    /// Waits until the next attempt may begin. `false`: there is none, pass on what failed.
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

    /// Waits for one request; `None` if it has no answer in time, so that its outcome is not
    /// known.
    pub async fn request<T>(&self, request: impl Future<Output = T>) -> Option<T> {
        let until = self.until.min(Instant::now() + REQUEST);
        timeout_at(until, request).await.ok()
    }
}
