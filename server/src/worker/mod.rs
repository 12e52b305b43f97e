//! The scoring worker: reads blocks, decodes, embeds with the reference and the learner, and hands out chosen rows.
mod config;
mod decode;
pub mod device;
pub mod model;
pub mod preprocess;
mod read;
mod register;
mod retained;
mod score;
mod service;
mod sidecar;
pub mod tokenize;
