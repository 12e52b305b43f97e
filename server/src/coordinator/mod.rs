//! The coordinator: owns runs, plans steps, has them scored, selects, commits and serves.
//!
//! Read it in the order of a step: [`service`] → [`run`] → [`decide`] → [`plan`] → [`scoring`] → [`selector`] → [`receipts`] →
//! [`output`].
mod calls;
pub mod chain;
mod claims;
mod decide;
pub mod facts;
pub mod incarnations;
pub mod limits;
pub mod members;
mod models;
pub mod open;
pub mod order;
pub mod output;
pub mod owner;
pub mod plan;
pub mod pool;
pub mod ranks;
pub mod ready;
pub mod receipt;
pub mod receipts;
mod record;
pub mod registry;
pub mod run;
mod scoring;
pub mod selector;
pub mod service;
pub mod sizing;
mod slice;
pub mod spec;
mod step;
pub mod table;
mod trail;
pub mod upkeep;
mod waiting;
mod wasted;
pub mod weights;

use crate::error::Error;
use superbatch_proto::v1::Reason;

/// A step or run that somebody let go of: it was rewound or closed, or the service stops.
fn gone() -> Error {
    Error::new(
        Reason::ShuttingDown,
        "the step was let go: its run was rewound or closed, or the service stops; ask again",
    )
}
