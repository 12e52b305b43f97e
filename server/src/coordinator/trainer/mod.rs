//! The trainer's side of a run: its ranks, the steps for which they wait, and its pace.
pub mod cell;
pub mod patience;
pub mod ranks;
pub mod sizing;
pub mod waits;
