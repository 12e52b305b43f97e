//! What a worker reads and keeps in memory: blocks, captions, embeddings.
pub mod cache;
pub mod captions;
pub mod embeddings;
pub mod read;
pub mod retained;
pub mod sidecar;
