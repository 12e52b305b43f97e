//! Bounds on fields that come off the wire and that size memory or work.
//!
//! A field is checked before it is used: a message of 8 MiB may name numbers, repeats and texts
//! that cost gigabytes or hours. Which field has which bound, and why the others need none, is the
//! table in `bounds/tests.rs`, which fails where a field of the protocol is not in it.
use crate::error::{Error, Result};

/// Sources are 16 bits of a noise key.
pub(crate) const SOURCES_MAX: usize = 1 << 16;
/// Blocks whose rows are shuffled together.
pub(crate) const WINDOW_BLOCKS_MAX: u32 = 1 << 16;
/// Rows of one forward pass.
pub(crate) const MICRO_BATCH_ROWS_MAX: u32 = 1 << 12;
/// About 30 years.
pub(crate) const SECONDS_MAX: f64 = 1e9;
/// Steps that are prepared ahead.
pub(crate) const MAX_AHEAD_MAX: u32 = 1 << 10;
/// Phases of a run, those that are appended among them.
pub(crate) const PHASES_MAX: usize = 1 << 12;
/// Approximations that a learner was trained with: each phase is compared with all of them.
pub(crate) const FIDELITIES_MAX: usize = 1 << 6;
/// Extra columns of a run or a call.
pub(crate) const COLUMNS_MAX: usize = 1 << 10;
/// URIs of a spec and names of columns, in bytes. The longest key of an object store has 1,024.
pub(crate) const NAME_BYTES_MAX: usize = 1 << 12;
/// URIs that are opened, in bytes.
pub(crate) const URI_BYTES_MAX: usize = 1 << 13;
/// Names of processes, devices, builds, pushes and digests, in bytes.
pub(crate) const LABEL_BYTES_MAX: usize = 256;
/// Files that the patterns of one source may name, and the bytes of their names.
pub(crate) const EXPANSION_MAX: usize = 1_000_000;
pub(crate) const EXPANSION_BYTES_MAX: usize = 256 << 20;
/// Braces of one URI: each is taken apart within the one before it.
pub(crate) const BRACES_MAX: usize = 64;
/// Globs of one source: each is compared with every file of its folder.
pub(crate) const GLOBS_MAX: usize = 1 << 12;

/// Parts of one push, over all ranks.
pub(crate) const PARTS_MAX: usize = 1 << 20;
/// Parts of one tensor: each new one is compared with all. So many ranks share a tensor at most.
pub(crate) const PARTS_OF_TENSOR_MAX: usize = 1 << 12;
/// Bytes of a tensor's name.
pub(crate) const TENSOR_NAME_BYTES_MAX: usize = 1 << 10;

/// Workers of one coordinator.
pub(crate) const WORKERS_MAX: usize = 1 << 12;
/// A worker's token, in bytes.
pub(crate) const TOKEN_BYTES_MAX: usize = 1 << 12;
/// The largest embedding. Published encoders have 512 to 4,096 numbers.
pub(crate) const EMBEDDING_DIM_MAX: u32 = 1 << 14;
/// Tokens of the sub-batch of a phase that chooses tokens. The choice has 16 bytes for each while
/// it is made, and its mask has one.
pub(crate) const MASKED_TOKENS_MAX: u64 = 1 << 24;
/// Tensors of a model.
pub(crate) const TENSORS_MAX: usize = 1 << 16;
/// Tensors whose digests are in one answer: with their names, no more than a message holds.
pub(crate) const TENSORS_AT_ONCE_MAX: usize = 1 << 11;
/// Losses in one report.
pub(crate) const LOSSES_MAX: usize = 1 << 17;
/// Versions of weights in one list.
pub(crate) const VERSIONS_MAX: usize = 10_000;
/// Dimensions of a tensor.
pub(crate) const TENSOR_DIMENSIONS_MAX: usize = 16;
/// Files of a model folder, without its weights.
pub(crate) const FILES_MAX: usize = 1 << 8;
/// Calls that one connection may have under way.
pub(crate) const CALLS_MAX: u32 = 1 << 10;
/// Characters of what is said about one bad row.
pub(crate) const DETAIL_CHARS_MAX: usize = 512;

/// Checks the length of a text.
///
/// # Errors
/// `InvalidArgument`, with the `field`.
pub(crate) fn check_bytes(field: &str, text: &str, most: usize) -> Result<()> {
    if text.len() <= most {
        return Ok(());
    }
    let message = format!("{field} has {} bytes; give at most {most}", text.len());
    Err(Error::invalid(field, message))
}

/// Checks how many values were given.
///
/// # Errors
/// `InvalidArgument`, with the `field`.
pub(crate) fn check_count(field: &str, count: usize, most: usize) -> Result<()> {
    if count <= most {
        return Ok(());
    }
    let message = format!("{field} has {count} values; give at most {most}");
    Err(Error::invalid(field, message))
}

#[cfg(test)]
mod tests;
