//! Data sets: an immutable manifest of shards and blocks, written once by indexing, and the readers
//! of their files.
mod file;
pub(crate) mod filter;
mod find;
mod index;
mod layout;
mod manifest;
mod mask;
mod parts;
mod paths;
pub(crate) mod pattern;
mod row_groups;
mod schema;
mod scores;
pub mod sidecars;
mod tar;
mod unify;

pub use file::Ranges;
pub use file::ShardFile;
pub(crate) use filter::{describe_fault, parse as parse_predicate};
pub use index::SourceRequest;
pub use index::index;
pub use manifest::Block;
pub use manifest::Column;
pub use manifest::Format;
pub use manifest::KeptBy;
pub use manifest::Layout;
pub use manifest::Manifest;
pub use manifest::Shard;
pub use manifest::SourceManifest;
pub use mask::Mask;
pub use paths::image_key;
pub use paths::quoted;
pub use paths::row_group_of;
pub use pattern::parts;
pub use scores::Scores;
pub use tar::Survey;
pub use tar::TarBlock;
pub use tar::survey_kept;

/// A block of more rows is large: the reference embeds only those of its rows that a step wants,
/// where they are few, and indexing tells of such row groups.
pub const LARGE_BLOCK_ROWS: u32 = 10_000;

/// Returns the hash of a row's content in its receipt: the first 16 bytes of BLAKE3 over the
/// image's length (u64, little endian), the image as stored, and the caption's UTF-8.
pub fn content_hash(image: &[u8], caption: &str) -> [u8; 16] {
    // BLAKE3 takes chunks of 1 KiB eight at a time, where so many begin at once. Behind the length
    // alone the image would begin within a chunk, and its first chunks would be taken by one, two
    // and four.
    const FIRST_BYTES: usize = 16 << 10;
    let mut first = [0; FIRST_BYTES];
    let length = (image.len() as u64).to_le_bytes();
    let (head, rest) = image.split_at(image.len().min(FIRST_BYTES - length.len()));
    let begun = length.len() + head.len();
    first[..length.len()].copy_from_slice(&length);
    first[length.len()..begun].copy_from_slice(head);
    let mut hasher = blake3::Hasher::new();
    hasher.update(&first[..begun]).update(rest);
    hasher.update(caption.as_bytes());
    let mut hash = [0; 16];
    hasher.finalize_xof().fill(&mut hash);
    hash
}

/// Formats a count with its noun, in the plural unless it is one.
pub(crate) fn counted(count: usize, noun: &str) -> String {
    format!("{count} {noun}{}", if count == 1 { "" } else { "s" })
}

#[cfg(test)]
pub(crate) mod fixtures;
#[cfg(test)]
pub(crate) use tar::fixtures as tar_fixtures;
#[cfg(test)]
mod tests;
