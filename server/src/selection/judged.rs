//! The parts of a receipt besides the draw: each candidate's own losses, the expected score of a
//! uniform draw, and the candidates passed over that are listed. It costs O(candidates x dim),
//! little compared with scoring.
use super::{Embedded, Values, is_scored, settings};
use std::cmp::Reverse;
use superbatch_kernels::{
    Backend, Candidates, Criterion, Loss, ModelEmbeddings, Noise, Policy, Rows, Settings,
};
use superbatch_proto::v1::{self, SelectBegin};

/// Candidates whose pairs represent all pairs, to estimate a uniform draw's score. All pairs of a
/// super-batch would cost as much as the dense matrix.
const SAMPLE: usize = 256;

/// All candidates, judged by their own pairs.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Judged {
    /// Unconditional score with gain; not finite for holes.
    pub own: Vec<f64>,
    /// Learner's and reference's loss of each candidate's own pair, for the models that are used.
    pub losses: [Option<Vec<f64>>; 2],
    /// Expected batch score of a uniform draw of the same size.
    pub uniform_score: Option<f64>,
    /// Floating-point operations spent on dot products.
    pub flops: f64,
}

/// A candidate that was passed over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Passed {
    pub candidate: u32,
    /// Whether it is of the sample; otherwise it is listed for its own score.
    pub sampled: bool,
}

/// Judges the candidates of a draw. `None` if the draw has no scores, or if the embeddings for them
/// are missing.
pub fn judge(
    begin: &SelectBegin,
    learner: Option<&Embedded>,
    reference: Option<&Embedded>,
) -> Option<Judged> {
    let settings = settings(begin).ok().filter(|_| is_scored(begin.policy()))?;
    let pair = [
        learner
            .filter(|_| settings.criterion.needs_learner())
            .map(|m| m.model(begin.learner_scale, begin.learner_bias)),
        reference
            .filter(|_| settings.criterion.needs_reference())
            .map(|m| m.model(begin.reference_scale, begin.reference_bias)),
    ];
    let count = begin.positions.len();
    let losses = pair
        .each_ref()
        .map(|model| model.map(|model| own_losses(&model, begin.loss(), count, &begin.holes)));
    let gain = if settings.loss == Loss::Softmax {
        settings.gain
    } else {
        1.0
    };
    let score = |n: usize| match (settings.criterion, &losses) {
        (Criterion::Learnability, [Some(learner), Some(reference)]) => {
            Some(gain * (learner[n] - reference[n]))
        }
        (Criterion::Hard, [Some(learner), _]) => Some(gain * learner[n]),
        (Criterion::Easy, [_, Some(reference)]) => Some(-gain * reference[n]),
        _ => None,
    };
    let of_columns = (begin.criterion() == v1::Criterion::Column).then_some(0.0);
    let bare: Vec<f64> = (0..count)
        .map(|n| of_columns.or_else(|| score(n)))
        .collect::<Option<_>>()?;
    let mut own = bare.clone();
    own.iter_mut()
        .zip(&begin.terms)
        .for_each(|(own, term)| *own += term);
    for hole in &begin.holes {
        if let Some(own) = own.get_mut(*hole as usize) {
            *own = f64::NAN;
        }
    }
    let offered: Vec<usize> = (0..count).filter(|n| own[*n].is_finite()).collect();
    let mean_term = mean(&begin.terms, &offered);
    let dims: usize = pair.iter().flatten().map(|model| model.dim).sum();
    let mut judged = Judged {
        own,
        losses,
        uniform_score: None,
        flops: 2.0 * (count * dims) as f64,
    };
    let embedded = [learner, reference];
    if of_columns.is_some() {
        judged.uniform_score = Some(mean_term);
    } else if begin.loss() == v1::Loss::PerExample {
        // Without pairs a batch's score is the mean of its own.
        judged.uniform_score = Some(mean(&judged.own, &offered));
    } else if let Some((score, flops)) = uniform_score(&settings, &bare, gain, embedded, pair) {
        judged.uniform_score = Some(score + mean_term);
        judged.flops += flops;
    }
    Some(judged)
}

/// Returns the losses of the candidates' own pairs, NaN for holes. Under softmax without the
/// denominators. A model that gives losses sends them as the first number of a row.
fn own_losses(
    model: &ModelEmbeddings<'_>,
    loss: v1::Loss,
    count: usize,
    holes: &[u32],
) -> Vec<f64> {
    let mut losses = vec![f64::NAN; count];
    let mut is_hole = vec![false; count];
    for hole in holes {
        if let Some(marked) = is_hole.get_mut(*hole as usize) {
            *marked = true;
        }
    }
    for (n, own) in losses.iter_mut().enumerate().filter(|(n, _)| !is_hole[*n]) {
        let scaled = || model.scale * model.own_cosine(n as u32);
        *own = match loss {
            v1::Loss::Softmax => -scaled(),
            v1::Loss::PerExample => model.scale * number(&model.image, n * model.dim),
            v1::Loss::Sigmoid | v1::Loss::Unspecified => softplus(-(scaled() + model.bias)),
        };
    }
    losses
}

/// Returns one number of the embeddings; NaN if it is not there.
fn number(rows: &Rows<'_>, at: usize) -> f64 {
    let found = match rows {
        Rows::F32(values) => values.get(at).map(|value| f64::from(*value)),
        Rows::F16(values) => values.get(at).map(|value| f64::from(*value)),
    };
    found.unwrap_or(f64::NAN)
}

/// Returns the mean of the values of some candidates; 0 if there are none.
fn mean(values: &[f64], of: &[usize]) -> f64 {
    let sum: f64 = of.iter().filter_map(|n| values.get(*n)).sum();
    sum / of.len().max(1) as f64
}

fn softplus(x: f64) -> f64 {
    x.max(0.0) + (-x.abs()).exp().ln_1p()
}

/// Estimates a uniform draw's score: the mean own score of all candidates plus, for each example,
/// as many pair terms as a batch has, each the mean over a sample. Under softmax, the denominators
/// of a sample, scaled to the batch's size. Returns it with the FLOPs spent.
fn uniform_score(
    settings: &Settings,
    own: &[f64],
    gain: f64,
    embedded: [Option<&Embedded>; 2],
    pair: [Option<ModelEmbeddings<'_>>; 2],
) -> Option<(f64, f64)> {
    let offered: Vec<u32> = (0..own.len() as u32)
        .filter(|n| own[*n as usize].is_finite())
        .collect();
    let wanted = settings.sub_batch_size;
    let size = wanted.min(SAMPLE).min(offered.len());
    let mean_own =
        offered.iter().map(|n| own[*n as usize]).sum::<f64>() / offered.len().max(1) as f64 / gain;
    if size < 2 {
        return (size == 1 && wanted == 1).then_some((mean_own, 0.0));
    }
    let sample: Vec<usize> = (0..size)
        .map(|k| offered[k * offered.len() / size] as usize)
        .collect();
    let [learner, reference] = embedded.map(|model| model.map(|model| model.picked(&sample)));
    let taken = |rows: &Option<Embedded>, model: Option<ModelEmbeddings<'_>>| {
        rows.as_ref()
            .zip(model)
            .map(|(rows, model)| (rows.clone(), model.scale, model.bias))
    };
    let [learner, reference] = [taken(&learner, pair[0]), taken(&reference, pair[1])];
    let candidates = Candidates {
        count: size,
        learner: learner
            .as_ref()
            .map(|(rows, scale, bias)| rows.model(*scale, *bias)),
        reference: reference
            .as_ref()
            .map(|(rows, scale, bias)| rows.model(*scale, *bias)),
        holes: &[],
    };
    let all = Settings {
        policy: Policy::Uniform,
        sub_batch_size: size,
        n_chunks: 1,
        gain: 1.0,
        ..settings.clone()
    };
    let keys: Vec<u64> = (0..size as u64).collect();
    let noise = Noise::Seeded {
        seed: 0,
        generation: 0,
        step: 0,
        keys: &keys,
    };
    let drawn = Backend::Native.select(&candidates, &all, &noise).ok()?;
    let pairs = drawn.batch_score? - drawn.mean_score_candidates?;
    let grown = wanted as f64 / size as f64;
    let of_batch = match (settings.loss, settings.criterion) {
        (Loss::Sigmoid, _) => pairs * (wanted - 1) as f64 / (size - 1) as f64,
        (Loss::Softmax, Criterion::Learnability) => pairs,
        (Loss::Softmax, Criterion::Hard) => pairs + grown.ln(),
        (Loss::Softmax, Criterion::Easy) => pairs - grown.ln(),
    };
    Some((mean_own + of_batch, drawn.flops))
}

/// Returns up to `most` of the candidates that were not drawn: the first half are those of the best
/// own scores, best first; the others are evenly spaced over the rest, in their order.
pub(crate) fn passed_over(own: &[f64], drawn: &[u32], most: usize) -> Vec<Passed> {
    let mut is_drawn = vec![false; own.len()];
    for index in drawn {
        if let Some(marked) = is_drawn.get_mut(*index as usize) {
            *marked = true;
        }
    }
    let mut left: Vec<u32> = (0..own.len() as u32)
        .filter(|n| own[*n as usize].is_finite() && !is_drawn[*n as usize])
        .collect();
    let most = most.min(left.len());
    let best = most.div_ceil(2);
    let order = |n: &u32| (Reverse(Total(own[*n as usize])), *n);
    left.sort_unstable_by_key(order);
    let mut rest = left.split_off(best);
    rest.sort_unstable();
    let named = left.into_iter().map(|candidate| Passed {
        candidate,
        sampled: false,
    });
    let wanted = most - best;
    let sampled = (0..wanted).map(|k| Passed {
        candidate: rest[k * rest.len() / wanted],
        sampled: true,
    });
    named.chain(sampled).collect()
}

/// A number with a total order.
#[derive(PartialEq)]
struct Total(f64);

impl Eq for Total {}

impl PartialOrd for Total {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Total {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        self.0.total_cmp(&other.0)
    }
}

impl Embedded {
    /// Returns only these rows, in this order.
    pub fn picked(&self, rows: &[usize]) -> Self {
        Self {
            image: self.image.picked(rows, self.dim),
            text: self.text.picked(rows, self.dim),
            dim: self.dim,
        }
    }
}

impl Values {
    fn picked(&self, rows: &[usize], dim: usize) -> Self {
        let ranges = rows.iter().map(|row| row * dim..(row + 1) * dim);
        match self {
            Self::F16(values) => Self::F16(
                ranges
                    .flat_map(|range| values[range].iter().copied())
                    .collect(),
            ),
            Self::F32(values) => Self::F32(
                ranges
                    .flat_map(|range| values[range].iter().copied())
                    .collect(),
            ),
        }
    }
}

#[cfg(test)]
mod tests;
