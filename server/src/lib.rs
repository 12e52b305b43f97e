//! Superbatch's server: a coordinator that owns runs, and workers that score.
//!
//! `coordinator` and `worker` never import each other: they meet on the wire, also in one process.
//! Only [`app`] names both.
pub mod access;
pub mod admin;
pub mod app;
mod batches;
mod blocking;
mod bounds;
pub mod config;
pub mod coordinator;
#[cfg(feature = "torch")]
mod cuda;
pub mod dataset;
pub mod error;
mod ipc;
pub mod logging;
pub mod metrics;
pub mod page;
pub mod process;
mod selection;
pub mod storage;
#[cfg(feature = "torch")]
pub mod worker;
#[cfg(not(feature = "torch"))]
#[path = "worker/absent.rs"]
pub mod worker;
