//! Candidates of a super-batch, and the keys of their noise.
use superbatch_proto::v1::SourceSpan;

/// A row that is scanned in a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Candidate {
    pub source: u32,
    /// The shard's number in the source.
    pub shard: u32,
    /// The block's number in the shard.
    pub block: u32,
    /// The row's number in the block.
    pub row: u32,
    /// Epoch times the source's rows, plus the place in the epoch's order. It is unique in a source
    /// over all epochs.
    pub position: u64,
}

/// The candidates of one step in canonical order: block by block, blocks by the first appearance of
/// their positions, rows rising within a block.
#[derive(Debug, Clone, PartialEq)]
pub struct SuperBatch {
    pub candidates: Vec<Candidate>,
    /// The positions scanned, one span for each source.
    pub spans: Vec<SourceSpan>,
}

/// Returns the keys of the candidates' noise, unique over the sources of a super-batch. The source
/// takes the upper 16 bits and the position the lower 48, see `POSITIONS_MAX`.
pub fn noise_keys(candidates: &[Candidate]) -> Vec<u64> {
    candidates
        .iter()
        .map(|c| u64::from(c.source) << 48 | c.position)
        .collect()
}
