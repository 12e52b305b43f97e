//! The time for which the trainer stood still, for receipts and metrics.
use std::{
    collections::BTreeMap,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

/// Steps whose waits are held. A trainer that never says what it has consumed ends none.
const STEPS_MAX: usize = 64;

/// The waits of one run's ranks.
#[derive(Debug, Default)]
pub struct Waits {
    /// The longest wait since the last call of [`Waits::take`], in microseconds.
    longest: AtomicU64,
    /// The longest wait of each step that has not ended.
    steps: Mutex<BTreeMap<u64, Duration>>,
}

impl Waits {
    /// Notes that a rank stood still for so long for its batch of `step`.
    pub fn record(&self, step: u64, waited: Duration) {
        // 0 means that no wait was noted.
        let micros = u64::try_from(waited.as_micros()).unwrap_or(u64::MAX).max(1);
        self.longest.fetch_max(micros, Ordering::Relaxed);
        let mut steps = self.steps.lock().unwrap_or_else(PoisonError::into_inner);
        let known = steps.entry(step).or_default();
        *known = waited.max(*known);
    }

    /// Notes that a batch of `step` was served before a rank stood still for it.
    pub fn record_served(&self, step: u64) {
        let mut steps = self.steps.lock().unwrap_or_else(PoisonError::into_inner);
        steps.entry(step).or_default();
    }

    /// Returns the longest noted wait in seconds; `None` if there was none. Starts anew.
    pub fn take(&self) -> Option<f64> {
        let micros = self.longest.swap(0, Ordering::Relaxed);
        (micros > 0).then(|| Duration::from_micros(micros).as_secs_f64())
    }

    /// Takes out the steps through `consumed`, which all ranks have consumed, and the oldest if
    /// there are too many. Returns the longest wait of each.
    pub fn end_through(&self, consumed: Option<u64>) -> Vec<Duration> {
        let mut steps = self.steps.lock().unwrap_or_else(PoisonError::into_inner);
        let mut ended = Vec::new();
        let is_consumed = |step: u64| consumed.is_some_and(|consumed| step <= consumed);
        while let Some((step, waited)) = steps.pop_first() {
            if !is_consumed(step) && steps.len() < STEPS_MAX {
                steps.insert(step, waited);
                break;
            }
            ended.push(waited);
        }
        ended
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_longest_wait_is_told_once() {
        let waits = Waits::default();
        assert_eq!(waits.take(), None);
        for millis in [20, 70, 10] {
            waits.record(0, Duration::from_millis(millis));
        }
        assert_eq!((waits.take(), waits.take()), (Some(0.07), None));
        waits.record(0, Duration::ZERO);
        assert_eq!(waits.take(), Some(1e-6), "it was asked for, and was there");
    }

    #[test]
    fn a_step_has_the_wait_of_its_slowest_rank() {
        let waits = Waits::default();
        for (step, millis) in [(3, 20), (4, 5), (3, 70), (3, 10), (4, 0)] {
            waits.record(step, Duration::from_millis(millis));
        }
        assert!(waits.end_through(None).is_empty());
        assert!(waits.end_through(Some(2)).is_empty());
        let [slow, fast] = [70, 5].map(Duration::from_millis);
        assert_eq!(waits.end_through(Some(3)), vec![slow]);
        assert!(waits.end_through(Some(3)).is_empty(), "it is told once");
        assert_eq!(waits.end_through(Some(9)), vec![fast]);
    }

    #[test]
    fn steps_that_nobody_consumes_take_bounded_memory() {
        let waits = Waits::default();
        let mut ended = 0;
        for step in 0..2 * STEPS_MAX as u64 {
            waits.record(step, Duration::ZERO);
            ended += waits.end_through(None).len();
        }
        assert_eq!(ended, STEPS_MAX);
        assert_eq!(waits.end_through(Some(u64::MAX)).len(), STEPS_MAX);
    }
}
