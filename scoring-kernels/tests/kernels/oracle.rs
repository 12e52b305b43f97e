//! Joint selection written to be read: dense float64 matrices, no care for speed.
use crate::support::{Model, World};
use superbatch_kernels::{Criterion, Loss, Policy, Settings, Tuning};

type Matrix = Vec<Vec<f64>>;

pub(crate) struct Oracle {
    signs: Vec<f64>,
    logits: Vec<Matrix>,
    settings: Settings,
    pub tuning: Tuning,
}

pub(crate) struct Draw {
    pub indices: Vec<u32>,
    pub chunks: Vec<u32>,
    pub batch_score: f64,
    /// Smallest gap between the last drawn and the first not drawn.
    pub margin: f64,
}

impl Oracle {
    pub(crate) fn new(world: &World, settings: &Settings) -> Self {
        let models: &[(f64, &Model)] = match settings.criterion {
            Criterion::Learnability => &[(1.0, &world.learner), (-1.0, &world.reference)],
            Criterion::Hard => &[(1.0, &world.learner)],
            Criterion::Easy => &[(-1.0, &world.reference)],
        };
        let logits = models
            .iter()
            .map(|(_, model)| logits(model, world.count, settings.loss))
            .collect();
        Self {
            signs: models.iter().map(|(sign, _)| *sign).collect(),
            logits,
            settings: settings.clone(),
            tuning: Tuning::default(),
        }
    }

    /// Score of candidate x given the drawn ones, with gain.
    pub(crate) fn score(&self, x: usize, drawn: &[u32]) -> f64 {
        let gain = if self.settings.loss == Loss::Softmax {
            self.settings.gain
        } else {
            1.0
        };
        gain * self.combine(|logits| self.loss(logits, x, drawn))
    }

    fn combine(&self, loss: impl Fn(&Matrix) -> f64) -> f64 {
        self.signs
            .iter()
            .zip(&self.logits)
            .map(|(sign, logits)| sign * loss(logits))
            .sum()
    }

    fn loss(&self, logits: &Matrix, x: usize, drawn: &[u32]) -> f64 {
        let drawn = || {
            drawn
                .iter()
                .map(|&k| k as usize)
                .filter(move |&k| k != x || self.settings.loss == Loss::Softmax)
        };
        match self.settings.loss {
            Loss::Sigmoid => {
                softplus(-logits[x][x])
                    + drawn()
                        .map(|k| softplus(logits[x][k]) + softplus(logits[k][x]))
                        .sum::<f64>()
            }
            Loss::Softmax if drawn().next().is_none() => -logits[x][x],
            Loss::Softmax => {
                let denominators = log_sum_exp(drawn().map(|k| logits[x][k]))
                    + log_sum_exp(drawn().map(|k| logits[k][x]));
                -logits[x][x] + 0.5 * denominators
            }
        }
    }

    /// Mean loss of the sub-batch as one batch, by the criterion.
    pub(crate) fn batch_score(&self, chosen: &[u32]) -> f64 {
        let total = self.combine(|logits| match self.settings.loss {
            Loss::Softmax => chosen
                .iter()
                .map(|&x| self.loss(logits, x as usize, chosen))
                .sum(),
            Loss::Sigmoid => {
                let pairs = chosen
                    .iter()
                    .flat_map(|&i| chosen.iter().map(move |&j| (i as usize, j as usize)));
                pairs
                    .map(|(i, j)| softplus(if i == j { -logits[i][i] } else { logits[i][j] }))
                    .sum()
            }
        });
        total / chosen.len() as f64
    }

    pub(crate) fn goes_by_chunks(&self) -> bool {
        matches!(
            self.settings.policy,
            Policy::Joint | Policy::JointTopK | Policy::KCenter
        )
    }

    /// ln of the unnormalised chance of x, given what the chunks before drew.
    pub(crate) fn logit(&self, world: &World, x: usize, before: &[u32]) -> f64 {
        let offered = || (0..world.count).filter(|y| !world.holes.contains(&(*y as u32)));
        let own = |y: usize| self.score(y, &[]);
        match self.settings.policy {
            Policy::Uniform => 0.0,
            Policy::Joint | Policy::JointTopK => self.score(x, before),
            Policy::TopK => own(x),
            Policy::Independent => own(x) / self.tuning.temperature,
            Policy::Proportional => self.tuning.priority_exponent * (own(x).max(0.0) + 1e-6).ln(),
            Policy::Rank => {
                let better = offered()
                    .filter(|&y| own(y) > own(x) || own(y) == own(x) && y < x)
                    .count();
                -self.tuning.pressure.ln() * better as f64 / (offered().count() - 1) as f64
            }
            Policy::KCenter => distance(&world.reference, x, before),
        }
    }

    pub(crate) fn draw(&self, world: &World) -> Draw {
        let b = self.settings.sub_batch_size;
        let parts = if self.goes_by_chunks() {
            self.settings.n_chunks.min(b)
        } else {
            1
        };
        let chunks: Vec<u32> = (0..parts)
            .map(|k| (b / parts + usize::from(k < b % parts)) as u32)
            .collect();
        let (mut indices, mut margin) = (Vec::new(), f64::INFINITY);
        for (k, &size) in chunks.iter().enumerate() {
            let greedy = match self.settings.policy {
                Policy::TopK | Policy::JointTopK => true,
                Policy::KCenter => k > 0,
                _ => false,
            };
            let noise = |x: u32| {
                if greedy {
                    0.0
                } else {
                    f64::from(world.noise[k * world.count + x as usize])
                }
            };
            let left = (0..world.count as u32)
                .filter(|x| !world.holes.contains(x) && !indices.contains(x));
            let mut left: Vec<(f64, u32)> = left
                .map(|x| (self.logit(world, x as usize, &indices) + noise(x), x))
                .collect();
            left.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
            if let Some(next) = left.get(size as usize) {
                margin = margin.min(left[size as usize - 1].0 - next.0);
            }
            indices.extend(left.into_iter().take(size as usize).map(|(_, x)| x));
        }
        let batch_score = self.batch_score(&indices);
        Draw {
            indices,
            chunks,
            batch_score,
            margin,
        }
    }
}

/// 1 - the cosine of x's image with the nearest of those before; 0 if there are none.
pub(crate) fn distance(model: &Model, x: usize, before: &[u32]) -> f64 {
    let image = |i: usize| &model.image[i * model.dim..][..model.dim];
    let cosine = |&y: &u32| -> f64 {
        image(x)
            .iter()
            .zip(image(y as usize))
            .map(|(a, b)| f64::from(*a) * f64::from(*b))
            .sum()
    };
    before
        .iter()
        .map(cosine)
        .reduce(f64::max)
        .map_or(0.0, |nearest| 1.0 - nearest)
}

fn logits(model: &Model, count: usize, loss: Loss) -> Matrix {
    let bias = if loss == Loss::Softmax {
        0.0
    } else {
        model.bias
    };
    let dot = |i, j| -> f64 {
        let (image, text) = (
            &model.image[i * model.dim..][..model.dim],
            &model.text[j * model.dim..][..model.dim],
        );
        image
            .iter()
            .zip(text)
            .map(|(a, b)| f64::from(*a) * f64::from(*b))
            .sum()
    };
    (0..count)
        .map(|i| (0..count).map(|j| model.scale * dot(i, j) + bias).collect())
        .collect()
}

fn softplus(x: f64) -> f64 {
    x.max(0.0) + (-x.abs()).exp().ln_1p()
}

fn log_sum_exp(x: impl Iterator<Item = f64> + Clone) -> f64 {
    let largest = x.clone().fold(f64::NEG_INFINITY, f64::max);
    largest + x.map(|x| (x - largest).exp()).sum::<f64>().ln()
}
