//! Converts between candidates and the rows in receipts.
use super::candidate::Candidate;
use crate::{
    dataset::Manifest,
    error::{Error, Result},
};
use superbatch_proto::{ids::RowId, v1::ChosenRow};

/// Returns a candidate's id, and its row's number in the shard. The candidate must be one of
/// `manifest`.
pub fn row_id(manifest: &Manifest, candidate: &Candidate) -> (String, u64) {
    let shard = &manifest.sources[candidate.source as usize].shards[candidate.shard as usize];
    let row = shard.blocks[candidate.block as usize].row_in_shard(candidate.row);
    let source = (manifest.sources.len() > 1).then_some(candidate.source);
    (
        RowId {
            source,
            shard: &shard.path,
            row,
        }
        .to_string(),
        row,
    )
}

/// Returns the candidate of a receipt's row.
///
/// # Errors
/// `Internal` if the manifest has no such row, so it is not the receipt's manifest.
pub fn locate(manifest: &Manifest, chosen: &ChosenRow) -> Result<Candidate> {
    let ChosenRow {
        source,
        shard,
        row,
        position,
        ..
    } = chosen;
    let found = || {
        let blocks = &manifest
            .sources
            .get(*source as usize)?
            .shards
            .get(*shard as usize)?
            .blocks;
        let block = blocks
            .partition_point(|block| block.first_row <= *row)
            .checked_sub(1)?;
        let row = blocks[block].row_of(*row)?;
        Some(Candidate {
            source: *source,
            shard: *shard,
            block: block as u32,
            row,
            position: *position,
        })
    };
    found().ok_or_else(|| {
        Error::internal(format!(
            "row {} of a receipt is not in the run's dataset manifest",
            chosen.id
        ))
    })
}
