//! A model exported as a TorchScript module: a dual encoder, whose methods `encode_image` and
//! `encode_text` embed, or one that gives losses. Weights replace its parameters by name.
//!
//! TorchScript is code. A module is loaded only if the operator's settings name its SHA-256.
use super::{
    config::{Activation, Family, ModelConfig, TextConfig, Tower, VisionConfig},
    encoder::Towers,
    entry::View,
    fields::{Fields, invalid_in},
    layers::{Tensors, Torch},
    losses::{Input, LossForm},
    parameters::{Init, Parameters},
    positions::Resizes,
};
use crate::error::{Error, Result};
use bytes::Bytes;
use serde_json::Value;
use sha2::{Digest, Sha256};
use std::sync::Arc;
use superbatch_proto::v1::Reason;
use tch::{CModule, Device, IValue, Kind, TchError, Tensor};

/// What a folder says about its module.
pub(super) const FILE: &str = "module.json";
/// Largest values of `module.json`, which no setting pins: inputs of these sizes are made, to call
/// the module, before anything contradicts them.
const IMAGE_SIZE_MAX: usize = 4096;
const TEXT_LENGTH_MAX: usize = 1 << 16;
const EMBEDDING_DIM_MAX: usize = 1 << 16;
const VOCABULARY_MAX: usize = 1 << 24;
/// The module itself.
pub(super) const MODULE: &str = "module.pt";

/// A module that the operator allows.
#[derive(Debug)]
pub struct Exported {
    pub(super) bytes: Bytes,
    sha256: String,
    pub(super) parameters: Parameters,
    /// Of one image, and of one caption. A loss is all in one: of images, or of texts.
    pub(super) flops: [f64; 2],
    /// What the module compares, if it gives losses.
    pub(super) losses: Option<LossForm>,
}

impl PartialEq for Exported {
    fn eq(&self, other: &Self) -> bool {
        self.sha256 == other.sha256 && self.flops == other.flops && self.losses == other.losses
    }
}

/// Refuses all modules where the operator allows none, before any is read.
pub(super) fn allowed(pinned: &[String]) -> Result<()> {
    if !pinned.is_empty() {
        return Ok(());
    }
    let message = format!(
        "{MODULE} is TorchScript, which is code: it runs only if worker.exported_modules names its \
         SHA-256, and that names none"
    );
    Err(invalid_in(MODULE, message, ""))
}

/// Reads `module.json`, and loads the module once to see what it takes and returns.
///
/// # Errors
/// `ModelInvalid` naming the file or the field: if the module is not among `pinned`, is not
/// TorchScript, or does not do what `module.json` says.
pub(super) fn config(json: &[u8], module: Bytes, pinned: &[String]) -> Result<ModelConfig> {
    let sha256: String = Sha256::digest(&module)
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect();
    if !pinned.contains(&sha256) {
        let message = format!(
            "{MODULE} has SHA-256 {sha256}, which worker.exported_modules does not name: \
             TorchScript is code; add it there if you exported the module yourself"
        );
        return Err(invalid_in(MODULE, message, ""));
    }
    let value: Value = serde_json::from_slice(json)
        .map_err(|e| invalid_in(FILE, format!("{FILE} is no valid JSON"), "").because(e))?;
    let fields = Fields::root_of(FILE, &value)?;
    let (mut config, flops, losses) = described(&fields)?;
    let parameters = looked_at(&config, losses.as_ref(), &module)?;
    config.exported = Some(Arc::new(Exported {
        bytes: module,
        sha256,
        parameters,
        flops,
        losses,
    }));
    Ok(config)
}

/// What `module.json` says: sizes, the cost of both towers, and the form of losses.
type Described = (ModelConfig, [f64; 2], Option<LossForm>);

fn described(fields: &Fields) -> Result<Described> {
    let size = |key: &'static str, most: usize| needed(fields, key, most);
    let losses = LossForm::read(fields, size, [TEXT_LENGTH_MAX, VOCABULARY_MAX])?;
    let flops = match losses.map(|form| form.input) {
        None => [cost(fields, "image_flops")?, cost(fields, "text_flops")?],
        Some(Input::Image) => [cost(fields, "flops")?, 0.0],
        Some(Input::Text) => [0.0, cost(fields, "flops")?],
    };
    let image_size = match losses.map(|form| form.input) {
        Some(Input::Text) => 0,
        _ => size("image_size", IMAGE_SIZE_MAX)?,
    };
    let (embedding_dim, vocab_size, length) = match &losses {
        None => (
            size("embedding_dim", EMBEDDING_DIM_MAX)?,
            size("vocab_size", VOCABULARY_MAX)?,
            size("text_length", TEXT_LENGTH_MAX)?,
        ),
        Some(form) => (form.width(), form.ids_below(), form.ids()),
    };
    let none = Tower {
        hidden_size: 0,
        intermediate_size: 0,
        num_hidden_layers: 0,
        num_attention_heads: 0,
        layer_norm_eps: 0.0,
        hidden_act: Activation::Gelu,
    };
    let config = ModelConfig {
        family: Family::Exported,
        vision: VisionConfig {
            tower: none.clone(),
            image_size,
            patch_size: 0,
            max_patches: None,
        },
        text: TextConfig {
            tower: none,
            vocab_size,
            max_position_embeddings: length,
            eos_token_id: 0,
            pad_token_id: fields.id("pad_token_id", 0)?,
        },
        embedding_dim,
        resizes: Resizes::TRANSFORMERS,
        logit_scale_init: 0.0,
        logit_bias_init: None,
        exported: None,
    };
    Ok((config, flops, losses))
}

fn needed(fields: &Fields, key: &str, most: usize) -> Result<usize> {
    if fields.get(key).is_none() {
        return Err(fields.invalid(key, "is missing"));
    }
    let size = fields.size(key, 1)?;
    if size > most {
        return Err(fields.invalid(key, &format!("is {size}; it is at most {most}")));
    }
    Ok(size)
}

fn cost(fields: &Fields, key: &str) -> Result<f64> {
    let flops = fields.number(key, 0.0)?;
    if flops > 0.0 {
        return Ok(flops);
    }
    let problem = "should be the operations of one forward pass, above 0; accounts are made of it";
    Err(fields.invalid(key, problem))
}

/// Puts one made-up row through the module, and returns its parameters.
fn looked_at(
    config: &ModelConfig,
    losses: Option<&LossForm>,
    module: &Bytes,
) -> Result<Parameters> {
    let _no_grad = tch::no_grad_guard();
    let invalid = |what: String| invalid_in(MODULE, format!("{MODULE} {what}"), "");
    let unreadable = |e: TchError| invalid("is no TorchScript module".into()).because(e);
    let module = load(module, Device::Cpu).map_err(unreadable)?;
    let (side, length) = (
        config.vision.image_size as i64,
        config.text.max_position_embeddings as i64,
    );
    let zeros = |shape: &[i64], kind| Tensor::f_zeros(shape, (kind, Device::Cpu));
    let (pixels, ids) = (
        zeros(&[1, 3, side, side], Kind::Float),
        zeros(&[1, length], Kind::Int64),
    );
    if let Some(form) = losses {
        let called = pixels.and_then(|pixels| form.call(&module, &pixels, &ids?));
        let what = format!("cannot be called by {}", form.method());
        drop(called.map_err(|e| invalid(what).because(e))?);
        return all_parameters(&module).map_err(unreadable);
    }
    let rows = [("encode_image", pixels), ("encode_text", ids)];
    for (method, row) in rows {
        let shape = row
            .and_then(|row| call(&module, method, &row))
            .map_err(|e| invalid(format!("cannot be called by {method}")).because(e))?
            .size();
        let wanted = [1, config.embedding_dim as i64];
        if shape != wanted {
            let what = format!("makes {shape:?} by {method} of one row; {FILE} says {wanted:?}");
            return Err(invalid(what));
        }
    }
    let mut parameters = all_parameters(&module).map_err(unreadable)?;
    if parameters.get("logit_scale").is_none() {
        return Err(invalid("has no parameter logit_scale".into()));
    }
    if parameters.get("logit_bias").is_none() {
        parameters.add_optional("logit_bias", &[]);
    }
    Ok(parameters)
}

fn all_parameters(module: &CModule) -> Torch<Parameters> {
    let mut parameters = Parameters::default();
    for (name, tensor) in module.named_parameters()? {
        let shape: Vec<usize> = tensor.size().iter().map(|size| *size as usize).collect();
        parameters.add(name, &shape, Init::Constant(0.0));
    }
    Ok(parameters)
}

fn load(module: &Bytes, device: Device) -> Torch<CModule> {
    // The profiling executor compiles a module anew after its first calls, so that later embeddings
    // of the same row would differ in their last bits.
    tch::jit::f_set_profiling_mode(false)?;
    let mut module = CModule::load_data_on_device(&mut &module[..], device)?;
    module.f_set_eval()?;
    Ok(module)
}

fn call(module: &CModule, method: &str, rows: &Tensor) -> Torch {
    let given = [IValue::Tensor(rows.shallow_clone())];
    match module.method_is(method, &given)? {
        IValue::Tensor(found) => Ok(found),
        other => Err(TchError::Torch(format!(
            "{method} returned {other:?}, not a tensor"
        ))),
    }
}

/// A module on a device, with given weights.
pub(super) struct Module {
    module: CModule,
    losses: Option<LossForm>,
}

impl Module {
    pub(super) fn load(exported: &Exported, tensors: &Tensors, device: Device) -> Torch<Self> {
        let module = load(&exported.bytes, device)?;
        for (name, mut parameter) in module.named_parameters()? {
            parameter.f_copy_(&tensors.get(&name)?.f_view_as(&parameter)?)?;
        }
        Ok(Self {
            module,
            losses: exported.losses,
        })
    }
}

impl Towers for Module {
    fn image(&self, pixels: &Tensor, _whole: &View) -> Torch {
        call(&self.module, "encode_image", &channels_first(pixels)?)
    }

    fn text(&self, ids: &Tensor) -> Torch {
        call(&self.module, "encode_text", ids)
    }

    fn losses(&self, pixels: &Tensor, ids: &Tensor) -> Torch<(Tensor, Tensor)> {
        let none = || TchError::Torch("a dual encoder gives no losses".into());
        let form = self.losses.ok_or_else(none)?;
        let pixels = match form.input {
            Input::Image => channels_first(pixels)?,
            Input::Text => pixels.shallow_clone(),
        };
        form.call(&self.module, &pixels, ids)
    }
}

fn channels_first(pixels: &Tensor) -> Torch {
    pixels.f_permute([0, 3, 1, 2])?.f_contiguous()
}

/// Returns the error for random weights of a module, which has no initial distributions.
pub(in crate::worker) fn no_random_weights(uri: &str) -> Error {
    let message = format!(
        "{uri} is an exported module, of which the service can make no random weights; push them \
         first, or name a snapshot"
    );
    Error::new(Reason::ModelInvalid, message).with("field", "random_seed")
}

#[cfg(test)]
mod tests;
