//! Asks for every candidate's score by a criterion, to measure sub-batches by it.
use super::Past;
use crate::{
    coordinator::{
        plan::{candidate::Candidate, rows::row_id},
        receipts::wasted::Wasted,
        score::scored::Scored,
        step::{decided::Decided, draw::asking},
    },
    error::{Error, Result},
};
use superbatch_proto::v1::{Criterion, Hole, Phase, Policy, Reason, RunSpec, SelectBegin};

/// Returns whether the available models give scores by `criterion`.
pub(super) fn can_measure(criterion: Criterion, has_learner: bool, has_reference: bool) -> bool {
    match criterion {
        Criterion::Learnability => has_learner && has_reference,
        Criterion::Hard => has_learner,
        Criterion::Easy => has_reference,
        Criterion::Column | Criterion::Unspecified => false,
    }
}

/// Returns the step with nothing decided yet but its phase.
pub(super) fn decided(past: &Past, phase: Phase) -> Decided {
    let spent = Wasted::default().spend();
    Decided::new(
        past.summary.chosen_in_generation,
        past.summary.step,
        phase,
        spent,
    )
}

/// Returns a request that asks every candidate's score by `criterion`; nothing is drawn by it.
pub(super) fn measuring(
    past: &Past,
    spec: &RunSpec,
    as_decided: &Decided,
    criterion: Criterion,
    [learner, reference]: [&Option<Scored>; 2],
) -> Result<SelectBegin> {
    let phase = Phase {
        policy: Policy::Joint.into(),
        criterion: criterion.into(),
        tuning: None,
        ..as_decided.phase.clone()
    };
    let mut measured = decided(past, phase);
    measured.columns = as_decided.columns.clone();
    measured.holes.clone_from(&as_decided.holes);
    let (learner, reference) = (learner.as_ref(), reference.as_ref());
    Ok(asking(spec, &past.super_batch, &measured, learner, reference)?.0)
}

/// Refuses a row that was chosen and that is a hole now, among the `candidates` that were read.
///
/// # Errors
/// `RowChanged` naming the row.
pub(super) fn still_usable(
    past: &Past,
    candidates: &[Candidate],
    lost: Option<&Hole>,
) -> Result<()> {
    let Some(hole) = lost else { return Ok(()) };
    let (id, _) = row_id(&past.manifest, &candidates[hole.candidate as usize]);
    let message = format!(
        "row {id} was chosen in step {} and cannot be used any more: {}; restore the data",
        past.summary.step, hole.detail
    );
    Err(Error::new(Reason::RowChanged, message).with("id", id))
}
