//! Any dual encoder, exported as a TorchScript module: its methods `encode_image` and
//! `encode_text` embed, and weights replace its parameters by name.
//!
//! TorchScript is code. A module is loaded only if the operator's settings name its SHA-256.
use super::{
    config::{Activation, Family, ModelConfig, TextConfig, Tower, VisionConfig},
    encoder::Towers,
    entry::View,
    fields::{Fields, invalid_in},
    layers::{Tensors, Torch},
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
    /// Of one image, and of one caption.
    pub(super) flops: [f64; 2],
}

impl PartialEq for Exported {
    fn eq(&self, other: &Self) -> bool {
        self.sha256 == other.sha256 && self.flops == other.flops
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
    let flops = [cost(&fields, "image_flops")?, cost(&fields, "text_flops")?];
    let none = Tower {
        hidden_size: 0,
        intermediate_size: 0,
        num_hidden_layers: 0,
        num_attention_heads: 0,
        layer_norm_eps: 0.0,
        hidden_act: Activation::Gelu,
    };
    let mut config = ModelConfig {
        family: Family::Exported,
        vision: VisionConfig {
            tower: none.clone(),
            image_size: needed(&fields, "image_size", IMAGE_SIZE_MAX)?,
            patch_size: 0,
            max_patches: None,
        },
        text: TextConfig {
            tower: none,
            vocab_size: needed(&fields, "vocab_size", VOCABULARY_MAX)?,
            max_position_embeddings: needed(&fields, "text_length", TEXT_LENGTH_MAX)?,
            eos_token_id: 0,
            pad_token_id: fields.id("pad_token_id", 0)?,
        },
        embedding_dim: needed(&fields, "embedding_dim", EMBEDDING_DIM_MAX)?,
        resizes: Resizes::TRANSFORMERS,
        logit_scale_init: 0.0,
        logit_bias_init: None,
        exported: None,
    };
    let parameters = looked_at(&config, &module)?;
    config.exported = Some(Arc::new(Exported {
        bytes: module,
        sha256,
        parameters,
        flops,
    }));
    Ok(config)
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

/// Embeds one made-up row, and returns the module's parameters.
fn looked_at(config: &ModelConfig, module: &Bytes) -> Result<Parameters> {
    let _no_grad = tch::no_grad_guard();
    let invalid = |what: String| invalid_in(MODULE, format!("{MODULE} {what}"), "");
    let unreadable = |e: TchError| invalid("is no TorchScript module".into()).because(e);
    let module = load(module, Device::Cpu).map_err(unreadable)?;
    let (side, length) = (
        config.vision.image_size as i64,
        config.text.max_position_embeddings as i64,
    );
    let zeros = |shape: &[i64], kind| Tensor::f_zeros(shape, (kind, Device::Cpu));
    let rows = [
        ("encode_image", zeros(&[1, 3, side, side], Kind::Float)),
        ("encode_text", zeros(&[1, length], Kind::Int64)),
    ];
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
    let mut parameters = Parameters::default();
    for (name, tensor) in module.named_parameters().map_err(unreadable)? {
        let shape: Vec<usize> = tensor.size().iter().map(|size| *size as usize).collect();
        parameters.add(name, &shape, Init::Constant(0.0));
    }
    if parameters.get("logit_scale").is_none() {
        return Err(invalid("has no parameter logit_scale".into()));
    }
    if parameters.get("logit_bias").is_none() {
        parameters.add_optional("logit_bias", &[]);
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
pub(super) struct Module(CModule);

impl Module {
    pub(super) fn load(exported: &Exported, tensors: &Tensors, device: Device) -> Torch<Self> {
        let module = load(&exported.bytes, device)?;
        for (name, mut parameter) in module.named_parameters()? {
            parameter.f_copy_(&tensors.get(&name)?.f_view_as(&parameter)?)?;
        }
        Ok(Self(module))
    }
}

impl Towers for Module {
    fn image(&self, pixels: &Tensor, _whole: &View) -> Torch {
        let channels_first = pixels.f_permute([0, 3, 1, 2])?.f_contiguous()?;
        call(&self.0, "encode_image", &channels_first)
    }

    fn text(&self, ids: &Tensor) -> Torch {
        call(&self.0, "encode_text", ids)
    }
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
mod tests {
    use super::*;

    const JSON: &str = r#"{"image_size": 8, "embedding_dim": 4, "text_length": 5,
        "vocab_size": 9, "image_flops": 1, "text_flops": 1}"#;

    #[test]
    fn only_what_the_operator_names_is_loaded() {
        assert_eq!(allowed(&[]).unwrap_err().value("file"), Some(MODULE));
        let module = Bytes::from_static(b"code");
        let error = config(JSON.as_bytes(), module.clone(), &["0".repeat(64)]).unwrap_err();
        let sha256 = "5694d08a2e53ffcae0c3103e5ad6f6076abd960eb1f8a56577040bc1028f702b";
        assert!(error.to_string().contains(sha256), "{error}");
        // It is looked into only now, and is none.
        let error = config(JSON.as_bytes(), module, &[sha256.to_owned()]).unwrap_err();
        assert!(
            error.to_string().contains("no TorchScript module"),
            "{error}"
        );
    }

    #[test]
    fn sizes_are_bounded_before_anything_is_made_of_them() {
        let module = Bytes::from_static(b"code");
        let sha256 = ["5694d08a2e53ffcae0c3103e5ad6f6076abd960eb1f8a56577040bc1028f702b".into()];
        for (name, most) in [
            ("image_size", IMAGE_SIZE_MAX),
            ("embedding_dim", EMBEDDING_DIM_MAX),
            ("text_length", TEXT_LENGTH_MAX),
            ("vocab_size", VOCABULARY_MAX),
        ] {
            let field = |size: usize| {
                let mut json: Value = serde_json::from_str(JSON).unwrap();
                json[name] = size.into();
                let json = json.to_string();
                let error = config(json.as_bytes(), module.clone(), &sha256).unwrap_err();
                error.value("field").map(str::to_owned)
            };
            assert_eq!(field(most + 1).as_deref(), Some(name));
            assert_ne!(field(most).as_deref(), Some(name));
        }
    }

    #[test]
    fn what_is_missing_is_named() {
        let (module, sha256) = (
            Bytes::from_static(b"code"),
            "5694d08a2e53ffcae0c3103e5ad6f6076abd960eb1f8a56577040bc1028f702b".to_owned(),
        );
        let names = [
            "image_size",
            "embedding_dim",
            "text_length",
            "vocab_size",
            "image_flops",
            "text_flops",
        ];
        for name in names {
            let mut json: Value = serde_json::from_str(JSON).unwrap();
            json.as_object_mut().unwrap().remove(name);
            let json = json.to_string();
            let error = config(
                json.as_bytes(),
                module.clone(),
                std::slice::from_ref(&sha256),
            )
            .unwrap_err();
            assert_eq!(error.value("field"), Some(name));
        }
    }
}
