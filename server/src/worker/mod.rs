//! The scoring worker: reads blocks, decodes, embeds with the reference and the learner, and hands out chosen rows.
mod answers;
mod cache;
mod captions;
mod config;
pub mod device;
mod embed;
mod engine;
mod fetch;
pub mod model;
mod models;
mod pool;
pub mod preprocess;
mod read;
mod register;
mod retained;
mod rows;
mod score;
mod select;
mod service;
mod sidecar;
mod slice;
mod survey;
pub mod tokenize;

pub use config::WorkerConfig;
pub use register::keep_registered;
pub use rows::CONTENT_HASH_COLUMN;
pub use service::{Worker, WorkerInfo};
