//! One selection, without the GIL.
use crate::{arrays::memory, pool::pool, request::Request};
use half::f16;
use pyo3::{
    exceptions::PyValueError,
    prelude::*,
    types::{PyByteArray, PyDict},
};
use std::iter;
use superbatch_kernels::{
    Backend, Candidates, Criterion, Error, Loss, ModelEmbeddings, Noise, Number, Policy, Rows,
    Selection, Settings, Tuning,
};

/// Arrays as the memory of new NumPy arrays: int64 and float64.
#[derive(IntoPyObject)]
pub(crate) struct Drawn<'py> {
    indices: Bound<'py, PyByteArray>,
    chunks: Bound<'py, PyByteArray>,
    scores: Bound<'py, PyByteArray>,
    weights: Bound<'py, PyByteArray>,
    not_finite: Bound<'py, PyByteArray>,
    left_out: usize,
    batch_score: Option<f64>,
    mean_score_chosen: Option<f64>,
    mean_score_candidates: Option<f64>,
    flops: f64,
}

/// Draws a sub-batch by `request`. The GIL is released, so other Python threads run in the
/// meantime.
#[pyfunction]
pub(crate) fn select(py: Python<'_>, request: Request) -> PyResult<Drawn<'_>> {
    let (settings, tuning, noise) = (request.settings()?, request.tuning(), request.noise()?);
    let (learner, reference, given) = (request.learner()?, request.reference()?, request.holes()?);
    let pool = pool(py, request.threads)?;
    let mut holes = given.clone();
    let count = request.count;
    let selection = py.detach(|| {
        let candidates = Candidates {
            count,
            learner,
            reference,
            holes: &[],
        };
        pool.install(|| survivors(&candidates, &mut holes, &settings, &tuning, &noise))
    });
    let mut not_finite = holes.split_off(given.len());
    let selection = selection.map_err(|error| exception(&error, not_finite.len()))?;
    not_finite.sort_unstable();
    drawn(py, &selection, &not_finite)
}

/// Selects from the candidates whose embeddings are finite; the others are appended to the holes.
///
/// If all rows are finite, each is read once: the kernels find a bad row before they draw, and only
/// then are all rows searched.
fn survivors(
    candidates: &Candidates<'_>,
    holes: &mut Vec<u32>,
    settings: &Settings,
    tuning: &Tuning,
    noise: &Noise<'_>,
) -> Result<Selection, Error> {
    let mut offered = vec![true; candidates.count];
    for hole in holes.iter() {
        if let Some(slot) = offered.get_mut(*hole as usize) {
            *slot = false;
        }
    }
    loop {
        let found = Backend::Native.select_tuned(
            &Candidates {
                holes,
                ..*candidates
            },
            settings,
            tuning,
            noise,
        );
        let Err(Error::NotFinite { model, .. }) = &found else {
            return found;
        };
        let searched = if *model == "learner" {
            &candidates.learner
        } else {
            &candidates.reference
        };
        let Some(searched) = searched else {
            return found;
        };
        let before = holes.len();
        holes.extend(not_finite(searched, candidates.count).filter(|row| offered[*row as usize]));
        holes[before..]
            .iter()
            .for_each(|row| offered[*row as usize] = false);
        if holes.len() == before {
            return found;
        }
    }
}

/// Candidates whose image or text holds a NaN or an infinity.
fn not_finite<'a>(
    model: &ModelEmbeddings<'a>,
    count: usize,
) -> impl Iterator<Item = u32> + use<'a> {
    fn finite<T: Copy>(
        values: &[T],
        dim: usize,
        row: usize,
        is_finite: impl Fn(T) -> bool,
    ) -> bool {
        values[row * dim..][..dim]
            .iter()
            .all(|value| is_finite(*value))
    }
    let ModelEmbeddings {
        image, text, dim, ..
    } = *model;
    let is_bad = move |row: &usize| {
        !iter::once(image).chain([text]).all(|rows| match rows {
            Rows::F32(values) => finite(values, dim, *row, f32::is_finite),
            Rows::F16(values) => finite(values, dim, *row, f16::is_finite),
        })
    };
    (0..count).filter(is_bad).map(|row| row as u32)
}

/// Turns the kernels' refusal into a `ValueError`.
fn exception(error: &Error, not_finite: usize) -> PyErr {
    let more = match error {
        Error::ModelMissing { model, .. } => {
            format!(": give {model}=(image, text, scale, bias), or another criterion")
        }
        Error::TooFewCandidates { .. } if not_finite > 0 => {
            format!(
                " ({not_finite} of the holes are candidates whose embeddings hold NaN or infinity)"
            )
        }
        _ => String::new(),
    };
    PyValueError::new_err(format!("{error}{more}"))
}

fn drawn<'py>(py: Python<'py>, selection: &Selection, not_finite: &[u32]) -> PyResult<Drawn<'py>> {
    let whole = |numbers: &[u32]| memory(py, numbers, |number| i64::from(number).to_ne_bytes());
    let real = |numbers: &[f64]| memory(py, numbers, f64::to_ne_bytes);
    Ok(Drawn {
        indices: whole(&selection.indices)?,
        chunks: whole(&selection.chunks)?,
        scores: real(&selection.scores)?,
        weights: real(&selection.weights)?,
        not_finite: whole(not_finite)?,
        left_out: selection.left_out.total(),
        batch_score: selection.batch_score,
        mean_score_chosen: selection.mean_score_chosen,
        mean_score_candidates: selection.mean_score_candidates,
        flops: selection.flops,
    })
}

/// Returns the names of the kernels' policies, losses and criteria.
#[pyfunction]
pub(crate) fn words() -> [Vec<&'static str>; 3] {
    [
        Policy::ALL.iter().map(|word| word.as_str()).collect(),
        Loss::ALL.iter().map(|word| word.as_str()).collect(),
        Criterion::ALL.iter().map(|word| word.as_str()).collect(),
    ]
}

/// Returns the kernels' defaults, by argument.
#[pyfunction]
pub(crate) fn defaults(py: Python<'_>) -> PyResult<Bound<'_, PyDict>> {
    let Settings {
        policy,
        loss,
        criterion,
        sub_batch_size: _,
        n_chunks,
        gain,
    } = Settings::default();
    let tuning = Tuning::default();
    let defaults = PyDict::new(py);
    defaults.set_item("policy", policy.as_str())?;
    defaults.set_item("loss", loss.as_str())?;
    defaults.set_item("criterion", criterion.as_str())?;
    defaults.set_item("n_chunks", n_chunks)?;
    defaults.set_item("gain", gain)?;
    defaults.set_item("temperature", tuning.temperature)?;
    defaults.set_item("pressure", tuning.pressure)?;
    defaults.set_item("priority_exponent", tuning.priority_exponent)?;
    defaults.set_item("weight_exponent", tuning.weight_exponent)?;
    defaults.set_item("duplicates_above", tuning.duplicates_above)?;
    defaults.set_item("clip_score_at_least", tuning.clip_score_at_least)?;
    defaults.set_item("neg_clip_loss_keep", tuning.neg_clip_loss_keep)?;
    Ok(defaults)
}

/// Returns the arguments that only one policy reads, each with its policy.
#[pyfunction]
pub(crate) fn readers(py: Python<'_>) -> PyResult<Bound<'_, PyDict>> {
    let readers = PyDict::new(py);
    for number in Number::ALL {
        if let Some(policy) = number.reader {
            readers.set_item(number.name, policy.as_str())?;
        }
    }
    Ok(readers)
}
