//! The trainer's side of a run: its ranks, what they wait for, and its pace.
pub mod cell;
pub mod patience;
pub mod ranks;
pub mod sizing;
pub mod waits;
