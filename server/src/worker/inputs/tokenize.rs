//! Turns captions into token ids, by the model folder's `tokenizer.json`.
//!
//! That file is followed to the letter, its normalizer included. The slow SigLIP tokenizer of
//! `transformers` also removes punctuation and lowercases in Python; a `tokenizer.json` that should
//! do so says it in its normalizer.
use super::{
    clean::{self, clean},
    preprocess::RowFault,
};
use crate::{
    error::{Error, Result},
    worker::model::open_clip_config::Clean,
};
use superbatch_proto::v1::{BadRowReason, Reason};
use tokenizers::{
    PaddingDirection, PaddingParams, PaddingStrategy, PostProcessor, TruncationParams,
};

const FILE: &str = "tokenizer.json";
/// Bytes of a caption that are tokenized. Tokenizers take time and memory that grow with the whole
/// text, and a caption may be megabytes of scraped HTML; no model takes so many tokens.
const CAPTION_BYTES_MAX: usize = 64 << 10;

/// What the model's text tower expects.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TextShape {
    /// Ids per caption.
    pub length: usize,
    pub pad_id: i64,
    /// Rows of the model's token embedding.
    pub vocab_size: usize,
    /// How the tower finds the token at which it pools.
    pub end: End,
    pub clean: Clean,
    /// The separator's id, if it is 0 to the model.
    pub separator: Option<i64>,
}

/// How a tower finds the end of a caption.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// It does not look for the end.
    Anywhere,
    Id(i64),
    /// The largest id of the caption.
    Largest,
}

/// Turns captions into exactly `length` ids.
#[derive(Debug)]
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    length: usize,
    clean: Clean,
    separator: Option<i64>,
    digest: [u8; 32],
}

impl Tokenizer {
    /// Reads a tokenizer, and replaces the file's truncation and padding by those of `text`.
    ///
    /// # Errors
    /// `TokenizerMismatch` if it is no tokenizer, has ids that the model lacks, or does not end
    /// captions with `eos_id`.
    pub fn parse(tokenizer_json: &[u8], text: &TextShape) -> Result<Self> {
        let mut inner = tokenizers::Tokenizer::from_bytes(tokenizer_json)
            .map_err(|e| mismatch("it cannot be read".to_owned()).because(e))?;
        let highest = inner.get_vocab(true).into_iter().max_by_key(|(_, id)| *id);
        let Some((token, highest)) = highest else {
            return Err(mismatch("its vocabulary is empty".to_owned()));
        };
        if highest as usize >= text.vocab_size {
            let what = format!(
                "token '{token}' has id {highest}, but the model has {} embeddings",
                text.vocab_size
            );
            return Err(mismatch(what));
        }
        let pad = usize::try_from(text.pad_id)
            .ok()
            .filter(|&id| id < text.vocab_size);
        let Some(pad) = pad else {
            return Err(mismatch(format!(
                "the model's padding id {} is not in its vocabulary",
                text.pad_id
            )));
        };
        let pad_token = inner.id_to_token(pad as u32).unwrap_or_default();
        inner.with_padding(Some(PaddingParams {
            strategy: PaddingStrategy::Fixed(text.length),
            direction: PaddingDirection::Right,
            pad_id: pad as u32,
            pad_token,
            ..Default::default()
        }));
        // The library subtracts the number of special tokens from the length without a check for
        // underflow.
        if inner
            .get_post_processor()
            .map_or(0, |post| post.added_tokens(false))
            >= text.length
        {
            return Err(too_short(text.length));
        }
        let truncation = TruncationParams {
            max_length: text.length,
            ..Default::default()
        };
        inner
            .with_truncation(Some(truncation))
            .map_err(|e| too_short(text.length).because(e))?;
        let mut hasher = blake3::Hasher::new();
        hasher
            .update(tokenizer_json)
            .update(&(text.length as u64).to_le_bytes())
            .update(&text.pad_id.to_le_bytes());
        if text.clean != Clean::Nothing {
            hasher.update(format!("{:?} {}", text.clean, clean::VERSION).as_bytes());
        }
        if let Some(separator) = text.separator {
            hasher.update(&separator.to_le_bytes());
        }
        let tokenizer = Self {
            inner,
            length: text.length,
            clean: text.clean,
            separator: text.separator,
            digest: *hasher.finalize().as_bytes(),
        };
        tokenizer.probe(text)?;
        Ok(tokenizer)
    }

    /// Encodes an empty caption and one that is cut. A fault that every caption would meet is then
    /// an error at opening, instead of a data set of holes.
    fn probe(&self, text: &TextShape) -> Result<()> {
        for caption in ["", &"a b ".repeat(text.length)] {
            let ids = self
                .encode(caption)
                .map_err(|fault| mismatch(fault.detail))?;
            let what = match text.end {
                End::Anywhere => continue,
                End::Id(eos) if ids.contains(&eos) => continue,
                End::Id(eos) => format!("captions do not end with id {eos}"),
                End::Largest if self.ends_with_largest(caption) => continue,
                End::Largest => "captions do not end with their largest id".to_owned(),
            };
            return Err(mismatch(format!(
                "{what}, at which the model pools; add an end token in the post-processor"
            )));
        }
        Ok(())
    }

    /// Returns whether the last id before the padding is larger than all ids before it.
    fn ends_with_largest(&self, caption: &str) -> bool {
        let mut inner = self.inner.clone();
        inner.with_padding(None);
        let Ok(encoding) = inner.encode_fast(caption, true) else {
            return false;
        };
        match encoding.get_ids() {
            [before @ .., last] => before.iter().all(|id| id < last),
            [] => false,
        }
    }

    /// Describes what it does, for people.
    pub fn described(&self) -> String {
        let pad = self
            .inner
            .get_padding()
            .map_or_else(String::new, |padding| {
                format!(" ('{}', id {})", padding.pad_token, padding.pad_id)
            });
        let clean = match self.clean {
            Clean::Nothing => "",
            Clean::Whitespace => "white space made single, ",
            Clean::Lower => "white space made single, lower case, ",
            Clean::Canonicalize => "no punctuation, lower case, ",
        };
        let separator = match self.separator {
            Some(id) => format!(", id {id} made 0"),
            None => String::new(),
        };
        format!(
            "{FILE}, {} entries; captions {clean}cut or padded{pad} to {}{separator}",
            self.inner.get_vocab_size(true),
            self.length
        )
    }

    /// Returns BLAKE3 of the file, the length and the padding.
    pub fn digest(&self) -> [u8; 32] {
        self.digest
    }

    /// Returns an error if the file lacks what transformers' `SiglipTokenizer` does before it: no
    /// punctuation, and lower case if it `lowers`. A file that was made of `spiece.model` alone
    /// lacks it.
    ///
    /// # Errors
    /// `TokenizerMismatch`.
    pub fn check_siglip(&self, lowers: bool) -> Result<()> {
        let caption = if lowers {
            "Two DOGS, here!"
        } else {
            "two dogs, here!"
        };
        let ids = |caption: &str| self.encode(caption).ok();
        if ids(caption) == ids("two dogs here") {
            return Ok(());
        }
        let (does, way) = if lowers {
            let way = "python -m superbatch.siglip FOLDER makes one of spiece.model that does";
            ("lower-cases captions and takes punctuation out", way)
        } else {
            ("takes punctuation out", "add one to that file")
        };
        let message = format!(
            "{FILE} is a SiglipTokenizer's, but it has no normalizer that {does}, as that class \
             does before it; {way}"
        );
        Err(Error::new(Reason::TokenizerMismatch, message).with("file", FILE))
    }

    /// Returns exactly `length` ids: cut on the right with the special tokens kept, or padded on
    /// the right.
    ///
    /// # Errors
    /// `CaptionInvalid`.
    pub fn encode(&self, caption: &str) -> Result<Vec<i64>, RowFault> {
        let invalid = |detail: String| RowFault::new(BadRowReason::CaptionInvalid, detail);
        let read = beginning(caption);
        let encoding = self
            .inner
            .encode_fast(clean(read, self.clean).as_ref(), true)
            .map_err(|e| invalid(e.to_string()))?;
        let id = |&id: &u32| match i64::from(id) {
            id if self.separator == Some(id) => 0,
            id => id,
        };
        let ids: Vec<i64> = encoding.get_ids().iter().map(id).collect();
        if ids.len() != self.length {
            return Err(invalid(format!(
                "{} ids, the model takes {}",
                ids.len(),
                self.length
            )));
        }
        Ok(ids)
    }
}

/// Returns the part of a caption that is tokenized. It ends with a whole word, if there is a space.
fn beginning(caption: &str) -> &str {
    let read = &caption[..caption.floor_char_boundary(CAPTION_BYTES_MAX)];
    match read.rfind(char::is_whitespace) {
        Some(at) if read.len() < caption.len() => &read[..at],
        _ => read,
    }
}

fn mismatch(what: String) -> Error {
    let message = format!(
        "{FILE} does not fit the model: {what}; use the tokenizer that the model was trained with"
    );
    Error::new(Reason::TokenizerMismatch, message).with("file", FILE)
}

fn too_short(length: usize) -> Error {
    mismatch(format!("{length} ids are too few for its special tokens"))
}

#[cfg(test)]
mod tests;
