//! Draws a step's sub-batch once its candidates are scored.
use super::{decided::Decided, maker::Maker};
use crate::{
    blocking::blocking,
    coordinator::{
        plan::candidate::{SuperBatch, noise_keys},
        runs::models,
        score::scored::Scored,
        spec::Asked,
    },
    error::{Error, Result},
    metrics,
    selection::{
        is_scored,
        judged::{Judged, judge},
        tokens::TokenLosses,
    },
};
use superbatch_proto::v1::{
    Criterion, Loss, Mode, Phase, Policy, RunSpec, SelectBegin, SelectResponse,
};

impl Maker<'_> {
    pub(crate) async fn draw(
        &self,
        decided: &mut Decided,
        learner: Option<Scored>,
        reference: Option<Scored>,
    ) -> Result<SelectResponse> {
        let (begin, asked) = self.asking(decided, learner.as_ref(), reference.as_ref())?;
        let (mut learner, mut reference) = (
            learner.filter(|_| asked.learner),
            reference.filter(|_| asked.reference),
        );
        let tokens = match self.spec.loss() {
            Loss::PerExample => taken_apart(&mut learner, &mut reference),
            _ => None,
        };
        // Dropped at once where no token is chosen: they are most of what a step holds.
        let tokens = decided.phase.token_share.zip(tokens);
        decided.scales = [
            begin.learner_scale,
            begin.learner_bias,
            begin.reference_scale,
            begin.reference_bias,
        ];
        let (begin, learner, reference, judged) = judged(begin, learner, reference).await?;
        decided.judged = judged;
        let drawn = self
            .run
            .deps
            .selector
            .select(begin, learner, reference)
            .await;
        let mut drawn = drawn.map_err(|error| error.about(format!("step {}", decided.step)))?;
        drawn.left_out.get_or_insert_default().score_columns =
            decided.columns.left_out.len() as u32;
        drawn.flops += decided.judged.as_ref().map_or(0.0, |judged| judged.flops);
        decided.spent.add(drawn.flops);
        metrics::stage_duration("select").record(drawn.seconds);
        metrics::flops("selection").increment(drawn.flops as u64);
        if let Some((share, tokens)) = tokens {
            decided.token_masks = masks(tokens, drawn.indices.clone(), share).await?;
        }
        Ok(drawn)
    }

    /// As [`asking`], for this step.
    pub(crate) fn asking(
        &self,
        decided: &Decided,
        learner: Option<&Scored>,
        reference: Option<&Scored>,
    ) -> Result<(SelectBegin, Asked)> {
        asking(self.spec, self.super_batch, decided, learner, reference)
    }
}

/// Returns what the selector is asked, and of which models.
///
/// # Errors
/// `BiasMissing`.
pub(crate) fn asking(
    spec: &RunSpec,
    super_batch: &SuperBatch,
    decided: &Decided,
    learner: Option<&Scored>,
    reference: Option<&Scored>,
) -> Result<(SelectBegin, Asked)> {
    let mut begin = select_begin(spec, decided, super_batch);
    let asked = Asked::by_draw(begin.policy(), begin.criterion(), begin.tuning.as_ref());
    if let Some(scored) = learner.filter(|_| asked.learner) {
        let given = spec.learner.as_ref().and_then(|l| l.logit_bias);
        (begin.learner_scale, begin.learner_bias) =
            (scored.scale, bias(spec, scored, given, "learner")?);
    }
    if let Some(scored) = reference.filter(|_| asked.reference) {
        begin.reference_scale = scored.scale;
        // The rules that leave candidates out, and distances, need embeddings but no bias. So a
        // bias is required only if the reference's losses are read.
        if asked.reference_losses {
            let given = if decided.phase.reference_step.is_some() {
                spec.learner.as_ref().and_then(|l| l.logit_bias)
            } else {
                spec.reference.as_ref().and_then(|r| r.logit_bias)
            };
            begin.reference_bias = bias(spec, scored, given, "reference")?;
        }
    }
    Ok((begin, asked))
}

fn bias(spec: &RunSpec, scored: &Scored, given: Option<f64>, which: &str) -> Result<f64> {
    match spec.loss() {
        Loss::Sigmoid => models::sigmoid_bias(scored.bias, given, which),
        _ => Ok(0.0),
    }
}

/// Leaves the losses of examples, which candidates are drawn by, and returns what models gave with
/// the losses of tokens, if both gave such.
fn taken_apart(
    learner: &mut Option<Scored>,
    reference: &mut Option<Scored>,
) -> Option<TokenLosses> {
    let [learner, reference] = [learner, reference].map(|scored| {
        let embedded = &mut scored.as_mut()?.embedded;
        let of_examples = embedded.of_examples()?;
        Some(std::mem::replace(embedded, of_examples))
    });
    Some(TokenLosses {
        learner: learner?,
        reference: reference?,
    })
}

/// Returns which tokens of the drawn rows are to be trained.
async fn masks(tokens: TokenLosses, drawn: Vec<u32>, share: f64) -> Result<Vec<Vec<bool>>> {
    let missing = || Error::internal("learner and reference gave losses of other tokens");
    let work = move || tokens.masks(&drawn, share).ok_or_else(missing);
    blocking("choosing tokens", work).await
}

/// The request to the selector, and the candidates' own scores.
type Asking = (SelectBegin, Option<Scored>, Option<Scored>, Option<Judged>);

/// Judges the candidates off the async threads.
async fn judged(
    begin: SelectBegin,
    learner: Option<Scored>,
    reference: Option<Scored>,
) -> Result<Asking> {
    let work = move || {
        let [of_learner, of_reference] =
            [&learner, &reference].map(|scored| scored.as_ref().map(|scored| &scored.embedded));
        let judged = judge(&begin, of_learner, of_reference);
        (begin, learner, reference, judged)
    };
    let done = tokio::task::spawn_blocking(work).await;
    done.map_err(|e| Error::internal("judging the candidates panicked").because(e))
}

/// Returns the request to the selector: by the step's phase, or by the mode to which the step was
/// degraded.
pub(crate) fn select_begin(
    spec: &RunSpec,
    decided: &Decided,
    super_batch: &SuperBatch,
) -> SelectBegin {
    let Phase {
        policy,
        criterion,
        sub_batch_size,
        n_chunks,
        gain,
        tuning,
        ..
    } = &decided.phase;
    let (policy, criterion, sub_batch_size) = (*policy, *criterion, *sub_batch_size);
    let (policy, criterion) = match decided.mode {
        Mode::Uniform => (Policy::Uniform as i32, criterion),
        Mode::ReferenceOnly => (policy, Criterion::Easy as i32),
        _ => (policy, criterion),
    };
    // A policy that reads no loss gets no learner's embeddings, but it may get the reference's, for
    // the rules that leave candidates out. Under `easy` the selector would then report scores of
    // the reference alone. Learnability needs both models, so nothing is reported.
    let criterion = if is_scored(Policy::try_from(policy).unwrap_or_default()) {
        criterion
    } else {
        Criterion::Learnability as i32
    };
    let terms = decided.columns.terms.clone();
    let terms = terms.filter(|_| is_scored(Policy::try_from(policy).unwrap_or_default()));
    SelectBegin {
        policy,
        criterion,
        loss: spec.loss,
        sub_batch_size,
        n_chunks: *n_chunks,
        gain: *gain,
        seed: spec.seed,
        generation: decided.generation,
        step: decided.step,
        positions: noise_keys(&super_batch.candidates),
        holes: decided.unusable(),
        embedding_dtype: spec.embedding_dtype,
        tuning: *tuning,
        terms: terms.unwrap_or_default(),
        ..Default::default()
    }
}
