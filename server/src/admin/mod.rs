//! Operator commands.
pub mod index;
pub mod select;
