//! Bounds on workers' answers and on their time.
//!
//! Workers are other processes, perhaps of another build. Every number that sizes memory or decides
//! a step is checked before it is used, and every wait for a worker ends. The error names a worker
//! that breaks a rule, and another worker does its work.
use super::worker::Worker;
use crate::{
    bounds::{
        DETAIL_CHARS_MAX, EMBEDDING_DIM_MAX, FILES_MAX, LABEL_BYTES_MAX, TENSOR_DIMENSIONS_MAX,
        TENSOR_NAME_BYTES_MAX, TENSORS_MAX,
    },
    error::{Error, Result},
};
use std::{
    collections::{HashMap, HashSet},
    time::Duration,
};
use superbatch_proto::v1::{
    EmbedDone, Hole, ImageTower, Policy, PrepareModelResponse, Reason, SelectBegin, SelectResponse,
    TensorInfo,
};
use tokio::time::timeout;

/// The least that one part of rows counts.
const PART_BYTES_MIN: u64 = 1024;

/// The operator's bounds on a worker's answers.
#[derive(Debug, Clone, Copy)]
pub struct Replies {
    /// How long a worker may be silent.
    pub silence_max: Duration,
    /// Most bytes of one slice's chosen rows.
    pub rows_bytes_max: u64,
}

impl Default for Replies {
    fn default() -> Self {
        Self {
            silence_max: Duration::from_secs(1800),
            rows_bytes_max: 8 << 30,
        }
    }
}

impl Replies {
    /// Waits for `answer`.
    ///
    /// # Errors
    /// `NoWorkers`, naming the worker and `what` was awaited. The worker then counts as lost.
    pub async fn within<T>(
        &self,
        worker: &Worker,
        what: &str,
        answer: impl Future<Output = T>,
    ) -> Result<T> {
        timeout(self.silence_max, answer).await.map_err(|_| {
            let message = format!(
                "the worker at {} has said nothing for {} s, while {what} was awaited \
                (coordinator.worker_silence_seconds)",
                worker.address,
                self.silence_max.as_secs_f64()
            );
            Error::new(Reason::NoWorkers, message).with("worker", &worker.address)
        })
    }

    /// Adds a part of rows to `bytes`, the number received so far.
    ///
    /// A part counts at least [`PART_BYTES_MIN`]: what is kept of each costs memory beside its
    /// bytes, so a worker that sends tiny ones without end would pass the bound many times over.
    ///
    /// # Errors
    /// `MessageTooLarge`; `Internal` for an empty part, which no worker sends.
    pub fn count_rows(&self, bytes: &mut u64, part: &[u8]) -> Result<()> {
        if part.is_empty() {
            return Err(unsound("an empty part of rows"));
        }
        *bytes += (part.len() as u64).max(PART_BYTES_MIN);
        self.check_rows_bytes(*bytes)
    }

    /// Checks the number of bytes of rows that a worker has sent, or says that it holds.
    ///
    /// # Errors
    /// `MessageTooLarge`.
    pub fn check_rows_bytes(&self, bytes: u64) -> Result<()> {
        if bytes <= self.rows_bytes_max {
            return Ok(());
        }
        let message = format!(
            "the chosen rows of one slice exceed {} bytes (eight times \
            coordinator.ready_bytes_max); raise it, or choose fewer rows a step",
            self.rows_bytes_max
        );
        Err(Error::new(Reason::MessageTooLarge, message))
    }
}

/// Returns the error for an answer that breaks the protocol. Another worker may do better.
pub fn unsound(what: impl std::fmt::Display) -> Error {
    Error::internal(format!("a worker sent {what}"))
}

fn number(name: &str, value: f64) -> Result<()> {
    if value.is_finite() && value >= 0.0 {
        return Ok(());
    }
    Err(unsound(format_args!("{name} = {value}")))
}

fn finite(name: &str, value: f64) -> Result<()> {
    if value.is_finite() {
        return Ok(());
    }
    Err(unsound(format_args!("{name} = {value}")))
}

/// Checks a text that is kept or written down.
fn label(name: &str, text: &str) -> Result<()> {
    if text.len() <= LABEL_BYTES_MAX {
        return Ok(());
    }
    let bytes = text.len();
    Err(unsound(format_args!(
        "{name} of {bytes} bytes; at most {LABEL_BYTES_MAX}"
    )))
}

/// Checks the digests of a model folder's files.
fn files(files: &HashMap<String, String>) -> Result<()> {
    if files.len() > FILES_MAX {
        let count = files.len();
        return Err(unsound(format_args!(
            "files of {count} names; at most {FILES_MAX}"
        )));
    }
    files
        .iter()
        .flat_map(|(name, digest)| [name, digest])
        .try_for_each(|text| label("files", text))
}

/// Checks that a tower's costs are numbers: they decide what steps are charged. They are written
/// down with the run, and a number that is none would make that unreadable.
fn check_tower(tower: &ImageTower) -> Result<()> {
    let numbers = [
        ("constant", tower.constant),
        ("per_patch", tower.per_patch),
        ("per_patch_pair", tower.per_patch_pair),
        ("layer_constant", tower.layer_constant),
        ("layer_per_patch", tower.layer_per_patch),
        ("layer_per_patch_pair", tower.layer_per_patch_pair),
        ("per_pixel", tower.per_pixel),
    ];
    numbers
        .into_iter()
        .try_for_each(|(name, value)| number(&format!("image_tower.{name}"), value))
}

/// Checks a worker's description of a model.
pub fn check_model(model: &PrepareModelResponse) -> Result<()> {
    let labels = [
        ("digest", &model.digest),
        ("model_type", &model.model_type),
        ("device", &model.device),
        ("weights_digest", &model.weights_digest),
    ];
    labels
        .into_iter()
        .try_for_each(|(name, text)| label(name, text))?;
    files(&model.files)?;
    model.image_tower.as_ref().map_or(Ok(()), check_tower)?;
    number("image_flops", model.image_flops)?;
    number("text_flops", model.text_flops)?;
    finite("logit_scale", model.logit_scale)?;
    finite("logit_bias", model.logit_bias.unwrap_or(0.0))?;
    if !(1..=EMBEDDING_DIM_MAX).contains(&model.embedding_dim) {
        let dim = model.embedding_dim;
        return Err(unsound(format_args!(
            "an embedding_dim of {dim}; it is 1 to {EMBEDDING_DIM_MAX}"
        )));
    }
    if model.tensors.len() > TENSORS_MAX {
        let count = model.tensors.len();
        return Err(unsound(format_args!(
            "a model of {count} tensors; at most {TENSORS_MAX}"
        )));
    }
    let sound = |shape: &[u64]| {
        let elements = shape.iter().try_fold(1u64, |all, n| all.checked_mul(*n));
        shape.len() <= TENSOR_DIMENSIONS_MAX && elements.is_some_and(|n| n < 1 << 48)
    };
    let sound =
        |tensor: &TensorInfo| tensor.name.len() <= TENSOR_NAME_BYTES_MAX && sound(&tensor.shape);
    match model.tensors.iter().find(|tensor| !sound(tensor)) {
        Some(tensor) => Err(unsound(format_args!(
            "a tensor of an impossible name or shape: {:.100}",
            tensor.name
        ))),
        None => Ok(()),
    }
}

/// Checks the end of a slice's embeddings. `candidates` counts also those of other slices that it
/// embeds.
pub fn check_done(done: &EmbedDone, candidates: usize) -> Result<()> {
    number("seconds", done.seconds)?;
    number("flops", done.flops)?;
    number("text_flops", done.text_flops)?;
    finite("logit_scale", done.logit_scale)?;
    finite("logit_bias", done.logit_bias.unwrap_or(0.0))?;
    label("model_digest", &done.model_digest)?;
    label("device", &done.device)?;
    files(&done.files)?;
    match done.not_finite.iter().find(|c| **c as usize >= candidates) {
        Some(candidate) => Err(unsound(format_args!(
            "an embedding of candidate {candidate}, and its slice has {candidates}"
        ))),
        None => Ok(()),
    }
}

/// Checks the holes of a slice of `candidates`. Returns each hole once, with a short detail.
pub fn checked_holes(mut holes: Vec<Hole>, candidates: usize) -> Result<Vec<Hole>> {
    let mut known = HashSet::new();
    if let Some(hole) = holes.iter().find(|h| h.candidate as usize >= candidates) {
        return Err(unsound(format_args!(
            "a hole at candidate {}, and its slice has {candidates}",
            hole.candidate
        )));
    }
    holes.retain(|hole| known.insert(hole.candidate));
    for hole in &mut holes {
        if let Some((end, _)) = hole.detail.char_indices().nth(DETAIL_CHARS_MAX) {
            hole.detail.truncate(end);
        }
    }
    Ok(holes)
}

/// Checks the answer to the selection request `begin`.
pub fn check_selected(begin: &SelectBegin, selected: &SelectResponse) -> Result<()> {
    let (candidates, wanted) = (begin.positions.len(), begin.sub_batch_size as usize);
    let (drawn, holes) = (selected.indices.len(), &begin.holes);
    // A uniform draw may return more than it needs, because rows that cannot be read are skipped.
    let enough = match begin.policy() {
        Policy::Uniform => drawn >= wanted,
        _ => drawn == wanted,
    };
    // The answer decides which rows are trained on, so it is checked in full: every index exists,
    // is no hole, and comes once. A faulty worker could otherwise serve one row a thousand times,
    // under a receipt that looks right.
    let mut free = vec![true; candidates];
    let mut take = |index: &u32| free.get_mut(*index as usize).is_some_and(std::mem::take);
    for hole in holes {
        take(hole);
    }
    if !enough || !selected.indices.iter().all(&mut take) {
        return Err(unsound(format_args!(
            "a selection of {drawn} candidates that are not {wanted} different ones of those it \
            was given"
        )));
    }
    let of_each = |values: &[f64]| values.is_empty() || values.len() == drawn;
    if !of_each(&selected.scores) || !of_each(&selected.weights) {
        return Err(unsound("a selection without the scores of all it chose"));
    }
    if selected.chunks.iter().map(|n| u64::from(*n)).sum::<u64>() > candidates as u64 {
        return Err(unsound(
            "a selection whose chunks are larger than its super-batch",
        ));
    }
    label("device", &selected.device)?;
    number("seconds", selected.seconds)?;
    number("flops", selected.flops)?;
    finite("batch_score", selected.batch_score)?;
    finite("mean_score_chosen", selected.mean_score_chosen)?;
    finite("mean_score_candidates", selected.mean_score_candidates)?;
    let all = selected.scores.iter().chain(&selected.weights);
    all.copied().try_for_each(|value| finite("score", value))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn model() -> PrepareModelResponse {
        PrepareModelResponse {
            embedding_dim: 512,
            logit_scale: 10.0,
            ..Default::default()
        }
    }

    #[test]
    fn numbers_that_would_be_written_down_are_finite() {
        check_model(&model()).unwrap();
        let lies: [fn(&mut PrepareModelResponse); 6] = [
            |m| m.image_flops = f64::NAN,
            |m| m.text_flops = f64::INFINITY,
            |m| m.logit_bias = Some(f64::NAN),
            |m| m.embedding_dim = u32::MAX,
            |m| m.embedding_dim = 0,
            |m| {
                m.tensors.push(TensorInfo {
                    name: "w".into(),
                    shape: vec![u64::MAX, 2],
                    optional: false,
                });
            },
        ];
        for lie in lies {
            let mut model = model();
            lie(&mut model);
            assert!(check_model(&model).is_err(), "{model:?}");
        }
        for flops in [f64::NAN, -1.0] {
            let done = EmbedDone {
                flops,
                ..Default::default()
            };
            assert!(check_done(&done, 1).is_err());
        }
    }

    #[test]
    fn rows_of_a_slice_are_bounded() {
        let replies = Replies {
            rows_bytes_max: 100,
            ..Default::default()
        };
        replies.check_rows_bytes(100).unwrap();
        let error = replies.check_rows_bytes(101).unwrap_err();
        assert_eq!(error.reason(), Reason::MessageTooLarge);
    }

    #[test]
    fn tiny_parts_of_rows_count_as_larger_ones_and_empty_ones_are_refused() {
        let replies = Replies {
            rows_bytes_max: 3 * PART_BYTES_MIN,
            ..Default::default()
        };
        let mut bytes = 0;
        for _ in 0..3 {
            replies.count_rows(&mut bytes, &[0]).unwrap();
        }
        let error = replies.count_rows(&mut bytes, &[0]).unwrap_err();
        assert_eq!(error.reason(), Reason::MessageTooLarge);
        let error = replies.count_rows(&mut 0, &[]).unwrap_err();
        assert_eq!(error.reason(), Reason::Internal);
    }

    #[test]
    fn a_hole_lies_in_its_slice_and_is_told_once() {
        let hole = |candidate| Hole {
            candidate,
            detail: "é".repeat(10_000),
            ..Default::default()
        };
        let holes = checked_holes(vec![hole(3), hole(3), hole(0)], 4).unwrap();
        assert_eq!(
            holes.iter().map(|h| h.candidate).collect::<Vec<_>>(),
            [3, 0]
        );
        assert_eq!(holes[0].detail.chars().count(), DETAIL_CHARS_MAX);
        assert!(checked_holes(vec![hole(4)], 4).is_err());
        assert!(checked_holes(vec![hole(u32::MAX)], 4).is_err());
    }

    #[test]
    fn a_selection_names_as_many_candidates_as_are_wanted_each_once_and_no_hole() {
        let begin = SelectBegin {
            policy: Policy::Joint.into(),
            sub_batch_size: 2,
            positions: vec![7, 8, 9, 10],
            holes: vec![1],
            ..Default::default()
        };
        let check = |indices: &[u32]| {
            let selected = SelectResponse {
                indices: indices.to_vec(),
                scores: vec![0.0; indices.len()],
                ..Default::default()
            };
            check_selected(&begin, &selected)
        };
        check(&[3, 0]).unwrap();
        for unsound in [
            &[0][..],
            &[0, 2, 3],
            &[0, 0],
            &[0, 1],
            &[0, 4],
            &[0, u32::MAX],
        ] {
            assert!(check(unsound).is_err(), "{unsound:?}");
        }
        let nan = SelectResponse {
            indices: vec![0, 2],
            batch_score: f64::NAN,
            ..Default::default()
        };
        assert!(check_selected(&begin, &nan).is_err());
    }
}
