//! Where two specs part: for people who open a known run with another spec.
use superbatch_proto::v1::{Fork, Lag, LearnerSpec, Phase, ReferenceSpec, RunSpec, Source, Tuning, lag, learner_spec};

/// The path of the first field, in the protocol's order, in which two completed specs differ, such as
/// `phases[1].sub_batch_size`.
pub fn first_difference(a: &RunSpec, b: &RunSpec) -> Option<String> {
    a.differs(b)
}

trait Differs {
    /// The path below this value, empty where it is the value itself.
    fn differs(&self, other: &Self) -> Option<String>;
}

macro_rules! values {
    ($($type:ty),*) => {
        $(impl Differs for $type {
            fn differs(&self, other: &Self) -> Option<String> {
                (self != other).then(String::new)
            }
        })*
    };
}

values!(bool, i32, u32, u64, f64, String, lag::Bound, learner_spec::Initial);

impl<T: Differs> Differs for Option<T> {
    fn differs(&self, other: &Self) -> Option<String> {
        match (self, other) {
            (Some(a), Some(b)) => a.differs(b),
            (None, None) => None,
            _ => Some(String::new()),
        }
    }
}

impl<T: Differs> Differs for Vec<T> {
    fn differs(&self, other: &Self) -> Option<String> {
        let common = self.len().min(other.len());
        let at = |(i, (a, b)): (usize, (&T, &T))| a.differs(b).map(|rest| join(format!("[{i}]"), &rest));
        let inside = self.iter().zip(other).enumerate().find_map(at);
        inside.or_else(|| (self.len() != other.len()).then(|| format!("[{common}]")))
    }
}

fn join(path: String, rest: &str) -> String {
    match rest.chars().next() {
        None => path,
        Some('[') => path + rest,
        Some(_) => path + "." + rest,
    }
}

/// Names every field, so that a new one cannot be forgotten.
macro_rules! messages {
    ($($type:ident { $($field:ident),* $(,)? })*) => {
        $(impl Differs for $type {
            fn differs(&self, other: &Self) -> Option<String> {
                let $type { $($field),* } = self;
                $(if let Some(rest) = $field.differs(&other.$field) {
                    return Some(join(stringify!($field).to_owned(), &rest));
                })*
                None
            }
        })*
    };
}

messages! {
    RunSpec {
        sources, learner, reference, phases, loss, lag, push_every_steps, micro_batches, columns, fallback, seed, max_ahead,
        epochs, window_blocks, embedding_dtype, micro_batch_rows, max_bad_row_share, fork_of, compute_dtype,
        train_flops_per_example, need_deadline_seconds,
    }
    Source { uri, weight, image_column, caption_column }
    LearnerSpec { model_uri, initial, logit_bias }
    ReferenceSpec { model_uri, logit_bias }
    Phase { from_step, policy, criterion, super_batch_size, sub_batch_size, n_chunks, gain, fidelity, tuning }
    Tuning {
        temperature, pressure, priority_exponent, weight_exponent, clip_score_at_least, neg_clip_loss_keep, duplicates_above,
    }
    Lag { bound }
    Fork { run_id, step }
}
