//! The coordinator: owns runs, plans steps, has them scored, selects, commits and serves.
//!
//! A folder is a stage of a step or a role. They have an order (`docs/ARCHITECTURE.md` lists them
//! in it, and a test holds it): a later one may import an earlier one, never the other way round.
//! [`step`] is the table of contents of a step.
pub mod facts;
pub mod losses;
pub mod plan;
pub mod receipts;
pub mod replay;
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

/// Returns the error of a step or run that was dropped: it was rewound or closed, or the service
/// stops.
fn released() -> Error {
    Error::new(
        Reason::ShuttingDown,
        "the step was cancelled: its run was rewound or closed, or the service stops; ask again",
    )
}
