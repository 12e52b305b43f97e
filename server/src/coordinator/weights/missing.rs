//! Finds the pushes that a trainer must repeat when it resumes. Pure.
use super::{Due, due};
use std::collections::BTreeSet;
use superbatch_proto::v1::Lag;

/// Most steps that are examined. With a larger lag a trainer learns of the first missing pushes
/// only.
const STEPS_MAX: u64 = 1 << 12;

/// Returns the pushes that steps from `resume` on need, that are not published, and that a trainer
/// which goes on at `resume` will not make by itself. `is_scored` returns whether a step is still
/// to be decided with the learner's weights, `is_there` whether suitable weights are published.
pub fn missing(
    resume: u64,
    lag: &Lag,
    push_every_steps: u32,
    is_scored: impl Fn(u64) -> bool,
    is_there: impl Fn(Due) -> bool,
) -> Vec<i64> {
    let mut missing = BTreeSet::new();
    for step in (0..STEPS_MAX).map_while(|n| resume.checked_add(n)) {
        let due = due(step, lag, push_every_steps);
        let push = match due {
            Due::Initial => -1,
            Due::Exactly(push) => i64::try_from(push).unwrap_or(i64::MAX),
            Due::Within { newest, .. } => newest,
        };
        if i64::try_from(resume).is_ok_and(|resume| push >= resume) {
            // The trainer makes this push and all later ones as it trains.
            break;
        }
        if is_scored(step) && !is_there(due) {
            missing.insert(push);
        }
    }
    missing.into_iter().collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use superbatch_proto::v1::lag::Bound;

    /// For a run whose pushes `there` have arrived, and whose steps below `decided` are decided.
    fn of(bound: Bound, every: u32, resume: u64, decided: u64, there: &[i64]) -> Vec<i64> {
        let lag = Lag { bound: Some(bound) };
        let is_there = |due| match due {
            Due::Initial => there.contains(&-1),
            Due::Exactly(push) => there.contains(&(push as i64)),
            Due::Within { oldest, newest } => there.iter().any(|at| (oldest..=newest).contains(at)),
        };
        missing(resume, &lag, every, |step| step >= decided, is_there)
    }

    #[test]
    fn two_pushes_may_be_lost_under_exact_1() {
        let exact = Bound::Exact(1);
        assert_eq!(of(exact, 1, 7, 7, &[-1, 0, 1, 2, 3, 4]), [5, 6]);
        assert_eq!(of(exact, 1, 7, 7, &[-1, 0, 1, 2, 3, 4, 5]), [6]);
        assert_eq!(of(exact, 1, 7, 7, &[-1, 0, 1, 2, 3, 4, 5, 6]), [0; 0]);
        assert_eq!(
            of(exact, 1, 7, 8, &[-1, 0, 1, 2, 3, 4]),
            [6],
            "step 7 is decided already"
        );
    }

    #[test]
    fn a_trainer_repeats_no_more_than_its_lag_and_cadence_ask() {
        assert_eq!(of(Bound::Exact(0), 1, 7, 7, &[4, 5]), [6]);
        assert_eq!(of(Bound::Exact(3), 1, 7, 7, &[3]), [4, 5, 6]);
        // Pushes come after steps 3, 7, 11: step 9 waits for 7, steps from 13 on for 11.
        assert_eq!(of(Bound::Exact(1), 4, 9, 9, &[3]), [7]);
        assert_eq!(of(Bound::Exact(1), 4, 9, 9, &[3, 7]), [0; 0]);
    }

    #[test]
    fn any_fresh_push_will_do_under_at_most() {
        assert_eq!(of(Bound::AtMost(2), 1, 7, 7, &[4]), [0; 0]);
        assert_eq!(of(Bound::AtMost(2), 1, 7, 7, &[3]), [6]);
    }

    #[test]
    fn initial_weights_may_be_missing() {
        assert_eq!(of(Bound::Exact(1), 1, 0, 0, &[]), [-1]);
        assert_eq!(of(Bound::Exact(1), 1, 0, 0, &[-1]), [0; 0]);
        assert_eq!(of(Bound::Exact(1), 1, 1, 1, &[]), [-1, 0]);
    }
}
