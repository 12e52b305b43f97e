//! The weights for a step: pure arithmetic on step numbers.
use superbatch_proto::v1::{Lag, lag::Bound};

/// The weights that a step requires, by the step after which they were pushed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Due {
    /// The initial learner: no push is due that early.
    Initial,
    /// The push after this step and no other, whatever the timing.
    Exactly(u64),
    /// The newest push of a step in `oldest..=newest`; -1 stands for the initial learner.
    Within { oldest: i64, newest: i64 },
}

/// Returns the weights for scoring `step` if a push comes after every `push_every_steps` steps
/// (after p-1, 2p-1, …; 0 is read as 1).
///
/// `exact(n)` requires the newest such push at or before step-1-n. `at_most(n)` accepts the newest
/// push before the step, at most n steps older than step-1; pushes need not keep the cadence there.
/// An absent lag is `exact(1)`.
pub fn due(step: u64, lag: &Lag, push_every_steps: u32) -> Due {
    let behind = |n: u32| i64::try_from(step).unwrap_or(i64::MAX) - 1 - i64::from(n);
    match lag.bound.unwrap_or(Bound::Exact(1)) {
        Bound::Exact(n) => match newest_push(behind(n), push_every_steps) {
            Some(push) => Due::Exactly(push),
            None => Due::Initial,
        },
        Bound::AtMost(n) => Due::Within {
            oldest: behind(n).max(-1),
            newest: behind(0),
        },
    }
}

/// Returns whether a push is expected after `step`.
pub fn on_cadence(step: u64, push_every_steps: u32) -> bool {
    step % u64::from(push_every_steps.max(1)) == u64::from(push_every_steps.max(1)) - 1
}

/// Returns the first step at or after `step` after which a push is expected.
pub(super) fn next_push(step: u64, push_every_steps: u32) -> u64 {
    let every = u64::from(push_every_steps.max(1));
    (step / every)
        .saturating_mul(every)
        .saturating_add(every - 1)
}

/// Returns the newest step at or before `limit` after which a push is expected.
fn newest_push(limit: i64, push_every_steps: u32) -> Option<u64> {
    let every = u64::from(push_every_steps.max(1));
    let steps = u64::try_from(limit).ok()? + 1;
    (steps / every * every).checked_sub(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lag(bound: Bound) -> Lag {
        Lag { bound: Some(bound) }
    }

    /// The definition, by trying every push step there could be.
    fn exact_by_trial(step: u64, n: u64, every: u64) -> Due {
        let pushes = (0..step).filter(|q| (q + 1) % every == 0 && q + 1 + n <= step);
        pushes.max().map_or(Due::Initial, Due::Exactly)
    }

    #[test]
    fn exact_is_the_newest_push_that_is_old_enough() {
        for (step, n, every) in
            (0..40).flat_map(|s| (0..6).flat_map(move |n| (1..7).map(move |p| (s, n, p))))
        {
            let found = due(step, &lag(Bound::Exact(n)), every);
            assert_eq!(
                found,
                exact_by_trial(step, n.into(), every.into()),
                "step {step}, exact({n}), every {every}"
            );
            if let Due::Exactly(push) = found {
                assert!(on_cadence(push, every));
            }
        }
        assert_eq!(
            due(7, &Lag { bound: None }, 0),
            Due::Exactly(5),
            "the default is exact(1), a push after every step"
        );
    }

    #[test]
    fn at_most_accepts_exactly_the_steps_it_names() {
        for (step, n, every) in
            (0..20i64).flat_map(|s| (0..6).flat_map(move |n| (1..4).map(move |p| (s, n, p))))
        {
            let Due::Within { oldest, newest } = due(step as u64, &lag(Bound::AtMost(n)), every)
            else {
                panic!("not a range")
            };
            for push in -1..step + 3 {
                let age = step - 1 - push;
                assert_eq!(
                    (oldest..=newest).contains(&push),
                    (0..=n.into()).contains(&age),
                    "step {step}, push {push}"
                );
            }
        }
    }

    #[test]
    fn the_cadence_is_after_every_p_steps() {
        for every in 1..6u32 {
            for step in 0..30 {
                assert_eq!(on_cadence(step, every), (step + 1) % u64::from(every) == 0);
                assert_eq!(
                    next_push(step, every),
                    (step..).find(|next| on_cadence(*next, every)).unwrap()
                );
            }
        }
    }
}
