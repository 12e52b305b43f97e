//! Self-reference: the reference of a phase is the learner as it was pushed after an earlier step.
use super::{learner::Learner, maker::Maker};
use crate::{
    coordinator::{runs::models, score::slice::Job, spec::Asked},
    error::{Error, Result},
};
use superbatch_proto::v1::{Mode, ModelRef, Phase, lag::Bound};

/// The reference of a step.
pub(crate) enum Reference {
    /// The run's, or none.
    OfRun,
    /// The learner with earlier weights.
    Own(ModelRef),
    /// Its weights did not come, so that the step is decided without scores.
    Degraded(Mode),
}

impl Reference {
    /// Puts the learner's weights into the place of the run's reference.
    pub(crate) fn put_into(&self, job: Job) -> Job {
        match self {
            Self::Own(model) => Job {
                reference: Some(model.clone()),
                reference_dim: job.learner_dim,
                ..job
            },
            _ => job,
        }
    }

    pub(crate) fn is_own(&self) -> bool {
        matches!(self, Self::Own(_))
    }
}

impl Maker<'_> {
    /// Returns the phase's reference. The push of its step is due before the phase begins, so
    /// it is waited for as the learner's weights are, with the same deadlines and fallbacks.
    pub(crate) async fn reference_of(&self, phase: &Phase) -> Result<Reference> {
        let asked = Asked::by(phase).reference;
        let (Some(step), Some(spec)) = (phase.reference_step, &self.spec.learner) else {
            return Ok(Reference::OfRun);
        };
        if !asked {
            return Ok(Reference::OfRun);
        }
        let lag = match self.spec.lag.and_then(|lag| lag.bound) {
            None => 1,
            Some(Bound::Exact(lag)) => u64::from(lag),
            Some(Bound::AtMost(_)) => {
                return Err(Error::internal("self-reference under a lag of at_most"));
            }
        };
        // The first step that is scored with these weights.
        let first = step.saturating_add(lag).saturating_add(1);
        Ok(match self.await_weights(first).await? {
            Learner::Version(published, Mode::Normal) => {
                let fact = self.run.learner.as_ref();
                Reference::Own(models::published_ref(self.spec, spec, &published, fact))
            }
            Learner::Degraded(mode) => Reference::Degraded(mode),
            // Other weights than the phase names would be another reference.
            Learner::Version(..) | Learner::NotAsked => Reference::Degraded(Mode::Uniform),
        })
    }
}
