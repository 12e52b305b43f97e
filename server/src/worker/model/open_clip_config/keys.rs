//! The keys of `open_clip_config.json`. Each is read, changes nothing, or refuses the model.
use crate::{error::Result, worker::model::fields::Fields};
use serde_json::Value;

/// Keys of a tower that do not change what a checkpoint computes.
pub(super) const PASSED_OVER: [&str; 8] = [
    "patch_dropout",
    "output_tokens",
    "timm_model_pretrained",
    "timm_drop",
    "timm_drop_path",
    "hf_model_pretrained",
    "attn_pooler_queries",
    "attn_pooler_heads",
];
/// Keys that must have their default value, and what another value would mean.
const NOT_SUPPORTED: [(&str, &str); 15] = [
    ("ls_init_value", "layer scale"),
    ("attentional_pool", "CoCa's attentional pooling"),
    ("embed_cls", "CoCa's class token in the caption"),
    ("use_pad_mask", "a mask of padding"),
    ("block_type", "custom blocks"),
    ("qk_norm", "normalised queries and keys"),
    ("scaled_cosine_attn", "cosine attention"),
    ("scale_heads", "scaled heads"),
    ("scale_attn_inner", "a norm inside the attention"),
    ("scale_attn", "a norm after the attention"),
    ("scale_fc", "a norm inside the MLP"),
    ("hf_model_name", "a text tower of transformers"),
    ("timm_model_kwargs", "a timm model of its own making"),
    ("tokenizer_mode", "another order of special tokens"),
    ("multimodal_cfg", "CoCa's decoder of captions"),
];
pub(super) const VISION: [&str; 17] = [
    "layers",
    "width",
    "head_width",
    "mlp_ratio",
    "patch_size",
    "image_size",
    "no_ln_pre",
    "pos_embed_type",
    "final_ln_after_pool",
    "pool_type",
    "act_kwargs",
    "norm_kwargs",
    "timm_model_name",
    "timm_pool",
    "timm_proj",
    "timm_proj_bias",
    "correct_cls_mask",
];
pub(super) const TEXT: [&str; 19] = [
    "context_length",
    "vocab_size",
    "hf_tokenizer_name",
    "tokenizer_kwargs",
    "width",
    "heads",
    "layers",
    "mlp_ratio",
    "pad_id",
    "eos_id",
    "no_causal_mask",
    "final_ln_after_pool",
    "pool_type",
    "proj_bias",
    "proj_type",
    "act_kwargs",
    "norm_kwargs",
    "hf_proj_type",
    "hf_pooler_type",
];
pub(super) const MODEL: [&str; 9] = [
    "embed_dim",
    "vision_cfg",
    "text_cfg",
    "quick_gelu",
    "init_logit_scale",
    "init_logit_bias",
    "nonscalar_logit_scale",
    "custom_text",
    "output_dict",
];
/// Keys of `norm_kwargs`, `act_kwargs` and `tokenizer_kwargs`.
pub(super) const NORM: [&str; 1] = ["eps"];
pub(super) const ACTIVATION: [&str; 1] = ["approximate"];
pub(super) const TOKENIZER: [&str; 2] = ["clean", "strip_sep_token"];
/// The way out for a model that is not supported.
pub(super) const EXPORT: &str =
    "export the model as TorchScript (\"Any other dual encoder\" in docs/models.md)";

/// Refuses unknown keys, and values of architectures that are not supported. Ignoring an unknown
/// key would embed with another model than the one that was trained, without an error.
pub(super) fn check_known_keys(fields: &Fields, sets: &[&[&str]]) -> Result<()> {
    for key in fields.keys() {
        let unsupported = NOT_SUPPORTED.iter().find(|(name, _)| *name == key);
        if let Some((_, what)) = unsupported {
            let is_default = match fields.get(key) {
                None => true,
                Some(Value::Bool(on)) => !on,
                Some(Value::String(kind)) => kind.is_empty() || kind == "default",
                Some(_) => false,
            };
            if !is_default {
                return Err(fields.invalid(key, &format!("{what} is not supported; {EXPORT}")));
            }
        } else if !sets.iter().any(|set| set.contains(&key)) {
            let problem = format!(
                "is not known, so the model may be another; remove the key if it changes nothing, \
                 or {EXPORT}"
            );
            return Err(fields.invalid(key, &problem));
        }
    }
    Ok(())
}

/// Returns the arguments that a part of the model is made with, of which only some are known.
pub(super) fn arguments<'a>(
    fields: &Fields<'a>,
    key: &'static str,
    known: &[&str],
) -> Result<Fields<'a>> {
    let arguments = fields.section(key)?;
    check_known_keys(&arguments, &[known])?;
    Ok(arguments)
}
