//! The file of embeddings: a super-batch as safetensors, settings as metadata.
use super::{TuningArgs, invalid, norms};
use crate::error::{Error, Result};
use half::f16;
use safetensors::{
    SafeTensors,
    tensor::{Dtype, TensorView},
};
use std::{collections::HashMap, fmt::Display, path::Path, str::FromStr};
use superbatch_kernels::{Loss, ModelEmbeddings, Number, Policy, Rows, Tuning};
use superbatch_proto::v1::Reason;

/// One model's embeddings and logit.
pub(super) struct Model {
    image: Values,
    text: Values,
    pub count: usize,
    dim: usize,
    scale: f64,
    bias: f64,
}

pub(super) enum Values {
    F32(Vec<f32>),
    F16(Vec<f16>),
}

impl Model {
    pub(super) fn view(&self) -> ModelEmbeddings<'_> {
        let (image, text) = (self.image.view(), self.text.view());
        ModelEmbeddings {
            image,
            text,
            dim: self.dim,
            scale: self.scale,
            bias: self.bias,
        }
    }

    /// Returns one warning for each tower whose rows are not normalised.
    pub(super) fn warnings(&self, name: &str) -> Vec<String> {
        let towers = [("image", &self.image), ("text", &self.text)];
        towers
            .iter()
            .filter_map(|(tower, values)| {
                norms::warning(&format!("{name} {tower}"), values.view(), self.dim)
            })
            .collect()
    }
}

impl Values {
    fn view(&self) -> Rows<'_> {
        match self {
            Self::F32(values) => Rows::F32(values),
            Self::F16(values) => Rows::F16(values),
        }
    }
}

/// A file of embeddings, with its settings.
pub(super) struct File<'a> {
    path: &'a Path,
    tensors: SafeTensors<'a>,
    metadata: HashMap<String, String>,
}

impl<'a> File<'a> {
    pub(super) fn parse(path: &'a Path, bytes: &'a [u8]) -> Result<Self> {
        let broken =
            |error| invalid(format!("{} is not a safetensors file", path.display())).because(error);
        let (_, header) = SafeTensors::read_metadata(bytes).map_err(broken)?;
        let tensors = SafeTensors::deserialize(bytes).map_err(broken)?;
        Ok(Self {
            path,
            tensors,
            metadata: header.metadata().clone().unwrap_or_default(),
        })
    }

    /// Returns the flag's value, else the metadata's, else the default.
    pub(super) fn setting<T: FromStr<Err: Display>>(
        &self,
        flag: Option<T>,
        key: &str,
        default: T,
    ) -> Result<T> {
        if let Some(value) = flag {
            return Ok(value);
        }
        Ok(self.metadata_value(key)?.unwrap_or(default))
    }

    /// Returns the numbers that `policy` reads, and the rules, which go with every policy.
    pub(super) fn tuning(&self, args: &TuningArgs, policy: Policy) -> Result<Tuning> {
        let otherwise = Tuning::default();
        let number = |flag: Option<f64>, key: &str, default: f64| {
            let read = Number::of(key).map_or(Ok(()), |number| number.check_reader(policy));
            match (read, flag) {
                (Ok(()), flag) => self.setting(flag, key, default),
                (Err(_), None) => Ok(default),
                (Err(unread), Some(_)) => Err(Error::invalid(key, unread.to_string())),
            }
        };
        let filter =
            |flag: Option<f64>, key: &str| Ok::<_, Error>(flag.or(self.metadata_value(key)?));
        Ok(Tuning {
            temperature: number(args.temperature, "temperature", otherwise.temperature)?,
            pressure: number(args.pressure, "pressure", otherwise.pressure)?,
            priority_exponent: number(
                args.priority_exponent,
                "priority_exponent",
                otherwise.priority_exponent,
            )?,
            weight_exponent: number(
                args.weight_exponent,
                "weight_exponent",
                otherwise.weight_exponent,
            )?,
            duplicates_above: filter(args.duplicates_above, "duplicates_above")?,
            clip_score_at_least: filter(args.clip_score_at_least, "clip_score_at_least")?,
            neg_clip_loss_keep: filter(args.neg_clip_loss_keep, "neg_clip_loss_keep")?,
        })
    }

    fn metadata_value<T: FromStr<Err: Display>>(&self, key: &str) -> Result<Option<T>> {
        let Some(text) = self.metadata.get(key) else {
            return Ok(None);
        };
        let wrong = |error| {
            invalid(format!(
                "{}: metadata {key} is {text:?}: {error}",
                self.path.display()
            ))
        };
        text.parse()
            .map(Some)
            .map_err(wrong)
            .map_err(|error| error.with("metadata", key))
    }

    fn tensor(&self, name: &str) -> Result<TensorView<'_>> {
        let missing = || {
            invalid(format!("{} has no tensor {name}", self.path.display())).with("tensor", name)
        };
        self.tensors.tensor(name).map_err(|_| missing())
    }

    /// Returns a model's embeddings and logit; `None` if they are optional and the file has no
    /// tensor of the model.
    pub(super) fn model(&self, name: &str, loss: Loss, optional: bool) -> Result<Option<Model>> {
        let (image_name, text_name) = (format!("{name}_img"), format!("{name}_txt"));
        let has = |name: &str| self.tensors.tensor(name).is_ok();
        if optional && !has(&image_name) && !has(&text_name) {
            return Ok(None);
        }
        let (image, [count, dim]) = values(&image_name, &self.tensor(&image_name)?)?;
        let (text, shape) = values(&text_name, &self.tensor(&text_name)?)?;
        if shape != [count, dim] {
            let message = format!(
                "{text_name} is {shape:?} where {image_name} is {:?}: they must agree",
                [count, dim]
            );
            return Err(invalid(message).with("tensor", text_name));
        }
        let scale_key = format!("{name}_scale");
        let no_scale = || {
            invalid(format!(
                "{} has no metadata {scale_key}; {}",
                self.path.display(),
                how_to_write(&scale_key)
            ))
        };
        let scale = self.metadata_value(&scale_key)?.ok_or_else(no_scale)?;
        let bias_key = format!("{name}_bias");
        let bias = match (self.metadata_value(&bias_key)?, loss) {
            (Some(bias), _) => bias,
            (None, Loss::Softmax) => 0.0,
            (None, Loss::Sigmoid) => {
                let (path, how) = (self.path.display(), how_to_write(&bias_key));
                let message = format!(
                    "{path} has no metadata {bias_key}, which the sigmoid loss needs; {how}"
                );
                return Err(Error::new(Reason::BiasMissing, message));
            }
        };
        Ok(Some(Model {
            image,
            text,
            count,
            dim,
            scale,
            bias,
        }))
    }

    /// Returns the file's noise and its number of candidates.
    pub(super) fn noise(&self) -> Result<Option<(Vec<f32>, usize)>> {
        let Ok(view) = self.tensors.tensor("noise") else {
            return Ok(None);
        };
        match values("noise", &view)? {
            (Values::F32(noise), [_, count]) => Ok(Some((noise, count))),
            (Values::F16(_), _) => Err(invalid("tensor noise must be F32").with("tensor", "noise")),
        }
    }
}

fn how_to_write(key: &str) -> String {
    format!(
        "give save_file of safetensors metadata={{'{key}': '...', ...}} (`superbatch select \
        --help` has an example)"
    )
}

/// Returns a tensor's values and shape.
fn values(name: &str, view: &TensorView<'_>) -> Result<(Values, [usize; 2])> {
    let shape = <[usize; 2]>::try_from(view.shape());
    let shape = shape
        .ok()
        .filter(|shape| shape.iter().all(|extent| *extent > 0))
        .ok_or_else(|| {
            invalid(format!(
                "tensor {name} is {:?}: two extents, neither 0, are needed",
                view.shape()
            ))
            .with("tensor", name)
        })?;
    let values = match view.dtype() {
        Dtype::F32 => Values::F32(
            view.data()
                .as_chunks()
                .0
                .iter()
                .map(|bytes| f32::from_le_bytes(*bytes))
                .collect(),
        ),
        Dtype::F16 => Values::F16(
            view.data()
                .as_chunks()
                .0
                .iter()
                .map(|bytes| f16::from_le_bytes(*bytes))
                .collect(),
        ),
        other => {
            return Err(
                invalid(format!("tensor {name} is {other:?}: F32 or F16 is needed"))
                    .with("tensor", name),
            );
        }
    };
    Ok((values, shape))
}
