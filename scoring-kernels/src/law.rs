//! The probability law of each policy, given the scores.
use crate::{problem::Problem, types::Policy};
use std::borrow::Cow;

/// Added to each priority, so that none is 0, as in Schaul et al. 2015.
const LEAST_PRIORITY: f64 = 1e-6;

impl Policy {
    /// Returns whether the sub-batch is drawn in `n_chunks` chunks instead of at once.
    pub fn goes_by_chunks(self) -> bool {
        matches!(self, Self::Joint | Self::JointTopK | Self::KCenter)
    }

    /// Returns whether a chunk's scores depend on the chunks before.
    pub fn is_conditional(self) -> bool {
        matches!(self, Self::Joint | Self::JointTopK)
    }

    /// Returns whether the draw depends on the criterion.
    pub fn is_scored(self) -> bool {
        !matches!(self, Self::Uniform | Self::KCenter)
    }

    /// Returns whether a chunk is drawn at random. Otherwise the largest scores are taken.
    pub fn is_noisy(self, chunk: usize) -> bool {
        match self {
            Self::Uniform | Self::Independent | Self::Joint | Self::Rank | Self::Proportional => {
                true
            }
            Self::JointTopK | Self::TopK => false,
            Self::KCenter => chunk == 0,
        }
    }
}

/// Returns the logarithms of unnormalised probabilities, by index, of all offered candidates.
pub(crate) fn logits<'a>(problem: &Problem<'_>, scores: &'a [f64]) -> Cow<'a, [f64]> {
    let tuning = &problem.tuning;
    match problem.policy {
        Policy::Independent if tuning.temperature != 1.0 => scores
            .iter()
            .map(|score| score / tuning.temperature)
            .collect::<Vec<_>>()
            .into(),
        Policy::Proportional => {
            let priority = |score: &f64| score.max(0.0) + LEAST_PRIORITY;
            scores
                .iter()
                .map(|score| tuning.priority_exponent * priority(score).ln())
                .collect::<Vec<_>>()
                .into()
        }
        Policy::Rank => {
            let mut order = problem.offered.clone();
            order.sort_by(|&a, &b| {
                scores[b as usize]
                    .total_cmp(&scores[a as usize])
                    .then(a.cmp(&b))
            });
            let step = tuning.pressure.ln() / (order.len().max(2) - 1) as f64;
            let mut logits = vec![0.0; scores.len()];
            order
                .iter()
                .enumerate()
                .for_each(|(rank, &index)| logits[index as usize] = -step * rank as f64);
            logits.into()
        }
        _ => scores.into(),
    }
}

/// Returns the importance weights of the chosen, the largest 1: (N p)^-beta with p the probability
/// of being drawn first.
pub(crate) fn weights(problem: &Problem<'_>, own: &[f64], chosen: &[u32]) -> Vec<f64> {
    if problem.policy != Policy::Proportional {
        return vec![1.0; chosen.len()];
    }
    // Dividing by the largest weight cancels N and the sum of all priorities, so neither is
    // computed.
    let logits = logits(problem, own);
    let least = chosen
        .iter()
        .map(|&index| logits[index as usize])
        .fold(f64::INFINITY, f64::min);
    let weight =
        |&index: &u32| (problem.tuning.weight_exponent * (least - logits[index as usize])).exp();
    chosen.iter().map(weight).collect()
}
