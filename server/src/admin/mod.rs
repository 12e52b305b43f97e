//! Operator commands.
pub mod select;
