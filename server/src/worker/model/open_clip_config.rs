//! Reads `open_clip_config.json`, as open_clip 3 publishes it beside its weights.
mod keys;

use self::keys::{EXPORT, PASSED_OVER, arguments, check_known_keys};
use super::{
    config::{Activation, Family, ModelConfig, TextConfig, Tower, VisionConfig},
    fields::Fields,
    positions::Resizes,
    timm,
};
use crate::error::Result;
use serde_json::Value;

pub const FILE: &str = "open_clip_config.json";

/// The architecture of open_clip's towers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OpenClipForm {
    pub vision: VisionForm,
    /// Names of the text tower's tensors begin with `text.` (`custom_text`).
    pub custom_text: bool,
    pub causal: bool,
    pub pool: TextPool,
    pub text_projection: TextProjection,
    pub clean: Clean,
    /// The separator that ends captions is 0 to the model (`strip_sep_token`).
    pub strips_separator: bool,
    /// One-element logits have a shape of one dimension (`nonscalar_logit_scale`).
    pub logits_are_vectors: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum VisionForm {
    /// open_clip's own.
    Vit {
        pre_norm: bool,
        /// The mean of all patches instead of the class token.
        average: bool,
        norm_after_pool: bool,
    },
    /// A trunk of timm with attention pooling, and a projection (with a bias or not) or none.
    Timm { projection: Option<bool> },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TextPool {
    First,
    Last,
    /// The token of the largest id.
    Argmax,
    /// The first token of that id.
    Eos(i64),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TextProjection {
    None,
    /// `x @ text_projection`.
    Matrix,
    /// With a bias.
    Linear,
}

/// How a caption is cleaned before it is tokenised.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Clean {
    /// Nothing beyond the tokenizer's own normalizer.
    Nothing,
    /// Runs of white space become single spaces.
    Whitespace,
    /// Also lower-cased.
    Lower,
    /// Also without punctuation; underscores become spaces.
    Canonicalize,
}

/// # Errors
/// `ModelInvalid` naming the `field` that is missing, malformed or not supported.
pub fn parse(json: &[u8]) -> Result<ModelConfig> {
    let value: Value = serde_json::from_slice(json).map_err(|e| {
        super::fields::invalid_in(FILE, format!("{FILE} is no valid JSON"), "").because(e)
    })?;
    let model = Fields::root_of(FILE, &value)?.section("model_cfg")?;
    check_known_keys(&model, &[&keys::MODEL])?;
    let (vision, text) = (model.section("vision_cfg")?, model.section("text_cfg")?);
    check_known_keys(&vision, &[&keys::VISION, &PASSED_OVER])?;
    check_known_keys(&text, &[&keys::TEXT, &PASSED_OVER])?;
    let quick = model.flag("quick_gelu", false)?;
    let embedding_dim = model.size("embed_dim", 512)?;
    let (vision_config, form) = self::vision(&vision, quick, embedding_dim)?;
    let (text_config, of_text) = self::text(&text, quick, embedding_dim)?;
    Ok(ModelConfig {
        family: Family::OpenClip(OpenClipForm {
            vision: form,
            custom_text: model.flag("custom_text", false)?,
            logits_are_vectors: model.flag("nonscalar_logit_scale", false)?,
            ..of_text
        }),
        vision: vision_config,
        text: text_config,
        embedding_dim,
        resizes: match form {
            VisionForm::Timm { .. } => Resizes::TIMM,
            VisionForm::Vit { .. } => Resizes::OPEN_CLIP,
        },
        logit_scale_init: model.number("init_logit_scale", (1.0_f64 / 0.07).ln())?,
        logit_bias_init: match model.get("init_logit_bias") {
            None | Some(Value::Null) => None,
            Some(_) => Some(model.number("init_logit_bias", 0.0)?),
        },
        exported: None,
    })
}

fn activation(fields: &Fields, quick: bool) -> Result<Activation> {
    let approximate = arguments(fields, "act_kwargs", &keys::ACTIVATION)?;
    match (quick, approximate.text("approximate", "none")?) {
        (true, _) => Ok(Activation::QuickGelu),
        (false, "none") => Ok(Activation::Gelu),
        (false, "tanh") => Ok(Activation::GeluTanh),
        (false, other) => {
            let problem = format!("'{other}' is not supported, only none and tanh");
            Err(approximate.invalid("approximate", &problem))
        }
    }
}

fn tower(fields: &Fields, width: usize, heads: usize, quick: bool) -> Result<Tower> {
    if let Some(Value::Array(_)) = fields.get("layers") {
        let problem = format!("a list makes a ResNet, which is not supported; {EXPORT}");
        return Err(fields.invalid("layers", &problem));
    }
    if heads == 0 || !width.is_multiple_of(heads) {
        return Err(fields.invalid(
            "width",
            &format!("{width} is not divisible by {heads} heads"),
        ));
    }
    Ok(Tower {
        hidden_size: width,
        intermediate_size: (width as f64 * fields.number("mlp_ratio", 4.0)?) as usize,
        num_hidden_layers: fields.size("layers", 12)?,
        num_attention_heads: heads,
        layer_norm_eps: arguments(fields, "norm_kwargs", &keys::NORM)?.number("eps", 1e-5)?,
        hidden_act: activation(fields, quick)?,
    })
}

fn vision(fields: &Fields, quick: bool, dim: usize) -> Result<(VisionConfig, VisionForm)> {
    if let Some(name) = fields.get("timm_model_name") {
        let name = name.as_str().unwrap_or_default();
        return timm_trunk(fields, name, dim);
    }
    let width = fields.size("width", 768)?;
    let heads = width / fields.size("head_width", 64)?;
    let config = VisionConfig {
        tower: tower(fields, width, heads, quick)?,
        image_size: fields.size("image_size", 224)?,
        patch_size: fields.size("patch_size", 16)?,
        max_patches: None,
    };
    if config.grid() == 0 {
        return Err(fields.invalid("patch_size", "is larger than image_size"));
    }
    let average = match fields.text("pool_type", "tok")? {
        "tok" => false,
        "avg" => true,
        other => {
            let problem = format!("'{other}' is not supported, only tok and avg");
            return Err(fields.invalid("pool_type", &problem));
        }
    };
    let form = VisionForm::Vit {
        pre_norm: !fields.flag("no_ln_pre", false)?,
        average,
        norm_after_pool: fields.flag("final_ln_after_pool", false)?,
    };
    Ok((config, form))
}

fn timm_trunk(fields: &Fields, name: &str, dim: usize) -> Result<(VisionConfig, VisionForm)> {
    let Some(trunk) = timm::trunk(name) else {
        let problem = format!(
            "'{name}' is not supported, only timm's vit_*_siglip_* with attention pooling; {EXPORT}"
        );
        return Err(fields.invalid("timm_model_name", &problem));
    };
    let pool = fields.text("timm_pool", "avg")?;
    if !["map", ""].contains(&pool) {
        let problem = format!("'{pool}' is not supported, only map");
        return Err(fields.invalid("timm_pool", &problem));
    }
    let projection = match fields.text("timm_proj", "linear")? {
        "linear" => Some(fields.flag("timm_proj_bias", false)?),
        "none" => None,
        other => {
            let problem = format!("'{other}' is not supported, only linear and none");
            return Err(fields.invalid("timm_proj", &problem));
        }
    };
    let image_size = fields.size("image_size", trunk.image_size)?;
    if projection.is_none() && trunk.tower.hidden_size != dim {
        let problem = format!(
            "none leaves {} numbers, and embed_dim is {dim}",
            trunk.tower.hidden_size
        );
        return Err(fields.invalid("timm_proj", &problem));
    }
    let config = VisionConfig {
        image_size,
        ..trunk
    };
    Ok((config, VisionForm::Timm { projection }))
}

/// Returns the text tower; what is said elsewhere of the form is left at its default.
fn text(fields: &Fields, quick: bool, dim: usize) -> Result<(TextConfig, OpenClipForm)> {
    let width = fields.size("width", 512)?;
    let tower = tower(fields, width, fields.size("heads", 8)?, quick)?;
    let eos = fields.id("eos_id", 2)?;
    let pool = match fields.text("pool_type", "argmax")? {
        "argmax" => TextPool::Argmax,
        "eos" => TextPool::Eos(eos),
        "first" => TextPool::First,
        "last" => TextPool::Last,
        other => {
            let problem = format!("'{other}' is not supported, only argmax, eos, first and last");
            return Err(fields.invalid("pool_type", &problem));
        }
    };
    let text_projection = match (
        fields.text("proj_type", "linear")?,
        fields.flag("proj_bias", false)?,
    ) {
        ("linear", false) => TextProjection::Matrix,
        ("linear", true) => TextProjection::Linear,
        ("none", _) if width == dim => TextProjection::None,
        ("none", _) => {
            let problem = format!("none leaves {width} numbers, and embed_dim is {dim}");
            return Err(fields.invalid("proj_type", &problem));
        }
        (other, _) => {
            let problem = format!("'{other}' is not supported, only linear and none");
            return Err(fields.invalid("proj_type", &problem));
        }
    };
    let (clean, strips_separator) = tokenizer(fields)?;
    let config = TextConfig {
        tower,
        vocab_size: fields.size("vocab_size", 49_408)?,
        max_position_embeddings: fields.size("context_length", 77)?,
        eos_token_id: eos,
        pad_token_id: fields.id("pad_id", 0)?,
    };
    let form = OpenClipForm {
        vision: VisionForm::Timm { projection: None },
        custom_text: false,
        causal: !fields.flag("no_causal_mask", false)?,
        pool,
        text_projection,
        clean,
        strips_separator,
        logits_are_vectors: false,
    };
    Ok((config, form))
}

/// Returns how captions are cleaned, and whether the separator is stripped.
fn tokenizer(fields: &Fields) -> Result<(Clean, bool)> {
    let kwargs = arguments(fields, "tokenizer_kwargs", &keys::TOKENIZER)?;
    let of_transformers = fields.get("hf_tokenizer_name").is_some();
    let clean = match kwargs.text(
        "clean",
        if of_transformers {
            "whitespace"
        } else {
            "lower"
        },
    )? {
        "whitespace" => Clean::Whitespace,
        "lower" => Clean::Lower,
        "canonicalize" => Clean::Canonicalize,
        other => {
            let problem =
                format!("'{other}' is not supported, only whitespace, lower and canonicalize");
            return Err(kwargs.invalid("clean", &problem));
        }
    };
    Ok((clean, kwargs.flag("strip_sep_token", false)?))
}

#[cfg(test)]
mod tests;
