//! Changes of a run on request: rewind, more phases, close.
use super::{
    models,
    open::tell_of_no_spare,
    run::{IDLE_MAX, Run},
    state::{closed, stale},
};
use crate::{
    coordinator::{
        facts::{chain::Rewound, run},
        released,
        spec::{Asked, append_phases, complete_phase, phase_at, references_from},
        trainer::ranks::last_allowed,
        weights::{Due, due},
    },
    error::{Error, Result},
};
use std::{sync::Arc, time::Duration};
use superbatch_proto::v1::{Phase, Reason, RewindMode, RunSpec, WeightsVersion};

impl Run {
    /// Rewinds the run: opens the next generation.
    ///
    /// # Errors
    /// `InvalidArgument` for a step that was not reached; `WeightsMissing` if the step would be
    /// chosen anew with weights that were deleted, or against a reference that was rolled back;
    /// `NotOwner`; `GenerationStale` if another rewind was first.
    pub(super) async fn rewind(&self, to_step: u64, mode: RewindMode) -> Result<u32> {
        let _alone = self.committing.lock().await;
        let (old, next) = {
            let state = self.state();
            state.check_open()?;
            (
                state.chain.current(),
                state.committed.newest().map_or(0, |step| step + 1),
            )
        };
        if to_step > next {
            return Err(Error::invalid(
                "to_step",
                format!("cannot rewind to step {to_step}: the next step is {next}"),
            ));
        }
        let rewound = Rewound {
            generation: old + 1,
            to_step,
            replay: mode == RewindMode::Replay,
        };
        if !rewound.replay {
            self.check_weights_kept(to_step)?;
            self.check_past_references(to_step)?;
        }
        self.owner.check().await?;
        run::create_generation(&self.location, &rewound).await?;
        let mut state = self.state();
        if !rewound.replay {
            state.committed.rewind(to_step);
        }
        state.chain.push(rewound);
        state.members.rewound(to_step);
        state.end_all(&stale(old, old + 1));
        Ok(old + 1)
    }

    /// Checks that the weights for `to_step` are kept. A trainer that goes back cannot push them
    /// again, since they are older than its checkpoint.
    fn check_weights_kept(&self, to_step: u64) -> Result<()> {
        let spec = self.spec();
        let phase = phase_at(&spec.phases, to_step);
        let scored = Asked::by(phase).learner;
        match due(
            to_step,
            &spec.lag.unwrap_or_default(),
            spec.push_every_steps,
        ) {
            Due::Exactly(push) if scored && push + 1 < to_step => {
                self.weights.check_kept(push, &self.began().0)
            }
            _ => Ok(()),
        }
    }

    /// Checks that the references of the steps from `to_step` on still serve. A phase may have been
    /// over when its reference was rolled back, and begin again by a rewind: without its reference
    /// its steps would be uniform.
    fn check_past_references(&self, to_step: u64) -> Result<()> {
        let began = self.began().0;
        let references = references_from(&self.spec().phases, to_step).into_iter();
        // As above: later ones are pushed again.
        for step in references.filter(|step| step + 1 < to_step) {
            self.weights.check_reference(step, &began, false)?;
        }
        Ok(())
    }

    /// Adds phases for steps that are not started yet.
    ///
    /// # Errors
    /// `RunSpecImpossible` for phases that come too late or can never be met; `WeightsMissing` if
    /// weights that are the reference of one are gone; `NotOwner`; `RunSpecConflict` if another
    /// addition was first.
    pub(super) async fn append_phases(&self, phases: Vec<Phase>) -> Result<Arc<RunSpec>> {
        let _alone = self.committing.lock().await;
        self.owner.check().await?;
        self.check_references(&phases)?;
        let (spec, number) = self.begin_append(phases)?;
        let known = self.spec().phases.len();
        let written = run::append_phases(&self.location, number, &spec.phases[known..]).await;
        let mut state = self.state();
        // Cleared before `written?`, also after a failure: otherwise the steps of these phases
        // could never start.
        state.appending_from = None;
        written?;
        state.appended += 1;
        tell_of_no_spare(&self.id, &spec.phases[known..]);
        let spec = Arc::new(spec);
        *self.spec.write().expect("no panic while held") = spec.clone();
        Ok(spec)
    }

    /// Returns the longer spec and the addition's number. From here on, steps of the new phases
    /// cannot start until the phases are written.
    fn begin_append(&self, phases: Vec<Phase>) -> Result<(RunSpec, u32)> {
        let mut state = self.state();
        state.check_open()?;
        let begun = state
            .cells
            .keys()
            .next_back()
            .copied()
            .max(state.committed.newest());
        let known = self.spec();
        let spec = append_phases((*known).clone(), phases, begun)?;
        self.plan.check(&spec.phases)?;
        self.deps.limits.check(&spec)?;
        self.check_models(&spec)?;
        state.appending_from = spec
            .phases
            .get(known.phases.len())
            .map(|phase| phase.from_step);
        Ok((spec, state.appended))
    }

    /// Checks that the weights which are the reference of new phases are there, or will be pushed.
    ///
    /// # Errors
    /// `WeightsMissing`.
    fn check_references(&self, phases: &[Phase]) -> Result<()> {
        let known = self.spec().phases.last().map(|phase| phase.from_step);
        let new = phases.iter().filter(|phase| Some(phase.from_step) > known);
        let mut new: Vec<Phase> = new.cloned().collect();
        new.iter_mut().for_each(complete_phase);
        let chain = self.state().chain.clone();
        let (began, forked_at) = (chain.began(), self.receipts.forked_at(&chain));
        for step in references_from(&new, 0) {
            let is_past = step < forked_at;
            self.weights.check_reference(step, &began, is_past)?;
        }
        Ok(())
    }

    /// Takes back all versions of the weights after `version`.
    ///
    /// # Errors
    /// `RunClosed`, `RunFailed`, `NotOwner`; those of [`crate::coordinator::weights::Weights`].
    pub(super) async fn roll_back_weights(&self, version: u64) -> Result<(WeightsVersion, u64)> {
        // The lock keeps out commits: a step that was scored with a version that is taken back
        // commits before, or is decided anew. It keeps the version from being retired, too.
        let _alone = self.committing.lock().await;
        self.state().check_open()?;
        self.owner.check().await?;
        let references = references_from(&self.spec().phases, self.next_step());
        let references: Vec<u64> = references.into_iter().collect();
        self.weights
            .roll_back(version, &self.began().0, &references)
            .await
    }

    /// # Errors
    /// `NotOwner`; `StorageUnreachable`.
    pub(super) async fn close(&self) -> Result<()> {
        self.owner.check().await?;
        run::close(&self.location).await?;
        let mut state = self.state();
        let was = std::mem::replace(&mut state.closed, true);
        state.end_all(&closed());
        drop(state);
        if !was {
            tracing::info!(run = self.id, "run closed");
        }
        Ok(())
    }

    /// Ends all waiting calls: the process ends, or another coordinator owns the run.
    pub fn stop(&self) {
        self.state().end_all(&released());
    }

    /// # Errors
    /// `RunClosed`, `RunFailed`, `GenerationStale`, `NotOwner`; `WorldSizeConflict` for a start of
    /// the trainer that another has replaced; `StepBeyondAhead` for a push of a step that no
    /// trainer can have trained.
    pub(super) async fn check_push(
        &self,
        generation: u32,
        step: i64,
        incarnation: &str,
    ) -> Result<()> {
        let (reachable, pushing) = {
            let state = self.state();
            state.check_open()?;
            state.check_generation(generation)?;
            let reachable = last_allowed(state.committed.newest(), self.spec().max_ahead);
            (reachable, state.members.check_pushing(incarnation))
        };
        // First the owner: if another coordinator has the run, this memory of its ranks is old.
        self.owner.check().await?;
        pushing?;
        check_reachable(step, reachable)
    }

    /// Drops batches for which no rank has asked in a long time.
    pub fn drop_spare_batches(&self) {
        self.state()
            .cells
            .retain(|_, cell| !is_spare(cell.is_wanted(), cell.idle_for()));
    }

    /// Deletes snapshots that no uncommitted step needs, except the newest ones, which the operator
    /// wants to keep.
    pub async fn forget_weights(&self) -> Result<()> {
        let kept = self.deps.limits.snapshots_kept;
        let oldest = || oldest_needed(self.next_step(), &self.spec());
        let pinned = || pinned(&self.spec());
        if !self.weights.has_before(oldest(), kept, &pinned()) {
            return Ok(());
        }
        let (oldest, retired) = {
            // The lock keeps a rewind out, which may need these versions again: once they are
            // retired in the book, it sees that they are gone. It is released before the store
            // deletes them, so that no commit waits for that.
            let _alone = self.committing.lock().await;
            // Both are read under the lock: phases that were added meanwhile name references.
            let (oldest, pinned) = (oldest(), pinned());
            (oldest, self.weights.retire_before(oldest, kept, &pinned))
        };
        self.owner.check().await?;
        self.weights.delete(&retired).await?;
        tracing::info!(
            run = self.id,
            forgotten = retired.len(),
            before_step = oldest,
            "snapshots deleted"
        );
        Ok(())
    }

    /// # Errors
    /// `BiasMissing` if a phase of `spec` scores by the sigmoid loss and a model has no bias;
    /// `RunSpecImpossible` if a model cannot be run at a phase's approximation, or gives no losses
    /// of tokens that a phase chooses by.
    pub fn check_models(&self, spec: &RunSpec) -> Result<()> {
        let (reference, learner) = (self.reference.as_ref(), self.learner.as_ref());
        models::check_biases(spec, reference, learner)?;
        models::check_approximations(spec, reference, learner)?;
        models::check_tokens(spec, reference, learner)
    }
}

/// Checks that a push is of a step near the run's. A version of a step far beyond would stand for
/// all steps up to it: they would be scored with weights that they cannot have.
///
/// # Errors
/// `StepBeyondAhead`.
fn check_reachable(step: i64, newest_allowed: u64) -> Result<()> {
    if u64::try_from(step).is_ok_and(|step| step > newest_allowed) {
        let message = format!(
            "a push of step {step} cannot be: no trainer has got past step {newest_allowed}; \
            push with the step that was trained"
        );
        return Err(Error::new(Reason::StepBeyondAhead, message)
            .with("step", step)
            .with("newest_allowed", newest_allowed));
    }
    Ok(())
}

/// Returns whether a ready batch may be dropped; its rows can be read again.
fn is_spare(is_wanted: bool, idle_for: Duration) -> bool {
    !is_wanted && idle_for >= IDLE_MAX
}

/// Returns the steps whose weights are a phase's reference. They are kept as long as the run, since
/// a rewind may lead back.
fn pinned(spec: &RunSpec) -> Vec<i64> {
    let own = spec.phases.iter().filter_map(|phase| phase.reference_step);
    own.filter_map(|step| step.try_into().ok()).collect()
}

/// Returns the oldest push that `next` or a later step may be scored with.
fn oldest_needed(next: u64, spec: &RunSpec) -> i64 {
    match due(next, &spec.lag.unwrap_or_default(), spec.push_every_steps) {
        Due::Initial => -1,
        Due::Exactly(push) => i64::try_from(push).unwrap_or(i64::MAX),
        Due::Within { oldest, .. } => oldest,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use superbatch_proto::v1::{Lag, lag::Bound};

    #[test]
    fn a_batch_goes_when_nobody_has_asked_for_it_in_half_an_hour() {
        let just_before = IDLE_MAX - Duration::from_secs(1);
        assert!(is_spare(false, IDLE_MAX));
        assert!(!is_spare(false, just_before));
        assert!(!is_spare(true, IDLE_MAX), "somebody waits for it");
    }

    #[test]
    fn a_push_is_of_a_step_that_can_have_been_trained() {
        for step in [-1, 0, 7] {
            check_reachable(step, 7).unwrap();
        }
        for step in [8, i64::MAX] {
            let error = check_reachable(step, 7).unwrap_err();
            assert_eq!(error.reason(), Reason::StepBeyondAhead);
            assert_eq!(error.value("newest_allowed"), Some("7"));
        }
    }

    #[test]
    fn snapshots_are_needed_as_far_back_as_the_lag_reaches() {
        let spec = |bound, push_every_steps| RunSpec {
            lag: Some(Lag { bound: Some(bound) }),
            push_every_steps,
            ..Default::default()
        };
        for (bound, every, next, oldest) in [
            (Bound::Exact(1), 1, 0, -1),
            (Bound::Exact(1), 1, 10, 8),
            (Bound::Exact(0), 1, 10, 9),
            (Bound::Exact(1), 4, 10, 7),
            (Bound::AtMost(3), 1, 10, 6),
            (Bound::AtMost(30), 1, 10, -1),
        ] {
            assert_eq!(
                oldest_needed(next, &spec(bound, every)),
                oldest,
                "{bound:?} every {every} before step {next}"
            );
        }
    }
}
