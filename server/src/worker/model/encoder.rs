//! A loaded model: turns pixels and ids into L2-normalised embeddings.
use super::{
    captions,
    clip::Clip,
    config::{Compute, Family, ModelConfig},
    entry::{View, drawn},
    exported::Module,
    flops::{self, TextTower},
    layers::{Tensors, Torch},
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
        Ok(Self {
            towers,
            config: config.clone(),
            image_tower: flops::image_tower(config),
            compute,
            device,
            logit_scale: scalar("logit_scale")?.unwrap_or_default().exp(),
            logit_bias: scalar("logit_bias")?,
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
        let pixels = pixels.f_to_kind(self.compute.kind())?;
        unit(&self.towers.image(&pixels, &self.view(images, fidelity)?)?)
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

    /// Embeds two made-up rows and checks that the embeddings are finite: finite weights can still
    /// overflow in a forward pass.
    pub fn canary(&self) -> Torch<Result<(), Refusal>> {
        const ROWS: usize = 2;
        let (tower, text) = (&self.image_tower, &self.config.text);
        let pixels: Vec<u8> = (0..ROWS * tower.pixels(Fidelity::Full) * 3)
            .map(|i| (i * 37 % 256) as u8)
            .collect();
        let grids = match tower.max_patches {
            0 => vec![],
            most => vec![[1, most], [most.isqrt(); 2]],
        };
        let images = Images {
            pixels: &pixels,
            keys: &[0; ROWS],
            grids: &grids,
        };
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
        let problem = if !finite(self.image(&images, Fidelity::Full, &plain)?)? {
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
mod tests {
    use super::*;
    use crate::worker::model::{init, open_clip_config};

    const SMALL: &str = r#""hidden_size": 32, "intermediate_size": 64,
        "num_hidden_layers": 3, "num_attention_heads": 4"#;

    fn encoder(config: &ModelConfig) -> Encoder {
        let weights = init::random(&config.parameters(), 5).unwrap();
        let snapshot = Snapshot::parse(vec![weights]).unwrap();
        Encoder::load(config, &snapshot, Compute::F32, Device::Cpu).unwrap()
    }

    /// Of captions that end after 2, 9 and 5 of 30 tokens: how far their embeddings are from those
    /// of the whole length, and how many tokens were embedded.
    fn apart(config: &ModelConfig, end: i64, pad: i64) -> (f64, usize) {
        let encoder = encoder(config);
        let row = |length: usize| {
            let word = |n: usize| 1 + (n * length) as i64 % 50;
            let mut row: Vec<i64> = (0..30).map(word).collect();
            row[length - 1] = end;
            row[length..].fill(pad);
            row
        };
        let ids: Vec<i64> = [2, 9, 5].into_iter().flat_map(row).collect();
        let whole = Tensor::from_slice(&ids).reshape([3, 30]);
        let whole = unit(&encoder.towers.text(&whole).unwrap()).unwrap();
        let cut = encoder.text(&ids, 3).unwrap();
        let apart = (whole - cut).abs().max().double_value(&[]);
        (apart, encoder.text_seen(&ids))
    }

    #[test]
    fn captions_without_their_padding_are_the_same_to_a_causal_tower() {
        for (eos, end, pad) in [(60, 60, 0), (60, 60, 60), (2, 63, 0)] {
            let json = format!(
                r#"{{"model_type": "clip", "projection_dim": 16,
                    "vision_config": {{{SMALL}, "image_size": 8, "patch_size": 4}},
                    "text_config": {{{SMALL}, "max_position_embeddings": 30, "vocab_size": 64,
                    "eos_token_id": {eos}}}}}"#
            );
            let config = ModelConfig::parse(json.as_bytes()).unwrap();
            let (apart, seen) = apart(&config, end, pad);
            assert!(apart < 1e-6 && seen == 16, "{eos} {pad}: {apart} of {seen}");
        }
        let json = r#"{"model_cfg": {"embed_dim": 16,
            "vision_cfg": {"image_size": 8, "patch_size": 4, "width": 32, "layers": 1,
                "head_width": 8},
            "text_cfg": {"context_length": 30, "vocab_size": 64, "width": 32, "heads": 4,
                "layers": 3}}}"#;
        let config = open_clip_config::parse(json.as_bytes()).unwrap();
        let (apart, seen) = apart(&config, 63, 0);
        assert!(apart < 1e-6 && seen == 16, "{apart} of {seen}");
    }

    fn naflex() -> Encoder {
        let json = format!(
            r#"{{"model_type": "siglip2",
                "vision_config": {{{SMALL}, "num_patches": 16, "patch_size": 2}},
                "text_config": {{{SMALL}, "max_position_embeddings": 30, "vocab_size": 64}}}}"#
        );
        let mut config = ModelConfig::parse(json.as_bytes()).unwrap();
        let most = br#"{"max_num_patches": 12}"#;
        config.take_max_patches(most).unwrap();
        encoder(&config)
    }

    #[test]
    fn only_an_images_own_patches_decide_its_embedding() {
        const ROW: usize = 12 * 2 * 2 * 3;
        let (encoder, plain) = (naflex(), [0.5; 3]);
        let normalisation = Normalisation {
            rescale: 1.0 / 255.0,
            mean: plain,
            std: plain,
        };
        let embedded = |pixels: &[u8], grids: &[[u32; 2]]| {
            let images = Images {
                pixels,
                keys: &vec![0; grids.len()],
                grids,
            };
            encoder.image(&images, Fidelity::Full, &normalisation)
        };
        let apart = |a: &Tensor, b: &Tensor| (a - b).abs().max().double_value(&[]);
        let mut pixels: Vec<u8> = (0..2 * ROW).map(|i| (i * 37 % 251) as u8).collect();
        let grids = [[2, 3], [3, 4]];
        let both = embedded(&pixels, &grids).unwrap();
        assert_eq!(both.size(), [2, 32]);
        // What is behind the six patches of the first image, and the image beside it.
        pixels[ROW / 2..ROW].fill(0);
        let alone = embedded(&pixels[..ROW], &grids[..1]).unwrap();
        assert!(apart(&alone, &both.narrow(0, 0, 1)) < 1e-5);
        // The last of its own patches, and its shape.
        let turned = embedded(&pixels[..ROW], &[[3, 2]]).unwrap();
        assert!(apart(&alone, &turned) > 1e-4);
        pixels[ROW / 2 - 1] ^= 128;
        let other = embedded(&pixels[..ROW], &grids[..1]).unwrap();
        assert!(apart(&alone, &other) > 1e-4);
        for wrong in [&[][..], &[[4, 4]][..]] {
            assert!(embedded(&pixels[..ROW], wrong).is_err(), "{wrong:?}");
        }
        assert!(encoder.canary().unwrap().is_ok());
    }

    #[test]
    fn captions_of_a_tower_that_sees_both_ways_keep_their_padding() {
        let json = format!(
            r#"{{"model_type": "siglip",
                "vision_config": {{{SMALL}, "image_size": 8, "patch_size": 4}},
                "text_config": {{{SMALL}, "max_position_embeddings": 30, "vocab_size": 64}}}}"#
        );
        let config = ModelConfig::parse(json.as_bytes()).unwrap();
        assert_eq!(apart(&config, 1, 0), (0.0, 30));
    }
}
