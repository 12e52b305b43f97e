//! Calls of a run that are under way, and the choice of the run to put to sleep if there are too
//! many. A sleeping run leaves memory; its durable state stays, and the next call that names it
//! loads it again, as after a restart.
use super::run::Run;
use std::{ops::Deref, sync::Arc};
use tokio::time::Instant;

/// A run that a call uses. It is not put to sleep while this value lives.
pub struct Called(Arc<Run>);

impl Called {
    pub fn new(run: Arc<Run>) -> Self {
        let mut count = run.calls.count();
        (count.under_way, count.changed) = (count.under_way + 1, Instant::now());
        drop(count);
        Self(run)
    }
}

impl Deref for Called {
    type Target = Arc<Run>;

    fn deref(&self) -> &Arc<Run> {
        &self.0
    }
}

impl Drop for Called {
    fn drop(&mut self) {
        let mut count = self.0.calls.count();
        (count.under_way, count.changed) = (count.under_way - 1, Instant::now());
    }
}

/// Returns the run that has been idle longest, of (id, since when it has been idle).
pub fn longest_idle<'a>(
    runs: impl Iterator<Item = (&'a String, Option<Instant>)>,
) -> Option<&'a String> {
    runs.filter_map(|(id, since)| Some((since?, id)))
        .min()
        .map(|(_, id)| id)
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
            longest_idle(ids.iter().zip(idle.iter().copied())).cloned()
        };
        assert_eq!(
            first(&[after(3), after(1), None, after(2)]).as_deref(),
            Some("1")
        );
        assert_eq!(first(&[None, None]), None);
    }
}
