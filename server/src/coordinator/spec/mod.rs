//! The run spec: fills in defaults, refuses at open what can never be met, and knows the schedule
//! of phases.
mod asked;
mod check;
mod columns;
mod differs;
mod fidelity;
mod own;
mod per_example;
mod tuning;

use crate::error::{Error, Result};
pub use asked::Asked;
pub use differs::Difference;
pub use differs::first_difference;
pub use fidelity::low_rows;
pub use fidelity::probes_at;
pub use fidelity::scores_at;
pub use own::references_from;
pub use per_example::has_masks;
use superbatch_proto::v1::{
    Criterion, Delivery, Fallback, Fidelity, Lag, Loss, Phase, Reason, RunSpec, lag::Bound,
};
pub use tuning::leaves_out;

/// Returns the spec with the defaults that the protocol documents. `need_deadline_seconds` is the
/// operator's default.
///
/// An unspecified `compute_dtype` stays so, and `micro_batch_rows` too: the workers' device decides
/// when the run is opened ([`micro_batch_rows_on`]). `train_flops_per_example` stays as it is.
///
/// # Errors
/// `RunSpecImpossible` if no run can meet it, with the path of the cause in `field`;
/// `Unimplemented` if only a later version can.
pub fn complete(mut spec: RunSpec, need_deadline_seconds: f64) -> Result<RunSpec> {
    for source in &mut spec.sources {
        fill(&mut source.weight, 1.0);
    }
    spec.phases.iter_mut().for_each(complete_phase);
    fill(&mut spec.loss, Loss::Sigmoid.into());
    if spec.lag.is_none_or(|lag| lag.bound.is_none()) {
        spec.lag = Some(Lag {
            bound: Some(Bound::Exact(1)),
        });
    }
    fill(&mut spec.push_every_steps, 1);
    fill(&mut spec.micro_batches, 1);
    fill(&mut spec.fallback, Fallback::Wait.into());
    fill(&mut spec.max_ahead, 2);
    fill(&mut spec.window_blocks, 16);
    let dtype = per_example::embedding_dtype(spec.loss());
    fill(&mut spec.embedding_dtype, dtype.into());
    fill(&mut spec.max_bad_row_share, 0.1);
    fill(&mut spec.need_deadline_seconds, need_deadline_seconds);
    complete_later_fields(&mut spec);
    check::check(&spec)?;
    Ok(spec)
}

/// Returns the default of `micro_batch_rows` on a device, such as `cpu` or `cuda:0`.
///
/// A forward pass of 64 pairs is too little work for a GPU of today. On a CPU more rows gain
/// nothing, and what they hold no longer fits its caches.
pub fn micro_batch_rows_on(device: &str) -> u32 {
    if device.starts_with("cuda") { 256 } else { 64 }
}

/// Returns the examples of all steps through `consumed`.
pub fn delivered(spec: &RunSpec, consumed: Option<u64>) -> u64 {
    let Some(consumed) = consumed else { return 0 };
    let ends = spec
        .phases
        .iter()
        .skip(1)
        .map(|phase| phase.from_step)
        .chain([u64::MAX]);
    let steps = |(phase, end): (&Phase, u64)| {
        end.min(consumed.saturating_add(1))
            .saturating_sub(phase.from_step)
            * u64::from(phase.sub_batch_size)
    };
    spec.phases.iter().zip(ends).map(steps).sum()
}

/// Fills in a phase's defaults, also those that an earlier version did not know.
pub fn complete_phase(phase: &mut Phase) {
    fill(&mut phase.criterion, Criterion::Learnability.into());
    fill(&mut phase.n_chunks, 16);
    fill(&mut phase.gain, 1.0);
    fill(&mut phase.fidelity, Fidelity::Full.into());
    columns::complete(phase);
    tuning::complete(phase);
    fidelity::complete(phase);
}

/// Fills in the defaults of a past step's phase that was changed for another draw of that step, and
/// refuses draws that can never work.
///
/// What else a run is refused for has no bearing on one draw: its fallback, how the learner was
/// trained, and when a phase begins.
///
/// # Errors
/// `RunSpecImpossible`, with the path of the cause in `field`.
pub fn complete_redraw(spec: &RunSpec, phase: &mut Phase) -> Result<()> {
    complete_phase(phase);
    check::drawn("redraw", phase)?;
    per_example::drawn("redraw", spec, phase)?;
    check::models_named("the redraw by", spec, phase)
}

/// Default seconds of a stall before it counts. Long enough for an announcement by another
/// connection to arrive; short enough for a trainer that never pushes.
const STALL_GRACE_SECONDS: f64 = 5.0;

/// Fills in the defaults of fields that an earlier version, which opened the run, did not know.
pub fn complete_later_fields(spec: &mut RunSpec) {
    fill(&mut spec.delivery, Delivery::Coordinator.into());
    spec.stall_grace_seconds = Some(stall_grace_seconds(spec));
}

/// Returns how long every rank must stand still, without a push under way, before the run is
/// stalled.
pub fn stall_grace_seconds(spec: &RunSpec) -> f64 {
    spec.stall_grace_seconds.unwrap_or(STALL_GRACE_SECONDS)
}

fn fill<T: Default + PartialEq>(value: &mut T, default: T) {
    if *value == T::default() {
        *value = default;
    }
}

/// Returns the phase of `step`. `phases` are those of a completed spec: not empty, rising from step
/// 0.
pub fn phase_at(phases: &[Phase], step: u64) -> &Phase {
    &phases[phases
        .partition_point(|phase| phase.from_step <= step)
        .saturating_sub(1)]
}

/// Returns a completed spec with more phases. Phases that it has already are skipped, so that a
/// call may be repeated.
///
/// # Errors
/// `RunSpecImpossible` if a phase begins at or before `last_started`, the last step that is
/// committed or started, or if the result is no valid spec.
pub fn append_phases(
    mut spec: RunSpec,
    phases: Vec<Phase>,
    last_started: Option<u64>,
) -> Result<RunSpec> {
    // Each new phase is compared with all others, so their number is bounded first.
    if phases.len() > crate::bounds::PHASES_MAX {
        return Err(check::too_many_phases(phases.len()));
    }
    let known = spec.phases.clone();
    for mut phase in phases {
        complete_phase(&mut phase);
        if spec.phases.contains(&phase) {
            continue;
        }
        if let Some(last) = last_started.filter(|last| phase.from_step <= *last) {
            let field = format!("phases[{}].from_step", spec.phases.len());
            let message = format!(
                "a phase from step {} cannot be added: step {last} is already decided; begin at {} \
                 or later",
                phase.from_step,
                last + 1
            );
            return Err(impossible(&field, message));
        }
        spec.phases.push(phase);
    }
    check::check(&spec)?;
    per_example::appended(&known, &spec.phases)?;
    Ok(spec)
}

/// Returns a refusal of one field. Its text begins with the field's path, so that a reader who sees
/// the text alone knows which of many phases or sources is meant.
fn impossible(field: &str, message: impl Into<String>) -> Error {
    let mut message = message.into();
    if !message.starts_with(field) {
        message = format!("{field}: {message}");
    }
    Error::new(Reason::RunSpecImpossible, message).with("field", field)
}

#[cfg(test)]
mod tests;
