//! Runs: opened, kept in memory, put to sleep, changed on purpose.
mod asleep;
pub mod calls;
pub mod change;
pub mod deps;
pub mod fork;
pub mod lease;
pub mod limits;
pub mod models;
pub mod open;
pub mod open_runs;
pub mod progress;
pub mod registry;
pub(crate) mod reported;
pub mod rotten;
pub mod run;
pub mod state;
pub mod upkeep;
pub mod verifier;
