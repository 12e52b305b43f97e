//! Typed reads from `config.json`, with errors that name the field.
use super::config::{Activation, TextConfig, Tower, VisionConfig};
use crate::error::{Error, Result};
use serde_json::{Map, Value};
use superbatch_proto::v1::Reason;

const CONFIG: &str = "config.json";
/// The largest size, count or id that is accepted. Products of two of them stay far from overflow.
const NUMBER_MAX: u64 = 1 << 24;

/// Returns the error `ModelInvalid`, with the field of config.json if one is at fault.
pub(super) fn invalid(message: impl Into<String>, field: &str) -> Error {
    invalid_in(CONFIG, message, field)
}

/// Returns the error `ModelInvalid`, with the field of another file.
pub(super) fn invalid_in(file: &str, message: impl Into<String>, field: &str) -> Error {
    let error = Error::new(Reason::ModelInvalid, message).with("file", file);
    if field.is_empty() {
        error
    } else {
        error.with("field", field)
    }
}

/// One object of config.json. A key that is absent or null takes its default.
pub(super) struct Fields<'a> {
    file: &'static str,
    path: &'static str,
    map: Option<&'a Map<String, Value>>,
}

impl<'a> Fields<'a> {
    /// Returns the whole of config.json.
    pub(super) fn root(value: &'a Value) -> Result<Self> {
        Self::root_of(CONFIG, value)
    }

    /// Returns the whole of a file.
    pub(super) fn root_of(file: &'static str, value: &'a Value) -> Result<Self> {
        let map = value
            .as_object()
            .ok_or_else(|| invalid_in(file, format!("{file} is no JSON object"), ""))?;
        Ok(Self {
            file,
            path: "",
            map: Some(map),
        })
    }

    /// Returns an object inside this one; empty if it is absent.
    pub(super) fn section(&self, key: &'static str) -> Result<Self> {
        let map = match self.get(key) {
            None => None,
            Some(value) => Some(
                value
                    .as_object()
                    .ok_or_else(|| self.invalid(key, "should be an object"))?,
            ),
        };
        Ok(Self {
            file: self.file,
            path: key,
            map,
        })
    }

    pub(super) fn get(&self, key: &str) -> Option<&'a Value> {
        self.map?.get(key).filter(|value| !value.is_null())
    }

    /// Returns the error `ModelInvalid` about a key of this object.
    pub(super) fn invalid(&self, key: &str, problem: &str) -> Error {
        let field = if self.path.is_empty() {
            key.to_owned()
        } else {
            format!("{}.{key}", self.path)
        };
        let file = self.file;
        invalid_in(file, format!("{field} in {file}: {problem}"), &field)
    }

    /// Returns the keys of the object.
    pub(super) fn keys(&self) -> impl Iterator<Item = &'a str> + use<'a> {
        self.map
            .into_iter()
            .flat_map(|map| map.keys().map(String::as_str))
    }

    pub(super) fn text(&self, key: &str, default: &'a str) -> Result<&'a str> {
        let Some(value) = self.get(key) else {
            return Ok(default);
        };
        value
            .as_str()
            .ok_or_else(|| self.invalid(key, &format!("{value} should be a string")))
    }

    pub(super) fn flag(&self, key: &str, default: bool) -> Result<bool> {
        let Some(value) = self.get(key) else {
            return Ok(default);
        };
        value
            .as_bool()
            .ok_or_else(|| self.invalid(key, &format!("{value} should be true or false")))
    }

    pub(super) fn number(&self, key: &str, default: f64) -> Result<f64> {
        let Some(value) = self.get(key) else {
            return Ok(default);
        };
        let number = value.as_f64().filter(|number| number.is_finite());
        number.ok_or_else(|| self.invalid(key, &format!("{value} should be a number")))
    }

    pub(super) fn id(&self, key: &str, default: i64) -> Result<i64> {
        let Some(value) = self.get(key) else {
            return Ok(default);
        };
        value
            .as_i64()
            .ok_or_else(|| self.invalid(key, &format!("{value} should be an integer")))
    }

    /// Reads a size or count of at least one.
    pub(super) fn size(&self, key: &str, default: usize) -> Result<usize> {
        let Some(value) = self.get(key) else {
            return Ok(default);
        };
        let size = value
            .as_u64()
            .filter(|size| (1..=NUMBER_MAX).contains(size));
        size.map(|size| size as usize).ok_or_else(|| {
            self.invalid(
                key,
                &format!("{value} should be an integer from 1 to {NUMBER_MAX}"),
            )
        })
    }

    /// Refuses a `model_type` that is given and not known.
    pub(super) fn expect_type(&self, known: &[&'static str]) -> Result<()> {
        let found = self.text("model_type", known[0])?;
        if known.contains(&found) {
            return Ok(());
        }
        Err(self.invalid(
            "model_type",
            &format!(
                "'{found}' is not supported, only '{}'",
                known.join("' and '")
            ),
        ))
    }

    fn tower(&self, defaults: &Tower) -> Result<Tower> {
        let hidden_act = match self.get("hidden_act") {
            None => defaults.hidden_act,
            Some(value) => match value.as_str() {
                Some("gelu") => Activation::Gelu,
                Some("gelu_pytorch_tanh" | "gelu_new") => Activation::GeluTanh,
                Some("quick_gelu") => Activation::QuickGelu,
                _ => {
                    let problem = format!(
                        "{value} is not supported, only gelu, gelu_pytorch_tanh and quick_gelu"
                    );
                    return Err(self.invalid("hidden_act", &problem));
                }
            },
        };
        let tower = Tower {
            hidden_size: self.size("hidden_size", defaults.hidden_size)?,
            intermediate_size: self.size("intermediate_size", defaults.intermediate_size)?,
            num_hidden_layers: self.size("num_hidden_layers", defaults.num_hidden_layers)?,
            num_attention_heads: self.size("num_attention_heads", defaults.num_attention_heads)?,
            layer_norm_eps: self.number("layer_norm_eps", defaults.layer_norm_eps)?,
            hidden_act,
        };
        if !tower.hidden_size.is_multiple_of(tower.num_attention_heads) {
            let problem = format!(
                "{} does not divide hidden_size {}",
                tower.num_attention_heads, tower.hidden_size
            );
            return Err(self.invalid("num_attention_heads", &problem));
        }
        Ok(tower)
    }

    /// Returns the section as an image transformer's.
    pub(super) fn vision(&self, defaults: &Tower, patch_size: usize) -> Result<VisionConfig> {
        self.expect_rgb()?;
        let config = VisionConfig {
            tower: self.tower(defaults)?,
            image_size: self.size("image_size", 224)?,
            patch_size: self.size("patch_size", patch_size)?,
            max_patches: None,
        };
        if config.grid() == 0 {
            let problem = format!(
                "{} is larger than image_size {}",
                config.patch_size, config.image_size
            );
            return Err(self.invalid("patch_size", &problem));
        }
        Ok(config)
    }

    /// Returns the section as the image transformer of a SigLIP 2 that takes images of any shape.
    /// It has the number of position embeddings in the place of an image's size.
    pub(super) fn naflex_vision(&self, defaults: &Tower) -> Result<VisionConfig> {
        self.expect_rgb()?;
        let patch_size = self.size("patch_size", 16)?;
        let positions = self.size("num_patches", 256)?;
        let side = positions.isqrt();
        if side * side != positions {
            let problem = format!("{positions} position embeddings are no square grid");
            return Err(self.invalid("num_patches", &problem));
        }
        Ok(VisionConfig {
            tower: self.tower(defaults)?,
            image_size: side * patch_size,
            patch_size,
            max_patches: Some(positions),
        })
    }

    fn expect_rgb(&self) -> Result<()> {
        match self.size("num_channels", 3)? {
            3 => Ok(()),
            _ => Err(self.invalid("num_channels", "only 3 (RGB) is supported")),
        }
    }

    /// Returns the section as a caption transformer's.
    pub(super) fn text_tower(
        &self,
        defaults: &Tower,
        vocab_size: usize,
        length: usize,
    ) -> Result<TextConfig> {
        Ok(TextConfig {
            tower: self.tower(defaults)?,
            vocab_size: self.size("vocab_size", vocab_size)?,
            max_position_embeddings: self.size("max_position_embeddings", length)?,
            eos_token_id: self.id("eos_token_id", 49_407)?,
            pad_token_id: self.id("pad_token_id", 1)?,
        })
    }
}
