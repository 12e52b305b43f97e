//! Fidelities of a schedule: refuses what can never work, and counts the rows that are trained low.
use super::{Asked, impossible};
use crate::{error::Result, selection::is_scored};
use superbatch_proto::v1::{
    Approximation, Fidelity, MultiResolution, Phase, RunSpec, approximation::By,
};

/// Default share of a sub-batch that is trained at the approximation.
const SHARE: f64 = 0.5;

/// Returns the approximation at which a phase scores; `None` is full fidelity.
pub fn scores_at(phase: &Phase) -> Option<Approximation> {
    phase
        .approximation
        .filter(|_| phase.fidelity() == Fidelity::Approximate)
}

/// Returns how many of a step's `rows` are trained low, if rows of one step differ; 0 if all are
/// alike.
pub fn low_rows(multi_resolution: Option<&MultiResolution>, rows: usize) -> usize {
    match multi_resolution {
        Some(asked) if !asked.whole_step => (rows as f64 * asked.share).round() as usize,
        _ => 0,
    }
}

/// Candidates that a probe compares, unless the phase says otherwise.
const PROBE_ROWS: u32 = 1024;

/// Fills in defaults.
pub(super) fn complete(phase: &mut Phase) {
    if let Some(asked) = &mut phase.multi_resolution
        && asked.share == 0.0
    {
        asked.share = SHARE;
    }
    if let Some(probe) = &mut phase.probe
        && probe.rows == 0
    {
        probe.rows = PROBE_ROWS;
    }
}

/// Returns what the phase's probe scores at beside the phase itself, where one is due at `step`;
/// `None` within is full fidelity.
pub fn probes_at(phase: &Phase, step: u64) -> Option<Option<Approximation>> {
    let every = u64::from(phase.probe.as_ref()?.every_steps).max(1);
    let is_due = (step - phase.from_step.min(step)).is_multiple_of(every);
    is_due.then(|| match scores_at(phase) {
        Some(_) => None,
        None => phase.approximation,
    })
}

/// Refuses fidelities that can never work in one phase. `at` is its path.
pub(super) fn check(at: &str, phase: &Phase, micro_batches: u32) -> Result<()> {
    let needed = match (phase.fidelity(), &phase.multi_resolution) {
        (Fidelity::Approximate, _) => Some("fidelity approximate"),
        (_, Some(_)) => Some("multi_resolution"),
        _ if phase.probe.is_some() => Some("probe"),
        _ => None,
    };
    let known = phase.approximation.and_then(|given| given.by);
    let field = format!("{at}.approximation");
    match (needed, known) {
        (Some(needed), None) => {
            let message = format!(
                "{needed} needs an approximation; give its resolution, such as half the model's \
                 image size, or patch, patch_dropout or layers"
            );
            return Err(impossible(&field, message));
        }
        (None, Some(_)) => {
            let message = "an approximation that is neither scored nor trained with; set fidelity \
                           to approximate, multi_resolution or probe";
            return Err(impossible(&field, message));
        }
        (_, Some(by)) => possible(&field, by)?,
        _ => {}
    }
    if phase.fidelity() == Fidelity::Approximate && Asked::by(phase).asks_no_model() {
        let message = "this phase scores with no model; leave fidelity out (multi_resolution goes \
                       without)";
        return Err(impossible(&format!("{at}.fidelity"), message));
    }
    probe(at, phase)?;
    match &phase.multi_resolution {
        Some(asked) => shares(at, asked, phase.sub_batch_size, micro_batches),
        None => Ok(()),
    }
}

/// Refuses an approximation that fits no model.
pub(super) fn possible(at: &str, by: By) -> Result<()> {
    let (name, problem) = match by {
        By::Resolution(0) => ("resolution", "0; give a side in pixels".to_owned()),
        By::Patch(0) => ("patch", "0; give the side of a patch in pixels".to_owned()),
        By::Layers(0) => ("layers", "0; give at least one".to_owned()),
        By::PatchDropout(share) if !(share > 0.0 && share < 1.0) => {
            ("patch_dropout", format!("{share}; it lies between 0 and 1"))
        }
        _ => return Ok(()),
    };
    let field = format!("{at}.{name}");
    Err(impossible(&field, format!("{field} is {problem}")))
}

fn probe(at: &str, phase: &Phase) -> Result<()> {
    let Some(probe) = &phase.probe else {
        return Ok(());
    };
    if probe.every_steps == 0 {
        let message = "a probe needs the number of steps between two of them; set every_steps";
        return Err(impossible(&format!("{at}.probe.every_steps"), message));
    }
    // A draw of one row says nothing.
    let (rows, of) = (u64::from(probe.rows), u64::from(phase.super_batch_size));
    if rows.min(of) * u64::from(phase.sub_batch_size) < 2 * of {
        let message = format!(
            "of {rows} rows a draw would have fewer than 2; compare at least {}",
            (2 * of).div_ceil(u64::from(phase.sub_batch_size).max(1))
        );
        return Err(impossible(&format!("{at}.probe.rows"), message));
    }
    if !is_scored(phase.policy()) {
        let message = "this phase draws by no scores, so that there is nothing to compare; leave \
                       the probe out";
        return Err(impossible(&format!("{at}.probe"), message));
    }
    Ok(())
}

fn shares(at: &str, asked: &MultiResolution, rows: u32, micro_batches: u32) -> Result<()> {
    let field = format!("{at}.multi_resolution.share");
    if !(asked.share > 0.0 && asked.share < 1.0) {
        let message = format!("{field} is {}; it lies between 0 and 1", asked.share);
        return Err(impossible(&field, message));
    }
    if asked.whole_step {
        return Ok(());
    }
    let low = low_rows(Some(asked), rows as usize) as u32;
    let (full, parts) = (rows - low, micro_batches);
    if low == 0 || full == 0 || !low.is_multiple_of(parts) || !full.is_multiple_of(parts) {
        let message = format!(
            "{field} {} makes {low} of sub_batch_size {rows} approximate and leaves {full} full; \
             both must be above 0 and \
             divisible by micro_batches {parts}",
            asked.share
        );
        return Err(impossible(&field, message));
    }
    Ok(())
}

/// Refuses to score with a learner at an approximation that it was never trained with: its ranking
/// would be noise.
pub(super) fn trained(spec: &RunSpec) -> Result<()> {
    for (i, phase) in spec.phases.iter().enumerate() {
        let Some(approximation) = scores_at(phase) else {
            continue;
        };
        if phase.allow_untrained_fidelity || !Asked::by(phase).learner {
            continue;
        }
        let declared = spec.learner.iter().flat_map(|l| &l.trained_fidelities);
        let earlier = spec.phases[..i]
            .iter()
            .filter(|phase| phase.multi_resolution.is_some())
            .filter_map(|phase| phase.approximation.as_ref());
        if declared.chain(earlier).any(|known| *known == approximation) {
            continue;
        }
        let field = format!("phases[{i}].fidelity");
        let message = format!(
            "phase {i} scores at an approximation that the learner was never trained with, so that \
             its ranking may be noise: put \
             a phase with multi_resolution and the same approximation before it (a warm-up), name \
             it in \
             learner.trained_fidelities, or set allow_untrained_fidelity (docs/flexi.md)"
        );
        return Err(impossible(&field, message));
    }
    Ok(())
}

#[cfg(test)]
mod tests;
