//! Exported modules that give losses: a classifier, a language model. Their method takes images or
//! token ids, and classes or token ids: `loss_per_example(inputs, targets)` gives one loss an
//! example, `loss_per_token(inputs, targets)` one for each token of the target, and which of them
//! count.
use super::{fields::Fields, layers::Torch};
use crate::{bounds, error::Result};
use std::fmt;
use tch::{CModule, IValue, Kind, TchError, Tensor};

const BY_EXAMPLE: &str = "loss_per_example";
const BY_TOKEN: &str = "loss_per_token";
/// Largest value of `classes`.
const CLASSES_MAX: usize = 1 << 24;
/// Largest value of `tokens`: their losses are sent as an embedding is.
const TOKENS_MAX: usize = bounds::EMBEDDING_DIM_MAX as usize - LossForm::WIDTH;

/// What a module compares, and how it takes both.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LossForm {
    pub input: Input,
    pub target: Target,
    /// Ids of a text, be it input or target; 0 if neither is one.
    pub text_length: usize,
    /// Ids that a text may have.
    pub vocab_size: usize,
    /// Losses of a row, if there is one for each token of the target; else 0.
    pub tokens: usize,
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
    /// Numbers of the embeddings that hold the loss of an example.
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
        let tokens = match fields.text("gives", "embeddings")? {
            "embeddings" => return Ok(None),
            BY_EXAMPLE => 0,
            BY_TOKEN => needed("tokens", TOKENS_MAX)?,
            other => {
                let or = format!("{BY_EXAMPLE}', '{BY_TOKEN}");
                return Err(fields.invalid("gives", &unknown(other, &or, "embeddings")));
            }
        };
        let input = match fields.text("input", "")? {
            "image" => Input::Image,
            "text" => Input::Text,
            other => return Err(fields.invalid("input", &unknown(other, "image", "text"))),
        };
        let target = match fields.text("target", "")? {
            "class" if tokens > 0 => {
                let problem = format!("is 'class', which has no tokens; {BY_TOKEN} needs 'text'");
                return Err(fields.invalid("target", &problem));
            }
            "class" => Target::Class(needed("classes", CLASSES_MAX)?),
            "text" => Target::Text,
            other => return Err(fields.invalid("target", &unknown(other, "class", "text"))),
        };
        let mut form = Self {
            input,
            target,
            text_length: 0,
            vocab_size: 0,
            tokens,
        };
        if form.has_text() {
            form.text_length = needed("text_length", length_max)?;
            form.vocab_size = needed("vocab_size", vocabulary_max)?;
        }
        Ok(Some(form))
    }

    /// Returns the method that is called, which names what the module gives.
    pub fn method(&self) -> &'static str {
        match self.tokens {
            0 => BY_EXAMPLE,
            _ => BY_TOKEN,
        }
    }

    /// Returns the numbers of the embeddings that hold the losses of a row.
    pub(super) fn width(&self) -> usize {
        Self::WIDTH + self.tokens
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

    /// Returns the losses of rows in the place of both towers' embeddings, f32 `[rows, width]`:
    /// `[loss, 1]` and `[1, 0]`. A loss of 0 is no embedding of zeros, which stands for a row that
    /// was lost. If each token has a loss, that of the example is their mean, and the losses of the
    /// tokens follow it in the first; in the second follows 1 for each token that counts, else 0.
    /// `pixels` are `[rows, 3, height, width]`, or anything where texts are read.
    pub(super) fn call(
        &self,
        module: &CModule,
        pixels: &Tensor,
        ids: &Tensor,
    ) -> Torch<(Tensor, Tensor)> {
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
        let found = module.method_is(self.method(), &given)?;
        match self.tokens {
            0 => by_example(found, rows),
            tokens => by_token(found, [rows, tokens as i64]),
        }
    }
}

fn by_example(found: IValue, rows: i64) -> Torch<(Tensor, Tensor)> {
    let losses = match found {
        IValue::Tensor(losses) => losses,
        other => {
            let problem = format!("{BY_EXAMPLE} returned {other:?}, not a tensor");
            return Err(TchError::Torch(problem));
        }
    };
    if losses.size() != [rows] {
        let found = losses.size();
        let problem = format!("{BY_EXAMPLE} of {rows} rows made {found:?}, not one loss a row");
        return Err(TchError::Shape(problem));
    }
    let losses = losses.f_to_kind(Kind::Float)?.f_reshape([rows, 1])?;
    let (one, zero) = (losses.f_ones_like()?, losses.f_zeros_like()?);
    let image = Tensor::f_cat(&[&losses, &one], 1)?;
    Ok((image, Tensor::f_cat(&[&one, &zero], 1)?))
}

fn by_token(found: IValue, shape: [i64; 2]) -> Torch<(Tensor, Tensor)> {
    let pair = match found {
        IValue::Tuple(pair) => <[IValue; 2]>::try_from(pair).ok(),
        _ => None,
    };
    let Some([IValue::Tensor(losses), IValue::Tensor(counts)]) = pair else {
        let problem = format!("{BY_TOKEN} did not return two tensors, losses and which count");
        return Err(TchError::Torch(problem));
    };
    for found in [losses.size(), counts.size()] {
        if found != shape {
            let problem = format!("{BY_TOKEN} made {found:?}, where {shape:?} are due");
            return Err(TchError::Shape(problem));
        }
    }
    let counts = counts.f_to_kind(Kind::Bool)?;
    // The loss of a token that does not count may be anything, NaN too.
    let losses = losses.f_to_kind(Kind::Float)?;
    let losses = losses.f_masked_fill(&counts.f_logical_not()?, 0.0)?;
    let counts = counts.f_to_kind(Kind::Float)?;
    let sum = |of: &Tensor| of.f_sum_dim_intlist(&[1_i64][..], true, Kind::Float);
    let mean = sum(&losses)?.f_div(&sum(&counts)?.f_clamp_min(1.0)?)?;
    let (one, zero) = (mean.f_ones_like()?, mean.f_zeros_like()?);
    let image = Tensor::f_cat(&[&mean, &one, &losses], 1)?;
    Ok((image, Tensor::f_cat(&[&one, &zero, &counts], 1)?))
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
            tokens: 0,
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

    #[test]
    fn losses_of_tokens_follow_their_mean_over_those_that_count() {
        let rows = |values: &[f32]| Tensor::from_slice(values).reshape([2, 3]);
        let losses = rows(&[1.0, f32::NAN, 3.0, 7.0, 7.0, 7.0]);
        let counts = rows(&[1.0, 0.0, 1.0, 0.0, 0.0, 0.0]).to_kind(Kind::Bool);
        let pair = |counts: &Tensor| {
            let tensors = [&losses, counts].map(|of| IValue::Tensor(of.shallow_clone()));
            IValue::Tuple(tensors.into())
        };
        let (image, text) = by_token(pair(&counts), [2, 3]).unwrap();
        let numbers = |of: Tensor| Vec::<f32>::try_from(of.reshape([-1])).unwrap();
        let expected: [f32; 10] = [2.0, 1.0, 1.0, 0.0, 3.0, 0.0, 1.0, 0.0, 0.0, 0.0];
        assert_eq!(numbers(image), expected);
        let expected: [f32; 10] = [1.0, 0.0, 1.0, 0.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0];
        assert_eq!(numbers(text), expected);
        let other = by_token(pair(&counts), [2, 4]).unwrap_err().to_string();
        assert!(other.contains("[2, 3], where [2, 4]"), "{other}");
        let alone = by_token(IValue::Tensor(losses), [2, 3]).unwrap_err();
        assert!(alone.to_string().contains("two tensors"), "{alone}");
    }
}
