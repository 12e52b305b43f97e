//! How far a long command is, for a log line now and then.
use std::time::{Duration, Instant};

/// How often a command says how far it is.
const EVERY: Duration = Duration::from_secs(10);

/// The clock of a command that works through `total` things.
pub(super) struct Progress {
    pub(super) total: u64,
    begun: Instant,
    last_line: Instant,
}

/// What a log line says of pace.
pub(super) struct Pace {
    /// Things a second since the command began.
    pub(super) per_second: f64,
    /// Whole seconds until the end at this pace.
    pub(super) seconds_left: f64,
}

impl Progress {
    pub(super) fn begin(total: u64) -> Self {
        let now = Instant::now();
        Self {
            total,
            begun: now,
            last_line: now,
        }
    }

    /// Returns the pace if a line is due, with `done` things behind.
    pub(super) fn due(&mut self, done: u64) -> Option<Pace> {
        if self.last_line.elapsed() < EVERY {
            return None;
        }
        self.last_line = Instant::now();
        Some(Pace::of(done, self.total, self.begun.elapsed()))
    }
}

impl Pace {
    fn of(done: u64, total: u64, took: Duration) -> Self {
        let per_second = done as f64 / took.as_secs_f64();
        let left = total.saturating_sub(done) as f64;
        Self {
            per_second,
            seconds_left: (left / per_second.max(f64::MIN_POSITIVE)).round(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pace_tells_what_is_left() {
        let pace = Pace::of(30, 90, Duration::from_secs(10));
        assert_eq!((pace.per_second, pace.seconds_left), (3.0, 20.0));
        assert_eq!(Pace::of(90, 80, Duration::from_secs(10)).seconds_left, 0.0);
    }

    #[test]
    fn no_line_is_due_at_once() {
        assert!(Progress::begin(90).due(30).is_none());
    }
}
