//! Scores on the CPU, in plain Rust, on the caller's rayon pool.
//!
//! Candidates are in slots, [`TILE`] of them to a task. A candidate's sums are taken over the drawn
//! examples in a fixed order, whatever its slot and thread are, so the draw does not depend on the
//! number of threads.
mod cosines;
mod kernel;
mod pack;
mod running;
mod vector;

use crate::{
    engine::Engine,
    error::Result,
    problem::{Problem, SignedModel},
    types::{Loss, ModelEmbeddings, Rows},
};
use kernel::{BLOCK, WIDEST};
use pack::{Blocks, Buffer};
use rayon::prelude::*;
use running::{Running, own_logit, softplus, start};
use vector::Isa;

pub(crate) use cosines::{NativeSpread, Others};

/// Candidates of a task: a multiple of every panel's width.
const TILE: usize = 64;
/// Most bytes of panels that are kept from chunk to chunk. For larger super-batches the chunks are
/// larger too, and packing costs little compared with their products.
const KEPT_BYTES: usize = 256 << 20;

pub(crate) struct NativeEngine<'a> {
    problem: &'a Problem<'a>,
    isa: Isa,
    /// The candidates left, by slot.
    running: Vec<Running>,
    /// The slot of every candidate left, by index.
    slots: Vec<u32>,
    /// For each direction, the candidates' rows in panels `[panel][dim][lane]`, if they fit
    /// [`KEPT_BYTES`].
    kept: Vec<Buffer>,
    flops: f64,
}

/// Which tower's rows are the candidate's and which the drawn example's: (image, text) or (text,
/// image).
#[derive(Clone, Copy)]
struct Direction<'a> {
    model: &'a SignedModel<'a>,
    /// Index of the model, and of the direction.
    slot: [usize; 2],
    ours: Rows<'a>,
    theirs: Rows<'a>,
}

fn directions<'a>(problem: &'a Problem<'a>) -> impl Iterator<Item = Direction<'a>> {
    problem.models.iter().enumerate().flat_map(|(m, model)| {
        let (image, text) = (model.embeddings.image, model.embeddings.text);
        let forth = Direction {
            model,
            slot: [m, 0],
            ours: image,
            theirs: text,
        };
        [
            forth,
            Direction {
                slot: [m, 1],
                ours: text,
                theirs: image,
                ..forth
            },
        ]
    })
}

impl<'a> NativeEngine<'a> {
    pub(crate) fn new(problem: &'a Problem<'a>) -> Self {
        let running = all_start(problem, &problem.offered);
        let mut slots = vec![0; problem.count];
        problem
            .offered
            .iter()
            .zip(0..)
            .for_each(|(&index, slot)| slots[index as usize] = slot);
        let dims: usize = problem
            .models
            .iter()
            .map(|model| model.embeddings.dim)
            .sum();
        let flops = 2.0 * problem.offered.len() as f64 * dims as f64;
        let mut engine = Self {
            problem,
            isa: Isa::detect(),
            running,
            slots,
            kept: Vec::new(),
            flops,
        };
        if problem.chunks.len() > 2 && 8 * problem.offered.len() * dims <= KEPT_BYTES {
            engine.kept = directions(problem)
                .map(|direction| engine.panels(&direction))
                .collect();
        }
        engine
    }

    /// Packs all candidates' rows of one direction into panels.
    fn panels(&self, direction: &Direction<'_>) -> Buffer {
        let (dim, width) = (direction.model.embeddings.dim, self.isa.width());
        let mut panels = Buffer::zeros(self.running.len().next_multiple_of(TILE) * dim);
        let tiles = panels
            .as_mut_slice()
            .par_chunks_mut(width * dim)
            .zip(self.running.par_chunks(width));
        tiles.for_each(|(panel, rows)| {
            pack::panel(
                &direction.ours,
                dim,
                rows.iter().map(|row| row.index),
                width,
                panel,
            );
        });
        panels
    }

    /// Removes a drawn chunk: the candidate of the last slot moves into each freed slot. Returns
    /// the slots that got another candidate, rising.
    fn remove(&mut self, chunk: &[u32]) -> Vec<usize> {
        let mut changed = Vec::with_capacity(chunk.len());
        for &index in chunk {
            let slot = self.slots[index as usize] as usize;
            self.running.swap_remove(slot);
            if let Some(moved) = self.running.get(slot) {
                self.slots[moved.index as usize] = slot as u32;
                changed.push(slot);
            }
        }
        // A slot that was filled early may lie beyond the end by now, or be filled twice. Only
        // slots that hold a candidate at the end are packed again; a slot left out here would be
        // scored with the embedding of the candidate before it.
        changed.retain(|&slot| slot < self.running.len());
        changed.sort_unstable();
        changed.dedup();
        changed
    }

    /// Adds to each of `running` its terms of one direction against a chunk, and returns the
    /// operations that took.
    fn add(&self, running: &mut [Running], chunk: &[u32], direction: &Direction<'_>) -> f64 {
        let (dim, width) = (direction.model.embeddings.dim, self.isa.width());
        let blocks = Blocks::new(self.isa, &direction.theirs, dim, chunk);
        let scratch = || (Buffer::zeros(TILE * dim), Buffer::zeros(BLOCK * WIDEST));
        running
            .par_chunks_mut(TILE)
            .for_each_init(scratch, |(panels, dots), tile| {
                let panels = panels.as_mut_slice();
                for (rows, panel) in tile.chunks(width).zip(panels.chunks_exact_mut(width * dim)) {
                    pack::panel(
                        &direction.ours,
                        dim,
                        rows.iter().map(|row| row.index),
                        width,
                        panel,
                    );
                }
                self.add_tile(tile, panels, &blocks, direction, dots.as_mut_slice());
            });
        2.0 * running.len() as f64 * chunk.len() as f64 * dim as f64
    }

    /// As [`Self::add`], with kept panels. The lanes of the slots in `changed` still hold another
    /// candidate's row and are packed again.
    fn add_kept(
        &self,
        (running, kept): (&mut [Running], &mut [f32]),
        changed: &[usize],
        chunk: &[u32],
        direction: &Direction<'_>,
    ) -> f64 {
        let (dim, width) = (direction.model.embeddings.dim, self.isa.width());
        let blocks = Blocks::new(self.isa, &direction.theirs, dim, chunk);
        let tiles = running
            .par_chunks_mut(TILE)
            .zip(kept.par_chunks_mut(TILE * dim))
            .enumerate();
        tiles.for_each_init(
            || Buffer::zeros(BLOCK * WIDEST),
            |dots, (t, (tile, panels))| {
                // Lanes are packed here and not in a pass before, so that a panel is loaded into
                // the cache once.
                let place = |slot| changed.partition_point(|&changed| changed < slot);
                for slot in &changed[place(t * TILE)..place((t + 1) * TILE)] {
                    let slot = slot % TILE;
                    let panel = &mut panels[slot / width * width * dim..];
                    pack::lane(
                        &direction.ours,
                        dim,
                        tile[slot].index,
                        width,
                        slot % width,
                        panel,
                    );
                }
                self.add_tile(tile, panels, &blocks, direction, dots.as_mut_slice());
            },
        );
        2.0 * running.len() as f64 * chunk.len() as f64 * dim as f64
    }

    fn add_tile(
        &self,
        tile: &mut [Running],
        panels: &[f32],
        blocks: &Blocks,
        direction: &Direction<'_>,
        dots: &mut [f32],
    ) {
        let (dim, width) = (direction.model.embeddings.dim, self.isa.width());
        for (block, groups) in blocks.iter() {
            let dots = &mut dots[..block.len() / dim * width];
            for (rows, panel) in tile.chunks_mut(width).zip(panels.chunks_exact(width * dim)) {
                kernel::dots(self.isa, block, groups, panel, dim, dots);
                reduce(self.isa, self.problem.loss, rows, dots, direction);
            }
        }
    }
}

/// Adds a panel's dot products with a block to its candidates' running scores.
fn reduce(isa: Isa, loss: Loss, rows: &mut [Running], dots: &[f32], direction: &Direction<'_>) {
    let SignedModel {
        sign, embeddings, ..
    } = direction.model;
    let mut sums = [0f64; WIDEST];
    match loss {
        Loss::Sigmoid => {
            kernel::softplus_sums(isa, dots, embeddings.scale, embeddings.bias, &mut sums);
            rows.iter_mut()
                .zip(sums)
                .for_each(|(row, sum)| row.pairs += sign * sum);
        }
        Loss::Softmax => {
            let ([model, side], mut largest) = (direction.slot, [0f64; WIDEST]);
            kernel::exp_sums(isa, dots, embeddings.scale, &mut largest, &mut sums);
            for (row, term) in rows.iter_mut().zip(largest.into_iter().zip(sums)) {
                row.logits[model][side].add(term);
            }
        }
    }
}

/// Returns the softmax loss of each offered candidate in a batch of `context` and, if it is not in
/// `context`, itself.
pub(crate) fn clip_losses(
    model: &ModelEmbeddings<'_>,
    cosines: Vec<f64>,
    offered: &[u32],
    context: &[u32],
) -> Vec<f64> {
    let mut inside = vec![false; cosines.len()];
    context
        .iter()
        .for_each(|&index| inside[index as usize] = true);
    let problem = Problem::of_one(*model, cosines, offered.to_vec());
    let mut engine = NativeEngine::new(&problem);
    let mut running = std::mem::take(&mut engine.running);
    for direction in directions(&problem) {
        engine.add(&mut running, context, &direction);
    }
    for row in running.iter_mut().filter(|row| !inside[row.index as usize]) {
        let own = (
            model.scale * problem.models[0].cosines[row.index as usize],
            1.0,
        );
        row.logits[0].iter_mut().for_each(|logits| logits.add(own));
    }
    running.iter().map(|row| row.score(&problem)).collect()
}

/// Returns the unconditional scores of candidates, without gain, in their order.
pub(crate) fn own_scores(problem: &Problem<'_>, indices: &[u32]) -> Vec<f64> {
    all_start(problem, indices)
        .into_iter()
        .map(|row| row.own)
        .collect()
}

/// Returns what a candidate's own pair would add to a sigmoid score if it were a negative.
pub(crate) fn own_as_negative(problem: &Problem<'_>, index: u32) -> f64 {
    problem
        .models
        .iter()
        .map(|model| model.sign * softplus(own_logit(model, index)))
        .sum()
}

fn all_start(problem: &Problem<'_>, indices: &[u32]) -> Vec<Running> {
    indices
        .par_iter()
        .with_min_len(64)
        .map(|&index| start(problem, index))
        .collect()
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
        let changed = self.remove(chunk);
        let (mut running, mut kept) = (
            std::mem::take(&mut self.running),
            std::mem::take(&mut self.kept),
        );
        for (k, direction) in directions(self.problem).enumerate() {
            self.flops += match kept.get_mut(k) {
                Some(kept) => self.add_kept(
                    (&mut running, kept.as_mut_slice()),
                    &changed,
                    chunk,
                    &direction,
                ),
                None => self.add(&mut running, chunk, &direction),
            };
        }
        (self.running, self.kept) = (running, kept);
        Ok(())
    }

    fn inner(&mut self, chosen: &[u32]) -> Result<f64> {
        if self.problem.loss == Loss::Sigmoid && chosen.len() == 1 {
            return Ok(0.0);
        }
        let mut running = all_start(self.problem, chosen);
        if self.problem.loss == Loss::Softmax {
            for direction in directions(self.problem) {
                self.flops += self.add(&mut running, chosen, &direction);
            }
            return Ok(running.iter().map(|row| row.score(self.problem)).sum());
        }
        // One direction covers every ordered pair (i, j) once; both would count each twice. It also
        // covers (i, i), as if that were a negative, which is subtracted below.
        for direction in directions(self.problem).filter(|direction| direction.slot[1] == 0) {
            self.flops += self.add(&mut running, chosen, &direction);
        }
        Ok(running
            .iter()
            .map(|row| row.pairs - own_as_negative(self.problem, row.index))
            .sum())
    }

    fn flops(&self) -> f64 {
        self.flops
    }
}
