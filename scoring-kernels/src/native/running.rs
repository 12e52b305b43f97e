//! The running score of a candidate: its own pair, and its terms with all absorbed examples.
use crate::{
    problem::{Problem, SignedModel},
    types::Loss,
};

/// The running score of one candidate.
#[derive(Clone)]
pub(super) struct Running {
    pub index: u32,
    /// Unconditional score, without gain.
    pub own: f64,
    /// Sigmoid: signed sum of the pair terms with all absorbed examples.
    pub pairs: f64,
    /// Softmax: logits against all absorbed examples, by model and direction (own image, own text).
    pub logits: [[LogSumExp; 2]; 2],
}

/// The logarithm of a sum of exponentials, kept as the largest exponent and a sum scaled by it.
/// Logits may be hundreds, whose exponentials overflow. Scaled by the largest, every term is at
/// most 1, and terms of later chunks can still be added.
#[derive(Clone, Copy, Default)]
pub(super) struct LogSumExp {
    largest: f64,
    sum: f64,
}

impl LogSumExp {
    pub(super) fn add(&mut self, (largest, sum): (f64, f64)) {
        if self.sum == 0.0 {
            *self = Self { largest, sum };
        } else if largest > self.largest {
            *self = Self {
                largest,
                sum: self.sum * (self.largest - largest).exp() + sum,
            };
        } else {
            self.sum += sum * (largest - self.largest).exp();
        }
    }

    /// Returns the logarithm; 0 while nothing was added, since the first chunk has no denominators.
    fn value(&self) -> f64 {
        if self.sum == 0.0 {
            0.0
        } else {
            self.largest + self.sum.ln()
        }
    }
}

impl Running {
    /// Returns the conditional score without gain.
    pub(super) fn score(&self, problem: &Problem<'_>) -> f64 {
        match problem.loss {
            Loss::Sigmoid => self.own + self.pairs,
            Loss::Softmax => {
                let half = |[image, text]: &[LogSumExp; 2]| 0.5 * (image.value() + text.value());
                let models = problem.models.iter().zip(&self.logits);
                self.own
                    + models
                        .map(|(model, logits)| model.sign * half(logits))
                        .sum::<f64>()
            }
        }
    }
}

/// Returns a candidate with its own pair only.
pub(super) fn start(problem: &Problem<'_>, index: u32) -> Running {
    let loss = |model: &SignedModel<'_>| match problem.loss {
        Loss::Sigmoid => softplus(-own_logit(model, index)),
        Loss::Softmax => model.embeddings.bias - own_logit(model, index),
    };
    let own = problem
        .models
        .iter()
        .map(|model| model.sign * loss(model))
        .sum();
    Running {
        index,
        own,
        pairs: 0.0,
        logits: Default::default(),
    }
}

/// Returns a candidate's own logit, in f64.
pub(super) fn own_logit(model: &SignedModel<'_>, index: u32) -> f64 {
    model.embeddings.scale * model.cosines[index as usize] + model.embeddings.bias
}

pub(super) fn softplus(x: f64) -> f64 {
    x.max(0.0) + (-x.abs()).exp().ln_1p()
}
