//! Self-reference: refuses weights that may not be there when a phase begins.
use super::{Asked, impossible};
use crate::error::Result;
use std::collections::BTreeSet;
use superbatch_proto::v1::{Phase, RunSpec, lag::Bound};

/// Checks that the learner's own weights can be a phase's reference: they are there for sure when
/// the phase begins, and at any time they are the same.
pub(super) fn check(i: usize, spec: &RunSpec, phase: &Phase) -> Result<()> {
    let Some(step) = phase.reference_step else {
        return Ok(());
    };
    let lag = match spec.lag.and_then(|lag| lag.bound) {
        None => Some(1),
        Some(Bound::Exact(lag)) => Some(u64::from(lag)),
        Some(Bound::AtMost(_)) => None,
    };
    let every = u64::from(spec.push_every_steps.max(1));
    let problem = match lag {
        _ if spec.learner.is_none() => "the run has no learner; name one".to_owned(),
        None => "the lag is at_most, under which no push is sure to come; make it exact".to_owned(),
        Some(lag) if step.saturating_add(lag) >= phase.from_step => format!(
            "the phase begins at step {}, before which those weights may not be there: with lag \
             exact({lag}) begin at step {} or later",
            phase.from_step,
            step.saturating_add(lag).saturating_add(1)
        ),
        Some(_) if step % every != every - 1 => {
            format!("no push is due after that step, with push_every_steps {every}")
        }
        Some(_) => return Ok(()),
    };
    let field = format!("phases[{i}].reference_step");
    Err(impossible(
        &field,
        format!("{field} is {step}, but {problem}"),
    ))
}

/// Returns the steps whose weights are the reference of a phase, as far as `step` or a later one is
/// scored with it.
pub fn references_from(phases: &[Phase], step: u64) -> BTreeSet<u64> {
    let ends = phases.iter().skip(1).map(|next| next.from_step);
    let ends = ends.chain(std::iter::once(u64::MAX));
    let used = phases.iter().zip(ends).filter(|(_, end)| *end > step);
    let asked = used.filter(|(phase, _)| Asked::by(phase).reference);
    asked
        .filter_map(|(phase, _)| phase.reference_step)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use superbatch_proto::v1::Policy;

    #[test]
    fn references_are_those_of_the_phases_that_are_not_over() {
        let phase = |from_step, policy: Policy, reference_step| Phase {
            from_step,
            policy: policy.into(),
            reference_step,
            ..Default::default()
        };
        let phases = [
            phase(0, Policy::Uniform, None),
            phase(100, Policy::Joint, Some(20)),
            phase(500, Policy::Joint, Some(300)),
            phase(900, Policy::Uniform, Some(400)),
        ];
        let of = |step| {
            references_from(&phases, step)
                .into_iter()
                .collect::<Vec<_>>()
        };
        assert_eq!(of(0), [20, 300]);
        assert_eq!(of(499), [20, 300]);
        assert_eq!(of(500), [300]);
        assert_eq!(of(900), [0; 0]);
    }
}
