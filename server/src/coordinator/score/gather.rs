//! One model's embeddings of a super-batch, joined from those of its slices.
use super::{
    scored::{Scored, other_file},
    slice::Embeddings,
};
use crate::{
    error::{Error, Result},
    selection::{Embedded, Values},
};
use std::collections::BTreeMap;
use superbatch_proto::v1::{EmbeddingDtype, Reason};

/// Joins embeddings of slices, each with the number of its first candidate.
///
/// # Errors
/// `ModelInvalid` if the workers hold different models; `Internal` if embeddings are missing.
pub(super) fn gathered(
    parts: Vec<(u32, Embeddings)>,
    dtype: EmbeddingDtype,
    candidates: usize,
) -> Result<Option<Scored>> {
    let mut all: Option<Scored> = None;
    for (start, part) in parts {
        let all = all.get_or_insert_with(|| empty(&part, dtype, candidates));
        let files: BTreeMap<String, String> = part.done.files.clone().into_iter().collect();
        // Workers load models by themselves, at different times. If a folder was replaced in
        // between, half of the super-batch would be scored by another model. Scores of two models
        // cannot be compared, and the draw would prefer one half of the data for no reason.
        if let Some(file) = other_file(&all.files, &files) {
            return Err(changed(file));
        }
        let same =
            part.done.model_digest == all.digest && part.done.compute_dtype() == all.compute_dtype;
        if !same || part.dim != all.embedded.dim {
            return Err(differs());
        }
        for some in part.parts {
            all.embedded.image.append(&some.image);
            all.embedded.text.append(&some.text);
        }
        all.flops += part.done.flops;
        all.text_flops += part.done.text_flops;
        all.seconds = all.seconds.max(part.done.seconds);
        all.not_finite
            .extend(part.done.not_finite.iter().map(|c| c + start));
    }
    match all {
        // Some slice has no embeddings.
        Some(all) if all.embedded.image.len() != candidates * all.embedded.dim => Err(differs()),
        all => Ok(all),
    }
}

fn empty(part: &Embeddings, dtype: EmbeddingDtype, candidates: usize) -> Scored {
    let values = || Values::with_capacity(dtype, candidates * part.dim);
    Scored {
        embedded: Embedded {
            image: values(),
            text: values(),
            dim: part.dim,
        },
        scale: part.done.logit_scale,
        bias: part.done.logit_bias,
        digest: part.done.model_digest.clone(),
        files: part.done.files.clone().into_iter().collect(),
        compute_dtype: part.done.compute_dtype(),
        device: part.done.device.clone(),
        flops: 0.0,
        text_flops: 0.0,
        seconds: 0.0,
        not_finite: Vec::new(),
    }
}

fn changed(file: &str) -> Error {
    let message = format!(
        "{file} of a model folder was changed while its run went on: some workers hold the old \
        one, some the new; put it back \
         and start the workers anew"
    );
    Error::new(Reason::ModelInvalid, message).with("file", file)
}

fn differs() -> Error {
    Error::internal("workers answered with different models or arithmetic for one step")
}
