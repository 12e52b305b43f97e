//! Pixels as a model's image processor makes them.

/// What is done to pixels on the device: `(x * rescale - mean) / std`, a channel at a time (RGB).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Normalisation {
    pub rescale: f32,
    pub mean: [f32; 3],
    pub std: [f32; 3],
}
