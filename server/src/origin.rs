//! How stored blocks of reference embeddings begin: with whose they are. Their names are hashes, of
//! which nobody could tell whether they are still needed.
use serde::{Deserialize, Serialize};

/// Folder of the blocks, in the state.
pub(crate) const FOLDER: &str = "reference";
/// How an object begins. The length of its header follows (u32 le), then the header (JSON), the
/// embeddings, and BLAKE3 of all that.
pub(crate) const MAGIC: &[u8; 8] = b"SBREF\0\0\x01";
/// Bytes from the beginning that hold an [`Origin`].
pub(crate) const BEGINNING_BYTES: u64 = 1024;
/// How a header with an origin begins. It is its first field.
const FIRST: &[u8] = br#"{"of":"#;

/// Whose embeddings they are.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub(crate) struct Origin {
    /// `SourceManifest::rows_digest` of the source.
    pub rows: String,
    /// Digest of the model.
    pub model: String,
}

impl Origin {
    /// Returns the origin of the object that begins so. `None` for objects of earlier builds, which
    /// do not say it.
    pub(crate) fn of(beginning: &[u8]) -> Option<Self> {
        let header = beginning.strip_prefix(MAGIC)?.get(4..)?;
        let values = serde_json::Deserializer::from_slice(header.strip_prefix(FIRST)?);
        // What follows may be cut off.
        values.into_iter().next()?.ok()
    }
}

/// Returns whether an object has the bytes that its checksum says.
pub(crate) fn is_whole(bytes: &[u8]) -> bool {
    let parts = bytes.split_last_chunk::<{ blake3::OUT_LEN }>();
    parts.is_some_and(|(body, checksum)| {
        body.starts_with(MAGIC) && blake3::hash(body) == blake3::Hash::from_bytes(*checksum)
    })
}
