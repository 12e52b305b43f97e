//! Async client of Superbatch, an online data-selection service.
//!
//! Three calls are enough: open a run, take batches from it, push the learner's weights back.
//!
//! ```no_run
//! # async fn train(spec: superbatch_client::v1::RunSpec) -> superbatch_client::Result<()> {
//! use futures::StreamExt;
//! use superbatch_client::{BatchesConfig, Client, Part};
//!
//! let run = Client::connect("http://127.0.0.1:50051").await?.open_run("my-run", spec).await?;
//! let from = BatchesConfig { start_step: run.next_step(), ..BatchesConfig::default() };
//! let mut batches = run.batches(from)?;
//! while let Some(batch) = batches.next().await {
//!     // batch.record_batch: image, caption, …; batch.receipt says why these rows.
//!     let batch = batch?;
//!     run.push_weights(batch.step as i64, vec![Part::f32("w", &[2], &[0.5, 1.0])?]).await?;
//! }
//! # Ok(())
//! # }
//! ```
//!
//! The client resumes broken streams at the byte where they broke, checks every batch against its
//! row count and XXH3-128, retries transient faults within bounds ([`Retry`]), requests the next
//! steps ahead, and cuts weights into parts with checksums. Dropping a future or a stream cancels
//! its calls.
#![warn(missing_docs)]
mod batches;
mod client;
mod credentials;
mod error;
mod push;
mod retry;
mod run;
mod weights;
mod workers;

#[doc(hidden)]
pub use batches::fuzzing;
pub use batches::{Batch, Batches, BatchesConfig};
pub use client::{Client, ConnectConfig};
pub use credentials::Credentials;
pub use error::{Error, Result};
pub use push::{Part, Push, Pusher, Slot, StoredFile};
pub use retry::Retry;
pub use run::Run;
pub use superbatch_proto::{Failure, v1};
