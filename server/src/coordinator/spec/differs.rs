//! Finds the first difference of two specs, for people who open a known run with another spec.
use super::word;
use std::fmt::Debug;
use superbatch_proto::v1::{
    Approximation, ComputeDtype, Criterion, EmbeddingDtype, Fallback, Fidelity, FidelityProbe,
    Fork, Lag, LearnerSpec, Loss, MultiResolution, Phase, Policy, ReferenceSpec, RunSpec,
    ScoreColumn, Source, Tuning, approximation, lag, learner_spec,
};

/// Longest text of a value, in characters.
const VALUE_CHARS_MAX: usize = 200;

/// A field in which two specs differ.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Difference {
    /// Such as `phases[1].sub_batch_size`.
    pub field: String,
    /// The two specs' values, for people.
    pub values: [String; 2],
}

/// Returns the first field, in the protocol's order, in which two completed specs differ.
pub fn first_difference(a: &RunSpec, b: &RunSpec) -> Option<Difference> {
    let Difference { field, values } = a.differs(b)?;
    let values = values.map(|value| shortened(&named(&field, value)));
    Some(Difference { field, values })
}

/// Returns the protocol's name of a value, if the field is an enum.
fn named(field: &str, value: String) -> String {
    let Ok(number) = value.parse::<i32>() else {
        return value;
    };
    let name = match field.rsplit('.').next() {
        Some("policy") => Policy::try_from(number).map(|v| word(v.as_str_name(), "POLICY_")),
        Some("criterion") => {
            Criterion::try_from(number).map(|v| word(v.as_str_name(), "CRITERION_"))
        }
        Some("fidelity") => Fidelity::try_from(number).map(|v| word(v.as_str_name(), "FIDELITY_")),
        Some("loss") => Loss::try_from(number).map(|v| word(v.as_str_name(), "LOSS_")),
        Some("fallback") => Fallback::try_from(number).map(|v| word(v.as_str_name(), "FALLBACK_")),
        Some("embedding_dtype") => {
            EmbeddingDtype::try_from(number).map(|v| word(v.as_str_name(), "EMBEDDING_DTYPE_"))
        }
        Some("compute_dtype") => {
            ComputeDtype::try_from(number).map(|v| word(v.as_str_name(), "COMPUTE_DTYPE_"))
        }
        _ => return value,
    };
    name.unwrap_or(value)
}

fn shortened(value: &str) -> String {
    match value.char_indices().nth(VALUE_CHARS_MAX) {
        Some((end, _)) => format!("{}…", &value[..end]),
        None => value.to_owned(),
    }
}

trait Differs {
    /// Returns the first difference below this value. Its field is empty if the value itself
    /// differs.
    fn differs(&self, other: &Self) -> Option<Difference>;
}

/// The difference of two values.
fn values(a: &dyn Debug, b: &dyn Debug) -> Difference {
    Difference {
        field: String::new(),
        values: [format!("{a:?}"), format!("{b:?}")],
    }
}

/// The difference if one of the two is absent.
fn one_of<T: Debug>(a: Option<&T>, b: Option<&T>) -> Difference {
    let text = |value: Option<&T>| {
        value.map_or_else(|| "nothing".to_owned(), |value| format!("{value:?}"))
    };
    Difference {
        field: String::new(),
        values: [text(a), text(b)],
    }
}

impl Difference {
    fn below(self, at: impl Into<String>) -> Self {
        Self {
            field: join(at.into(), &self.field),
            ..self
        }
    }
}

macro_rules! values {
    ($($type:ty),*) => {
        $(impl Differs for $type {
            fn differs(&self, other: &Self) -> Option<Difference> {
                (self != other).then(|| values(self, other))
            }
        })*
    };
}

values!(
    bool,
    i32,
    u32,
    u64,
    f64,
    String,
    lag::Bound,
    learner_spec::Initial,
    approximation::By
);

impl<T: Differs + Debug> Differs for Option<T> {
    fn differs(&self, other: &Self) -> Option<Difference> {
        match (self, other) {
            (Some(a), Some(b)) => a.differs(b),
            (None, None) => None,
            (a, b) => Some(one_of(a.as_ref(), b.as_ref())),
        }
    }
}

impl<T: Differs + Debug> Differs for Vec<T> {
    fn differs(&self, other: &Self) -> Option<Difference> {
        let common = self.len().min(other.len());
        let at =
            |(i, (a, b)): (usize, (&T, &T))| a.differs(b).map(|rest| rest.below(format!("[{i}]")));
        let inside = self.iter().zip(other).enumerate().find_map(at);
        let more = || one_of(self.get(common), other.get(common)).below(format!("[{common}]"));
        inside.or_else(|| (self.len() != other.len()).then(more))
    }
}

fn join(path: String, rest: &str) -> String {
    match rest.chars().next() {
        None => path,
        Some('[') => path + rest,
        Some(_) => path + "." + rest,
    }
}

/// Destructures each message with all its fields, so that the compiler reports a forgotten new
/// field.
macro_rules! messages {
    ($($type:ident { $($field:ident),* $(,)? })*) => {
        $(impl Differs for $type {
            fn differs(&self, other: &Self) -> Option<Difference> {
                let $type { $($field),* } = self;
                $(if let Some(rest) = $field.differs(&other.$field) {
                    return Some(rest.below(stringify!($field).trim_start_matches("r#")));
                })*
                None
            }
        })*
    };
}

messages! {
    RunSpec {
        sources, learner, reference, phases, loss, lag, push_every_steps, micro_batches, columns,
            fallback, seed, max_ahead,
        epochs, window_blocks, embedding_dtype, micro_batch_rows, max_bad_row_share, fork_of,
            compute_dtype,
        train_flops_per_example, need_deadline_seconds, stall_grace_seconds,
    }
    Source { uri, weight, image_column, caption_column, r#where, allow, id_column, scores }
    LearnerSpec { model_uri, initial, logit_bias, trained_fidelities }
    ReferenceSpec { model_uri, logit_bias }
    Phase {
        from_step, policy, criterion, super_batch_size, sub_batch_size, n_chunks, gain, fidelity,
        tuning, approximation, multi_resolution, allow_untrained_fidelity, probe, score_columns,
    }
    ScoreColumn { name, weight, at_least, at_most, missing }
    Approximation { by }
    MultiResolution { share, whole_step }
    FidelityProbe { every_steps, rows }
    Tuning {
        temperature, pressure, priority_exponent, weight_exponent, clip_score_at_least,
            neg_clip_loss_keep, duplicates_above,
    }
    Lag { bound }
    Fork { run_id, step }
}
