//! Dual encoders rebuilt in LibTorch from Hugging Face model folders, with the same tensor names.
pub mod clip;
pub mod config;
pub mod encoder;
pub mod flops;
pub mod folder;
pub mod layers;
pub mod siglip;
pub mod snapshot;
