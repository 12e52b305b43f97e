//! From stored image to model input, as a model folder's `preprocessor_config.json` says: the slow
//! image processors of `transformers` for SigLIP and CLIP, given RGB images with the channels last.
use crate::error::{Error, Result};
use serde::Serialize;
use serde_json::Value;
use superbatch_images::{Axis, Filter, Taps, decode_at_least, resize};
pub use superbatch_images::{ImageLimits, decode};
use superbatch_proto::v1::{BadRowReason, Reason};

const FILE: &str = "preprocessor_config.json";
/// Raised when the same configuration gives other pixels: part of the digest.
const VERSION: u32 = 3;
const SIDE_MAX: u64 = 4096;

/// Why a row cannot be used: a fault of its content, which costs this row only.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RowFault {
    pub reason: BadRowReason,
    pub detail: String,
}

impl RowFault {
    pub fn new(reason: BadRowReason, detail: impl Into<String>) -> Self {
        Self {
            reason,
            detail: detail.into(),
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

/// How images become pixels of one fixed size.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Preprocess {
    version: u32,
    target: Target,
    /// Pillow's number of the filter: 2 bilinear, 3 bicubic.
    resample: u8,
    /// Height and width cut from the middle, black where the image is smaller.
    crop: Option<(u32, u32)>,
    normalisation: Normalisation,
    /// JPEG files are decoded at half their size where that is enough.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    halves_jpeg: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
enum Target {
    /// Exactly this height and width.
    Exact(u32, u32),
    /// The shorter edge; the longer keeps the ratio, rounded down.
    ShortestEdge(u32),
}

/// What the device does to the pixels: `x * rescale`, then `(x - mean) / std` by channel.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Normalisation {
    pub rescale: f32,
    pub mean: [f32; 3],
    pub std: [f32; 3],
}

impl Preprocess {
    /// Reads a configuration of `SiglipImageProcessor` or `CLIPImageProcessor`. What it leaves out
    /// has that processor's default.
    ///
    /// # Errors
    /// `ModelInvalid` naming the field: another processor, another filter, or settings that give no
    /// fixed size.
    pub fn parse(preprocessor_config_json: &[u8]) -> Result<Self> {
        let json: Value = serde_json::from_slice(preprocessor_config_json)
            .map_err(|e| invalid("", "it is no JSON object").because(e))?;
        let config = Config(&json);
        let clip = config.is_clip()?;
        if !config.flag("do_resize", true)? {
            return Err(invalid(
                "do_resize",
                "it is false, but images need one fixed size; set it to true",
            ));
        }
        let target = config.target(clip)?;
        let crop = match config.flag("do_center_crop", clip)? {
            true => Some(config.crop()?),
            false => None,
        };
        if let (Target::ShortestEdge(_), None) = (target, crop) {
            return Err(invalid(
                "do_center_crop",
                "without it a shortest_edge gives images of many sizes; set it to true",
            ));
        }
        let resample = match json.get("resample") {
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
        })
    }

    /// The same for a model that takes images of `side` pixels. From half the size down, JPEG files
    /// are decoded at half their size by a smaller inverse DCT: a quarter of the work, and pixels
    /// that are Pillow's only nearly.
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
            },
            crop: self.crop.map(|_| (side, side)),
            halves_jpeg: side <= height / 2,
            ..self.clone()
        }
    }

    /// BLAKE3 of everything that decides the pixels and their normalisation.
    pub fn digest(&self) -> [u8; 32] {
        *blake3::hash(&serde_json::to_vec(self).expect("plain data encodes")).as_bytes()
    }

    /// Height and width of what [`Preprocess::pixels`] gives.
    pub fn size(&self) -> (u32, u32) {
        match (self.crop, self.target) {
            (Some(size), _) => size,
            (None, Target::Exact(height, width)) => (height, width),
            (None, Target::ShortestEdge(edge)) => (edge, edge),
        }
    }

    pub fn normalisation(&self) -> Normalisation {
        self.normalisation
    }

    /// The image decoded and resized: RGB, `height * width * 3` bytes by row, pixel and channel.
    ///
    /// # Errors
    /// Those of [`decode`]; `ImageTooLarge` where a shape so long needs more than `pixels_max` on
    /// its way.
    pub fn pixels(&self, image: &[u8], limits: &ImageLimits) -> Result<Vec<u8>, RowFault> {
        let image = match self.halves_jpeg {
            true => decode_at_least(image, limits, self.shorter())?,
            false => decode(image, limits)?,
        };
        let (height, width) = self.size();
        let (resized_height, resized_width) = self.resized(image.height(), image.width());
        let (rows, top) = cropped(image.height(), resized_height, height);
        let (columns, left) = cropped(image.width(), resized_width, width);
        let filter = if self.resample == 2 {
            Filter::Bilinear
        } else {
            Filter::Bicubic
        };
        let (rows, columns) = (Taps::new(filter, &rows), Taps::new(filter, &columns));
        let (source, between) = (image.as_raw().len() / 3, columns.len() * rows.span().len());
        if between as u64 > limits.pixels_max.max(source as u64) {
            let (width, height) = image.dimensions();
            let detail = format!("{width}x{height} pixels take {between} while they are resized");
            return Err(RowFault::new(BadRowReason::ImageTooLarge, detail));
        }
        let small = resize(image.as_raw(), &rows, &columns);
        if (rows.len(), columns.len()) == (height as usize, width as usize) {
            return Ok(small);
        }
        let mut canvas = vec![0; (height * width * 3) as usize];
        let line = columns.len() * 3;
        for (n, source) in small.chunks_exact(line).enumerate() {
            let at = ((top + n) * width as usize + left) * 3;
            canvas[at..at + line].copy_from_slice(source);
        }
        Ok(canvas)
    }

    /// What the shorter side of an image must have at least, so that no image is enlarged for being
    /// decoded smaller.
    fn shorter(&self) -> u32 {
        match self.target {
            Target::Exact(height, width) => height.max(width),
            Target::ShortestEdge(edge) => edge,
        }
    }

    /// Height and width after resizing, before the crop.
    fn resized(&self, height: u32, width: u32) -> (u64, u64) {
        match self.target {
            Target::Exact(height, width) => (height.into(), width.into()),
            Target::ShortestEdge(edge) => {
                let (edge, height, width) = (u64::from(edge), u64::from(height), u64::from(width));
                if width <= height {
                    (edge * height / width, edge)
                } else {
                    (edge, edge * width / height)
                }
            }
        }
    }
}

/// What a centre crop of `output` keeps of an axis, and where that begins in the output: where the
/// image is smaller, the spare black is split with the larger half first.
fn cropped(source: u32, resized: u64, output: u32) -> (Axis, usize) {
    let output = u64::from(output);
    match resized.checked_sub(output) {
        Some(spare) => (
            Axis {
                source,
                resized,
                kept: spare / 2..spare / 2 + output,
            },
            0,
        ),
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

/// The configuration's fields, each checked where it is read.
struct Config<'a>(&'a Value);

impl Config<'_> {
    fn get(&self, field: &str) -> Option<&Value> {
        self.0.get(field).filter(|value| !value.is_null())
    }

    /// Whether it is CLIP's processor, by name or, without one, by its fields.
    fn is_clip(&self) -> Result<bool> {
        let field = if self.get("image_processor_type").is_some() {
            "image_processor_type"
        } else {
            "feature_extractor_type"
        };
        match self.get(field).and_then(Value::as_str) {
            None => Ok(self
                .get("do_center_crop")
                .or(self.get("crop_size"))
                .is_some()),
            Some("CLIPImageProcessor" | "CLIPImageProcessorFast" | "CLIPFeatureExtractor") => {
                Ok(true)
            }
            Some("SiglipImageProcessor" | "SiglipImageProcessorFast") => Ok(false),
            Some(other) => Err(invalid(
                field,
                &format!("{other} is not known; use SiglipImageProcessor or CLIPImageProcessor"),
            )),
        }
    }

    fn flag(&self, field: &str, default: bool) -> Result<bool> {
        match self.get(field) {
            None => Ok(default),
            Some(value) => value
                .as_bool()
                .ok_or_else(|| invalid(field, "it is neither true nor false")),
        }
    }

    fn side(&self, field: &str, value: Option<&Value>) -> Result<u32> {
        let side = value
            .and_then(Value::as_u64)
            .filter(|side| (1..=SIDE_MAX).contains(side));
        side.map(|side| side as u32)
            .ok_or_else(|| invalid(field, &format!("its sides must be from 1 to {SIDE_MAX}")))
    }

    fn target(&self, clip: bool) -> Result<Target> {
        let field = "size";
        match self.get(field) {
            None if clip => Ok(Target::ShortestEdge(224)),
            None => Ok(Target::Exact(224, 224)),
            Some(side @ Value::Number(_)) => {
                let side = self.side(field, Some(side))?;
                Ok(if clip {
                    Target::ShortestEdge(side)
                } else {
                    Target::Exact(side, side)
                })
            }
            Some(size) => match size.get("shortest_edge") {
                Some(edge) if size.get("longest_edge").is_none() => {
                    Ok(Target::ShortestEdge(self.side(field, Some(edge))?))
                }
                Some(_) => Err(invalid(field, "longest_edge is not supported")),
                None => Ok(Target::Exact(
                    self.side(field, size.get("height"))?,
                    self.side(field, size.get("width"))?,
                )),
            },
        }
    }

    fn crop(&self) -> Result<(u32, u32)> {
        let field = "crop_size";
        match self.get(field) {
            None => Ok((224, 224)),
            Some(side @ Value::Number(_)) => self.side(field, Some(side)).map(|side| (side, side)),
            Some(size) => Ok((
                self.side(field, size.get("height"))?,
                self.side(field, size.get("width"))?,
            )),
        }
    }

    fn normalisation(&self, clip: bool) -> Result<Normalisation> {
        let rescale = match (self.flag("do_rescale", true)?, self.get("rescale_factor")) {
            (false, _) => 1.0,
            (true, None) => 1.0 / 255.0,
            (true, Some(factor)) => factor
                .as_f64()
                .ok_or_else(|| invalid("rescale_factor", "it is no number"))?,
        };
        let rescale = rescale as f32;
        if !self.flag("do_normalize", true)? {
            return Ok(Normalisation {
                rescale,
                mean: [0.0; 3],
                std: [1.0; 3],
            });
        }
        let (mean, std) = match clip {
            true => (
                [0.481_454_66, 0.457_827_5, 0.408_210_73],
                [0.268_629_54, 0.261_302_6, 0.275_777_1],
            ),
            false => ([0.5; 3], [0.5; 3]),
        };
        let (mean, std) = (
            self.channels("image_mean", mean)?,
            self.channels("image_std", std)?,
        );
        if std.iter().any(|&s| s <= 0.0) {
            return Err(invalid("image_std", "it must be above zero"));
        }
        Ok(Normalisation { rescale, mean, std })
    }

    fn channels(&self, field: &str, default: [f32; 3]) -> Result<[f32; 3]> {
        let three = || invalid(field, "it must be a number or three numbers");
        let number = |value: &Value| {
            value
                .as_f64()
                .map(|v| v as f32)
                .filter(|v| v.is_finite())
                .ok_or_else(three)
        };
        match self.get(field) {
            None => Ok(default),
            Some(Value::Array(values)) => {
                let values = values.iter().map(number).collect::<Result<Vec<_>>>()?;
                values.try_into().map_err(|_| three())
            }
            Some(value) => number(value).map(|v| [v; 3]),
        }
    }
}

fn invalid(field: &str, what: &str) -> Error {
    let place = if field.is_empty() {
        FILE.to_owned()
    } else {
        format!("'{field}' of {FILE}")
    };
    Error::new(Reason::ModelInvalid, format!("cannot use {place}: {what}"))
        .with("file", FILE)
        .with("field", field)
}

#[cfg(test)]
mod tests;
