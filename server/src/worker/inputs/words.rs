//! How a row's texts become ids: a caption's, or those of the input and the target of a loss.
use super::{preprocess::RowFault, tokenize::Tokenizer};
use crate::worker::model::losses::{Input, LossForm, Target};
use superbatch_proto::v1::BadRowReason;

/// Makes the ids of a row.
pub(super) enum Words {
    Caption(Tokenizer),
    /// The tokenizer is there if the model reads a text.
    Loss(LossForm, Option<Tokenizer>),
}

impl Words {
    /// Returns BLAKE3 of all that the ids depend on beside the row.
    pub(super) fn digest(&self) -> [u8; 32] {
        let (form, tokenizer) = match self {
            Self::Caption(tokenizer) => return tokenizer.digest(),
            Self::Loss(form, tokenizer) => (form, tokenizer),
        };
        let mut hasher = blake3::Hasher::new();
        hasher.update(format!("loss of {form}, texts of {}", form.text_length).as_bytes());
        if let Some(tokenizer) = tokenizer {
            hasher.update(&tokenizer.digest());
        }
        hasher.finalize().into()
    }

    /// Describes what it does, for people.
    pub(super) fn described(&self) -> String {
        match self {
            Self::Caption(tokenizer) | Self::Loss(_, Some(tokenizer)) => tokenizer.described(),
            Self::Loss(_, None) => "none: nothing is tokenized".to_owned(),
        }
    }

    /// Returns the ids of a row: of its caption; of a loss those of the input, if that is a text,
    /// then those of the target.
    ///
    /// # Errors
    /// `CaptionInvalid`.
    pub(super) fn ids(&self, input: &[u8], caption: &str) -> Result<Vec<i64>, RowFault> {
        let (form, tokenizer) = match self {
            Self::Caption(tokenizer) => return tokenizer.encode(caption),
            Self::Loss(form, tokenizer) => (form, tokenizer),
        };
        let encode = |text: &str| match tokenizer {
            Some(tokenizer) => tokenizer.encode(text),
            None => Err(invalid("there is no tokenizer for a text".to_owned())),
        };
        let mut ids = match form.input {
            Input::Image => Vec::new(),
            Input::Text => encode(text(input)?)?,
        };
        match form.target {
            Target::Class(classes) => ids.push(class(caption, classes)?),
            Target::Text => ids.extend(encode(caption)?),
        }
        Ok(ids)
    }
}

/// Returns the text that lies in the place of an image.
///
/// # Errors
/// `CaptionInvalid`.
pub(super) fn text(input: &[u8]) -> Result<&str, RowFault> {
    std::str::from_utf8(input).map_err(|_| invalid("the text is not UTF-8".to_owned()))
}

/// Returns a target that is a class. A class that the model does not have would read beyond its
/// outputs, which on CUDA ends the process.
fn class(target: &str, classes: usize) -> Result<i64, RowFault> {
    let number = target.trim().parse::<i64>().ok();
    let found = number.filter(|class| usize::try_from(*class).is_ok_and(|class| class < classes));
    found.ok_or_else(|| {
        let shown: String = target.chars().take(40).collect();
        let last = classes.saturating_sub(1);
        invalid(format!(
            "the target '{shown}' is no class; classes are 0 to {last}"
        ))
    })
}

fn invalid(detail: String) -> RowFault {
    RowFault::new(BadRowReason::CaptionInvalid, detail)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_class_is_an_integer_that_the_model_has() {
        let classes = Target::Class(10);
        let words = Words::Loss(
            LossForm {
                input: Input::Image,
                target: classes,
                text_length: 0,
                vocab_size: 0,
                tokens: 0,
            },
            None,
        );
        for (target, class) in [("0", 0), ("9", 9), (" 3 ", 3)] {
            assert_eq!(words.ids(b"an image", target).unwrap(), [class]);
        }
        for target in ["10", "-1", "cat", "", "1.0"] {
            let fault = words.ids(b"an image", target).unwrap_err();
            assert_eq!(fault.reason, BadRowReason::CaptionInvalid);
            assert!(fault.detail.contains("0 to 9"), "{}", fault.detail);
        }
    }

    #[test]
    fn a_text_in_the_place_of_an_image_is_read_as_one() {
        assert_eq!(text("né".as_bytes()).unwrap(), "né");
        assert!(text(&[0xff, 0xfe]).is_err());
    }
}
