//! Cosines of many pairs on the CPU, one by one, for k-center and near-duplicates.
use super::{
    kernel::{self, BLOCK, WIDEST},
    pack::{self, Blocks, Buffer},
    vector::Isa,
};
use crate::{
    engine::Spread,
    error::Result,
    types::{ModelEmbeddings, Rows},
};
use rayon::prelude::*;

/// Buffers of [`Others::visit`], one set for each thread.
pub(crate) struct Scratch {
    panel: Buffer,
    dots: Buffer,
}

/// The rows with which other rows are compared.
pub(crate) struct Others {
    isa: Isa,
    dim: usize,
    blocks: Blocks,
}

impl Others {
    pub(crate) fn new(rows: &Rows<'_>, dim: usize, indices: &[u32]) -> Self {
        let isa = Isa::detect();
        Self {
            isa,
            dim,
            blocks: Blocks::new(isa, rows, dim, indices),
        }
    }

    pub(crate) fn scratch(&self) -> Scratch {
        Scratch {
            panel: Buffer::zeros(WIDEST * self.dim),
            dots: Buffer::zeros(BLOCK * WIDEST),
        }
    }

    /// Calls `see(place in indices, place in the others, dot product)` for every pair. For each
    /// index the others come in order.
    pub(crate) fn visit(
        &self,
        rows: &Rows<'_>,
        indices: &[u32],
        scratch: &mut Scratch,
        mut see: impl FnMut(usize, usize, f32),
    ) {
        let width = self.isa.width();
        for (group, start) in indices.chunks(width).zip((0..).step_by(width)) {
            let panel = &mut scratch.panel.as_mut_slice()[..width * self.dim];
            pack::panel(rows, self.dim, group.iter().copied(), width, panel);
            let mut first = 0;
            for (block, groups) in self.blocks.iter() {
                let height = block.len() / self.dim;
                let dots = &mut scratch.dots.as_mut_slice()[..height * width];
                kernel::dots(self.isa, block, groups, panel, self.dim, dots);
                for (other, dots) in dots.chunks_exact(width).enumerate() {
                    for (lane, dot) in dots[..group.len()].iter().enumerate() {
                        see(start + lane, first + other, *dot);
                    }
                }
                first += height;
            }
        }
    }
}

/// K-center on the CPU.
pub(crate) struct NativeSpread<'a> {
    images: Rows<'a>,
    dim: usize,
    /// For each candidate, the cosine with the nearest chosen example.
    nearest: Vec<f32>,
}

impl<'a> NativeSpread<'a> {
    pub(crate) fn new(embeddings: &ModelEmbeddings<'a>, count: usize) -> Self {
        Self {
            images: embeddings.image,
            dim: embeddings.dim,
            nearest: vec![f32::NEG_INFINITY; count],
        }
    }
}

impl Spread for NativeSpread<'_> {
    fn absorb(&mut self, chunk: &[u32], left: &[u32]) -> Result<Vec<f32>> {
        let others = Others::new(&self.images, self.dim, chunk);
        let mut nearest: Vec<f32> = left
            .iter()
            .map(|&index| self.nearest[index as usize])
            .collect();
        nearest
            .par_chunks_mut(64)
            .zip(left.par_chunks(64))
            .for_each_init(
                || others.scratch(),
                |scratch, (nearest, indices)| {
                    others.visit(&self.images, indices, scratch, |lane, _, dot| {
                        nearest[lane] = nearest[lane].max(dot)
                    });
                },
            );
        left.iter()
            .zip(&nearest)
            .for_each(|(&index, &cosine)| self.nearest[index as usize] = cosine);
        Ok(nearest)
    }
}
