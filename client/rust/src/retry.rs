//! Retries of calls: how often and how long.
use crate::{Client, Error, Result};
use rand::Rng;
use std::time::Duration;
use tokio::time::{Instant, sleep, timeout};
use tonic::Status;

/// Bounds on retries. They count failures in a row: a stream that made progress before it broke
/// begins anew.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Retry {
    /// Attempts in all; 1 means no retry.
    pub attempts_max: u32,
    /// Time from the first failure after which no further attempt begins. A silent service counts
    /// as failed since its last answer, which is noticed after at most twice
    /// [`crate::ConnectConfig::keep_alive`]. After a call without an answer, the next attempt
    /// begins once the service answers at all; it may then wait as long as the answer takes.
    pub elapsed_max: Duration,
    /// Longest delay after the first failure. It doubles with each further failure.
    pub backoff_first: Duration,
    /// Longest delay between two attempts.
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

/// A batch that arrives damaged this often is damaged at its source, so more attempts would not
/// help.
const CORRUPT_ATTEMPTS_MAX: u32 = 3;

impl Retry {
    /// Returns the delay after the `failures`-th failure in a row (from 1). It grows exponentially
    /// and half of it is random, so that ranks that failed together do not retry together.
    pub fn delay(&self, failures: u32, rng: &mut impl Rng) -> Duration {
        let doublings = failures.saturating_sub(1).min(31);
        let longest = self
            .backoff_first
            .saturating_mul(1 << doublings)
            .min(self.backoff_max);
        longest.mul_f64(rng.random_range(0.5..=1.0))
    }
}

/// The failures of one call so far.
pub(crate) struct Attempts<'a> {
    retry: &'a Retry,
    silence_max: Duration,
    failures: u32,
    first: Option<Instant>,
}

impl<'a> Attempts<'a> {
    pub(crate) fn new(retry: &'a Retry, silence_max: Duration) -> Self {
        Self {
            retry,
            silence_max,
            failures: 0,
            first: None,
        }
    }

    pub(crate) fn of(client: &'a Client) -> Self {
        Self::new(&client.link.retry, client.link.silence_max)
    }

    /// Notes progress: earlier failures no longer count.
    pub(crate) fn progressed(&mut self) {
        (self.failures, self.first) = (0, None);
    }

    /// Returns the wait before the next attempt, or the final error. The attempt ran from `began`
    /// to `now`.
    fn failed(
        &mut self,
        error: Error,
        began: Instant,
        now: Instant,
        rng: &mut impl Rng,
    ) -> Result<Duration> {
        let silent = if error.is_silence() {
            self.silence_max.min(now - began)
        } else {
            Duration::ZERO
        };
        // An attempt that lasted this long had a live connection, since pings would have ended it
        // earlier. So the time before it does not count. The number of attempts still does.
        if now - began > 2 * self.silence_max {
            self.first = None;
        }
        // The service has tried again by itself before it answered. That is part of this call's
        // patience: if each of its answers after minutes began a new one, they would multiply.
        let retried = error.retried().min(now - began);
        self.first.get_or_insert(now - silent.max(retried));
        self.failures += 1;
        if !error.is_retryable() {
            return Err(error);
        }
        let attempts_max = match error {
            Error::Corrupt { .. } => self.retry.attempts_max.min(CORRUPT_ATTEMPTS_MAX),
            _ => self.retry.attempts_max,
        };
        let delay = self.retry.delay(self.failures, rng);
        if self.failures >= attempts_max || self.elapsed(now) + delay > self.retry.elapsed_max {
            return Err(self.give_up_error(error, now));
        }
        tracing::debug!(%error, attempt = self.failures, ?delay, "trying again");
        Ok(delay)
    }

    /// Waits until the next attempt may begin, or returns the final error.
    ///
    /// An attempt may rightly wait long for its answer: a step may take minutes. So its own
    /// duration cannot be limited. Instead, after an attempt without an answer, the service is
    /// first asked for any answer at all, in the time that is left.
    pub(crate) async fn wait_before_next(
        &mut self,
        client: &Client,
        error: Error,
        mut began: Instant,
    ) -> Result<()> {
        let mut error = client.located(error);
        loop {
            let heard = !matches!(error, Error::Broken { .. });
            let delay = self.failed(error, began, Instant::now(), &mut rand::rng())?;
            sleep(delay).await;
            if heard {
                return Ok(());
            }
            began = Instant::now();
            let left = self.retry.elapsed_max.saturating_sub(self.elapsed(began));
            error = match timeout(left, client.answers()).await {
                Ok(Ok(())) => return Ok(()),
                Ok(Err(error)) => error,
                Err(_) => {
                    let silence = Status::unavailable(format!(
                        "no sign of life in {:.1} s",
                        left.as_secs_f64()
                    ));
                    return Err(self.give_up_error(client.located(silence.into()), Instant::now()));
                }
            };
        }
    }

    fn elapsed(&self, now: Instant) -> Duration {
        self.first.map_or(Duration::ZERO, |first| now - first)
    }

    fn give_up_error(&self, last: Error, now: Instant) -> Error {
        Error::GaveUp {
            attempts: self.failures,
            elapsed: self.elapsed(now),
            last: Box::new(last),
        }
    }
}

/// Calls until `attempt` succeeds, fails for good, or reaches the bounds.
pub(crate) async fn call<T, F>(client: &Client, mut attempt: impl FnMut() -> F) -> Result<T>
where
    F: Future<Output = Result<T>>,
{
    let mut attempts = Attempts::of(client);
    loop {
        let began = Instant::now();
        match attempt().await {
            Ok(value) => return Ok(value),
            Err(error) => attempts.wait_before_next(client, error, began).await?,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::{SeedableRng, rngs::StdRng};
    use superbatch_proto::{Failure, RETRIED_SECONDS, v1::Reason};
    use tonic::Status;

    #[test]
    fn delays_double_up_to_the_longest_and_keep_at_least_half() {
        let retry = Retry::default();
        let mut rng = StdRng::seed_from_u64(7);
        for (failures, longest_ms) in [
            (1, 100),
            (2, 200),
            (5, 1_600),
            (9, 10_000),
            (u32::MAX, 10_000),
        ] {
            let longest = Duration::from_millis(longest_ms);
            for _ in 0..50 {
                let delay = retry.delay(failures, &mut rng);
                assert!(
                    longest / 2 <= delay && delay <= longest,
                    "{failures}: {delay:?}"
                );
            }
        }
    }

    #[test]
    fn attempts_are_bounded_in_count_and_in_time() {
        let retry = Retry {
            attempts_max: 3,
            elapsed_max: Duration::from_secs(5),
            ..Retry::default()
        };
        let mut rng = StdRng::seed_from_u64(7);
        let start = Instant::now();
        let broken = || Error::from(Status::unavailable("x"));

        let mut attempts = Attempts::new(&retry, Duration::from_secs(40));
        assert!(attempts.failed(broken(), start, start, &mut rng).is_ok());
        assert!(attempts.failed(broken(), start, start, &mut rng).is_ok());
        assert!(matches!(
            attempts.failed(broken(), start, start, &mut rng),
            Err(Error::GaveUp { attempts: 3, .. })
        ));

        let mut attempts = Attempts::new(&retry, Duration::from_secs(40));
        assert!(attempts.failed(broken(), start, start, &mut rng).is_ok());
        let late = start + Duration::from_secs(5);
        assert!(matches!(
            attempts.failed(broken(), start, late, &mut rng),
            Err(Error::GaveUp { attempts: 2, .. })
        ));

        attempts.progressed();
        assert!(attempts.failed(broken(), start, late, &mut rng).is_ok());
    }

    #[test]
    fn what_the_service_tried_again_is_part_of_the_patience() {
        let retry = Retry {
            elapsed_max: Duration::from_secs(120),
            ..Retry::default()
        };
        let mut rng = StdRng::seed_from_u64(7);
        let start = Instant::now();
        let failed_after = |seconds: u64, retried: &str| {
            let failure = Failure::new(Reason::StorageUnreachable, "no answer");
            let error = Error::Refused(Box::new(failure.with(RETRIED_SECONDS, retried)));
            let mut attempts = Attempts::new(&retry, Duration::from_secs(20));
            let now = start + Duration::from_secs(seconds);
            attempts.failed(error, start, now, &mut rng.clone())
        };
        assert!(matches!(
            failed_after(170, "170.0"),
            Err(Error::GaveUp { attempts: 1, .. })
        ));
        // The step took long, and the store failed at its end only.
        assert!(failed_after(600, "30.0").is_ok());
        // What is no number, or longer than the call, says nothing more.
        for nonsense in ["-1", "nan", "1e300", "x"] {
            assert!(failed_after(1, nonsense).is_ok(), "{nonsense}");
        }
        let mut attempts = Attempts::new(&retry, Duration::from_secs(20));
        let plain = Error::from(Status::unavailable("x"));
        assert!(attempts.failed(plain, start, start, &mut rng).is_ok());
    }

    #[test]
    fn time_counts_from_when_the_service_was_last_heard() {
        let retry = Retry {
            attempts_max: 4,
            elapsed_max: Duration::from_secs(45),
            ..Retry::default()
        };
        let mut rng = StdRng::seed_from_u64(7);
        let (start, silence) = (Instant::now(), Duration::from_secs(40));
        let mut attempts = Attempts::new(&retry, silence);
        let broken = || Error::from(Status::unavailable("x"));
        assert!(attempts.failed(broken(), start, start, &mut rng).is_ok());
        // Answered only after minutes, and then cut: the service was there.
        let late = start + Duration::from_secs(300);
        assert!(attempts.failed(broken(), start, late, &mut rng).is_ok());
        assert!(attempts.elapsed(late).is_zero());
        // As long as silence may last: it may never have been there.
        let silent = late + silence;
        assert!(attempts.failed(broken(), late, silent, &mut rng).is_ok());
        assert_eq!(attempts.elapsed(silent), silence);
        assert!(
            attempts
                .failed(broken(), silent, silent + silence * 3, &mut rng)
                .is_err(),
            "four attempts are enough"
        );
    }
}
