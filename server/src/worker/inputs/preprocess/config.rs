//! What `preprocessor_config.json` and open_clip's `preprocess_cfg` say.
use super::{Normalisation, Preprocess, Target, VERSION};
use crate::{
    error::{Error, Result},
    worker::model::open_clip_config,
};
use serde_json::Value;
use superbatch_proto::v1::Reason;

const FILE: &str = "preprocessor_config.json";
const SIDE_MAX: u64 = 4096;
/// Mean and deviation by channel of the images that OpenAI trained CLIP with.
const CLIP_COLOURS: ([f32; 3], [f32; 3]) = (
    [0.481_454_66, 0.457_827_5, 0.408_210_73],
    [0.268_629_54, 0.261_302_6, 0.275_777_1],
);

impl Preprocess {
    /// Reads `preprocess_cfg` of an `open_clip_config.json`: open_clip's transform for evaluation,
    /// of images of `side`.
    ///
    /// # Errors
    /// `ModelInvalid` naming the field.
    pub fn open_clip(config_json: &[u8], side: u32) -> Result<Self> {
        let wrong = |field: &str, what: &str| invalid_in(open_clip_config::FILE, field, what);
        let json: Value = serde_json::from_slice(config_json)
            .map_err(|e| wrong("", "it is no JSON object").because(e))?;
        let none = Value::Object(serde_json::Map::new());
        let config = Config(json.get("preprocess_cfg").unwrap_or(&none));
        let text = |field: &'static str, default: &'static str| match config.get(field) {
            None => Ok(default),
            Some(value) => value
                .as_str()
                .ok_or_else(|| wrong(field, "it is no string")),
        };
        let resample = match text("interpolation", "bicubic")? {
            "bicubic" => 3,
            "bilinear" => 2,
            other => {
                return Err(invalid(
                    "interpolation",
                    &format!("{other} is not supported"),
                ));
            }
        };
        let (target, crop) = match text("resize_mode", "shortest")? {
            "shortest" => (Target::ShortestEdge(side), Some((side, side))),
            "squash" => (Target::Exact(side, side), None),
            other => return Err(wrong("resize_mode", &format!("{other} is not supported"))),
        };
        let (mean, std) = CLIP_COLOURS;
        let (mean, std) = (config.channels("mean", mean)?, config.channels("std", std)?);
        if std.iter().any(|&s| s <= 0.0) {
            return Err(wrong("std", "it must be above zero"));
        }
        Ok(Self {
            version: VERSION,
            target,
            resample,
            crop,
            normalisation: Normalisation {
                rescale: 1.0 / 255.0,
                mean,
                std,
            },
            halves_jpeg: false,
            crop_rounds: true,
        })
    }
}

/// Whose image processor a configuration is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Processor {
    Siglip,
    /// That of NaFlex models; those of fixed resolution have SigLIP's.
    Siglip2,
    Clip,
}

/// The configuration's fields, each checked where it is read.
pub(super) struct Config<'a>(pub &'a Value);

impl Config<'_> {
    pub(super) fn get(&self, field: &str) -> Option<&Value> {
        self.0.get(field).filter(|value| !value.is_null())
    }

    /// Returns whose processor it is: by name or, without one, as `unnamed` says, else by its
    /// fields.
    pub(super) fn processor(&self, unnamed: Option<Processor>) -> Result<Processor> {
        let field = if self.get("image_processor_type").is_some() {
            "image_processor_type"
        } else {
            "feature_extractor_type"
        };
        match self.get(field).and_then(Value::as_str) {
            None => {
                let has_crop = self.get("do_center_crop").or(self.get("crop_size"));
                Ok(unnamed.unwrap_or(match has_crop {
                    Some(_) => Processor::Clip,
                    None => Processor::Siglip,
                }))
            }
            Some("CLIPImageProcessor" | "CLIPImageProcessorFast" | "CLIPFeatureExtractor") => {
                Ok(Processor::Clip)
            }
            Some("SiglipImageProcessor" | "SiglipImageProcessorFast") => Ok(Processor::Siglip),
            Some("Siglip2ImageProcessor" | "Siglip2ImageProcessorFast") => Ok(Processor::Siglip2),
            Some(other) => Err(invalid(
                field,
                &format!(
                    "{other} is not known; use SiglipImageProcessor, Siglip2ImageProcessor or \
                     CLIPImageProcessor"
                ),
            )),
        }
    }

    pub(super) fn flag(&self, field: &str, default: bool) -> Result<bool> {
        match self.get(field) {
            None => Ok(default),
            Some(value) => value
                .as_bool()
                .ok_or_else(|| invalid(field, "it is neither true nor false")),
        }
    }

    pub(super) fn side(&self, field: &str, value: Option<&Value>) -> Result<u32> {
        let side = value
            .and_then(Value::as_u64)
            .filter(|side| (1..=SIDE_MAX).contains(side));
        side.map(|side| side as u32)
            .ok_or_else(|| invalid(field, &format!("its sides must be from 1 to {SIDE_MAX}")))
    }

    /// Reads the patches of images of any shape. All of them together are not more pixels than
    /// another image may have.
    pub(super) fn patches(&self) -> Result<Target> {
        let count = |field, default| match self.get(field) {
            None => Ok(default),
            Some(value) => {
                let count = value
                    .as_u64()
                    .filter(|count| (1..=SIDE_MAX).contains(count));
                let wrong = || invalid(field, &format!("it must be from 1 to {SIDE_MAX}"));
                count.map(|count| count as u32).ok_or_else(wrong)
            }
        };
        let (side, most) = (count("patch_size", 16)?, count("max_num_patches", 256)?);
        if u64::from(most) * u64::from(side).pow(2) > SIDE_MAX.pow(2) {
            let what = format!("{most} patches of {side} pixels are more than any image may have");
            return Err(invalid("max_num_patches", &what));
        }
        Ok(Target::Patches { side, most })
    }

    pub(super) fn target(&self, clip: bool) -> Result<Target> {
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

    pub(super) fn crop(&self) -> Result<(u32, u32)> {
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

    pub(super) fn normalisation(&self, clip: bool) -> Result<Normalisation> {
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
        let (mean, std) = if clip {
            CLIP_COLOURS
        } else {
            ([0.5; 3], [0.5; 3])
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

    pub(super) fn channels(&self, field: &str, default: [f32; 3]) -> Result<[f32; 3]> {
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

pub(super) fn invalid(field: &str, what: &str) -> Error {
    invalid_in(FILE, field, what)
}

fn invalid_in(file: &str, field: &str, what: &str) -> Error {
    let place = if field.is_empty() {
        file.to_owned()
    } else {
        format!("'{field}' of {file}")
    };
    Error::new(Reason::ModelInvalid, format!("cannot use {place}: {what}"))
        .with("file", file)
        .with("field", field)
}
