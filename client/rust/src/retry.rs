//! How often and how long a call is tried again.
use crate::{Error, Result};
use rand::Rng;
use std::time::Duration;
use tokio::time::Instant;

/// Bounds on trying again. They count failures in a row: a stream that moved on before it broke starts afresh.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Retry {
    /// Attempts in all; 1 never tries again.
    pub attempts_max: u32,
    /// Time from the first failure after which no further attempt begins.
    pub elapsed_max: Duration,
    /// Longest delay after the first failure. It doubles with each further one.
    pub backoff_first: Duration,
    pub backoff_max: Duration,
}

impl Default for Retry {
    fn default() -> Self {
        Self {
            attempts_max: 16,
            elapsed_max: Duration::from_secs(120),
            backoff_first: Duration::from_millis(100),
            backoff_max: Duration::from_secs(10),
        }
    }
}

/// A batch that arrives damaged this often is damaged at its source.
const CORRUPT_ATTEMPTS_MAX: u32 = 3;

impl Retry {
    /// The delay after the `failures`-th failure in a row (from 1): exponential, with half of it left to chance, so that
    /// ranks that failed together do not come back together.
    pub fn delay(&self, failures: u32, rng: &mut impl Rng) -> Duration {
        let doublings = failures.saturating_sub(1).min(31);
        let longest = self.backoff_first.saturating_mul(1 << doublings).min(self.backoff_max);
        longest.mul_f64(rng.random_range(0.5..=1.0))
    }
}

/// The failures of one call so far.
pub(crate) struct Attempts<'a> {
    retry: &'a Retry,
    failures: u32,
    first: Option<Instant>,
}

impl<'a> Attempts<'a> {
    pub fn new(retry: &'a Retry) -> Self {
        Self { retry, failures: 0, first: None }
    }

    /// Something was achieved: what failed before no longer counts.
    pub fn progressed(&mut self) {
        (self.failures, self.first) = (0, None);
    }

    /// How long to wait before trying again, or the error to end with.
    pub fn failed(&mut self, error: Error, now: Instant, rng: &mut impl Rng) -> Result<Duration> {
        let first = *self.first.get_or_insert(now);
        self.failures += 1;
        if !error.is_retryable() {
            return Err(error);
        }
        let attempts_max = match error {
            Error::Corrupt { .. } => self.retry.attempts_max.min(CORRUPT_ATTEMPTS_MAX),
            _ => self.retry.attempts_max,
        };
        let (delay, elapsed) = (self.retry.delay(self.failures, rng), now - first);
        if self.failures >= attempts_max || elapsed + delay > self.retry.elapsed_max {
            return Err(Error::GaveUp { attempts: self.failures, elapsed, last: Box::new(error) });
        }
        tracing::debug!(%error, attempt = self.failures, ?delay, "trying again");
        Ok(delay)
    }
}

/// Calls until it succeeds, fails for good, or the bounds are reached.
pub(crate) async fn call<T, F>(retry: &Retry, mut attempt: impl FnMut() -> F) -> Result<T>
where
    F: Future<Output = Result<T>>,
{
    let mut attempts = Attempts::new(retry);
    loop {
        let error = match attempt().await {
            Ok(value) => return Ok(value),
            Err(error) => error,
        };
        let delay = attempts.failed(error, Instant::now(), &mut rand::rng())?;
        tokio::time::sleep(delay).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::{SeedableRng, rngs::StdRng};
    use tonic::Status;

    #[test]
    fn delays_double_up_to_the_longest_and_keep_at_least_half() {
        let retry = Retry::default();
        let mut rng = StdRng::seed_from_u64(7);
        for (failures, longest_ms) in [(1, 100), (2, 200), (5, 1_600), (9, 10_000), (u32::MAX, 10_000)] {
            let longest = Duration::from_millis(longest_ms);
            for _ in 0..50 {
                let delay = retry.delay(failures, &mut rng);
                assert!(longest / 2 <= delay && delay <= longest, "{failures}: {delay:?}");
            }
        }
    }

    #[test]
    fn attempts_are_bounded_in_count_and_in_time() {
        let retry = Retry { attempts_max: 3, elapsed_max: Duration::from_secs(5), ..Retry::default() };
        let mut rng = StdRng::seed_from_u64(7);
        let start = Instant::now();
        let broken = || Error::from(Status::unavailable("x"));

        let mut attempts = Attempts::new(&retry);
        assert!(attempts.failed(broken(), start, &mut rng).is_ok());
        assert!(attempts.failed(broken(), start, &mut rng).is_ok());
        assert!(matches!(attempts.failed(broken(), start, &mut rng), Err(Error::GaveUp { attempts: 3, .. })));

        let mut attempts = Attempts::new(&retry);
        assert!(attempts.failed(broken(), start, &mut rng).is_ok());
        let late = start + Duration::from_secs(5);
        assert!(matches!(attempts.failed(broken(), late, &mut rng), Err(Error::GaveUp { attempts: 2, .. })));

        attempts.progressed();
        assert!(attempts.failed(broken(), late, &mut rng).is_ok());
    }
}
