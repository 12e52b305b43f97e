//! Stage 2, score: a super-batch is cut into slices, and workers embed them.
pub mod claims;
pub mod fetch;
mod gather;
pub mod kept;
pub(crate) mod received;
pub mod scored;
pub mod slice;
pub mod stream;
pub mod super_batch;
pub mod table;
