//! What the device does to pixels before a model sees them.
use serde::Serialize;

/// `x * rescale`, then `(x - mean) / std` by channel.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Normalisation {
    pub rescale: f32,
    pub mean: [f32; 3],
    pub std: [f32; 3],
}
