//! From stored image to model input, as a model folder's `preprocessor_config.json` says: the slow image processors of
//! `transformers` for SigLIP and CLIP, given RGB images with the channels last.
pub use super::decode::{ImageLimits, RowFault, decode};

use super::decode::too_large;
use crate::error::{Error, Result};
use fast_image_resize::{FilterType, PixelType, ResizeAlg, ResizeOptions, Resizer, images::Image};
use image::RgbImage;
use serde::Serialize;
use serde_json::Value;
use superbatch_proto::v1::{BadRowReason, Reason};

const FILE: &str = "preprocessor_config.json";
/// Raised when the same configuration gives other pixels: part of the digest.
const VERSION: u32 = 2;
const SIDE_MAX: u64 = 4096;
/// Rows that are resized along their length at once: bounds the memory of a huge image.
const STRIP_ROWS: usize = 64;

/// How images become pixels of one fixed size.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Preprocess {
    version: u32,
    target: Target,
    /// Pillow's number of the filter: 2 bilinear, 3 bicubic; both widened when shrinking.
    resample: u8,
    /// Height and width cut from the middle, black where the image is smaller.
    crop: Option<(u32, u32)>,
    normalisation: Normalisation,
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
    /// Reads a configuration of `SiglipImageProcessor` or `CLIPImageProcessor`. What it leaves out has that processor's
    /// default.
    ///
    /// # Errors
    /// `ModelInvalid` naming the field: another processor, another filter, or settings that give no fixed size.
    pub fn parse(preprocessor_config_json: &[u8]) -> Result<Self> {
        let json: Value = serde_json::from_slice(preprocessor_config_json)
            .map_err(|e| invalid("", "it is no JSON object").because(e))?;
        let config = Config(&json);
        let clip = config.is_clip()?;
        if !config.flag("do_resize", true)? {
            return Err(invalid("do_resize", "it is false, but images need one fixed size; set it to true"));
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
                _ => return Err(invalid("resample", &format!("{value} is neither 2 (bilinear) nor 3 (bicubic)"))),
            },
        };
        Ok(Self { version: VERSION, target, resample, crop, normalisation: config.normalisation(clip)? })
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
    /// Those of [`decode`]; `ImageTooLarge` where a shape so long needs more than `pixels_max` on its way.
    pub fn pixels(&self, image: &[u8], limits: &ImageLimits) -> Result<Vec<u8>, RowFault> {
        let image = decode(image, limits)?;
        let (height, width) = self.size();
        let (resized_height, resized_width) = self.resized(image.height(), image.width());
        let rows = Axis::new(image.height(), resized_height, height);
        let columns = Axis::new(image.width(), resized_width, width);
        let small = self.resample(&image, &rows, &columns, limits)?;
        if (rows.length, columns.length) == (height, width) {
            return Ok(small);
        }
        let mut canvas = vec![0; (height * width * 3) as usize];
        let line = columns.length as usize * 3;
        for (n, source) in small.chunks_exact(line).enumerate() {
            let at = ((rows.offset as usize + n) * width as usize + columns.offset as usize) * 3;
            canvas[at..at + line].copy_from_slice(source);
        }
        Ok(canvas)
    }

    /// Height and width after resizing, before the crop.
    fn resized(&self, height: u32, width: u32) -> (u64, u64) {
        match self.target {
            Target::Exact(height, width) => (height.into(), width.into()),
            Target::ShortestEdge(edge) => {
                let (edge, height, width) = (u64::from(edge), u64::from(height), u64::from(width));
                if width <= height { (edge * height / width, edge) } else { (edge, edge * width / height) }
            }
        }
    }

    /// Resizes what the crop will keep. First along the rows, then along the columns, each rounded to 8 bits: Pillow's order,
    /// which shows where bicubic overshoots.
    fn resample(
        &self,
        image: &RgbImage,
        rows: &Axis,
        columns: &Axis,
        limits: &ImageLimits,
    ) -> Result<Vec<u8>, RowFault> {
        let (width, height) = image.dimensions();
        let between = u64::from(columns.length) * u64::from(height);
        if between > limits.pixels_max.max(u64::from(width) * u64::from(height)) {
            return Err(too_large(format!("{width}x{height} pixels take {between} while they are resized")));
        }
        let filter = if self.resample == 2 { FilterType::Bilinear } else { FilterType::CatmullRom };
        let options = ResizeOptions::new().resize_alg(ResizeAlg::Convolution(filter));
        let mut resizer = Resizer::new();
        let mut wide = Vec::with_capacity((columns.length * height * 3) as usize);
        let crop = |rows: usize| options.crop(columns.start, 0.0, columns.span, rows as f64);
        for strip in image.as_raw().chunks(width as usize * 3 * STRIP_ROWS) {
            let rows = strip.len() / (width as usize * 3);
            wide.extend(convolve(
                &mut resizer,
                strip,
                (width, rows as u32),
                (columns.length, rows as u32),
                &crop(rows),
            )?);
        }
        let crop = options.crop(0.0, rows.start, columns.length.into(), rows.span);
        convolve(&mut resizer, &wide, (columns.length, height), (columns.length, rows.length), &crop)
    }
}

/// Resizes RGB bytes from and to (width, height). Computed in f32: 8-bit kernels are off by a step too often.
fn convolve(
    resizer: &mut Resizer,
    pixels: &[u8],
    from: (u32, u32),
    to: (u32, u32),
    options: &ResizeOptions,
) -> Result<Vec<u8>, RowFault> {
    let failed = |e: &dyn std::fmt::Display| RowFault::new(BadRowReason::ImageUndecodable, e.to_string());
    let bytes: Vec<u8> = pixels.iter().flat_map(|value| f32::from(*value).to_ne_bytes()).collect();
    let source = Image::from_vec_u8(from.0, from.1, bytes, PixelType::F32x3).map_err(|e| failed(&e))?;
    let mut resized = Image::new(to.0, to.1, PixelType::F32x3);
    resizer.resize(&source, &mut resized, options).map_err(|e| failed(&e))?;
    let values = resized.buffer().as_chunks().0.iter().map(|value| f32::from_ne_bytes(*value));
    // `as` clamps to 0 .. 255.
    Ok(values.map(|value| (value + 0.5).floor() as u8).collect())
}

/// One axis of resize and centre crop together: which part of the source gives which part of the output.
struct Axis {
    /// Part of the source, in its pixels.
    start: f64,
    span: f64,
    /// Pixels that this becomes, and where they begin in the output.
    length: u32,
    offset: u32,
}

impl Axis {
    /// `source` pixels are resized to `resized`, of which the middle `output` are kept. Where there are fewer, the spare black
    /// is split with the larger half first.
    fn new(source: u32, resized: u64, output: u32) -> Self {
        let source = f64::from(source);
        let Some(spare) = resized.checked_sub(u64::from(output)) else {
            let length = resized as u32;
            return Self { start: 0.0, span: source, length, offset: (output - length).div_ceil(2) };
        };
        if spare == 0 {
            return Self { start: 0.0, span: source, length: output, offset: 0 };
        }
        let scale = source / resized as f64;
        let start = (spare / 2) as f64 * scale;
        // Rounding must not reach beyond the source.
        let span = (f64::from(output) * scale).min(source - start);
        Self { start, span, length: output, offset: 0 }
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
        let field =
            if self.get("image_processor_type").is_some() { "image_processor_type" } else { "feature_extractor_type" };
        match self.get(field).and_then(Value::as_str) {
            None => Ok(self.get("do_center_crop").or(self.get("crop_size")).is_some()),
            Some("CLIPImageProcessor" | "CLIPImageProcessorFast" | "CLIPFeatureExtractor") => Ok(true),
            Some("SiglipImageProcessor" | "SiglipImageProcessorFast") => Ok(false),
            Some(other) => {
                Err(invalid(field, &format!("{other} is not known; use SiglipImageProcessor or CLIPImageProcessor")))
            }
        }
    }

    fn flag(&self, field: &str, default: bool) -> Result<bool> {
        match self.get(field) {
            None => Ok(default),
            Some(value) => value.as_bool().ok_or_else(|| invalid(field, "it is neither true nor false")),
        }
    }

    fn side(&self, field: &str, value: Option<&Value>) -> Result<u32> {
        let side = value.and_then(Value::as_u64).filter(|side| (1..=SIDE_MAX).contains(side));
        side.map(|side| side as u32).ok_or_else(|| invalid(field, &format!("its sides must be from 1 to {SIDE_MAX}")))
    }

    fn target(&self, clip: bool) -> Result<Target> {
        let field = "size";
        match self.get(field) {
            None if clip => Ok(Target::ShortestEdge(224)),
            None => Ok(Target::Exact(224, 224)),
            Some(side @ Value::Number(_)) => {
                let side = self.side(field, Some(side))?;
                Ok(if clip { Target::ShortestEdge(side) } else { Target::Exact(side, side) })
            }
            Some(size) => match size.get("shortest_edge") {
                Some(edge) if size.get("longest_edge").is_none() => {
                    Ok(Target::ShortestEdge(self.side(field, Some(edge))?))
                }
                Some(_) => Err(invalid(field, "longest_edge is not supported")),
                None => Ok(Target::Exact(self.side(field, size.get("height"))?, self.side(field, size.get("width"))?)),
            },
        }
    }

    fn crop(&self) -> Result<(u32, u32)> {
        let field = "crop_size";
        match self.get(field) {
            None => Ok((224, 224)),
            Some(side @ Value::Number(_)) => self.side(field, Some(side)).map(|side| (side, side)),
            Some(size) => Ok((self.side(field, size.get("height"))?, self.side(field, size.get("width"))?)),
        }
    }

    fn normalisation(&self, clip: bool) -> Result<Normalisation> {
        let rescale = match (self.flag("do_rescale", true)?, self.get("rescale_factor")) {
            (false, _) => 1.0,
            (true, None) => 1.0 / 255.0,
            (true, Some(factor)) => factor.as_f64().ok_or_else(|| invalid("rescale_factor", "it is no number"))?,
        };
        let rescale = rescale as f32;
        if !self.flag("do_normalize", true)? {
            return Ok(Normalisation { rescale, mean: [0.0; 3], std: [1.0; 3] });
        }
        let (mean, std) = match clip {
            true => ([0.481_454_66, 0.457_827_5, 0.408_210_73], [0.268_629_54, 0.261_302_6, 0.275_777_1]),
            false => ([0.5; 3], [0.5; 3]),
        };
        let (mean, std) = (self.channels("image_mean", mean)?, self.channels("image_std", std)?);
        if std.iter().any(|&s| s <= 0.0) {
            return Err(invalid("image_std", "it must be above zero"));
        }
        Ok(Normalisation { rescale, mean, std })
    }

    fn channels(&self, field: &str, default: [f32; 3]) -> Result<[f32; 3]> {
        let three = || invalid(field, "it must be a number or three numbers");
        let number = |value: &Value| value.as_f64().map(|v| v as f32).filter(|v| v.is_finite()).ok_or_else(three);
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
    let place = if field.is_empty() { FILE.to_owned() } else { format!("'{field}' of {FILE}") };
    Error::new(Reason::ModelInvalid, format!("cannot use {place}: {what}")).with("file", FILE).with("field", field)
}

#[cfg(test)]
mod tests;
