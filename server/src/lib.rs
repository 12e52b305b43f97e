//! Superbatch's server: a coordinator that owns runs, and workers that score.
//!
//! `coordinator` and `worker` never import each other: they meet on the wire, also in one process.
//! Only [`app`] names both, and [`fuzzing`], which is no part of the service.
#![cfg_attr(test, allow(clippy::too_many_lines))]
pub mod access;
pub mod admin;
pub mod allocator;
pub mod app;
#[cfg_attr(
    not(feature = "torch"),
    allow(dead_code, reason = "workers use the rest of it")
)]
mod batches;
mod blocking;
mod bounds;
mod buffers;
mod caught;
pub mod config;
pub mod coordinator;
#[cfg(feature = "torch")]
mod cuda;
pub mod dataset;
pub mod error;
pub mod fidelity;
#[doc(hidden)]
pub mod fuzzing;
pub mod handed;
mod ipc;
pub mod logging;
pub mod metrics;
mod origin;
pub mod page;
pub mod process;
pub mod pushed;
pub mod selection;
pub mod storage;
#[cfg_attr(
    not(feature = "torch"),
    allow(dead_code, reason = "workers use the rest of it")
)]
mod ticket;
pub mod traces;
#[cfg(feature = "torch")]
pub mod worker;
#[cfg(not(feature = "torch"))]
#[path = "worker/absent.rs"]
pub mod worker;
