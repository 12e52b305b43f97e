//! How images and captions become one model's inputs.
use super::{
    padding,
    preprocess::{ImageLimits, Preprocess, Processor, RowFault, check},
    row::Prepared,
    tokenize::{End, TextShape, Tokenizer},
    words::{self, Words},
};
use crate::{
    error::{Error, Result},
    fidelity::Fidelity,
    worker::model::{
        Family, ModelFolder, Normalisation,
        clip::LEGACY_EOS,
        losses::Input,
        open_clip_config::{Clean, TextPool},
    },
};
use std::sync::Arc;
use superbatch_proto::v1::Reason;

/// How rows become a model's inputs.
pub struct Inputs {
    /// `None` only checks rows: images must decode, and captions must exist. A model that reads
    /// texts alone has no images.
    reading: Option<(Option<Preprocess>, Arc<Words>)>,
    /// Digest of preprocessing and tokenizer. Rows prepared for one model serve every model of the
    /// same digest.
    pub digest: [u8; 32],
    /// Whether rows get a key, by which patches are left out.
    is_keyed: bool,
    /// Whether texts lie in the place of images.
    has_texts: bool,
}

impl Inputs {
    /// Returns inputs that check rows without a model.
    pub fn check() -> Self {
        Self {
            reading: None,
            digest: [0; 32],
            is_keyed: false,
            has_texts: false,
        }
    }

    /// As [`Inputs::check`], of rows with texts in the place of images.
    pub fn check_texts() -> Self {
        Self {
            has_texts: true,
            ..Self::check()
        }
    }

    pub fn of(folder: &ModelFolder) -> Result<Self> {
        let losses = folder.config.losses();
        let preprocess = match losses.map(|form| form.input) {
            Some(Input::Text) => None,
            _ => Some(preprocess(folder)?),
        };
        let tokenizer = || -> Result<Tokenizer> {
            let tokenizer = Tokenizer::parse(&folder.tokenizer_json, &text_shape(folder)?)?;
            let config = folder.tokenizer_config_json.as_deref();
            let class = padding::class(config);
            // open_clip's captions are cleaned here.
            let is_siglip = folder.config.family == Family::Siglip
                && class.is_some_and(|class| class.starts_with("SiglipTokenizer"));
            if is_siglip {
                tokenizer.check_siglip(padding::lowers(config))?;
            }
            Ok(tokenizer)
        };
        let words = match losses {
            None => Words::Caption(tokenizer()?),
            Some(form) => Words::Loss(form, form.has_text().then(tokenizer).transpose()?),
        };
        Ok(Self::reading(preprocess, Arc::new(words)))
    }

    fn reading(preprocess: Option<Preprocess>, words: Arc<Words>) -> Self {
        let mut hash = blake3::Hasher::new();
        if let Some(preprocess) = &preprocess {
            hash.update(&preprocess.digest());
        }
        hash.update(&words.digest());
        Self {
            has_texts: preprocess.is_none(),
            reading: Some((preprocess, words)),
            digest: hash.finalize().into(),
            is_keyed: false,
        }
    }

    /// Returns the same inputs at a fidelity. Inputs that only check rows stay as they are.
    #[must_use]
    pub fn at(self: Arc<Self>, fidelity: Fidelity) -> Arc<Self> {
        match (&self.reading, fidelity) {
            (Some((Some(preprocess), words)), Fidelity::Resolution(side)) => {
                Arc::new(Self::reading(Some(preprocess.at(side)), words.clone()))
            }
            (Some((Some(preprocess), words)), Fidelity::PatchDropout(_)) => Arc::new(Self {
                is_keyed: true,
                ..Self::reading(Some(preprocess.clone()), words.clone())
            }),
            _ => self,
        }
    }

    /// Returns one row's pixels and token ids; none if rows are only checked.
    pub fn prepare(
        &self,
        image: &[u8],
        caption: &str,
        limits: &ImageLimits,
    ) -> Result<Prepared, RowFault> {
        let Some((preprocess, words)) = &self.reading else {
            if self.has_texts {
                words::text(image)?;
            } else {
                check(image, limits)?;
            }
            return Ok(Prepared {
                pixels: Vec::new(),
                grid: None,
                ids: Vec::new(),
                key: 0,
            });
        };
        // The tokenizer runs first, since it is cheap: a row without a usable caption need not be
        // decoded.
        let ids = words.ids(image, caption)?;
        let pixels = preprocess
            .as_ref()
            .map(|preprocess| preprocess.pixels(image, limits))
            .transpose()?
            .unwrap_or_default();
        Ok(Prepared {
            pixels: pixels.bytes,
            grid: pixels.grid,
            ids,
            key: if self.is_keyed { key_of(image) } else { 0 },
        })
    }

    /// Returns whether texts lie in the place of images.
    pub fn has_texts(&self) -> bool {
        self.has_texts
    }

    /// Describes how pixels are made, for people.
    pub fn pixels_of(&self) -> String {
        let preprocess = self.reading.as_ref().and_then(|(of, _)| of.as_ref());
        preprocess.map_or_else(String::new, Preprocess::described)
    }

    /// Describes how captions become ids, for people.
    pub fn tokens_of(&self) -> String {
        self.reading
            .as_ref()
            .map_or_else(String::new, |(_, words)| words.described())
    }

    /// Returns what the device does to pixels; nothing if rows are only checked.
    pub fn normalisation(&self) -> Normalisation {
        let none = Normalisation {
            rescale: 1.0,
            mean: [0.0; 3],
            std: [1.0; 3],
        };
        let preprocess = self.reading.as_ref().and_then(|(of, _)| of.as_ref());
        preprocess.map_or(none, Preprocess::normalisation)
    }
}

/// Returns how a folder's images become pixels, of the size that its model takes.
fn preprocess(folder: &ModelFolder) -> Result<Preprocess> {
    let side = folder.config.vision.image_size as u32;
    let preprocess = match folder.config.family {
        Family::OpenClip(_) => Preprocess::open_clip(&folder.preprocessor_json, side)?,
        Family::Exported => Preprocess::of(&folder.preprocessor_json, None)?,
        family => {
            let unnamed = match (family, folder.config.vision.max_patches) {
                (Family::Clip, _) => Processor::Clip,
                (_, Some(_)) => Processor::Siglip2,
                (_, None) => Processor::Siglip,
            };
            Preprocess::of(&folder.preprocessor_json, Some(unnamed))?
        }
    };
    check_sizes(folder, &preprocess)?;
    Ok(preprocess)
}

/// Refuses preprocessing that makes images of another size than the model takes.
fn check_sizes(folder: &ModelFolder, preprocess: &Preprocess) -> Result<()> {
    let vision = &folder.config.vision;
    let patched = |side: usize, most: usize| {
        format!("images of any shape, of at most {most} patches of {side} pixels")
    };
    let made = match preprocess.patches() {
        Some((side, most)) => patched(side as usize, most as usize),
        None => {
            let (height, width) = preprocess.size();
            format!("{height}x{width} images")
        }
    };
    let taken = match vision.max_patches {
        Some(most) => patched(vision.patch_size, most),
        None => format!("{0}x{0} images", vision.image_size),
    };
    if made == taken {
        return Ok(());
    }
    let message = format!(
        "preprocessor_config.json of {} makes {made}, and config.json takes {taken}; make them \
         agree",
        folder.uri
    );
    Err(Error::new(Reason::ModelInvalid, message).with("file", "preprocessor_config.json"))
}

/// Returns a hash of the image alone: learner and reference, every run and every worker must leave
/// out the same patches of it, or kept reference embeddings would be of other patches than the
/// learner's.
fn key_of(image: &[u8]) -> u64 {
    const PURPOSE: &str = "superbatch patches of an image v1";
    let mut word = [0; 8];
    blake3::Hasher::new_derive_key(PURPOSE)
        .update(image)
        .finalize_xof()
        .fill(&mut word);
    u64::from_le_bytes(word)
}

/// # Errors
/// `TokenizerMismatch` if the model strips a separator that the tokenizer lacks.
fn text_shape(folder: &ModelFolder) -> Result<TextShape> {
    let text = &folder.config.text;
    let (end, clean) = match folder.config.family {
        Family::Siglip | Family::Exported => (End::Anywhere, Clean::Nothing),
        Family::Clip if text.eos_token_id == LEGACY_EOS => (End::Largest, Clean::Nothing),
        Family::Clip => (End::Id(text.eos_token_id), Clean::Nothing),
        Family::OpenClip(form) => {
            let end = match form.pool {
                TextPool::Argmax => End::Largest,
                TextPool::Eos(eos) => End::Id(eos),
                TextPool::First | TextPool::Last => End::Anywhere,
            };
            (end, form.clean)
        }
    };
    let (length, vocab_size, pad_id) = match folder.config.losses() {
        // Such a module leaves padding out of its loss by the id that it was exported with.
        Some(form) => (form.text_length, form.vocab_size, text.pad_token_id),
        None => {
            let declared = padding::declared(
                &folder.tokenizer_json,
                folder.tokenizer_config_json.as_deref(),
                folder.config.family == Family::Siglip,
            );
            let pad_id = declared.unwrap_or(text.pad_token_id);
            (text.max_position_embeddings, text.vocab_size, pad_id)
        }
    };
    let separator = match folder.config.family {
        Family::OpenClip(form) if form.strips_separator => Some(separator(folder)?),
        _ => None,
    };
    Ok(TextShape {
        length,
        pad_id,
        vocab_size,
        end,
        clean,
        separator,
    })
}

fn separator(folder: &ModelFolder) -> Result<i64> {
    let config = folder.tokenizer_config_json.as_deref();
    padding::separator(&folder.tokenizer_json, config).ok_or_else(|| {
        let message = "the model strips the separator (strip_sep_token), but tokenizer.json has \
                       none; save the tokenizer with save_pretrained, which writes \
                       tokenizer_config.json too";
        Error::new(Reason::TokenizerMismatch, message).with("file", "tokenizer.json")
    })
}
