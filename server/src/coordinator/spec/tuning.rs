//! The numbers of single policies and the rules that leave candidates out: fills in defaults, and
//! refuses what can never work.
use super::impossible;
use crate::{error::Result, selection};
use superbatch_kernels::{self as kernels, Number};
use superbatch_proto::{
    reflect::{self, Value},
    v1::{Phase, Policy, Tuning},
};

/// Returns whether a rule of `tuning` leaves candidates out.
pub fn leaves_out(tuning: Option<&Tuning>) -> bool {
    selection::tuning(tuning).leaves_out()
}

/// Fills in the numbers that the phase's policy reads.
pub(super) fn complete(phase: &mut Phase) {
    let defaults = selection::tuning(phase.tuning.as_ref());
    let mut tuning = phase.tuning.unwrap_or_default();
    match phase.policy() {
        Policy::Independent => tuning.temperature = Some(defaults.temperature),
        Policy::Rank => tuning.pressure = Some(defaults.pressure),
        Policy::Proportional => {
            tuning.priority_exponent = Some(defaults.priority_exponent);
            tuning.weight_exponent = Some(defaults.weight_exponent);
        }
        _ => {}
    }
    phase.tuning = (tuning != Tuning::default()).then_some(tuning);
}

/// Refuses tuning that can never work. `at` is the path of the phase.
///
/// Ranges, readers and pairs of policy and criterion are the kernels' rules, which would refuse
/// each step of such a phase.
pub(super) fn check(at: &str, phase: &Phase) -> Result<()> {
    let refused = |field: &str, error: kernels::Error| impossible(field, error.to_string());
    let given = phase.tuning.unwrap_or_default();
    let policy = selection::policy(phase.policy()).unwrap_or_default();
    for (name, value) in numbers(&given) {
        let Some(number) = Number::of(&name) else {
            continue;
        };
        number
            .check_reader(policy)
            .and_then(|()| number.check(value))
            .map_err(|error| refused(&format!("{at}.tuning.{name}"), error))?;
    }
    let kept = (given.neg_clip_loss_keep.unwrap_or(1.0) * f64::from(phase.super_batch_size)).ceil();
    if kept < f64::from(phase.sub_batch_size) {
        let field = format!("{at}.tuning.neg_clip_loss_keep");
        let message = format!(
            "{field} keeps {kept} of super_batch_size {}, fewer than sub_batch_size {}; keep more",
            phase.super_batch_size, phase.sub_batch_size
        );
        return Err(impossible(&field, message));
    }
    match selection::criterion(phase.criterion()) {
        Some(criterion) => policy
            .check_criterion(criterion)
            .map_err(|error| refused(&format!("{at}.criterion"), error)),
        None => Ok(()),
    }
}

/// Returns the numbers that are set, by the protocol's names, which are the kernels' too.
fn numbers(tuning: &Tuning) -> Vec<(String, f64)> {
    reflect::fields(&reflect::dynamic(tuning))
        .filter_map(|(field, value)| match value {
            Some(Value::F64(value)) => Some((field.name().to_owned(), value)),
            _ => None,
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn protocol_and_kernels_name_the_same_numbers() {
        let all = Tuning {
            temperature: Some(1.0),
            pressure: Some(1.0),
            priority_exponent: Some(1.0),
            weight_exponent: Some(1.0),
            clip_score_at_least: Some(1.0),
            neg_clip_loss_keep: Some(1.0),
            duplicates_above: Some(1.0),
        };
        let names: Vec<_> = numbers(&all).into_iter().map(|(name, _)| name).collect();
        assert_eq!(names.len(), Number::ALL.len());
        assert!(names.iter().all(|name| Number::of(name).is_some()));
    }
}
