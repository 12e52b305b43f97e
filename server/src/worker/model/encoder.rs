//! A loaded model: turns pixels and ids into L2-normalised embeddings.
use super::{
    captions,
    clip::Clip,
    config::{Compute, Family, ModelConfig},
    entry::{View, drawn},
    exported::Module,
    flops::{self, TextTower},
    layers::{Tensors, Torch},
    losses::Input,
    normalisation::Normalisation,
    open_clip::OpenClip,
    siglip::Siglip,
    snapshot::{Refusal, Snapshot, Stored},
};
use crate::fidelity::{Fidelity, ImageTower};
use safetensors::Dtype;
use std::collections::{BTreeMap, HashMap};
use tch::{Device, Kind, TchError, Tensor};

/// The two halves of a dual encoder, before normalisation.
pub trait Towers: Send {
    /// Embeds normalised pixels `[n, height, width, 3]` as `[n, embedding_dim]`; of images of any
    /// shape, `[n, patches, patch², 3]`.
    fn image(&self, pixels: &Tensor, view: &View) -> Torch;
    /// Embeds ids `[n, length]` as `[n, embedding_dim]`.
    fn text(&self, ids: &Tensor) -> Torch;
    /// Returns the losses of rows in the place of both embeddings, of a model that gives losses.
    fn losses(&self, _pixels: &Tensor, _ids: &Tensor) -> Torch<(Tensor, Tensor)> {
        Err(TchError::Torch("a dual encoder gives no losses".into()))
    }
}

/// Images as a model takes them.
#[derive(Debug, Clone, Copy)]
pub struct Images<'a> {
    /// RGB bytes, `[rows, side, side, 3]` of the fidelity's side; of images of any shape, with
    /// their patches one after the other, `[rows, patches, patch², 3]`.
    pub pixels: &'a [u8],
    /// A number for each row, which decides which of its patches are left out.
    pub keys: &'a [u64],
    /// Rows and columns of patches of each image; empty if all have one size.
    pub grids: &'a [[u32; 2]],
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
    /// Whether it gives losses, which its embeddings hold then.
    pub gives_losses: bool,
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
    /// Of one forward pass for one caption of the whole length.
    pub text_flops: f64,
    pub text_tower: TextTower,
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
    image_tower: ImageTower,
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
            Family::Exported => Box::new(exported(config, &tensors, device)?),
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
        // A loss is taken as it is, whatever its module's parameters are called.
        let (logit_scale, logit_bias) = match config.losses() {
            Some(_) => (1.0, None),
            None => (
                scalar("logit_scale")?.unwrap_or_default().exp(),
                scalar("logit_bias")?,
            ),
        };
        Ok(Self {
            towers,
            config: config.clone(),
            image_tower: flops::image_tower(config),
            compute,
            device,
            logit_scale,
            logit_bias,
        })
    }

    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    pub fn image_tower(&self) -> &ImageTower {
        &self.image_tower
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
            gives_losses: self.config.losses().is_some(),
            embedding_dim: self.config.embedding_dim,
            image_size: self.config.vision.image_size,
            text_length: self.config.text.max_position_embeddings,
            logit_scale: self.logit_scale,
            logit_bias: self.logit_bias,
            image_flops: flops::image(&self.config),
            text_flops: flops::text(&self.config),
            text_tower: TextTower::of(&self.config),
            image_tower: self.image_tower,
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

    /// Embeds images as f32 `[rows, embedding_dim]` of length one.
    pub fn image(
        &self,
        images: &Images<'_>,
        fidelity: Fidelity,
        normalisation: &Normalisation,
    ) -> Torch {
        let pixels = self.normalised(images, fidelity, normalisation)?;
        unit(&self.towers.image(&pixels, &self.view(images, fidelity)?)?)
    }

    /// Returns what both towers make of rows, as [`Encoder::image`] and [`Encoder::text`] do. Of a
    /// model that gives losses: `[loss, 1]` and `[1, 0]`, and what follows of tokens.
    pub fn both(
        &self,
        images: &Images<'_>,
        fidelity: Fidelity,
        normalisation: &Normalisation,
        ids: &[i64],
    ) -> Torch<(Tensor, Tensor)> {
        let rows = images.keys.len();
        let Some(form) = self.config.losses() else {
            let image = self.image(images, fidelity, normalisation)?;
            return Ok((image, self.text(ids, rows)?));
        };
        let pixels = match form.input {
            Input::Image => self.normalised(images, fidelity, normalisation)?,
            Input::Text => Tensor::f_zeros([0], (Kind::Float, self.device))?,
        };
        let ids = Tensor::f_from_slice(ids)?
            .f_reshape([rows as i64, -1])?
            .f_to_device(self.device)?;
        self.towers.losses(&pixels, &ids)
    }

    fn normalised(
        &self,
        images: &Images<'_>,
        fidelity: Fidelity,
        normalisation: &Normalisation,
    ) -> Torch {
        let tower = &self.image_tower;
        let [height, width] = match tower.max_patches {
            0 => [i64::from(tower.side(fidelity)); 2],
            most => [i64::from(most), i64::from(tower.patch_size).pow(2)],
        };
        let shape = [images.keys.len() as i64, height, width, 3];
        if shape.iter().product::<i64>() != images.pixels.len() as i64 {
            let message = format!("{} bytes are not {shape:?}", images.pixels.len());
            return Err(TchError::Shape(message));
        }
        let pixels = Tensor::f_from_data_size(images.pixels, &shape, Kind::Uint8)?;
        let channels = |values: &[f32; 3]| Tensor::f_from_slice(values)?.f_to_device(self.device);
        let pixels = pixels
            .f_to_device(self.device)?
            .f_to_kind(Kind::Float)?
            .f_mul_scalar(f64::from(normalisation.rescale))?
            .f_sub(&channels(&normalisation.mean)?)?
            .f_div(&channels(&normalisation.std)?)?;
        pixels.f_to_kind(self.compute.kind())
    }

    fn view(&self, images: &Images<'_>, fidelity: Fidelity) -> Torch<View> {
        let whole = View {
            grids: images.grids.to_vec(),
            ..View::default()
        };
        let keys = images.keys;
        Ok(match fidelity {
            Fidelity::Full | Fidelity::Resolution(_) => whole,
            Fidelity::Patch(side) => View {
                patch: Some(i64::from(side)),
                ..whole
            },
            Fidelity::Layers(count) => View {
                layers: Some(count as usize),
                ..whole
            },
            Fidelity::PatchDropout(_) => {
                let all = self.image_tower.patches(Fidelity::Full);
                let kept = self.image_tower.patches(fidelity);
                let places = Tensor::f_from_slice(&drawn(keys, all, kept))?
                    .f_reshape([keys.len() as i64, kept as i64])?
                    .f_to_device(self.device)?;
                View {
                    kept: Some(places),
                    ..whole
                }
            }
        })
    }

    /// Embeds ids `[rows, length]` as f32 `[rows, embedding_dim]` of length one. They must be below
    /// `vocab_size`. Padding that the embeddings do not depend on is left out.
    pub fn text(&self, ids: &[i64], rows: usize) -> Torch {
        let seen = self.text_seen(ids) as i64;
        let ids = Tensor::f_from_slice(ids)?
            .f_reshape([rows as i64, -1])?
            .f_narrow(1, 0, seen)?
            .f_to_device(self.device)?;
        unit(&self.towers.text(&ids)?)
    }

    /// Returns how many tokens of each of these captions are embedded.
    pub fn text_seen(&self, ids: &[i64]) -> usize {
        captions::seen(&self.config, ids, self.config.text.max_position_embeddings)
    }

    /// Embeds a made-up row, of images of any shape one of each of two shapes, and checks that the
    /// embeddings are finite: finite weights can still overflow in a forward pass. A push waits for
    /// it, so it has no more rows.
    pub fn canary(&self) -> Torch<Result<(), Refusal>> {
        let (tower, text) = (&self.image_tower, &self.config.text);
        let (grids, rows) = match tower.max_patches {
            0 => (vec![], 1),
            most => (vec![[1, most], [most.isqrt(); 2]], 2),
        };
        let pixels: Vec<u8> = (0..rows * tower.pixels(Fidelity::Full) * 3)
            .map(|i| (i * 37 % 256) as u8)
            .collect();
        let images = Images {
            pixels: &pixels,
            keys: &vec![0; rows],
            grids: &grids,
        };
        let losses = self.config.losses();
        let ids: Vec<i64> = match &losses {
            Some(form) => form.made_up(rows),
            None => (0..rows * text.max_position_embeddings)
                .map(|i| (i * 31 % text.vocab_size) as i64)
                .collect(),
        };
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
        let (image, text) = self.both(&images, Fidelity::Full, &plain, &ids)?;
        let problem = match (finite(image)?, finite(text)?) {
            (true, true) => return Ok(Ok(())),
            _ if losses.is_some() => "losses",
            (false, _) => "image embeddings",
            (true, false) => "caption embeddings",
        };
        Ok(Err(Refusal::of_all(format!(
            "every tensor is finite, but the {problem} of a canary batch are not"
        ))))
    }
}

fn exported(config: &ModelConfig, tensors: &Tensors, device: Device) -> Torch<Module> {
    let missing = || TchError::Torch("an exported model without its module".into());
    let exported = config.exported.as_ref().ok_or_else(missing)?;
    Module::load(exported, tensors, device)
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
        Dtype::F64 => Kind::Double,
        Dtype::F32 => Kind::Float,
        Dtype::F16 => Kind::Half,
        Dtype::BF16 => Kind::BFloat16,
        other => return Err(TchError::Kind(format!("{other:?} was never checked"))),
    };
    let shape: Vec<i64> = stored.shape.iter().map(|size| *size as i64).collect();
    Tensor::f_from_data_size(stored.bytes, &shape, kind)?.f_to_device(device)
}

#[cfg(test)]
mod tests;
