//! Puts embeddings into the order in which the inner loops read them.
use super::{kernel::BLOCK, vector::Isa};
use crate::types::Rows;
use rayon::prelude::*;

/// Values of a row that are copied at a time. Writing a lane touches one value of every cache line;
/// with stretches of 128, the lines of all lanes stay in the L1 cache until they are full.
const STRETCH: usize = 128;
/// Values of a cache line.
const LINE: usize = 16;

/// f32 values that begin at a cache line, so that no vector straddles two lines.
pub(super) struct Buffer {
    values: Vec<f32>,
    first: usize,
}

impl Buffer {
    /// Allocates zeroed memory. The system maps a page at its first write, so on a machine with
    /// several memory nodes it lies near the thread that fills it.
    pub(super) fn zeros(len: usize) -> Self {
        let values = vec![0f32; len + LINE];
        let first = values
            .as_ptr()
            .align_offset(LINE * size_of::<f32>())
            .min(LINE);
        Self { values, first }
    }

    pub(super) fn as_slice(&self) -> &[f32] {
        &self.values[self.first..self.values.len() - (LINE - self.first)]
    }

    pub(super) fn as_mut_slice(&mut self) -> &mut [f32] {
        let end = self.values.len() - (LINE - self.first);
        &mut self.values[self.first..end]
    }
}

/// Writes rows as one panel `[dim][width]`. Lanes without a row keep their values, which are never
/// read out.
pub(super) fn panel(
    rows: &Rows<'_>,
    dim: usize,
    indices: impl Iterator<Item = u32> + Clone,
    width: usize,
    out: &mut [f32],
) {
    for start in (0..dim).step_by(STRETCH) {
        for (lane, index) in indices.clone().enumerate() {
            stretch(rows, dim, index, start, width, lane, out);
        }
    }
}

/// Writes one row as one lane of a panel.
pub(super) fn lane(
    rows: &Rows<'_>,
    dim: usize,
    index: u32,
    width: usize,
    lane: usize,
    out: &mut [f32],
) {
    for start in (0..dim).step_by(STRETCH) {
        stretch(rows, dim, index, start, width, lane, out);
    }
}

#[inline(always)]
fn stretch(
    rows: &Rows<'_>,
    dim: usize,
    index: u32,
    start: usize,
    width: usize,
    lane: usize,
    out: &mut [f32],
) {
    let mut values = [0f32; STRETCH];
    let values = rows.read(
        index as usize,
        dim,
        start,
        &mut values[..STRETCH.min(dim - start)],
    );
    for (slot, value) in out[start * width + lane..]
        .iter_mut()
        .step_by(width)
        .zip(values)
    {
        *slot = *value;
    }
}

/// Drawn examples of one tower as blocks of at most [`BLOCK`], each `[group][dim][row]`.
pub(super) struct Blocks {
    values: Buffer,
    dim: usize,
    /// For each block, the heights of its groups.
    groups: Vec<Vec<usize>>,
}

impl Blocks {
    pub(super) fn new(isa: Isa, rows: &Rows<'_>, dim: usize, drawn: &[u32]) -> Self {
        let mut values = Buffer::zeros(drawn.len() * dim);
        let groups: Vec<Vec<usize>> = drawn
            .chunks(BLOCK)
            .map(|block| isa.groups(block.len()))
            .collect();
        let (mut left, mut rest, mut tasks) = (drawn, values.as_mut_slice(), Vec::new());
        for &height in groups.iter().flatten() {
            let (group, after) = left.split_at(height);
            let (out, behind) = rest.split_at_mut(height * dim);
            tasks.push((group, out));
            (left, rest) = (after, behind);
        }
        tasks
            .into_par_iter()
            .for_each(|(group, out)| panel(rows, dim, group.iter().copied(), group.len(), out));
        Self {
            values,
            dim,
            groups,
        }
    }

    /// Returns (values, heights of groups) of every block.
    pub(super) fn iter(&self) -> impl Iterator<Item = (&[f32], &[usize])> {
        let mut rest = self.values.as_slice();
        self.groups.iter().map(move |groups| {
            let (block, after) = rest.split_at(groups.iter().sum::<usize>() * self.dim);
            rest = after;
            (block, groups.as_slice())
        })
    }
}
