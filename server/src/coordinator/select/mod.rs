//! The selectors that draw the sub-batch: this process, or a worker's device. Both are behind one
//! trait, so that a coordinator needs neither GPU nor LibTorch.
pub mod local;
pub mod remote;
use super::score::scored::Scored;
use crate::error::Result;
use async_trait::async_trait;
use superbatch_proto::{
    PART_BYTES,
    v1::{SelectBegin, SelectResponse},
};

/// Candidates that one message names: a position takes up to 10 bytes, a hole up to 5 and a term 8.
const PART_CANDIDATES: usize = PART_BYTES / 32;

/// Draws one sub-batch from embeddings of all candidates.
#[async_trait]
pub trait Selector: Send + Sync {
    /// Draws by `begin`. A model is absent if the policy does not need it.
    async fn select(
        &self,
        begin: SelectBegin,
        learner: Option<Scored>,
        reference: Option<Scored>,
    ) -> Result<SelectResponse>;
}
