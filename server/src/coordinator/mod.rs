//! The coordinator: owns runs, plans steps, has them scored, selects, commits and serves.
//!
//! A folder is a stage of a step or a role, listed here in the order in which they may import each
//! other: a later one may import an earlier one, never the other way round. [`step`] is the table
//! of contents of a step.
pub mod facts;
pub mod plan;
pub mod receipts;
pub mod runs;
pub mod score;
pub mod select;
pub mod serve;
pub mod service;
pub mod spec;
mod step;
pub mod trainer;
pub mod weights;
pub mod workers;

use crate::error::Error;
use superbatch_proto::v1::Reason;

/// The error of a step or run that was dropped: it was rewound or closed, or the service stops.
fn released() -> Error {
    Error::new(
        Reason::ShuttingDown,
        "the step was let go: its run was rewound or closed, or the service stops; ask again",
    )
}
