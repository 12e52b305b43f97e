//! The order of one source's rows in one epoch.
use super::order::Permutation;
use crate::dataset::Block;

// These texts key the permutations: changing one reshuffles every run, so they are part of
// PLAN_VERSION.
const BLOCKS: &str = "superbatch plan v1 blocks";
const ROWS: &str = "superbatch plan v1 rows";

/// Blocks in the epoch's order and their first places; 16 bytes for each block.
#[derive(Debug)]
pub(super) struct EpochOrder {
    source: u32,
    epoch: u64,
    window_blocks: usize,
    /// (shard, block in the shard), permuted.
    blocks: Vec<(u32, u32)>,
    /// The place of each permuted block's first row before rows are permuted, then the number of
    /// all rows.
    starts: Vec<u64>,
}

impl EpochOrder {
    pub(super) fn new<'a>(
        blocks: impl Iterator<Item = (u32, u32, &'a Block)>,
        seed: u64,
        source: u32,
        epoch: u64,
        window_blocks: u32,
    ) -> Self {
        let manifest_order: Vec<_> = blocks
            .filter(|(_, _, block)| block.rows > 0)
            .map(|(s, b, block)| (s, b, u64::from(block.rows)))
            .collect();
        let permutation = Permutation::new(
            BLOCKS,
            &[seed, u64::from(source), epoch],
            manifest_order.len() as u64,
        );
        let mut blocks = Vec::with_capacity(manifest_order.len());
        let mut starts = Vec::with_capacity(manifest_order.len() + 1);
        let mut start = 0;
        for i in 0..manifest_order.len() as u64 {
            let (shard, block, rows) = manifest_order[permutation.forward(i) as usize];
            blocks.push((shard, block));
            starts.push(start);
            start += rows;
        }
        starts.push(start);
        Self {
            source,
            epoch,
            window_blocks: window_blocks as usize,
            blocks,
            starts,
        }
    }

    /// Returns the blocks as (shard, block in the shard), in the epoch's order.
    pub(super) fn blocks(&self) -> &[(u32, u32)] {
        &self.blocks
    }

    /// Returns a cursor that looks places up. Rising places are cheapest, since a window's
    /// permutation is kept.
    pub(super) fn rows(&self, seed: u64) -> Rows<'_> {
        Rows {
            order: self,
            seed,
            window: None,
        }
    }

    /// Returns the place of a row in the epoch's order; `None` if the source has no such row.
    pub(super) fn place_of(&self, seed: u64, shard: u32, block: u32, row: u32) -> Option<u64> {
        let number = self
            .blocks
            .iter()
            .position(|found| *found == (shard, block))?;
        let start = self.starts[number] + u64::from(row);
        if start >= self.starts[number + 1] {
            return None;
        }
        let window = self.window(seed, start);
        Some(window.start + window.permutation.inverse(start - window.start))
    }

    fn window(&self, seed: u64, place: u64) -> Window {
        let block = self.starts.partition_point(|start| *start <= place) - 1;
        let number = block / self.window_blocks;
        let first = number * self.window_blocks;
        let last = (first + self.window_blocks).min(self.blocks.len());
        let (start, end) = (self.starts[first], self.starts[last]);
        let key = [seed, u64::from(self.source), self.epoch, number as u64];
        Window {
            first,
            last,
            start,
            end,
            permutation: Permutation::new(ROWS, &key, end - start),
        }
    }
}

/// A window of blocks whose rows are permuted together.
struct Window {
    /// Permuted blocks [first, last).
    first: usize,
    last: usize,
    /// Places [start, end).
    start: u64,
    end: u64,
    permutation: Permutation,
}

pub(super) struct Rows<'a> {
    order: &'a EpochOrder,
    seed: u64,
    window: Option<Window>,
}

impl Rows<'_> {
    /// Returns the block at `place`, by its number in the epoch's order, and the row in the block.
    /// `place` is below the source's rows.
    pub(super) fn at(&mut self, place: u64) -> (usize, u32) {
        let (order, seed) = (self.order, self.seed);
        let window = match self.window.take() {
            Some(window) if (window.start..window.end).contains(&place) => window,
            _ => order.window(seed, place),
        };
        let row = window.start + window.permutation.forward(place - window.start);
        let starts = &order.starts[window.first..window.last];
        let block = window.first + starts.partition_point(|start| *start <= row) - 1;
        self.window = Some(window);
        (block, (row - order.starts[block]) as u32)
    }
}
