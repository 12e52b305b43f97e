//! Embeddings in the order in which the inner loops read them.
use super::{kernel::BLOCK, vector::Isa};
use crate::types::Rows;

/// Values of a row copied at a time: what they become of all rows of a panel stays in the L1 cache.
const STRETCH: usize = 128;

/// A cache line, so that no vector straddles two.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Line([f32; 16]);

/// Aligned f32.
pub(super) struct Buffer(Vec<Line>);

impl Buffer {
    pub(super) fn zeros(len: usize) -> Self {
        Self(vec![Line([0.0; 16]); len.div_ceil(16)])
    }

    pub(super) fn as_slice(&self) -> &[f32] {
        // SAFETY: a `Line` is sixteen f32 and nothing else.
        unsafe { std::slice::from_raw_parts(self.0.as_ptr().cast(), self.0.len() * 16) }
    }

    pub(super) fn as_mut_slice(&mut self) -> &mut [f32] {
        // SAFETY: as above, and the borrow is exclusive.
        unsafe { std::slice::from_raw_parts_mut(self.0.as_mut_ptr().cast(), self.0.len() * 16) }
    }
}

/// Writes rows as one panel `[dim][width]`; lanes without a row keep what they hold.
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
pub(super) fn lane(rows: &Rows<'_>, dim: usize, index: u32, width: usize, lane: usize, out: &mut [f32]) {
    for start in (0..dim).step_by(STRETCH) {
        stretch(rows, dim, index, start, width, lane, out);
    }
}

#[inline(always)]
fn stretch(rows: &Rows<'_>, dim: usize, index: u32, start: usize, width: usize, lane: usize, out: &mut [f32]) {
    let mut values = [0f32; STRETCH];
    let values = rows.read(index as usize, dim, start, &mut values[..STRETCH.min(dim - start)]);
    for (slot, value) in out[start * width + lane..].iter_mut().step_by(width).zip(values) {
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
        let mut rest = values.as_mut_slice();
        let groups: Vec<Vec<usize>> = drawn.chunks(BLOCK).map(|block| isa.groups(block.len())).collect();
        let mut left = drawn;
        for &height in groups.iter().flatten() {
            let (group, after) = left.split_at(height);
            let (out, behind) = rest.split_at_mut(height * dim);
            panel(rows, dim, group.iter().copied(), height, out);
            (left, rest) = (after, behind);
        }
        Self { values, dim, groups }
    }

    /// (values, heights of groups) of every block.
    pub(super) fn iter(&self) -> impl Iterator<Item = (&[f32], &[usize])> {
        let mut rest = self.values.as_slice();
        self.groups.iter().map(move |groups| {
            let (block, after) = rest.split_at(groups.iter().sum::<usize>() * self.dim);
            rest = after;
            (block, groups.as_slice())
        })
    }
}
