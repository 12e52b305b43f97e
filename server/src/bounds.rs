//! Bounds on fields that come off the wire and that size memory or work.
//!
//! A field is checked before it is used: a message of 8 MiB may name numbers, repeats and texts
//! that cost gigabytes or hours. Which field has which bound, and why the others need none, is the
//! table in `bounds/tests.rs`, which fails where a field of the protocol is not in it.
use crate::error::{Error, Result};

/// Sources are 16 bits of a noise key.
pub const SOURCES_MAX: usize = 1 << 16;
/// Blocks whose rows are shuffled together.
pub const WINDOW_BLOCKS_MAX: u32 = 1 << 16;
/// Rows of one forward pass.
pub const MICRO_BATCH_ROWS_MAX: u32 = 1 << 12;
/// About 30 years.
pub const SECONDS_MAX: f64 = 1e9;
/// Steps that are prepared ahead.
pub const MAX_AHEAD_MAX: u32 = 1 << 10;
/// Phases of a run, those that are appended among them.
pub const PHASES_MAX: usize = 1 << 12;
/// Approximations that a learner was trained with: each phase is compared with all of them.
pub const FIDELITIES_MAX: usize = 1 << 6;
/// Extra columns of a run or a call.
pub const COLUMNS_MAX: usize = 1 << 10;
/// URIs of a spec and names of columns, in bytes. The longest key of an object store has 1,024.
pub const NAME_BYTES_MAX: usize = 1 << 12;
/// URIs that are opened, in bytes.
pub const URI_BYTES_MAX: usize = 1 << 13;
/// Names of processes, devices, builds, pushes and digests, in bytes.
pub const LABEL_BYTES_MAX: usize = 256;
/// Files that the patterns of one source may name, and the bytes of their names.
pub const EXPANSION_MAX: usize = 1_000_000;
pub const EXPANSION_BYTES_MAX: usize = 256 << 20;
/// Globs of one source: each is compared with every file of its folder.
pub const GLOBS_MAX: usize = 1 << 12;

/// Parts of one push, over all ranks.
pub const PARTS_MAX: usize = 1 << 20;
/// Parts of one tensor: each new one is compared with all. So many ranks share a tensor at most.
pub const PARTS_OF_TENSOR_MAX: usize = 1 << 12;
/// Bytes of a tensor's name.
pub const TENSOR_NAME_BYTES_MAX: usize = 1 << 10;

/// Workers of one coordinator.
pub const WORKERS_MAX: usize = 1 << 12;
/// A worker's token, in bytes.
pub const TOKEN_BYTES_MAX: usize = 1 << 12;
/// The largest embedding. Published encoders have 512 to 4,096 numbers.
pub const EMBEDDING_DIM_MAX: u32 = 1 << 14;
/// Tensors of a model.
pub const TENSORS_MAX: usize = 1 << 16;
/// Dimensions of a tensor.
pub const TENSOR_DIMENSIONS_MAX: usize = 16;
/// Files of a model folder, without its weights.
pub const FILES_MAX: usize = 1 << 8;
/// Characters of what is said about one bad row.
pub const DETAIL_CHARS_MAX: usize = 512;

/// Checks the length of a text.
///
/// # Errors
/// `InvalidArgument`, with the `field`.
pub fn check_bytes(field: &str, text: &str, most: usize) -> Result<()> {
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
pub fn check_count(field: &str, count: usize, most: usize) -> Result<()> {
    if count <= most {
        return Ok(());
    }
    let message = format!("{field} has {count} values; give at most {most}");
    Err(Error::invalid(field, message))
}

#[cfg(test)]
mod tests;
