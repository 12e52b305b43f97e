//! A past step looked at again: its sub-batch drawn anew, by its own policy or by another, and the
//! scores of its pairs. An ablation without a trainer.
//!
//! 1. [`past`]: the step as its receipt, the run's facts and the data have it.
//! 2. [`change`]: what is to differ.
//! 3. [`embed`] has the candidates embedded: the reference's embeddings are read from the state,
//!    or made again if they are not kept (docs/data.md#large-row-groups), the learner's are made
//!    again from the weights with which the step was scored.
//! 4. [`redraw`] draws with the code that drew the step, [`pairs`] scores pairs, both by what
//!    [`measure`] asks.
//!
//! Nothing of the run is changed.
pub mod change;
mod embed;
mod json;
mod measure;
pub mod pairs;
pub mod past;
pub mod redraw;

pub use change::Change;
pub use past::{CommittedStep, Past};

use crate::{
    coordinator::{select::Selector, workers::pool::Pool},
    dataset::Scores,
};
use std::sync::Arc;

/// The parts that a replay needs.
pub struct Replayer {
    pub pool: Arc<Pool>,
    pub selector: Arc<dyn Selector>,
    /// Score columns of the data.
    pub scores: Scores,
}
