//! The scoring worker: reads blocks, decodes rows, embeds them with the reference and the learner,
//! and sends the chosen rows.
mod calls;
mod config;
pub mod device;
mod engine;
pub mod inputs;
mod kept;
mod loader;
pub mod model;
mod register;
mod service;

pub use calls::ahead::{Asked, EmbeddedBlock, Embedder};
pub use config::WorkerConfig;
pub use kept::read::BlockReader;
pub use register::{Superior, keep_registered};
pub use service::{Worker, WorkerInfo};
