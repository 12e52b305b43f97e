//! Dual encoders rebuilt in LibTorch from Hugging Face model folders, with the same tensor names,
//! so that a trainer's `model.state_dict()` is what it pushes.
pub mod clip;
pub mod config;
pub mod encoder;
pub mod fidelity;
mod fields;
pub mod flops;
pub mod folder;
pub mod init;
pub mod layers;
pub mod parameters;
pub mod positions;
pub mod siglip;
pub mod snapshot;

pub use config::Activation;
pub use config::Compute;
pub use config::Family;
pub use config::ModelConfig;
pub use encoder::Encoder;
pub use encoder::ModelInfo;
pub use encoder::ModelKey;
pub use fidelity::Fidelity;
pub use folder::ModelFolder;
pub use snapshot::Snapshot;
