//! How one model wants its images and captions.
use super::{
    preprocess::{ImageLimits, Normalisation, Preprocess, RowFault, decode},
    row::Prepared,
    tokenize::{TextShape, Tokenizer},
};
use crate::{
    error::{Error, Result},
    worker::model::{Family, Fidelity, ModelFolder},
};
use std::sync::Arc;
use superbatch_proto::v1::Reason;

/// How a model wants its rows.
pub struct Inputs {
    /// `None` only checks rows: images are decoded, captions have to be there.
    reading: Option<(Preprocess, Arc<Tokenizer>)>,
    /// Of preprocessing and tokenizer: rows that are ready for one model are ready for another of
    /// the same digest.
    pub digest: [u8; 32],
}

impl Inputs {
    /// For checking rows without a model.
    pub fn check() -> Self {
        Self {
            reading: None,
            digest: [0; 32],
        }
    }

    pub fn of(folder: &ModelFolder) -> Result<Self> {
        let preprocess = Preprocess::parse(&folder.preprocessor_json)?;
        let (made, taken) = (preprocess.size(), folder.config.vision.image_size);
        if [made.0, made.1].map(|side| side as usize) != [taken; 2] {
            let message = format!(
                "preprocessor_config.json of {} makes {}x{} images, and config.json takes \
                {taken}x{taken}; make them agree",
                folder.uri, made.0, made.1
            );
            return Err(
                Error::new(Reason::ModelInvalid, message).with("file", "preprocessor_config.json")
            );
        }
        let tokenizer = Tokenizer::parse(&folder.tokenizer_json, &text_shape(folder))?;
        Ok(Self::reading(preprocess, Arc::new(tokenizer)))
    }

    fn reading(preprocess: Preprocess, tokenizer: Arc<Tokenizer>) -> Self {
        let mut hash = blake3::Hasher::new();
        hash.update(&preprocess.digest())
            .update(&tokenizer.digest());
        Self {
            reading: Some((preprocess, tokenizer)),
            digest: hash.finalize().into(),
        }
    }

    /// The same rows at a fidelity. What only checks rows is left as it is.
    #[must_use]
    pub fn at(self: Arc<Self>, fidelity: Fidelity) -> Arc<Self> {
        match (&self.reading, fidelity) {
            (Some((preprocess, tokenizer)), Fidelity::Resolution(side)) => {
                Arc::new(Self::reading(preprocess.at(side as u32), tokenizer.clone()))
            }
            _ => self,
        }
    }

    /// One row's pixels and token ids; none where rows are only checked.
    pub fn prepare(
        &self,
        image: &[u8],
        caption: &str,
        limits: &ImageLimits,
    ) -> Result<Prepared, RowFault> {
        let Some((preprocess, tokenizer)) = &self.reading else {
            decode(image, limits)?;
            return Ok(Prepared {
                pixels: Vec::new(),
                ids: Vec::new(),
            });
        };
        // The cheap part first: a row without a usable caption need not be decoded.
        let ids = tokenizer.encode(caption)?;
        Ok(Prepared {
            pixels: preprocess.pixels(image, limits)?,
            ids,
        })
    }

    /// What the device does to pixels; nothing where rows are only checked.
    pub fn normalisation(&self) -> Normalisation {
        let none = Normalisation {
            rescale: 1.0,
            mean: [0.0; 3],
            std: [1.0; 3],
        };
        self.reading
            .as_ref()
            .map_or(none, |(preprocess, _)| preprocess.normalisation())
    }
}

fn text_shape(folder: &ModelFolder) -> TextShape {
    // Only CLIP looks for the end of the caption; 2 in its configuration is an old mistake that
    // means "the largest id".
    let text = &folder.config.text;
    let looks_for_end = folder.config.family == Family::Clip && text.eos_token_id != 2;
    TextShape {
        length: text.max_position_embeddings,
        pad_id: text.pad_token_id,
        vocab_size: text.vocab_size,
        eos_id: looks_for_end.then_some(text.eos_token_id),
    }
}
