//! The time for which the trainer stood still, for receipts.
use std::{
    sync::atomic::{AtomicU64, Ordering},
    time::Duration,
};

/// The longest wait since the last call of [`Waits::take`].
#[derive(Debug, Default)]
pub struct Waits(AtomicU64);

impl Waits {
    /// Notes that a rank stood still for so long.
    pub fn record(&self, waited: Duration) {
        // 0 means that no wait was noted.
        let micros = u64::try_from(waited.as_micros()).unwrap_or(u64::MAX).max(1);
        self.0.fetch_max(micros, Ordering::Relaxed);
    }

    /// Returns the longest noted wait in seconds; `None` if there was none. Starts anew.
    pub fn take(&self) -> Option<f64> {
        let micros = self.0.swap(0, Ordering::Relaxed);
        (micros > 0).then(|| Duration::from_micros(micros).as_secs_f64())
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
            waits.record(Duration::from_millis(millis));
        }
        assert_eq!((waits.take(), waits.take()), (Some(0.07), None));
        waits.record(Duration::ZERO);
        assert_eq!(waits.take(), Some(1e-6), "it was asked for, and was there");
    }
}
