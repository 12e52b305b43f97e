//! A loaded model: turns pixels and ids into L2-normalised embeddings.
use super::{
    clip::Clip,
    config::{Compute, Family, ModelConfig},
    flops::{self, ImageTower},
    layers::{Tensors, Torch},
    open_clip::OpenClip,
    siglip::Siglip,
    snapshot::{Refusal, Snapshot, Stored},
};
use crate::worker::inputs::preprocess::Normalisation;
use safetensors::Dtype;
use std::collections::{BTreeMap, HashMap};
use tch::{Device, Kind, TchError, Tensor};

/// The two halves of a dual encoder, before normalisation.
pub trait Towers: Send {
    /// Embeds normalised pixels `[n, height, width, 3]` as `[n, embedding_dim]`.
    fn image(&self, pixels: &Tensor) -> Torch;
    /// Embeds ids `[n, length]` as `[n, embedding_dim]`.
    fn text(&self, ids: &Tensor) -> Torch;
}

/// Names a loaded model on a device.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct ModelKey {
    /// [`ModelInfo::digest`].
    pub digest: String,
    pub compute: Compute,
}

/// The description of a loaded model.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelInfo {
    pub key: ModelKey,
    /// BLAKE3 over configuration, preprocessing, tokenizer and weights, in hex.
    pub digest: String,
    pub model_type: String,
    pub embedding_dim: usize,
    /// Height and width of an image, in pixels.
    pub image_size: usize,
    /// Ids of a caption.
    pub text_length: usize,
    /// exp() applied.
    pub logit_scale: f64,
    pub logit_bias: Option<f64>,
    /// Of one forward pass for one image.
    pub image_flops: f64,
    /// Of one forward pass for one caption.
    pub text_flops: f64,
    pub image_tower: ImageTower,
    /// Names and shapes of the tensors that a push has.
    pub tensors: Vec<(String, Vec<u64>)>,
    /// Names of the tensors that a push may leave out.
    pub optional_tensors: Vec<String>,
    /// BLAKE3 of the weights, in hex; of the seed for the service's own initial weights.
    pub weights_digest: String,
    /// BLAKE3 of each file of its folder except the weights, in hex.
    pub files: BTreeMap<String, String>,
}

pub struct Encoder {
    towers: Box<dyn Towers>,
    config: ModelConfig,
    compute: Compute,
    device: Device,
    logit_scale: f64,
    logit_bias: Option<f64>,
}

impl Encoder {
    /// Puts checked weights on `device`, cast once to the dtype of the arithmetic.
    pub fn load(
        config: &ModelConfig,
        snapshot: &Snapshot,
        compute: Compute,
        device: Device,
    ) -> Torch<Self> {
        let mut tensors = HashMap::new();
        for (name, parameter) in config.parameters().iter() {
            let Some(stored) = snapshot.get(name) else {
                if parameter.optional {
                    continue;
                }
                return Err(TchError::Torch(format!(
                    "tensor '{name}' was never checked"
                )));
            };
            tensors.insert(
                name.to_owned(),
                place(&stored, device)?.f_to_kind(compute.kind())?,
            );
        }
        let tensors = Tensors(tensors);
        let towers: Box<dyn Towers> = match config.family {
            Family::Siglip => Box::new(Siglip::load(config, &tensors)?),
            Family::Clip => Box::new(Clip::load(config, &tensors)?),
            Family::OpenClip(form) => Box::new(OpenClip::load(config, &form, &tensors)?),
        };
        let scalar = |name| {
            snapshot
                .get(name)
                .map(|stored| {
                    place(&stored, Device::Cpu)?
                        .f_reshape([-1])?
                        .f_double_value(&[0])
                })
                .transpose()
        };
        Ok(Self {
            towers,
            config: config.clone(),
            compute,
            device,
            logit_scale: scalar("logit_scale")?.unwrap_or_default().exp(),
            logit_bias: scalar("logit_bias")?,
        })
    }

    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    pub fn info(
        &self,
        digest: String,
        weights_digest: String,
        files: BTreeMap<String, String>,
    ) -> ModelInfo {
        let shape = |shape: &[usize]| shape.iter().map(|size| *size as u64).collect();
        let parameters = self.config.parameters();
        ModelInfo {
            key: ModelKey {
                digest: digest.clone(),
                compute: self.compute,
            },
            digest,
            model_type: self.config.model_type().to_owned(),
            embedding_dim: self.config.embedding_dim,
            image_size: self.config.vision.image_size,
            text_length: self.config.text.max_position_embeddings,
            logit_scale: self.logit_scale,
            logit_bias: self.logit_bias,
            image_flops: flops::image(&self.config),
            text_flops: flops::text(&self.config),
            image_tower: ImageTower::of(&self.config),
            optional_tensors: parameters
                .iter()
                .filter(|(_, of)| of.optional)
                .map(|(name, _)| name.to_owned())
                .collect(),
            tensors: parameters
                .iter()
                .map(|(name, of)| (name.to_owned(), shape(&of.shape)))
                .collect(),
            weights_digest,
            files,
        }
    }

    /// Embeds RGB bytes `[rows, side, side, 3]` as f32 `[rows, embedding_dim]` of length one.
    pub fn image(
        &self,
        pixels: &[u8],
        rows: usize,
        side: usize,
        normalisation: &Normalisation,
    ) -> Torch {
        let size = side as i64;
        if rows as i64 * size * size * 3 != pixels.len() as i64 {
            return Err(TchError::Shape(format!(
                "{} bytes are not {rows} images of {size}x{size}",
                pixels.len()
            )));
        }
        let pixels = Tensor::f_from_data_size(pixels, &[rows as i64, size, size, 3], Kind::Uint8)?;
        let channels = |values: &[f32; 3]| Tensor::f_from_slice(values)?.f_to_device(self.device);
        let pixels = pixels
            .f_to_device(self.device)?
            .f_to_kind(Kind::Float)?
            .f_mul_scalar(f64::from(normalisation.rescale))?
            .f_sub(&channels(&normalisation.mean)?)?
            .f_div(&channels(&normalisation.std)?)?;
        unit(&self.towers.image(&pixels.f_to_kind(self.compute.kind())?)?)
    }

    /// Embeds ids `[rows, length]` as f32 `[rows, embedding_dim]` of length one. They must be below
    /// `vocab_size`.
    pub fn text(&self, ids: &[i64], rows: usize) -> Torch {
        let ids = Tensor::f_from_slice(ids)?
            .f_reshape([rows as i64, -1])?
            .f_to_device(self.device)?;
        unit(&self.towers.text(&ids)?)
    }

    /// Embeds two made-up rows and checks that the embeddings are finite: finite weights can still
    /// overflow in a forward pass.
    pub fn canary(&self) -> Torch<Result<(), Refusal>> {
        const ROWS: usize = 2;
        let (size, text) = (self.config.vision.image_size, &self.config.text);
        let pixels: Vec<u8> = (0..ROWS * size * size * 3)
            .map(|i| (i * 37 % 256) as u8)
            .collect();
        let ids: Vec<i64> = (0..ROWS * text.max_position_embeddings)
            .map(|i| (i * 31 % text.vocab_size) as i64)
            .collect();
        let plain = Normalisation {
            rescale: 1.0 / 255.0,
            mean: [0.5; 3],
            std: [0.5; 3],
        };
        let finite =
            |x: Tensor| Ok::<_, TchError>(x.f_isfinite()?.f_all()?.f_int64_value(&[])? != 0);
        // Selection multiplies by the scale in f32. exp() of a scale that is finite in f64 may be
        // infinite there.
        if !(self.logit_scale as f32).is_finite() {
            return Ok(Err(Refusal::of(
                "logit_scale",
                "is not finite in f32 once exp() is applied",
            )));
        }
        let problem = if !finite(self.image(&pixels, ROWS, size, &plain)?)? {
            "image"
        } else if !finite(self.text(&ids, ROWS)?)? {
            "caption"
        } else {
            return Ok(Ok(()));
        };
        Ok(Err(Refusal::of_all(format!(
            "every tensor is finite, but the {problem} embeddings of a canary batch are not"
        ))))
    }
}

/// Divides each row by its length, in f32. A row of zeros becomes NaN, which the device reports as
/// not finite, so the row becomes a hole.
fn unit(x: &Tensor) -> Torch {
    let x = x.f_to_kind(Kind::Float)?;
    let length = x.f_norm_scalaropt_dim(2, [-1], true)?;
    x.f_div(&length)
}

fn place(stored: &Stored, device: Device) -> Torch {
    let kind = match stored.dtype {
        Dtype::F32 => Kind::Float,
        Dtype::F16 => Kind::Half,
        Dtype::BF16 => Kind::BFloat16,
        other => return Err(TchError::Kind(format!("{other:?} was never checked"))),
    };
    let shape: Vec<i64> = stored.shape.iter().map(|size| *size as i64).collect();
    Tensor::f_from_data_size(stored.bytes, &shape, kind)?.f_to_device(device)
}
