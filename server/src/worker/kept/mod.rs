//! What a worker reads and keeps in memory: blocks, rows, embeddings.
pub(super) mod cache;
pub(super) mod embeddings;
pub(super) mod held;
pub(super) mod read;
pub(super) mod retained;
pub(super) mod sidecar;
pub(super) mod ticket_calls;
