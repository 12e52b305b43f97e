//! Turns stored images into model input, by a model folder's `preprocessor_config.json`. Matches
//! the slow image processors of `transformers` for SigLIP, SigLIP 2 and CLIP, given RGB images with
//! the channels last.
mod config;
mod naflex;

use crate::{error::Result, worker::model::Normalisation};
pub use config::Processor;
use config::{Config, invalid};
use serde::Serialize;
use serde_json::Value;
use superbatch_images::{Axis, Filter, Taps, decode_at_least, resize};
pub use superbatch_images::{ImageLimits, check, decode};
use superbatch_proto::v1::BadRowReason;

/// Raise it when the same configuration gives other pixels. It is part of the digest, so stored
/// embeddings of older pixels are not mixed with new ones.
const VERSION: u32 = 3;

/// Why a row cannot be used: a fault of its content, which costs this row only.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RowFault {
    pub reason: BadRowReason,
    pub detail: String,
    /// Whether it may be gone at another time: it is of this process, not of the row's content, so
    /// it is never stored.
    pub is_passing: bool,
}

impl RowFault {
    pub fn new(reason: BadRowReason, detail: impl Into<String>) -> Self {
        Self {
            reason,
            detail: detail.into(),
            is_passing: false,
        }
    }

    /// Makes a fault that may be gone at another time.
    pub fn passing(reason: BadRowReason, detail: impl Into<String>) -> Self {
        Self {
            is_passing: true,
            ..Self::new(reason, detail)
        }
    }
}

impl From<superbatch_images::Error> for RowFault {
    fn from(error: superbatch_images::Error) -> Self {
        let reason = match error {
            superbatch_images::Error::TooLarge(_) => BadRowReason::ImageTooLarge,
            superbatch_images::Error::Undecodable(_) => BadRowReason::ImageUndecodable,
        };
        Self::new(reason, error.to_string())
    }
}

/// An image as a model takes it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Pixels {
    /// RGB by row, pixel and channel; of an image of any shape, that of each patch in turn.
    pub bytes: Vec<u8>,
    /// Rows and columns of patches, of an image of any shape.
    pub grid: Option<[u32; 2]>,
}

/// How images become pixels: of one fixed size, or as patches of images of any shape.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Preprocess {
    version: u32,
    target: Target,
    /// Pillow's number of the filter: 2 bilinear, 3 bicubic.
    resample: u8,
    /// Height and width cut from the middle. A smaller image gets a black border.
    crop: Option<(u32, u32)>,
    normalisation: Normalisation,
    /// Whether JPEG files are decoded at half their size when that is large enough. Left out of the
    /// digest's JSON while false, so that digests of earlier versions stay valid.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    halves_jpeg: bool,
    /// Whether a crop begins at half of the spare pixels rounded to even, as in torchvision,
    /// instead of rounded down, as in transformers. One pixel of shift changes every embedding.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    crop_rounds: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
enum Target {
    /// Exactly this height and width.
    Exact(u32, u32),
    /// The shorter edge; the longer keeps the ratio, rounded down.
    ShortestEdge(u32),
    /// About the ratio of the image, in at most `most` patches of `side` pixels.
    Patches { side: u32, most: u32 },
}

impl Preprocess {
    /// Describes what it does, for people.
    pub fn described(&self) -> String {
        let filter = if self.resample == 2 {
            "bilinear"
        } else {
            "bicubic"
        };
        let resized = match self.target {
            Target::Exact(height, width) => format!("{height} x {width}"),
            Target::ShortestEdge(side) => format!("a shorter edge of {side}"),
            Target::Patches { side, most } => {
                format!("at most {most} patches of {side} pixels, of the image's own shape")
            }
        };
        let crop = self.crop.map_or_else(String::new, |(height, width)| {
            format!(", middle {height} x {width} cut out")
        });
        let Normalisation { mean, std, .. } = self.normalisation;
        format!("resized ({filter}) to {resized}{crop}; mean {mean:?}, deviation {std:?}")
    }

    /// Reads a configuration of `SiglipImageProcessor`, `Siglip2ImageProcessor` or
    /// `CLIPImageProcessor`. What it leaves out has that processor's default.
    ///
    /// # Errors
    /// `ModelInvalid` naming the field: another processor, another filter, or settings that give no
    /// fixed size.
    pub fn parse(preprocessor_config_json: &[u8]) -> Result<Self> {
        Self::of(preprocessor_config_json, None)
    }

    /// As [`Preprocess::parse`]. If the configuration names no processor, it is `unnamed`.
    ///
    /// # Errors
    /// As [`Preprocess::parse`].
    pub fn of(preprocessor_config_json: &[u8], unnamed: Option<Processor>) -> Result<Self> {
        let json: Value = serde_json::from_slice(preprocessor_config_json)
            .map_err(|e| invalid("", "it is no JSON object").because(e))?;
        let config = Config(&json);
        let processor = config.processor(unnamed)?;
        let clip = processor == Processor::Clip;
        if !config.flag("do_resize", true)? {
            return Err(invalid(
                "do_resize",
                "it is false, but images need one fixed size; set it to true",
            ));
        }
        let is_naflex = processor == Processor::Siglip2;
        let target = if is_naflex {
            config.patches()?
        } else {
            config.target(clip)?
        };
        let crop = if !is_naflex && config.flag("do_center_crop", clip)? {
            Some(config.crop()?)
        } else {
            None
        };
        if let (Target::ShortestEdge(_), None) = (target, crop) {
            return Err(invalid(
                "do_center_crop",
                "without it a shortest_edge gives images of many sizes; set it to true",
            ));
        }
        let resample = match json.get("resample") {
            None | Some(Value::Null) if is_naflex => 2,
            None | Some(Value::Null) => 3,
            Some(value) => match value.as_u64() {
                Some(filter @ (2 | 3)) => filter as u8,
                _ => {
                    return Err(invalid(
                        "resample",
                        &format!("{value} is neither 2 (bilinear) nor 3 (bicubic)"),
                    ));
                }
            },
        };
        Ok(Self {
            version: VERSION,
            target,
            resample,
            crop,
            normalisation: config.normalisation(clip)?,
            halves_jpeg: false,
            crop_rounds: false,
        })
    }

    /// Returns the same preprocessing for images of `side` pixels. From half the size down, JPEG
    /// files are decoded at half their size by a smaller inverse DCT: a quarter of the work, and
    /// pixels that are Pillow's only nearly.
    #[must_use]
    pub fn at(&self, side: u32) -> Self {
        let (height, width) = self.size();
        let scaled = |length: u32, of: u32| {
            let (length, side, of) = (u64::from(length), u64::from(side), u64::from(of.max(1)));
            (((2 * length * side + of) / (2 * of)) as u32).max(1)
        };
        Self {
            target: match self.target {
                Target::Exact(of_height, of_width) => {
                    Target::Exact(scaled(of_height, height), scaled(of_width, width))
                }
                Target::ShortestEdge(edge) => Target::ShortestEdge(scaled(edge, height)),
                // Models that take any shape are not run at another resolution.
                Target::Patches { .. } => self.target,
            },
            crop: self.crop.map(|_| (side, side)),
            halves_jpeg: side <= height / 2,
            ..self.clone()
        }
    }

    /// Returns BLAKE3 of everything that decides the pixels and their normalisation.
    pub fn digest(&self) -> [u8; 32] {
        *blake3::hash(&serde_json::to_vec(self).expect("plain data encodes")).as_bytes()
    }

    /// Returns the height and width of the result of [`Preprocess::pixels`]; for images of any
    /// shape, those of the largest square.
    pub fn size(&self) -> (u32, u32) {
        match (self.crop, self.target) {
            (Some(size), _) => size,
            (None, Target::Exact(height, width)) => (height, width),
            (None, Target::ShortestEdge(edge)) => (edge, edge),
            (None, Target::Patches { side, most }) => {
                let edge = most.isqrt() * side;
                (edge, edge)
            }
        }
    }

    /// Returns the side of a patch and how many an image has at most, for images of any shape.
    pub fn patches(&self) -> Option<(u32, u32)> {
        match self.target {
            Target::Patches { side, most } => Some((side, most)),
            Target::Exact(..) | Target::ShortestEdge(_) => None,
        }
    }

    pub fn normalisation(&self) -> Normalisation {
        self.normalisation
    }

    /// Decodes and resizes an image to RGB.
    ///
    /// # Errors
    /// Those of [`decode`]; `ImageTooLarge` if resizing needs an intermediate image of more than
    /// `pixels_max`, or if the image is too long for its patches.
    pub fn pixels(&self, image: &[u8], limits: &ImageLimits) -> Result<Pixels, RowFault> {
        let image = if self.halves_jpeg {
            decode_at_least(image, limits, self.shorter())?
        } else {
            decode(image, limits)?
        };
        let (resized_height, resized_width) = self.resized(image.height(), image.width())?;
        let (height, width) = match self.target {
            Target::Patches { .. } => (resized_height as u32, resized_width as u32),
            Target::Exact(..) | Target::ShortestEdge(_) => self.size(),
        };
        let rounds = self.crop_rounds;
        let (rows, top) = cropped(image.height(), resized_height, height, rounds);
        let (columns, left) = cropped(image.width(), resized_width, width, rounds);
        let filter = if self.resample == 2 {
            Filter::Bilinear
        } else {
            Filter::Bicubic
        };
        let (rows, columns) = (Taps::new(filter, &rows), Taps::new(filter, &columns));
        // The resize goes by columns and then by rows. An image of 1 x 50,000,000 pixels passes
        // `pixels_max`, but once it is 224 columns wide, and not yet reduced in height, it would be
        // 224 times as large. So this size is bounded too, before it is allocated.
        let (source, between) = (image.as_raw().len() / 3, columns.len() * rows.span().len());
        if between as u64 > limits.pixels_max.max(source as u64) {
            let (width, height) = image.dimensions();
            let detail = format!("{width}x{height} pixels take {between} while they are resized");
            return Err(RowFault::new(BadRowReason::ImageTooLarge, detail));
        }
        let small = resize(image.as_raw(), &rows, &columns);
        let whole = |bytes| Pixels { bytes, grid: None };
        if let Target::Patches { side, .. } = self.target {
            return Ok(naflex::cut(&small, [height, width], side));
        }
        if (rows.len(), columns.len()) == (height as usize, width as usize) {
            return Ok(whole(small));
        }
        let mut canvas = vec![0; (height * width * 3) as usize];
        let line = columns.len() * 3;
        for (n, source) in small.chunks_exact(line).enumerate() {
            let at = ((top + n) * width as usize + left) * 3;
            canvas[at..at + line].copy_from_slice(source);
        }
        Ok(whole(canvas))
    }

    /// Returns the least length of an image's shorter side. Below it an image that was decoded at
    /// half its size would have to be enlarged.
    fn shorter(&self) -> u32 {
        match self.target {
            Target::Exact(height, width) => height.max(width),
            Target::ShortestEdge(edge) => edge,
            Target::Patches { .. } => u32::MAX,
        }
    }

    /// Returns the height and width after resizing, before the crop.
    fn resized(&self, height: u32, width: u32) -> Result<(u64, u64), RowFault> {
        Ok(match self.target {
            Target::Exact(height, width) => (height.into(), width.into()),
            Target::Patches { side, most } => {
                let [height, width] = naflex::resized([height, width], side, most)?;
                (height.into(), width.into())
            }
            Target::ShortestEdge(edge) => {
                let (edge, height, width) = (u64::from(edge), u64::from(height), u64::from(width));
                if width <= height {
                    (edge * height / width, edge)
                } else {
                    (edge, edge * width / height)
                }
            }
        })
    }
}

/// Returns what a centre crop of `output` keeps of an axis, and where that begins in the output. If
/// the image is smaller, the black border is split with the larger half first.
fn cropped(source: u32, resized: u64, output: u32, rounds: bool) -> (Axis, usize) {
    let output = u64::from(output);
    match resized.checked_sub(output) {
        Some(spare) => {
            let half = spare / 2;
            // Half of an odd number lies between two pixels: take the even one, as Python's `round`
            // does.
            let first = half + u64::from(rounds && spare % 2 == 1 && half % 2 == 1);
            let kept = first..first + output;
            (
                Axis {
                    source,
                    resized,
                    kept,
                },
                0,
            )
        }
        None => (
            Axis {
                source,
                resized,
                kept: 0..resized,
            },
            (output - resized).div_ceil(2) as usize,
        ),
    }
}

#[cfg(test)]
mod tests;
