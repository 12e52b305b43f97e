//! Decodes and resizes images as Pillow does, to the last bit, so that a model is scored on the
//! same pixels that it is trained on in Python.
//!
//! [`decode`] gives 8-bit RGB of a JPEG, PNG or WebP file, turned by its EXIF orientation, on
//! white; [`check`] says only whether it can. [`resize`] is Pillow's antialiased bilinear and
//! bicubic resize. It can compute only a part of the output, such as a crop.
//!
//! ```
//! use superbatch_images::{Axis, Filter, Taps, resize};
//!
//! // Four pixels in a row, halved.
//! let columns = Taps::new(Filter::Bilinear, &Axis { source: 4, resized: 2, kept: 0..2 });
//! let rows = Taps::new(Filter::Bilinear, &Axis { source: 1, resized: 1, kept: 0..1 });
//! let pixels = [[0; 3], [0; 3], [255; 3], [255; 3]].concat();
//! assert_eq!(resize(&pixels, &rows, &columns), [[36; 3], [219; 3]].concat());
//! ```
mod decode;
mod image;
mod jpeg;
mod png;
mod resize;
mod riff;
mod thumbnail;
mod tiff;

pub use ::image::RgbImage;
pub use decode::{check, decode, decode_at_least};
pub use image::{Error, ImageLimits};
pub use resize::{Axis, Filter, Taps, resize};
pub use thumbnail::thumbnail;
