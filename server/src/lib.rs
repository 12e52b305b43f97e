//! Superbatch's server: a coordinator that owns runs, and workers that score.
//!
//! `coordinator` and `worker` never import each other: they meet on the wire, also in one process.
//! Only [`app`] names both.
pub mod admin;
#[cfg(feature = "torch")]
pub mod app;
mod batches;
pub mod config;
pub mod coordinator;
#[cfg(feature = "torch")]
mod cuda;
pub mod dataset;
pub mod error;
mod ipc;
pub mod logging;
pub mod metrics;
#[cfg(feature = "torch")]
pub mod page;
mod selection;
pub mod storage;
#[cfg(feature = "torch")]
pub mod worker;
