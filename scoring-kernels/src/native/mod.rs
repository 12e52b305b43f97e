//! Scores on the CPU, in plain Rust, on the caller's rayon pool.
//!
//! A candidate's sums are taken over the drawn examples in a fixed order, whatever tile it is in and whichever thread has
//! it: the draw does not depend on the number of threads.
mod simd;

use crate::{
    engine::Engine,
    error::Result,
    problem::{Problem, SignedModel},
    types::{Loss, Rows},
};
use rayon::prelude::*;
use simd::{BLOCK, Isa, TILE};

pub(crate) struct NativeEngine<'a> {
    problem: &'a Problem<'a>,
    isa: Isa,
    /// The candidates left, rising by index.
    running: Vec<Running>,
    flops: f64,
}

/// The running score of one candidate.
#[derive(Clone)]
struct Running {
    index: u32,
    /// Unconditional score, without gain.
    own: f64,
    /// Sigmoid: signed sum of the pair terms with all that was absorbed.
    pairs: f64,
    /// Softmax: logits against all that was absorbed, by model and direction (own image, own text).
    logits: [[LogSumExp; 2]; 2],
}

/// ln of a sum of exponentials, as the largest exponent and a sum scaled by it.
#[derive(Clone, Copy, Default)]
struct LogSumExp {
    largest: f64,
    sum: f64,
}

impl LogSumExp {
    fn add(&mut self, (largest, sum): (f64, f64)) {
        if self.sum == 0.0 {
            *self = Self { largest, sum };
        } else if largest > self.largest {
            *self = Self { largest, sum: self.sum * (self.largest - largest).exp() + sum };
        } else {
            self.sum += sum * (largest - self.largest).exp();
        }
    }

    /// 0 while nothing was added: the first chunk has no denominators.
    fn value(&self) -> f64 {
        if self.sum == 0.0 { 0.0 } else { self.largest + self.sum.ln() }
    }
}

impl Running {
    /// Conditional score without gain.
    fn score(&self, problem: &Problem<'_>) -> f64 {
        match problem.loss {
            Loss::Sigmoid => self.own + self.pairs,
            Loss::Softmax => {
                let half = |[image, text]: &[LogSumExp; 2]| 0.5 * (image.value() + text.value());
                let models = problem.models.iter().zip(&self.logits);
                self.own + models.map(|(model, logits)| model.sign * half(logits)).sum::<f64>()
            }
        }
    }
}

/// Whose rows are the candidate's and whose the drawn example's: (image, text) or (text, image).
#[derive(Clone, Copy)]
struct Direction<'a> {
    model: &'a SignedModel<'a>,
    /// Index of the model, and of the direction.
    slot: [usize; 2],
    ours: Rows<'a>,
    theirs: Rows<'a>,
}

impl<'a> NativeEngine<'a> {
    pub(crate) fn new(problem: &'a Problem<'a>) -> Self {
        let running = problem.offered.par_iter().with_min_len(64).map(|&index| start(problem, index)).collect();
        let dims: usize = problem.models.iter().map(|model| model.embeddings.dim).sum();
        let flops = 2.0 * problem.offered.len() as f64 * dims as f64;
        Self { problem, isa: Isa::detect(), running, flops }
    }

    fn directions(&self) -> impl Iterator<Item = Direction<'a>> + use<'a> {
        self.problem.models.iter().enumerate().flat_map(|(m, model)| {
            let (image, text) = (model.embeddings.image, model.embeddings.text);
            let forth = Direction { model, slot: [m, 0], ours: image, theirs: text };
            [forth, Direction { slot: [m, 1], ours: text, theirs: image, ..forth }]
        })
    }

    /// Adds to each of `running` its terms of one direction against a chunk.
    fn add(&mut self, running: &mut [Running], chunk: &[u32], direction: Direction<'_>) {
        let dim = direction.model.embeddings.dim;
        let (rows_high, columns_wide) = self.isa.shape();
        let panels = pack(&direction.theirs, chunk.iter().copied(), chunk.len(), dim, columns_wide);
        let (isa, loss) = (self.isa, self.problem.loss);
        let tallest = TILE.min(running.len().next_multiple_of(rows_high));
        let scratch = || (vec![0f32; tallest * dim], vec![0f32; tallest * BLOCK]);
        running.par_chunks_mut(TILE).for_each_init(scratch, |(packed, dots), tile| {
            let height = tile.len().next_multiple_of(rows_high);
            let packed = &mut packed[..height * dim];
            pack_into(&direction.ours, tile.iter().map(|row| row.index), dim, rows_high, packed);
            for (block, start) in panels.chunks(BLOCK * dim).zip((0..).step_by(BLOCK)) {
                let width = BLOCK.min(chunk.len() - start);
                simd::dots(isa, packed, block, dim, dots);
                for (row, dots) in tile.iter_mut().zip(dots.chunks_exact(BLOCK)) {
                    reduce(isa, loss, row, &dots[..width], &direction);
                }
            }
        });
        self.flops += 2.0 * running.len() as f64 * chunk.len() as f64 * dim as f64;
    }
}

impl Engine for NativeEngine<'_> {
    fn scores(&mut self) -> Result<Vec<f64>> {
        let mut scores = vec![0.0; self.problem.count];
        for row in &self.running {
            scores[row.index as usize] = self.problem.gain * row.score(self.problem);
        }
        Ok(scores)
    }

    fn absorb(&mut self, chunk: &[u32]) -> Result<()> {
        let mut drawn = chunk.to_vec();
        drawn.sort_unstable();
        let mut running = std::mem::take(&mut self.running);
        running.retain(|row| drawn.binary_search(&row.index).is_err());
        for direction in self.directions() {
            self.add(&mut running, chunk, direction);
        }
        self.running = running;
        Ok(())
    }

    fn inner(&mut self, chosen: &[u32]) -> Result<f64> {
        if self.problem.loss == Loss::Sigmoid && chosen.len() == 1 {
            return Ok(0.0);
        }
        let mut running: Vec<Running> =
            chosen.par_iter().with_min_len(64).map(|&index| start(self.problem, index)).collect();
        if self.problem.loss == Loss::Softmax {
            for direction in self.directions() {
                self.add(&mut running, chosen, direction);
            }
            return Ok(running.iter().map(|row| row.score(self.problem)).sum());
        }
        // One direction sees every ordered pair once, and each example's own pair as if it were a negative.
        for direction in self.directions().filter(|direction| direction.slot[1] == 0) {
            self.add(&mut running, chosen, direction);
        }
        let own_as_negative = |row: &Running| {
            self.problem.models.iter().map(|model| model.sign * softplus(own_logit(model, row.index))).sum::<f64>()
        };
        Ok(running.iter().map(|row| row.pairs - own_as_negative(row)).sum())
    }

    fn flops(&self) -> f64 {
        self.flops
    }
}

/// A candidate of which nothing but its own pair is known.
fn start(problem: &Problem<'_>, index: u32) -> Running {
    let loss = |model: &SignedModel<'_>| match problem.loss {
        Loss::Sigmoid => softplus(-own_logit(model, index)),
        Loss::Softmax => model.embeddings.bias - own_logit(model, index),
    };
    let own = problem.models.iter().map(|model| model.sign * loss(model)).sum();
    Running { index, own, pairs: 0.0, logits: Default::default() }
}

fn own_logit(model: &SignedModel<'_>, index: u32) -> f64 {
    let embeddings = &model.embeddings;
    let (mut image, mut text) = (vec![0f32; embeddings.dim], vec![0f32; embeddings.dim]);
    embeddings.image.read(index as usize, &mut image);
    embeddings.text.read(index as usize, &mut text);
    let mut lanes = [0f64; 8];
    for (image, text) in image.chunks(8).zip(text.chunks(8)) {
        for ((lane, a), b) in lanes.iter_mut().zip(image).zip(text) {
            *lane += f64::from(*a) * f64::from(*b);
        }
    }
    embeddings.scale * lanes.iter().sum::<f64>() + embeddings.bias
}

fn softplus(x: f64) -> f64 {
    x.max(0.0) + (-x.abs()).exp().ln_1p()
}

/// Adds a row's dot products with some drawn examples to its running score.
fn reduce(isa: Isa, loss: Loss, row: &mut Running, dots: &[f32], direction: &Direction<'_>) {
    let SignedModel { sign, embeddings } = direction.model;
    let scale = embeddings.scale as f32;
    match loss {
        Loss::Sigmoid => row.pairs += sign * simd::softplus_sum(isa, dots, scale, embeddings.bias as f32),
        Loss::Softmax => {
            let [model, side] = direction.slot;
            row.logits[model][side].add(simd::exp_sum(isa, dots, scale));
        }
    }
}

/// Rows as panels of `width` interleaved rows, `[panel][dim][width]`, the last padded with zeros.
fn pack(rows: &Rows<'_>, indices: impl Iterator<Item = u32>, count: usize, dim: usize, width: usize) -> Vec<f32> {
    let mut panels = vec![0f32; count.next_multiple_of(width) * dim];
    pack_into(rows, indices, dim, width, &mut panels);
    panels
}

fn pack_into(rows: &Rows<'_>, indices: impl Iterator<Item = u32>, dim: usize, width: usize, panels: &mut [f32]) {
    let mut row = vec![0f32; dim];
    let mut filled = 0;
    for index in indices {
        rows.read(index as usize, &mut row);
        let panel = &mut panels[filled / width * width * dim..];
        for (slot, value) in panel[filled % width..].iter_mut().step_by(width).zip(&row) {
            *slot = *value;
        }
        filled += 1;
    }
    // A tile's buffer is used again: clear the padding rows that an earlier tile filled.
    for padding in filled..panels.len() / dim {
        let panel = &mut panels[padding / width * width * dim..];
        panel[padding % width..].iter_mut().step_by(width).take(dim).for_each(|slot| *slot = 0.0);
    }
}
