//! The models that a phase needs, and for what.
use crate::selection;
use superbatch_kernels::{self as kernels, Needs};
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
        // A policy that is not set draws by nothing.
        let policy = selection::policy(policy).unwrap_or(kernels::Policy::Uniform);
        let needs = Needs::of(
            policy,
            selection::criterion(criterion),
            &selection::tuning(tuning),
        );
        Self {
            learner: needs.learner,
            reference_losses: needs.reference_losses,
            reference: needs.reference,
        }
    }

    /// Returns whether no model is needed: such a draw is from noise alone, or by score columns.
    pub fn asks_no_model(self) -> bool {
        !self.learner && !self.reference
    }
}
