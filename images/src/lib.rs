//! Images as Pillow shows them, to the last bit: what a model is trained on in Python, it is scored
//! on here.
//!
//! [`decode`] gives 8-bit RGB of a JPEG, PNG or WebP file, turned as its EXIF says, on white;
//! [`resize`] is Pillow's antialiased bilinear and bicubic, of a part of the output where only that
//! is wanted.
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
mod thumbnail;

pub use ::image::RgbImage;
pub use decode::{decode, decode_at_least};
pub use image::{Error, ImageLimits};
pub use resize::{Axis, Filter, Taps, resize};
pub use thumbnail::thumbnail;
