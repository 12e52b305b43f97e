//! Reads `config.json` of a model folder. A missing key has transformers' default.
use super::{
    clip,
    exported::Exported,
    fields::{Fields, invalid},
    losses::{Input, LossForm},
    open_clip,
    open_clip_config::OpenClipForm,
    parameters::Parameters,
    positions::Resizes,
    siglip,
};
use crate::{
    error::Result,
    selection::{LOSSES_OF_IMAGES, LOSSES_OF_TEXTS, TOKEN_LOSSES_OF_IMAGES, TOKEN_LOSSES_OF_TEXTS},
};
use serde_json::Value;
use std::sync::Arc;
use superbatch_proto::v1::ComputeDtype;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Family {
    Siglip,
    Clip,
    OpenClip(OpenClipForm),
    Exported,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Activation {
    /// Exact: x Φ(x).
    Gelu,
    /// The tanh approximation of GELU.
    GeluTanh,
    /// x σ(1.702 x).
    QuickGelu,
}

/// The arithmetic of a model; its embeddings are normalised in f32 either way.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Compute {
    F32,
    Bf16,
}

impl Compute {
    /// Returns the arithmetic of a request: if unspecified, bf16 on CUDA and f32 on a CPU.
    pub fn choose(wanted: ComputeDtype, cuda: bool) -> Self {
        match wanted {
            ComputeDtype::F32 => Self::F32,
            ComputeDtype::Bf16 => Self::Bf16,
            ComputeDtype::Unspecified if cuda => Self::Bf16,
            ComputeDtype::Unspecified => Self::F32,
        }
    }

    /// Returns the protocol's name for it.
    pub fn dtype(self) -> ComputeDtype {
        match self {
            Self::F32 => ComputeDtype::F32,
            Self::Bf16 => ComputeDtype::Bf16,
        }
    }

    pub(super) fn kind(self) -> tch::Kind {
        match self {
            Self::F32 => tch::Kind::Float,
            Self::Bf16 => tch::Kind::BFloat16,
        }
    }
}

/// The sizes of one transformer.
#[derive(Debug, Clone, PartialEq)]
pub struct Tower {
    pub hidden_size: usize,
    pub intermediate_size: usize,
    pub num_hidden_layers: usize,
    pub num_attention_heads: usize,
    pub layer_norm_eps: f64,
    pub hidden_act: Activation,
}

#[derive(Debug, Clone, PartialEq)]
pub struct VisionConfig {
    pub tower: Tower,
    /// Height and width of the pixels, in pixels; of images of any shape, those of one that has as
    /// many patches as there are position embeddings.
    pub image_size: usize,
    pub patch_size: usize,
    /// The most patches of an image of any shape (NaFlex); `None` if all images have one size.
    pub max_patches: Option<usize>,
}

impl VisionConfig {
    /// Returns the number of patches along one side. Pixels that fill no patch are left out, as a
    /// strided convolution does.
    pub fn grid(&self) -> usize {
        self.image_size / self.patch_size
    }

    /// Returns the number of patches that are computed for an image, padding included.
    pub fn patches(&self) -> usize {
        self.max_patches.unwrap_or_else(|| self.grid().pow(2))
    }
}

#[derive(Debug, Clone, PartialEq)]
pub struct TextConfig {
    pub tower: Tower,
    pub vocab_size: usize,
    /// Ids in a caption; every caption is cut or padded to it.
    pub max_position_embeddings: usize,
    pub eos_token_id: i64,
    pub pad_token_id: i64,
}

/// Everything about a dual encoder except its weights.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelConfig {
    pub family: Family,
    pub vision: VisionConfig,
    pub text: TextConfig,
    pub embedding_dim: usize,
    pub resizes: Resizes,
    /// log of the logit scale if weights are initialised at random.
    pub logit_scale_init: f64,
    /// The logit bias if weights are initialised at random; `None` if the model may have none.
    pub logit_bias_init: Option<f64>,
    /// The module of [`Family::Exported`].
    pub exported: Option<Arc<Exported>>,
}

impl ModelConfig {
    /// Reads `config.json`.
    ///
    /// # Errors
    /// `ModelInvalid` naming the `file`, and the `field` that is missing, malformed or not
    /// supported.
    pub fn parse(json: &[u8]) -> Result<Self> {
        let value: Value = serde_json::from_slice(json)
            .map_err(|e| invalid("config.json is no valid JSON", "").because(e))?;
        let root = Fields::root(&value)?;
        let siglip = |is_naflex| {
            let (vision, text) = ("vision_config", "text_config");
            Self::siglip(&root.section(vision)?, &root.section(text)?, is_naflex)
        };
        match root.text("model_type", "")? {
            "siglip" => siglip(false),
            "siglip2" => siglip(true),
            "clip" => {
                // Old versions of transformers wrote `*_config_dict`. transformers lets it replace
                // the section as a whole, so a key that is missing in it takes the default, not
                // the section's value.
                let section =
                    |old, new| root.section(if root.get(old).is_some() { old } else { new });
                let vision = section("vision_config_dict", "vision_config")?;
                Self::clip(&root, &vision, &section("text_config_dict", "text_config")?)
            }
            other => {
                let message = format!(
                    "model_type '{other}' is not supported; use a folder of 'siglip', 'siglip2' \
                     or 'clip'"
                );
                Err(invalid(message, "model_type"))
            }
        }
    }

    /// Reads a SigLIP or a SigLIP 2. Those of fixed resolution have one configuration; a NaFlex one
    /// has another vision transformer.
    fn siglip(vision: &Fields, text: &Fields, is_naflex: bool) -> Result<Self> {
        let kind = if is_naflex {
            "siglip2_vision_model"
        } else {
            "siglip_vision_model"
        };
        vision.expect_type(&[kind])?;
        text.expect_type(&["siglip_text_model", "siglip2_text_model"])?;
        if !vision.flag("vision_use_head", true)? {
            return Err(vision.invalid(
                "vision_use_head",
                "false leaves no image embedding to score with",
            ));
        }
        let defaults = Tower {
            hidden_size: 768,
            intermediate_size: 3072,
            num_hidden_layers: 12,
            num_attention_heads: 12,
            layer_norm_eps: 1e-6,
            hidden_act: Activation::GeluTanh,
        };
        let (vision_config, resizes) = if is_naflex {
            (vision.naflex_vision(&defaults)?, Resizes::NAFLEX)
        } else {
            (vision.vision(&defaults, 16)?, Resizes::TRANSFORMERS)
        };
        let text_config = text.text_tower(&defaults, 32_000, 64)?;
        let embedding_dim = text.size("projection_size", text_config.tower.hidden_size)?;
        if embedding_dim != vision_config.tower.hidden_size {
            let message = format!(
                "{embedding_dim} differs from vision_config.hidden_size {}, so images and \
                captions have no common space",
                vision_config.tower.hidden_size
            );
            return Err(text.invalid("projection_size", &message));
        }
        Ok(Self {
            family: Family::Siglip,
            vision: vision_config,
            text: text_config,
            embedding_dim,
            resizes,
            logit_scale_init: 0.0,
            logit_bias_init: None,
            exported: None,
        })
    }

    fn clip(root: &Fields, vision: &Fields, text: &Fields) -> Result<Self> {
        vision.expect_type(&["clip_vision_model"])?;
        text.expect_type(&["clip_text_model"])?;
        let of_vision = Tower {
            hidden_size: 768,
            intermediate_size: 3072,
            num_hidden_layers: 12,
            num_attention_heads: 12,
            layer_norm_eps: 1e-5,
            hidden_act: Activation::QuickGelu,
        };
        let of_text = Tower {
            hidden_size: 512,
            intermediate_size: 2048,
            num_attention_heads: 8,
            ..of_vision.clone()
        };
        Ok(Self {
            family: Family::Clip,
            vision: vision.vision(&of_vision, 32)?,
            text: text.text_tower(&of_text, 49_408, 77)?,
            embedding_dim: root.size("projection_dim", 512)?,
            resizes: Resizes::TRANSFORMERS,
            logit_scale_init: root.number("logit_scale_init_value", 2.6592)?,
            logit_bias_init: None,
            exported: None,
        })
    }

    /// Reads how many patches an image of any shape has at most, which only the preprocessing says.
    ///
    /// # Errors
    /// `ModelInvalid` naming the file, and the field.
    pub(super) fn take_max_patches(&mut self, preprocessor_json: &[u8]) -> Result<()> {
        if let Some(most) = &mut self.vision.max_patches {
            let value: Value = serde_json::from_slice(preprocessor_json).unwrap_or(Value::Null);
            let fields = Fields::root_of("preprocessor_config.json", &value)?;
            *most = fields.size("max_num_patches", 256)?;
        }
        Ok(())
    }

    /// Returns the arithmetic of the model where `wanted` is asked for. An exported module keeps
    /// that of its own code, f32.
    pub fn compute(&self, wanted: Compute) -> Compute {
        match self.family {
            Family::Exported => Compute::F32,
            _ => wanted,
        }
    }

    /// Returns what the model compares, if it gives losses instead of embeddings.
    pub fn losses(&self) -> Option<LossForm> {
        self.exported.as_ref()?.losses
    }

    pub fn model_type(&self) -> &'static str {
        match self.losses().map(|form| (form.input, form.tokens)) {
            Some((Input::Image, 0)) => return LOSSES_OF_IMAGES,
            Some((Input::Image, _)) => return TOKEN_LOSSES_OF_IMAGES,
            Some((Input::Text, 0)) => return LOSSES_OF_TEXTS,
            Some((Input::Text, _)) => return TOKEN_LOSSES_OF_TEXTS,
            None => {}
        }
        match self.family {
            Family::Siglip if self.vision.max_patches.is_some() => "siglip2",
            Family::Siglip => "siglip",
            Family::Clip => "clip",
            Family::OpenClip(_) => "open_clip",
            Family::Exported => "exported",
        }
    }

    /// Returns every tensor of the model by its name in the library's `state_dict`.
    pub fn parameters(&self) -> Parameters {
        match self.family {
            Family::Siglip => siglip::parameters(self),
            Family::Clip => clip::parameters(self),
            Family::OpenClip(form) => open_clip::parameters(self, &form),
            Family::Exported => {
                let exported = self.exported.as_ref();
                exported.map_or_else(Parameters::default, |of| of.parameters.clone())
            }
        }
    }
}

#[cfg(test)]
mod tests;
