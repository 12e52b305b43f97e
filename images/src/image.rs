//! An image between its file and its pixels: its limits, its errors, and a decoder's result.
use image::DynamicImage;
use std::fmt::Display;

/// Why a file gives no pixels.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    #[error("{0}")]
    TooLarge(String),
    #[error("{0}")]
    Undecodable(String),
}

/// The largest image, checked before memory is taken for its pixels.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ImageLimits {
    /// Width times height.
    pub pixels_max: u64,
    /// As stored.
    pub bytes_max: u64,
}

/// An image before its orientation is applied.
pub(crate) struct Decoded {
    pub image: DynamicImage,
    pub exif: Option<Vec<u8>>,
    pub xmp: Option<Vec<u8>>,
}

pub(crate) fn undecodable(cause: impl Display) -> Error {
    Error::Undecodable(cause.to_string())
}

pub(crate) fn check_size(width: u64, height: u64, limits: &ImageLimits) -> Result<(), Error> {
    if width * height > limits.pixels_max {
        return Err(Error::TooLarge(format!(
            "{width}x{height} pixels, the limit is {}",
            limits.pixels_max
        )));
    }
    Ok(())
}
