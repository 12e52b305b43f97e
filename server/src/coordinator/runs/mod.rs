//! Runs: opened, kept in memory, put to sleep, changed on purpose.
pub mod calls;
pub mod change;
pub mod deps;
pub mod lease;
pub mod limits;
pub mod models;
pub mod open;
pub mod open_runs;
pub mod registry;
pub mod run;
pub mod state;
pub mod upkeep;
pub mod verifier;
