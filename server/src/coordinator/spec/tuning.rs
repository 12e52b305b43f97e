//! The numbers of single policies and the rules that leave candidates out: fills in defaults, and
//! refuses what can never work.
use super::{impossible, word};
use crate::{error::Result, selection};
use superbatch_proto::v1::{Criterion, Phase, Policy, Tuning};

/// The CLIPScore of an image and a text with the same embedding.
const CLIP_SCORE_MAX: f64 = 2.5;
/// Beyond these, scores and chances overflow in the arithmetic of the draw, and each step fails.
/// Long before, the draw is the one of top_k or of uniform.
const RATIO_MIN: f64 = 1e-9;
const RATIO_MAX: f64 = 1e9;
const EXPONENT_MAX: f64 = 100.0;

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
pub(super) fn check(at: &str, phase: &Phase) -> Result<()> {
    let at_field = |field: &str| format!("{at}.tuning.{field}");
    let given = phase.tuning.unwrap_or_default();
    for Number {
        name,
        value,
        reader,
        from,
        to,
    } in numbers(&given)
    {
        let (Some(value), field) = (value, at_field(name)) else {
            continue;
        };
        if reader.is_some_and(|reader| reader != phase.policy()) {
            let [reader, policy] = [reader.unwrap_or_default(), phase.policy()]
                .map(|p| word(p.as_str_name(), "POLICY_"));
            let message = format!(
                "{field} belongs to policy {reader}, and the phase's is {policy}; leave it out"
            );
            return Err(impossible(&field, message));
        }
        if !from.is_met_by(value) || value > to || !value.is_finite() {
            return Err(impossible(
                &field,
                format!("{field} is {value}; it must be {}", range(from, to)),
            ));
        }
    }
    let kept = (given.neg_clip_loss_keep.unwrap_or(1.0) * f64::from(phase.super_batch_size)).ceil();
    if kept < f64::from(phase.sub_batch_size) {
        let field = at_field("neg_clip_loss_keep");
        let message = format!(
            "{field} keeps {kept} of super_batch_size {}, fewer than sub_batch_size {}; keep more",
            phase.super_batch_size, phase.sub_batch_size
        );
        return Err(impossible(&field, message));
    }
    if phase.policy() == Policy::Proportional && phase.criterion() == Criterion::Easy {
        let message = "easy scores are never positive, and proportional draws by positive ones; \
        use hard or learnability";
        return Err(impossible(&format!("{at}.criterion"), message));
    }
    Ok(())
}

/// One field of `Tuning`.
struct Number {
    name: &'static str,
    value: Option<f64>,
    /// The only policy that reads it; `None` for all policies.
    reader: Option<Policy>,
    from: Least,
    to: f64,
}

#[derive(Clone, Copy)]
enum Least {
    Above(f64),
    From(f64),
}

impl Least {
    fn is_met_by(self, value: f64) -> bool {
        match self {
            Self::Above(least) => value > least,
            Self::From(least) => value >= least,
        }
    }
}

/// Destructures `Tuning` with all its fields, so that the compiler reports a forgotten new field.
fn numbers(tuning: &Tuning) -> [Number; 7] {
    use Least::{Above, From};
    let Tuning {
        temperature,
        pressure,
        priority_exponent,
        weight_exponent,
        clip_score_at_least,
        neg_clip_loss_keep,
        duplicates_above,
    } = *tuning;
    let number = |name, value, reader, from, to| Number {
        name,
        value,
        reader,
        from,
        to,
    };
    [
        number(
            "temperature",
            temperature,
            Some(Policy::Independent),
            From(RATIO_MIN),
            RATIO_MAX,
        ),
        number(
            "pressure",
            pressure,
            Some(Policy::Rank),
            From(RATIO_MIN),
            RATIO_MAX,
        ),
        number(
            "priority_exponent",
            priority_exponent,
            Some(Policy::Proportional),
            From(0.0),
            EXPONENT_MAX,
        ),
        number(
            "weight_exponent",
            weight_exponent,
            Some(Policy::Proportional),
            From(0.0),
            1.0,
        ),
        number(
            "clip_score_at_least",
            clip_score_at_least,
            None,
            From(0.0),
            CLIP_SCORE_MAX,
        ),
        number(
            "neg_clip_loss_keep",
            neg_clip_loss_keep,
            None,
            Above(0.0),
            1.0,
        ),
        number("duplicates_above", duplicates_above, None, From(-1.0), 1.0),
    ]
}

fn range(from: Least, to: f64) -> String {
    let least = match from {
        Least::Above(least) => format!("above {least}"),
        Least::From(least) => format!("at least {least}"),
    };
    if to.is_finite() {
        format!("{least} and at most {to}")
    } else {
        format!("finite and {least}")
    }
}
