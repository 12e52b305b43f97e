//! Stage 1, plan: the positions of the data that a step scans. Pure.
pub mod candidate;
pub mod cut;
pub mod epoch;
pub mod order;
pub mod planner;
pub mod rows;
pub mod schedule;
pub mod search;
