//! The coordinator: owns runs, plans steps, has them scored, selects, commits and serves.
pub mod order;
pub mod output;
pub mod plan;
pub mod ranks;
pub mod receipt;
pub mod receipts;
pub mod spec;
pub mod weights;
