//! What a redraw does differently.
use crate::{
    coordinator::spec::complete_redraw,
    error::{Error, Result},
};
use superbatch_proto::v1::{Criterion, Mode, Phase, Policy, RunSpec, Tuning};

/// Differences from the step's own settings; what is absent stays as it was.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Change {
    pub policy: Option<Policy>,
    pub criterion: Option<Criterion>,
    pub sub_batch_size: Option<u32>,
    /// The share of the candidates that is left out; another way to give the sub-batch's size.
    pub filter_ratio: Option<f64>,
    pub n_chunks: Option<u32>,
    pub gain: Option<f64>,
    pub seed: Option<u64>,
    pub tuning: Tuning,
}

impl Change {
    /// Returns the run's spec with the step's phase alone, changed.
    ///
    /// # Errors
    /// `InvalidArgument` for a filter ratio that leaves nothing; `RunSpecImpossible` for a draw
    /// that can never work.
    pub(super) fn apply(&self, spec: &RunSpec, phase: &Phase) -> Result<RunSpec> {
        let scored_before = (phase.policy, phase.criterion);
        let mut phase = phase.clone();
        if let Some(policy) = self.policy {
            phase.policy = policy.into();
        }
        if let Some(criterion) = self.criterion {
            phase.criterion = criterion.into();
        }
        phase.sub_batch_size = self.size(&phase)?;
        phase.n_chunks = self.n_chunks.unwrap_or(phase.n_chunks);
        phase.gain = self.gain.unwrap_or(phase.gain);
        phase.tuning = Some(self.tuned(&phase, scored_before.0 == phase.policy));
        complete_redraw(spec, &mut phase)?;
        Ok(RunSpec {
            phases: vec![phase],
            seed: self.seed.unwrap_or(spec.seed),
            ..spec.clone()
        })
    }

    /// Returns the mode: a step that was degraded stays so, unless the change says how to draw.
    pub(super) fn mode(&self, was: Mode) -> Mode {
        match (self.policy, self.criterion) {
            (None, None) => was,
            _ => Mode::Normal,
        }
    }

    fn size(&self, phase: &Phase) -> Result<u32> {
        let Some(ratio) = self.filter_ratio else {
            return Ok(self.sub_batch_size.unwrap_or(phase.sub_batch_size));
        };
        let kept = (f64::from(phase.super_batch_size) * (1.0 - ratio)).round();
        if !(0.0..1.0).contains(&ratio) || kept < 1.0 {
            let message = format!(
                "filter_ratio is {ratio}, which leaves {kept} of {} candidates; give 0 or more, \
                 and less than 1",
                phase.super_batch_size
            );
            return Err(Error::invalid("filter_ratio", message));
        }
        Ok(kept as u32)
    }

    /// Returns the phase's tuning. Numbers that belong to the policy before do not go on under
    /// another. Rules that leave candidates out do.
    fn tuned(&self, phase: &Phase, same_policy: bool) -> Tuning {
        let (was, asked) = (phase.tuning.unwrap_or_default(), self.tuning);
        let own = |was: Option<f64>| was.filter(|_| same_policy);
        Tuning {
            temperature: asked.temperature.or(own(was.temperature)),
            pressure: asked.pressure.or(own(was.pressure)),
            priority_exponent: asked.priority_exponent.or(own(was.priority_exponent)),
            weight_exponent: asked.weight_exponent.or(own(was.weight_exponent)),
            duplicates_above: asked.duplicates_above.or(was.duplicates_above),
            clip_score_at_least: asked.clip_score_at_least.or(was.clip_score_at_least),
            neg_clip_loss_keep: asked.neg_clip_loss_keep.or(was.neg_clip_loss_keep),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::coordinator::spec::complete;
    use superbatch_proto::v1::{
        Approximation, Fallback, Fidelity, LearnerSpec, Loss, MultiResolution, Reason,
        ReferenceSpec, Source, approximation::By, learner_spec::Initial,
    };

    fn spec() -> RunSpec {
        let model = "file:///models/m".to_owned();
        RunSpec {
            sources: vec![Source {
                uri: "file:///data".into(),
                ..Default::default()
            }],
            reference: Some(ReferenceSpec {
                model_uri: model.clone(),
                ..Default::default()
            }),
            learner: Some(LearnerSpec {
                model_uri: model,
                initial: Some(Initial::RandomSeed(1)),
                ..Default::default()
            }),
            phases: vec![Phase {
                policy: Policy::Independent.into(),
                super_batch_size: 640,
                sub_batch_size: 128,
                tuning: Some(Tuning {
                    temperature: Some(2.0),
                    duplicates_above: Some(0.95),
                    ..Default::default()
                }),
                ..Default::default()
            }],
            loss: Loss::Sigmoid.into(),
            seed: 7,
            need_deadline_seconds: 60.0,
            ..Default::default()
        }
    }

    #[test]
    fn no_change_keeps_the_phase() {
        let before = complete(spec(), 60.0).unwrap();
        let after = Change::default().apply(&before, &before.phases[0]).unwrap();
        assert_eq!(after, before);
        assert_eq!(Change::default().mode(Mode::Uniform), Mode::Uniform);
    }

    #[test]
    fn a_policy_takes_its_numbers_with_it_and_rules_stay() {
        let before = complete(spec(), 60.0).unwrap();
        let change = Change {
            policy: Some(Policy::Joint),
            filter_ratio: Some(0.9),
            seed: Some(8),
            ..Default::default()
        };
        let after = change.apply(&before, &before.phases[0]).unwrap();
        let phase = &after.phases[0];
        assert_eq!((phase.policy(), phase.sub_batch_size), (Policy::Joint, 64));
        let tuning = phase.tuning.unwrap();
        assert_eq!(
            (tuning.temperature, tuning.duplicates_above),
            (None, Some(0.95))
        );
        assert_eq!(after.seed, 8);
        assert_eq!(change.mode(Mode::ReferenceOnly), Mode::Normal);
    }

    fn changed(before: &RunSpec, policy: Policy, criterion: Criterion) -> Result<RunSpec> {
        let change = Change {
            policy: Some(policy),
            criterion: Some(criterion),
            ..Default::default()
        };
        change.apply(before, before.phases.last().unwrap())
    }

    #[test]
    fn what_a_run_learned_before_the_step_is_not_asked_again() {
        let low = Approximation {
            by: Some(By::Resolution(8)),
        };
        let mut warm = spec();
        warm.phases[0].approximation = Some(low);
        warm.phases[0].multi_resolution = Some(MultiResolution::default());
        warm.phases.push(Phase {
            from_step: 2,
            fidelity: Fidelity::Approximate.into(),
            multi_resolution: None,
            ..warm.phases[0].clone()
        });
        let before = complete(warm, 60.0).unwrap();
        for phase in &before.phases {
            // A past step's phase has lost what concerns training.
            let phase = Phase {
                multi_resolution: None,
                ..phase.clone()
            };
            let after = Change::default().apply(&before, &phase).unwrap();
            assert_eq!(after.phases, [phase]);
        }
        let uniform = changed(&before, Policy::Uniform, Criterion::Learnability).unwrap();
        assert_eq!(uniform.phases[0].approximation, Some(low));
    }

    #[test]
    fn a_step_with_its_own_reference_is_redrawn_where_it_was() {
        let mut own = spec();
        own.phases.push(Phase {
            from_step: 3,
            reference_step: Some(1),
            ..own.phases[0].clone()
        });
        let before = complete(own, 60.0).unwrap();
        let hard = changed(&before, Policy::Independent, Criterion::Hard).unwrap();
        assert_eq!(hard.phases[0].reference_step, Some(1));
        changed(&before, Policy::Uniform, Criterion::Learnability).unwrap();
    }

    #[test]
    fn the_fallback_of_a_run_refuses_no_redraw() {
        let degrades = RunSpec {
            fallback: Fallback::ReferenceOnly.into(),
            ..spec()
        };
        let before = complete(degrades, 60.0).unwrap();
        changed(&before, Policy::Proportional, Criterion::Hard).unwrap();
    }

    #[test]
    fn what_no_run_could_do_is_refused() {
        let before = complete(spec(), 60.0).unwrap();
        let refused = |change: Change| {
            let refused = change.apply(&before, &before.phases[0]);
            refused.unwrap_err().reason()
        };
        for ratio in [1.0, -0.1, f64::NAN, 0.9999] {
            let change = Change {
                filter_ratio: Some(ratio),
                ..Default::default()
            };
            assert_eq!(refused(change), Reason::InvalidArgument, "{ratio}");
        }
        let change = Change {
            sub_batch_size: Some(641),
            ..Default::default()
        };
        assert_eq!(refused(change), Reason::RunSpecImpossible);
    }
}
