//! What a step's receipt says beside the draw: each candidate's own losses, what a uniform draw would have scored, and who is
//! named of those passed over. In O(candidates x dim): little beside any scoring.
use super::{Embedded, Values, is_scored, settings};
use std::cmp::Reverse;
use superbatch_kernels::{
    Backend, Candidates, Criterion, Loss, ModelEmbeddings, Noise, Policy, Settings,
};
use superbatch_proto::v1::SelectBegin;

/// Candidates whose pairs stand for all, where a uniform draw's score is estimated.
const SAMPLE: usize = 256;

/// All candidates by their own pairs.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Judged {
    /// Unconditional score with gain; not finite for holes.
    pub own: Vec<f64>,
    /// Learner's and reference's loss of each candidate's own pair, of the models that were asked.
    pub losses: [Option<Vec<f64>>; 2],
    /// Expected batch score of a uniform draw of the same size.
    pub uniform_score: Option<f64>,
    /// Floating-point operations spent on dot products.
    pub flops: f64,
}

/// A candidate that was passed over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Passed {
    pub candidate: u32,
    /// Stands for the others; else named for its own score.
    pub sampled: bool,
}

/// Judges the candidates of a draw. `None` where it is not drawn by scores, or lacks what they are made of.
pub fn judge(
    begin: &SelectBegin,
    learner: Option<&Embedded>,
    reference: Option<&Embedded>,
) -> Option<Judged> {
    let settings = settings(begin).ok().filter(|_| is_scored(begin.policy()))?;
    let models = [
        learner
            .filter(|_| settings.criterion.needs_learner())
            .map(|m| m.model(begin.learner_scale, begin.learner_bias)),
        reference
            .filter(|_| settings.criterion.needs_reference())
            .map(|m| m.model(begin.reference_scale, begin.reference_bias)),
    ];
    let count = begin.positions.len();
    let losses = models
        .each_ref()
        .map(|model| model.map(|model| own_losses(&model, settings.loss, count, &begin.holes)));
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
    let own: Vec<f64> = (0..count).map(score).collect::<Option<_>>()?;
    let dims: usize = models.iter().flatten().map(|model| model.dim).sum();
    let mut judged = Judged {
        own,
        losses,
        uniform_score: None,
        flops: 2.0 * (count * dims) as f64,
    };
    let embedded = [learner, reference];
    if let Some((score, flops)) = uniform_score(&settings, &judged.own, gain, embedded, models) {
        judged.uniform_score = Some(score);
        judged.flops += flops;
    }
    Some(judged)
}

/// Losses of the candidates' own pairs; softmax: without denominators. NaN for holes.
fn own_losses(model: &ModelEmbeddings<'_>, loss: Loss, count: usize, holes: &[u32]) -> Vec<f64> {
    let mut losses = vec![f64::NAN; count];
    let mut is_hole = vec![false; count];
    for hole in holes {
        if let Some(marked) = is_hole.get_mut(*hole as usize) {
            *marked = true;
        }
    }
    for (n, own) in losses.iter_mut().enumerate().filter(|(n, _)| !is_hole[*n]) {
        let scaled = model.scale * model.own_cosine(n as u32);
        *own = match loss {
            Loss::Sigmoid => softplus(-(scaled + model.bias)),
            Loss::Softmax => -scaled,
        };
    }
    losses
}

fn softplus(x: f64) -> f64 {
    x.max(0.0) + (-x.abs()).exp().ln_1p()
}

/// The mean own score of all, and for each example as many pair terms as a batch has, each the mean of a sample's. Softmax: a
/// sample's denominators, grown to the batch's size. With the operations that took.
fn uniform_score(
    settings: &Settings,
    own: &[f64],
    gain: f64,
    embedded: [Option<&Embedded>; 2],
    models: [Option<ModelEmbeddings<'_>>; 2],
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
    let [learner, reference] = [taken(&learner, models[0]), taken(&reference, models[1])];
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

/// Names up to `most` of the candidates that were not drawn: first the half of the best own scores, best first, then others
/// evenly spaced over the rest, in their order.
pub fn passed_over(own: &[f64], drawn: &[u32], most: usize) -> Vec<Passed> {
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

/// A number by its total order.
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
    /// These rows alone, in this order.
    fn picked(&self, rows: &[usize]) -> Self {
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
mod tests {
    use super::*;
    use superbatch_proto::v1;

    const DIM: usize = 4;

    /// `count` candidates whose embeddings are waves of their number: any that differ do.
    fn embedded(count: usize, phase: f64) -> Embedded {
        let tower = |shift: f64| {
            let rows = (0..count).flat_map(|n| {
                let row: Vec<f64> = (0..DIM)
                    .map(|d| ((n * (d + 2)) as f64 * 0.37 + phase + shift * d as f64).sin())
                    .collect();
                let norm = row.iter().map(|x| x * x).sum::<f64>().sqrt();
                row.into_iter().map(move |x| (x / norm) as f32)
            });
            Values::F32(rows.collect())
        };
        Embedded {
            image: tower(0.0),
            text: tower(0.3),
            dim: DIM,
        }
    }

    fn begin(
        count: u64,
        sub_batch_size: u32,
        loss: v1::Loss,
        criterion: v1::Criterion,
    ) -> SelectBegin {
        SelectBegin {
            policy: v1::Policy::Joint.into(),
            criterion: criterion.into(),
            loss: loss.into(),
            sub_batch_size,
            n_chunks: 4,
            gain: 2.0,
            positions: (0..count).collect(),
            learner_scale: 8.0,
            learner_bias: -3.0,
            reference_scale: 12.0,
            reference_bias: -4.0,
            ..Default::default()
        }
    }

    #[test]
    fn own_scores_are_those_that_the_draw_begins_with() {
        for loss in [v1::Loss::Sigmoid, v1::Loss::Softmax] {
            for criterion in [
                v1::Criterion::Learnability,
                v1::Criterion::Hard,
                v1::Criterion::Easy,
            ] {
                let mut begin = SelectBegin {
                    holes: vec![3],
                    ..begin(60, 20, loss, criterion)
                };
                begin.policy = v1::Policy::Independent.into();
                let (learner, reference) = (embedded(60, 0.1), embedded(60, 0.4));
                let judged = judge(&begin, Some(&learner), Some(&reference)).unwrap();
                let drawn =
                    super::super::draw(Backend::Native, &begin, Some(&learner), Some(&reference))
                        .unwrap();
                for (index, score) in drawn.indices.iter().zip(&drawn.scores) {
                    assert!(
                        (judged.own[*index as usize] - score).abs() < 1e-5,
                        "{loss:?} {criterion:?}"
                    );
                }
                assert!(judged.own[3].is_nan() && judged.flops > 0.0);
                assert_eq!(judged.losses[0].is_some(), criterion != v1::Criterion::Easy);
                assert_eq!(judged.losses[1].is_some(), criterion != v1::Criterion::Hard);
            }
        }
    }

    #[test]
    fn a_uniform_draw_scores_what_is_expected_of_it() {
        let (learner, reference) = (embedded(2_000, 0.1), embedded(2_000, 0.4));
        for loss in [v1::Loss::Sigmoid, v1::Loss::Softmax] {
            for (criterion, size) in [
                (v1::Criterion::Learnability, 64),
                (v1::Criterion::Hard, 600),
                (v1::Criterion::Easy, 600),
            ] {
                let begin = begin(2_000, size, loss, criterion);
                let expected = judge(&begin, Some(&learner), Some(&reference))
                    .unwrap()
                    .uniform_score
                    .unwrap();
                let uniform = |step| SelectBegin {
                    policy: v1::Policy::Uniform.into(),
                    step,
                    ..begin.clone()
                };
                let draws = (0..20).map(|step| {
                    super::super::draw(
                        Backend::Native,
                        &uniform(step),
                        Some(&learner),
                        Some(&reference),
                    )
                    .unwrap()
                    .batch_score
                    .unwrap()
                });
                let mean = draws.sum::<f64>() / 20.0;
                assert!(
                    (expected - mean).abs() < 0.05 * mean.abs().max(1.0),
                    "{loss:?} {criterion:?}: {expected} and {mean}"
                );
            }
        }
    }

    #[test]
    fn a_draw_without_scores_is_not_judged() {
        let (learner, reference) = (embedded(10, 0.1), embedded(10, 0.4));
        let uniform = SelectBegin {
            policy: v1::Policy::Uniform.into(),
            ..begin(10, 4, v1::Loss::Sigmoid, v1::Criterion::Hard)
        };
        assert_eq!(judge(&uniform, Some(&learner), Some(&reference)), None);
        let joint = begin(10, 4, v1::Loss::Sigmoid, v1::Criterion::Learnability);
        assert_eq!(judge(&joint, Some(&learner), None), None);
    }

    #[test]
    fn the_best_of_those_passed_over_are_named_and_a_sample_of_the_rest() {
        let own = [0.9, 0.1, 0.8, f64::NAN, 0.3, 0.7, 0.2, 0.5, 0.5, 0.0];
        let named = |most| {
            passed_over(&own, &[0, 5], most)
                .iter()
                .map(|p| (p.candidate, p.sampled))
                .collect::<Vec<_>>()
        };
        assert_eq!(named(4), [(2, false), (7, false), (1, true), (6, true)]);
        assert_eq!(named(3), [(2, false), (7, false), (1, true)]);
        assert_eq!(named(0), []);
        let mut all: Vec<u32> = named(100).iter().map(|(candidate, _)| *candidate).collect();
        all.sort_unstable();
        assert_eq!(
            all,
            [1, 2, 4, 6, 7, 8, 9],
            "each once: no hole, and nobody who was drawn"
        );
    }
}
