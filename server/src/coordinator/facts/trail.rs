//! The committed steps of the current trajectory. Pure.
//!
//! Two numbers are taken for one another easily, and differ while steps are prepared ahead: the
//! first step that is missing, and the newest that is there. A trainer resumes at the first, and
//! weights are kept for all steps from there on. If they were counted from the newest, the weights
//! of a step that is still being decided would be deleted under it. The bound on how far ahead a
//! rank may ask goes by the newest: counted from the gap, one slow step would hold up the others.
use std::collections::BTreeSet;

/// The committed steps: all below `next`, and those beyond it that were committed out of order.
/// Steps are decided ahead at the same time, so a later one may be committed first. One number and
/// a small set stand for millions of steps.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Trail {
    next: u64,
    beyond: BTreeSet<u64>,
}

impl Trail {
    pub fn new(steps: impl IntoIterator<Item = u64>) -> Self {
        Self::beyond(0, steps)
    }

    /// Makes the trail of a run in which all steps before `next`, and `steps`, are committed.
    pub fn beyond(next: u64, steps: impl IntoIterator<Item = u64>) -> Self {
        let beyond = steps.into_iter().filter(|step| *step >= next).collect();
        let mut trail = Self { next, beyond };
        trail.settle();
        trail
    }

    pub fn insert(&mut self, step: u64) {
        if step >= self.next {
            self.beyond.insert(step);
            self.settle();
        }
    }

    pub fn contains(&self, step: u64) -> bool {
        step < self.next || self.beyond.contains(&step)
    }

    /// Returns the first step that is not committed.
    pub fn next(&self) -> u64 {
        self.next
    }

    /// Returns the newest committed step.
    pub fn newest(&self) -> Option<u64> {
        self.beyond
            .last()
            .copied()
            .or_else(|| self.next.checked_sub(1))
    }

    /// Removes all steps from `to_step` on.
    pub fn rewind(&mut self, to_step: u64) {
        self.next = self.next.min(to_step);
        self.beyond.split_off(&to_step);
    }

    fn settle(&mut self) {
        while self.beyond.remove(&self.next) {
            self.next += 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_gap_is_the_next_step_and_is_filled_later() {
        let mut trail = Trail::new([0, 1, 3]);
        assert_eq!((trail.next(), trail.newest()), (2, Some(3)));
        assert!(trail.contains(1) && !trail.contains(2) && trail.contains(3));
        trail.insert(2);
        assert_eq!((trail.next(), trail.newest()), (4, Some(3)));
        assert_eq!(
            (Trail::default().next(), Trail::default().newest()),
            (0, None)
        );
    }

    #[test]
    fn a_rewind_takes_steps_back() {
        let mut trail = Trail::new([0, 1, 2, 4, 5]);
        trail.rewind(5);
        assert_eq!((trail.next(), trail.newest()), (3, Some(4)));
        trail.rewind(1);
        assert_eq!((trail.next(), trail.newest()), (1, Some(0)));
        trail.rewind(9);
        assert_eq!((trail.next(), trail.newest()), (1, Some(0)));
    }
}
