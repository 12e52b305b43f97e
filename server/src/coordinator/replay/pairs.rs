//! The scores of the pairs of a step's chosen examples, in the order of the draw.
use super::{
    Past, Replayer,
    embed::Weights,
    measure::{can_measure, decided, measuring, still_usable},
};
use crate::{
    blocking::blocking,
    error::{Error, Result},
    selection::{Embedded, Values, is_scored},
};
use std::collections::HashMap;
use superbatch_proto::v1::{Criterion, Loss, Policy, Reason, SelectBegin};

/// What each pair of an image and a text adds to the score of its batch.
#[derive(Debug, Clone, PartialEq)]
pub struct Pairs {
    /// How many of the chosen are shown, in the order of the draw.
    pub rows: usize,
    pub criterion: Criterion,
    pub loss: Loss,
    /// Image by text, row by row: under the sigmoid loss the terms of the score; under softmax,
    /// which has no terms of pairs, logits (learner less reference).
    pub values: Vec<f32>,
    /// Why a model is left out, where one is.
    pub missing: Option<String>,
}

impl Replayer {
    /// Scores the pairs of the first `most` of the chosen examples.
    ///
    /// # Errors
    /// `WeightsMissing` if no model is available; those of scoring.
    pub async fn pairs(&self, past: &Past, most: usize) -> Result<Pairs> {
        let spec = &past.facts.spec;
        if spec.loss() == Loss::PerExample {
            let message = "the run's loss is that of single examples, which has no pairs";
            return Err(Error::invalid("loss", message));
        }
        let weights = Weights::find(past).await?;
        let asked = asked(past.summary.policy(), past.summary.criterion());
        let why = || {
            let why = weights.missing().map(str::to_owned);
            why.unwrap_or_else(|| past.no_reference())
        };
        let criterion = possible(asked, weights.kept(), past.has_reference());
        let criterion = criterion.ok_or_else(|| Error::new(Reason::WeightsMissing, why()))?;
        let mut order = past.chosen()?;
        order.truncate(most);
        let mut numbers = order.clone();
        numbers.sort_unstable();
        let candidates: Vec<_> = numbers
            .iter()
            .map(|number| past.super_batch.candidates[*number as usize])
            .collect();
        let learner = match criterion {
            Criterion::Easy => None,
            _ => Some(weights.required()?),
        };
        let wants_reference = criterion != Criterion::Hard;
        let found = self
            .embed(past, &candidates, learner, wants_reference)
            .await?;
        let mut read = decided(past, past.phase.clone());
        // Its own numbers are of the rows that were read, not of all candidates.
        read.add_holes(found.holes, &[&found.reference, &found.learner]);
        still_usable(past, &candidates, read.holes.first())?;
        let places: HashMap<u32, usize> = numbers.iter().copied().zip(0..).collect();
        let places: Vec<usize> = order.iter().map(|number| places[number]).collect();
        // Only the models' scales and biases are read of it.
        let as_decided = decided(past, past.phase.clone());
        let pair = [&found.learner, &found.reference];
        let begin = measuring(past, spec, &as_decided, criterion, pair)?;
        let pair = [found.learner, found.reference].map(|scored| scored.map(|s| s.embedded));
        let terms = move || {
            let [learner, reference] =
                pair.map(|embedded| embedded.map(|embedded| embedded.picked(&places)));
            Ok(terms(&begin, learner.as_ref(), reference.as_ref()))
        };
        let missing = (criterion != asked).then(why);
        Ok(Pairs {
            rows: order.len(),
            criterion,
            loss: spec.loss(),
            values: blocking("scoring pairs", terms).await?,
            missing,
        })
    }
}

/// Returns the criterion that a step's draw asks of pairs: a column says nothing of them.
fn asked(policy: Policy, criterion: Criterion) -> Criterion {
    match criterion {
        Criterion::Column => Criterion::Learnability,
        _ if !is_scored(policy) => Criterion::Learnability,
        criterion => criterion,
    }
}

/// Returns the criterion `asked`, or the nearest one that the available models allow.
fn possible(asked: Criterion, has_learner: bool, has_reference: bool) -> Option<Criterion> {
    let instead = [Criterion::Learnability, Criterion::Easy, Criterion::Hard];
    [asked]
        .into_iter()
        .chain(instead)
        .find(|criterion| can_measure(*criterion, has_learner, has_reference))
}

/// Returns the term of each pair.
fn terms(
    begin: &SelectBegin,
    learner: Option<&Embedded>,
    reference: Option<&Embedded>,
) -> Vec<f32> {
    let loss = begin.loss();
    let of = |embedded: &Embedded, scale, bias| losses(loss, embedded, scale, bias);
    let learner = learner.map(|m| of(m, begin.learner_scale, begin.learner_bias));
    let reference = reference.map(|m| of(m, begin.reference_scale, begin.reference_bias));
    match (begin.criterion(), learner, reference) {
        (Criterion::Learnability, Some(learner), Some(reference)) => {
            let both = learner.iter().zip(&reference);
            both.map(|(learner, reference)| learner - reference)
                .collect()
        }
        (Criterion::Hard, Some(learner), _) => learner,
        (_, _, Some(reference)) => reference.iter().map(|loss| -loss).collect(),
        _ => Vec::new(),
    }
}

/// Returns the loss of each pair of an image and a text; under softmax its logit.
fn losses(loss: Loss, embedded: &Embedded, scale: f64, bias: f64) -> Vec<f32> {
    let dim = embedded.dim;
    let [image, text] = [&embedded.image, &embedded.text].map(floats);
    let count = image.len() / dim.max(1);
    let mut values = Vec::with_capacity(count * count);
    for (i, image) in image.chunks_exact(dim).enumerate() {
        for (j, text) in text.chunks_exact(dim).enumerate() {
            let cosine: f32 = image.iter().zip(text).map(|(a, b)| a * b).sum();
            let logit = scale * f64::from(cosine) + bias;
            values.push(match loss {
                Loss::Softmax => logit,
                _ if i == j => softplus(-logit),
                _ => softplus(logit),
            } as f32);
        }
    }
    values
}

fn softplus(x: f64) -> f64 {
    x.max(0.0) + (-x.abs()).exp().ln_1p()
}

fn floats(values: &Values) -> Vec<f32> {
    match values {
        Values::F16(values) => values.iter().map(|value| value.to_f32()).collect(),
        Values::F32(values) => values.clone(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::selection::probed::score_of;

    /// Rows of length 1, by angles.
    fn embedded(angles: &[(f32, f32)]) -> Embedded {
        let unit = |angle: f32| [angle.cos(), angle.sin()];
        Embedded {
            image: Values::F32(angles.iter().flat_map(|(a, _)| unit(*a)).collect()),
            text: Values::F32(angles.iter().flat_map(|(_, b)| unit(*b)).collect()),
            dim: 2,
        }
    }

    #[test]
    fn the_terms_of_a_batch_sum_to_its_score() {
        let learner = embedded(&[(0.0, 0.3), (1.0, 0.2), (2.0, 2.5), (0.5, 0.4)]);
        let reference = embedded(&[(0.0, 0.1), (1.0, 1.2), (2.0, 2.1), (0.5, 0.7)]);
        for criterion in [Criterion::Learnability, Criterion::Hard, Criterion::Easy] {
            let begin = SelectBegin {
                policy: Policy::Joint.into(),
                criterion: criterion.into(),
                loss: Loss::Sigmoid.into(),
                sub_batch_size: 4,
                n_chunks: 1,
                gain: 1.0,
                positions: (0..4).collect(),
                learner_scale: 10.0,
                learner_bias: -5.0,
                reference_scale: 12.0,
                reference_bias: -6.0,
                ..Default::default()
            };
            let found = terms(&begin, Some(&learner), Some(&reference));
            let pair = [Some(&learner), Some(&reference)];
            let (score, _) = score_of(&begin, pair, &[0, 1, 2, 3]).unwrap();
            let sum = found.iter().map(|term| f64::from(*term)).sum::<f64>() / 4.0;
            assert!((sum - score).abs() < 1e-5, "{criterion:?}: {sum} {score}");
        }
    }

    #[test]
    fn what_no_model_tells_is_told_by_the_other() {
        let learnability = Criterion::Learnability;
        assert_eq!(possible(learnability, true, true), Some(learnability));
        assert_eq!(possible(learnability, false, true), Some(Criterion::Easy));
        assert_eq!(possible(learnability, true, false), Some(Criterion::Hard));
        let of_column = asked(Policy::TopK, Criterion::Column);
        assert_eq!(of_column, learnability);
        assert_eq!(asked(Policy::Uniform, Criterion::Hard), learnability);
        assert_eq!(asked(Policy::Joint, Criterion::Hard), Criterion::Hard);
        assert_eq!(possible(Criterion::Hard, false, false), None);
    }
}
