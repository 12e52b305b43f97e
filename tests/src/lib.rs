//! What the system tests share.
pub mod cluster;
pub mod faults;
pub mod fixture;
