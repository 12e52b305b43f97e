//! Dual encoders rebuilt in LibTorch from Hugging Face model folders, with the same tensor names,
//! so that a trainer's `model.state_dict()` is what it pushes.
mod captions;
pub mod clip;
mod clip_vocabulary;
pub mod config;
pub mod encoder;
mod entry;
pub(super) mod exported;
mod fields;
pub mod flops;
pub mod folder;
pub mod init;
pub mod layers;
pub mod losses;
mod naflex;
pub mod naming;
mod normalisation;
pub mod open_clip;
pub mod open_clip_config;
mod other_forms;
pub mod parameters;
pub mod positions;
pub mod siglip;
pub mod snapshot;
pub mod timm;

pub use config::Activation;
pub use config::Compute;
pub use config::Family;
pub use config::ModelConfig;
pub use encoder::Encoder;
pub use encoder::Images;
pub use encoder::ModelInfo;
pub use encoder::ModelKey;
pub use folder::ModelFolder;
pub use normalisation::Normalisation;
pub use snapshot::Snapshot;
