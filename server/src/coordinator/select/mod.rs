//! Who draws the sub-batch: this process, or a worker's device. One trait, so that a coordinator
//! needs neither GPU nor LibTorch.
pub mod local;
pub mod remote;
use super::score::scored::Scored;
use crate::error::Result;
use async_trait::async_trait;
use superbatch_proto::{
    PART_BYTES,
    v1::{SelectBegin, SelectResponse},
};

/// Workers that may be lost under one selection before the step fails.
const ATTEMPTS_MAX: usize = 5;
/// Candidates that one message names: a position takes up to 10 bytes and a hole up to 5.
const PART_CANDIDATES: usize = PART_BYTES / 16;

/// Draws one sub-batch from embeddings of all candidates.
#[async_trait]
pub trait Selector: Send + Sync {
    /// `begin` says how; a model is absent where nothing asks it.
    async fn select(
        &self,
        begin: SelectBegin,
        learner: Option<Scored>,
        reference: Option<Scored>,
    ) -> Result<SelectResponse>;
}
