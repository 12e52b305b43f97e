//! Dual encoders rebuilt in LibTorch from Hugging Face model folders, with the same tensor names, so that a trainer's
//! `model.state_dict()` is what it pushes.
pub mod clip;
pub mod config;
pub mod encoder;
mod fields;
pub mod flops;
pub mod folder;
pub mod init;
pub mod layers;
pub mod parameters;
pub mod siglip;
pub mod snapshot;

pub use config::{Activation, Compute, Family, ModelConfig};
pub use encoder::{Encoder, ModelInfo, ModelKey};
pub use folder::ModelFolder;
pub use snapshot::Snapshot;
