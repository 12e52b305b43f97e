//! Which rows of a block the reference embeds.
use super::slice::SliceBlock;
use crate::dataset::LARGE_BLOCK_ROWS;

/// A step wants few rows of a block, if they are less than one in so many.
const FEW: usize = 8;

/// Which rows of a block the reference embeds, if its embeddings are not kept already.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Extent {
    /// All, whatever is wanted. They are kept, and the next run wants other rows of the block. What
    /// is kept must be the same whichever slice, run or worker makes it: it is created once and
    /// never changed.
    Whole,
    /// All, unless few rows of a large block are wanted. Otherwise a step would embed a hundred
    /// thousand rows to compare a hundred.
    Step,
    /// Those that are wanted. They are not kept.
    Wanted,
}

impl Extent {
    /// Returns the rows to embed, which rise; `None` if it is all of the block.
    pub(crate) fn rows(self, block: &SliceBlock) -> Option<Vec<u32>> {
        let wanted = block.rows.len() + block.reference_more.len();
        if self.is_whole(block.block_rows, wanted) {
            return None;
        }
        let mut rows: Vec<u32> = block.reference_rows().collect();
        rows.sort_unstable();
        Some(rows)
    }

    fn is_whole(self, block_rows: usize, wanted: usize) -> bool {
        match self {
            Self::Whole => true,
            Self::Step => block_rows <= LARGE_BLOCK_ROWS as usize || wanted * FEW >= block_rows,
            Self::Wanted => false,
        }
    }
}

/// Returns which of some embeddings is that of `row` of the block: of those of `rows`, which rise
/// and hold it, or of those of the whole block.
pub(crate) fn place(rows: Option<&[u32]>, row: u32) -> usize {
    match rows {
        None => row as usize,
        Some(rows) => rows.partition_point(|other| *other < row),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn few_rows_of_a_large_block_are_embedded_alone() {
        let large = LARGE_BLOCK_ROWS as usize;
        assert!(Extent::Step.is_whole(large, 1), "it is not large");
        assert!(!Extent::Step.is_whole(large + 1, 1));
        assert!(!Extent::Step.is_whole(100_000, 12_499));
        assert!(Extent::Step.is_whole(100_000, 12_500), "they are many");
        assert!(Extent::Whole.is_whole(100_000, 1));
        assert!(!Extent::Wanted.is_whole(1, 1));
    }
}
