//! One selection as the protocol describes it. Coordinator and worker draw with this code.
pub mod judged;
pub(crate) mod probed;
pub(crate) mod tokens;

#[cfg(feature = "torch")]
use crate::cuda;
use crate::error::{Error, Result};
use half::f16;
use std::ops::Range;
use superbatch_kernels::{
    self as kernels, Backend, Candidates, Criterion, Loss, ModelEmbeddings, Noise, Policy, Rows,
    Selection, Settings, Tuning,
};
use superbatch_proto::v1::{self, EmbeddingDtype, Reason, SelectBegin, SelectResponse};

/// The `model_type` of exported modules that give a loss an example, of images and of texts.
pub(crate) const LOSSES_OF_IMAGES: &str = "losses_of_images";
pub(crate) const LOSSES_OF_TEXTS: &str = "losses_of_texts";
/// Those that give a loss for each token of the target. They have types of their own: a coordinator
/// that knows of none would take the product of their embeddings for the loss, which it is not.
pub(crate) const TOKEN_LOSSES_OF_IMAGES: &str = "token_losses_of_images";
pub(crate) const TOKEN_LOSSES_OF_TEXTS: &str = "token_losses_of_texts";

/// Embeddings in the dtype to which they were rounded: f16 or f32, row-major.
#[derive(Debug, Clone)]
pub enum Values {
    F16(Vec<f16>),
    F32(Vec<f32>),
}

impl Values {
    pub fn with_capacity(dtype: EmbeddingDtype, values: usize) -> Self {
        match dtype {
            EmbeddingDtype::F32 => Self::F32(Vec::with_capacity(values)),
            _ => Self::F16(Vec::with_capacity(values)),
        }
    }

    /// Appends little-endian values. A rest shorter than one value is dropped.
    pub fn append(&mut self, bytes: &[u8]) {
        match self {
            Self::F16(values) => values.extend(
                bytes
                    .as_chunks::<2>()
                    .0
                    .iter()
                    .map(|value| f16::from_le_bytes(*value)),
            ),
            Self::F32(values) => values.extend(
                bytes
                    .as_chunks::<4>()
                    .0
                    .iter()
                    .map(|value| f32::from_le_bytes(*value)),
            ),
        }
    }

    pub fn len(&self) -> usize {
        self.rows().len()
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    pub fn rows(&self) -> Rows<'_> {
        match self {
            Self::F16(values) => Rows::F16(values),
            Self::F32(values) => Rows::F32(values),
        }
    }

    /// Returns the little-endian bytes of a range of values.
    pub fn bytes(&self, range: Range<usize>) -> bytes::Bytes {
        match self {
            Self::F16(values) => values[range]
                .iter()
                .flat_map(|value| value.to_le_bytes())
                .collect(),
            Self::F32(values) => values[range]
                .iter()
                .flat_map(|value| value.to_le_bytes())
                .collect(),
        }
    }
}

/// One model's embeddings of all candidates: [candidates, dim] each.
#[derive(Debug, Clone)]
pub struct Embedded {
    pub image: Values,
    pub text: Values,
    pub dim: usize,
}

impl Embedded {
    fn model(&self, scale: f64, bias: f64) -> ModelEmbeddings<'_> {
        ModelEmbeddings {
            image: self.image.rows(),
            text: self.text.rows(),
            dim: self.dim,
            scale,
            bias,
        }
    }
}

/// Draws a sub-batch by `begin`. A model is absent if the policy does not need it.
///
/// # Errors
/// `InvalidArgument` naming the field; `TooManyBadRows` if holes leave fewer candidates than the
/// sub-batch; `TooFewCandidates` if the rules of tuning do; `Overloaded` if the device's memory is
/// not enough; `DeviceUnavailable`.
pub(crate) fn draw(
    backend: Backend,
    begin: &SelectBegin,
    learner: Option<&Embedded>,
    reference: Option<&Embedded>,
) -> Result<Selection> {
    // The kernels know losses of pairs alone. Of losses without pairs they are handed the scores.
    let given = given_scores(begin, learner, reference)?;
    let [learner, reference] = [learner, reference].map(|model| model.filter(|_| given.is_none()));
    let candidates = Candidates {
        count: begin.positions.len(),
        learner: learner.map(|model| model.model(begin.learner_scale, begin.learner_bias)),
        reference: reference.map(|model| model.model(begin.reference_scale, begin.reference_bias)),
        holes: &begin.holes,
    };
    let SelectBegin {
        seed,
        generation,
        step,
        ..
    } = *begin;
    let noise = Noise::Seeded {
        seed,
        generation,
        step,
        keys: &begin.positions,
    };
    let (settings, tuning) = (settings(begin)?, tuning(begin.tuning.as_ref()));
    let terms = given.as_deref().or(Some(begin.terms.as_slice()));
    let terms = terms.filter(|terms| !terms.is_empty());
    let drawn = backend.select_with_terms(&candidates, &settings, &tuning, terms, &noise);
    #[cfg(feature = "torch")]
    let drawn = drawn.or_else(|error| match cuda::fallback_for(backend, &error) {
        Some(other) => other.select_with_terms(&candidates, &settings, &tuning, terms, &noise),
        None => Err(error),
    });
    drawn.map_err(refusal)
}

/// Returns each candidate's whole score, NaN for holes, if the models of the draw gave losses
/// instead of embeddings of pairs.
///
/// # Errors
/// `InvalidArgument` if the losses of a model are missing.
fn given_scores(
    begin: &SelectBegin,
    learner: Option<&Embedded>,
    reference: Option<&Embedded>,
) -> Result<Option<Vec<f64>>> {
    let reads_losses = is_scored(begin.policy()) && criterion(begin.criterion()).is_some();
    if begin.loss() != v1::Loss::PerExample || !reads_losses {
        return Ok(None);
    }
    let missing = || Error::invalid("embedding", "the losses of a model did not come");
    let judged = judged::judge(begin, learner, reference).ok_or_else(missing)?;
    Ok(Some(judged.own))
}

/// Returns the answer to a `Select` call. The caller fills in `seconds`, `device` and `threads`.
pub(crate) fn response(selection: Selection) -> SelectResponse {
    SelectResponse {
        indices: selection.indices,
        chunks: selection.chunks,
        scores: selection.scores,
        weights: selection.weights,
        batch_score: selection.batch_score.unwrap_or_default(),
        mean_score_chosen: selection.mean_score_chosen.unwrap_or_default(),
        mean_score_candidates: selection.mean_score_candidates.unwrap_or_default(),
        flops: selection.flops,
        left_out: Some(v1::LeftOut {
            clip_score_at_least: selection.left_out.clip_score_at_least as u32,
            neg_clip_loss_keep: selection.left_out.neg_clip_loss_keep as u32,
            duplicates_above: selection.left_out.duplicates_above as u32,
            score_columns: 0,
        }),
        ..Default::default()
    }
}

/// Returns the kernels' policy; `None` if none is set.
pub(crate) fn policy(policy: v1::Policy) -> Option<Policy> {
    Some(match policy {
        v1::Policy::Unspecified => return None,
        v1::Policy::Uniform => Policy::Uniform,
        v1::Policy::Independent => Policy::Independent,
        v1::Policy::Joint => Policy::Joint,
        v1::Policy::JointTopK => Policy::JointTopK,
        v1::Policy::TopK => Policy::TopK,
        v1::Policy::Rank => Policy::Rank,
        v1::Policy::Proportional => Policy::Proportional,
        v1::Policy::KCenter => Policy::KCenter,
    })
}

/// Returns the kernels' criterion; `None` for a column, which reads no model's losses. An
/// unspecified one is learnability, the default.
pub(crate) fn criterion(criterion: v1::Criterion) -> Option<Criterion> {
    match criterion {
        v1::Criterion::Unspecified | v1::Criterion::Learnability => Some(Criterion::Learnability),
        v1::Criterion::Hard => Some(Criterion::Hard),
        v1::Criterion::Easy => Some(Criterion::Easy),
        v1::Criterion::Column => None,
    }
}

/// Returns whether a policy draws by scores; steps of other policies have none.
pub(crate) fn is_scored(policy: v1::Policy) -> bool {
    self::policy(policy).is_some_and(Policy::is_scored)
}

/// Returns the kernels' tuning, with defaults filled in.
pub(crate) fn tuning(tuning: Option<&v1::Tuning>) -> Tuning {
    let (given, default) = (tuning.copied().unwrap_or_default(), Tuning::default());
    Tuning {
        temperature: given.temperature.unwrap_or(default.temperature),
        pressure: given.pressure.unwrap_or(default.pressure),
        priority_exponent: given.priority_exponent.unwrap_or(default.priority_exponent),
        weight_exponent: given.weight_exponent.unwrap_or(default.weight_exponent),
        duplicates_above: given.duplicates_above,
        clip_score_at_least: given.clip_score_at_least,
        neg_clip_loss_keep: given.neg_clip_loss_keep,
    }
}

/// # Errors
/// `InvalidArgument` naming the field that is not set.
pub(crate) fn settings(begin: &SelectBegin) -> Result<Settings> {
    let unset = |field| Error::invalid(field, format!("SelectBegin.{field} is not set"));
    Ok(Settings {
        policy: policy(begin.policy()).ok_or_else(|| unset("policy"))?,
        loss: match begin.loss() {
            // Nothing is made of it: given scores take the place of embeddings. Gain has no effect,
            // as under sigmoid.
            v1::Loss::Sigmoid | v1::Loss::PerExample => Loss::Sigmoid,
            v1::Loss::Softmax => Loss::Softmax,
            v1::Loss::Unspecified => return Err(unset("loss")),
        },
        criterion: match begin.criterion() {
            v1::Criterion::Unspecified => return Err(unset("criterion")),
            // No model is handed over for a column: the terms are the scores.
            given => criterion(given).unwrap_or_default(),
        },
        sub_batch_size: begin.sub_batch_size as usize,
        n_chunks: begin.n_chunks as usize,
        gain: begin.gain,
    })
}

fn refusal(error: kernels::Error) -> Error {
    use kernels::Error as E;
    let message = error.to_string();
    match &error {
        E::TooFewCandidates { .. } => Error::new(Reason::TooManyBadRows, message),
        E::TooManyLeftOut {
            candidates,
            holes,
            left_out,
            ..
        } => Error::new(Reason::TooFewCandidates, message)
            .with("candidates", candidates)
            .with("holes", holes)
            .with("left_out", left_out.total()),
        #[cfg(feature = "torch")]
        E::Cuda(_) | E::Torch(_) if cuda::is_out_of_memory(&error) => {
            let message = format!(
                "{message}; lower super_batch_size, keep fewer models on the device, or select on \
                the CPU"
            );
            Error::new(Reason::Overloaded, message).because(error)
        }
        E::Cuda(_) => Error::new(Reason::DeviceUnavailable, message).because(error),
        #[cfg(feature = "torch")]
        E::Torch(_) => Error::new(Reason::DeviceUnavailable, message).because(error),
        _ => Error::invalid("select", message),
    }
}

#[cfg(test)]
mod tests;
