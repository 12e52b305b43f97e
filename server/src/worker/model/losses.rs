//! Exported modules that give one loss an example: a classifier, a language model. Their method
//! `loss_per_example(inputs, targets)` takes images or token ids, and classes or token ids.
use super::{fields::Fields, layers::Torch};
use crate::error::Result;
use std::fmt;
use tch::{CModule, IValue, Kind, TchError, Tensor};

pub(super) const METHOD: &str = "loss_per_example";
/// Largest value of `classes`.
const CLASSES_MAX: usize = 1 << 24;

/// What a module compares, and how it takes both.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LossForm {
    pub input: Input,
    pub target: Target,
    /// Ids of a text, be it input or target; 0 if neither is one.
    pub text_length: usize,
    /// Ids that a text may have.
    pub vocab_size: usize,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Input {
    Image,
    Text,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Target {
    /// An integer below this number.
    Class(usize),
    Text,
}

/// For people: `image and one of 10 classes`.
impl fmt::Display for LossForm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self.input {
            Input::Image => "image",
            Input::Text => "text",
        })?;
        match self.target {
            Target::Class(classes) => write!(f, " and one of {classes} classes"),
            Target::Text => f.write_str(" and a text"),
        }
    }
}

impl LossForm {
    /// Numbers of the embeddings that hold a loss.
    pub(super) const WIDTH: usize = 2;

    /// Reads the form from `module.json`; `None` if the module gives embeddings.
    ///
    /// # Errors
    /// `ModelInvalid` naming the field.
    pub(super) fn read(
        fields: &Fields,
        needed: impl Fn(&'static str, usize) -> Result<usize>,
        [length_max, vocabulary_max]: [usize; 2],
    ) -> Result<Option<Self>> {
        match fields.text("gives", "embeddings")? {
            "embeddings" => return Ok(None),
            METHOD => {}
            other => return Err(fields.invalid("gives", &unknown(other, "embeddings", METHOD))),
        }
        let input = match fields.text("input", "")? {
            "image" => Input::Image,
            "text" => Input::Text,
            other => return Err(fields.invalid("input", &unknown(other, "image", "text"))),
        };
        let target = match fields.text("target", "")? {
            "class" => Target::Class(needed("classes", CLASSES_MAX)?),
            "text" => Target::Text,
            other => return Err(fields.invalid("target", &unknown(other, "class", "text"))),
        };
        let mut form = Self {
            input,
            target,
            text_length: 0,
            vocab_size: 0,
        };
        if form.has_text() {
            form.text_length = needed("text_length", length_max)?;
            form.vocab_size = needed("vocab_size", vocabulary_max)?;
        }
        Ok(Some(form))
    }

    /// Returns whether input or target is a text, so that there is a tokenizer.
    pub fn has_text(&self) -> bool {
        self.input == Input::Text || self.target == Target::Text
    }

    /// Returns how many of a row's ids are the input's. Those of the target follow.
    fn input_ids(&self) -> usize {
        match self.input {
            Input::Image => 0,
            Input::Text => self.text_length,
        }
    }

    /// Returns how many ids a row has.
    pub(super) fn ids(&self) -> usize {
        self.input_ids()
            + match self.target {
                Target::Class(_) => 1,
                Target::Text => self.text_length,
            }
    }

    /// Returns what each id of a row is below, whatever it is.
    pub(super) fn ids_below(&self) -> usize {
        match self.target {
            Target::Class(classes) => classes.max(self.vocab_size),
            Target::Text => self.vocab_size,
        }
    }

    /// Returns ids of made-up rows.
    pub(super) fn made_up(&self, rows: usize) -> Vec<i64> {
        let length = self.ids();
        let id = |n: usize| match self.target {
            Target::Class(classes) if n % length == length - 1 => n / length % classes,
            _ => n * 31 % self.vocab_size,
        };
        (0..rows * length).map(|n| id(n) as i64).collect()
    }

    /// Returns the losses of rows as f32 `[rows, 1]`. `pixels` are `[rows, 3, height, width]`, or
    /// anything where texts are read.
    pub(super) fn call(&self, module: &CModule, pixels: &Tensor, ids: &Tensor) -> Torch {
        let (rows, _) = ids.size2()?;
        let [split, length] = [self.input_ids(), self.text_length].map(|n| n as i64);
        let input = match self.input {
            Input::Image => pixels.shallow_clone(),
            Input::Text => ids.f_narrow(1, 0, split)?.f_contiguous()?,
        };
        let target = match self.target {
            Target::Class(_) => ids.f_narrow(1, split, 1)?.f_reshape([rows])?,
            Target::Text => ids.f_narrow(1, split, length)?.f_contiguous()?,
        };
        let given = [IValue::Tensor(input), IValue::Tensor(target)];
        let losses = match module.method_is(METHOD, &given)? {
            IValue::Tensor(losses) => losses,
            other => {
                let problem = format!("{METHOD} returned {other:?}, not a tensor");
                return Err(TchError::Torch(problem));
            }
        };
        if losses.size() != [rows] {
            let found = losses.size();
            let problem = format!("{METHOD} of {rows} rows made {found:?}, not one loss a row");
            return Err(TchError::Shape(problem));
        }
        losses.f_to_kind(Kind::Float)?.f_reshape([rows, 1])
    }
}

fn unknown(found: &str, one: &str, other: &str) -> String {
    format!("is '{found}'; it is '{one}' or '{other}'")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn made_up_rows_have_ids_that_a_module_takes() {
        let of = |input, target, text_length, vocab_size| LossForm {
            input,
            target,
            text_length,
            vocab_size,
        };
        let classifier = of(Input::Image, Target::Class(2), 0, 0);
        assert_eq!((classifier.ids(), classifier.ids_below()), (1, 2));
        assert_eq!(classifier.made_up(3), [0, 1, 0]);
        let of_texts = of(Input::Text, Target::Class(3), 4, 10);
        assert_eq!((of_texts.ids(), of_texts.ids_below()), (5, 10));
        let ids = of_texts.made_up(2);
        assert_eq!((ids.len(), ids[4], ids[9]), (10, 0, 1));
        assert!(ids.iter().all(|id| *id < 10));
        let language = of(Input::Text, Target::Text, 4, 10);
        assert_eq!((language.ids(), language.ids_below()), (8, 10));
        assert_eq!(language.to_string(), "text and a text");
        assert_eq!(classifier.to_string(), "image and one of 2 classes");
    }
}
