//! Stage 1, plan: which positions of the data a step scans. Pure.
pub mod candidate;
pub mod cut;
pub mod epoch;
pub mod order;
pub mod planner;
pub mod rows;
pub mod schedule;
pub mod search;
