//! The models that a phase needs, and for what.
use super::tuning::leaves_out;
use crate::selection::is_scored;
use superbatch_proto::v1::{Criterion, Phase, Policy, Tuning};

/// The models that a draw needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Asked {
    /// The learner, for its losses.
    pub learner: bool,
    /// The reference, for its losses.
    pub reference_losses: bool,
    /// The reference for any purpose: the rules that leave candidates out, and distances, need its
    /// embeddings too.
    pub reference: bool,
}

impl Asked {
    /// Returns the models of a phase that is not degraded.
    pub fn by(phase: &Phase) -> Self {
        Self::by_draw(phase.policy(), phase.criterion(), phase.tuning.as_ref())
    }

    pub fn by_draw(policy: Policy, criterion: Criterion, tuning: Option<&Tuning>) -> Self {
        let scored = is_scored(policy);
        let reference_losses = scored && !matches!(criterion, Criterion::Hard | Criterion::Column);
        Self {
            learner: scored && !matches!(criterion, Criterion::Easy | Criterion::Column),
            reference_losses,
            reference: reference_losses || policy == Policy::KCenter || leaves_out(tuning),
        }
    }

    /// Whether nobody is asked: such a draw is from noise alone, or by score columns.
    pub fn asks_no_model(self) -> bool {
        !self.learner && !self.reference
    }
}
