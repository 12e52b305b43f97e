//! The arguments of a selection, as Python passes them.
use crate::arrays::{Tower, values};
use pyo3::{buffer::PyBuffer, exceptions::PyValueError, prelude::*};
use superbatch_kernels::{ModelEmbeddings, Noise, Settings, Tuning, UnknownWord};

/// Image and text embeddings, scale and bias.
#[derive(FromPyObject)]
pub(crate) struct Model(Tower, Tower, f64, f64);

impl Model {
    fn view(&self) -> PyResult<ModelEmbeddings<'_>> {
        let Self(image, text, scale, bias) = self;
        Ok(ModelEmbeddings {
            image: image.rows()?,
            text: text.rows()?,
            dim: image.dim(),
            scale: *scale,
            bias: *bias,
        })
    }
}

/// The items of the dict that `superbatch_kernels.select` makes of its arguments.
#[derive(FromPyObject)]
#[pyo3(from_item_all)]
pub(crate) struct Request {
    /// B.
    pub count: usize,
    learner: Option<Model>,
    reference: Option<Model>,
    holes: PyBuffer<u32>,
    /// One key for each candidate.
    keys: PyBuffer<u64>,
    /// `[draws or more, B]`; if absent, the seeded noise.
    noise: Option<PyBuffer<f32>>,
    seed: u64,
    generation: u32,
    step: u64,
    policy: String,
    loss: String,
    criterion: String,
    sub_batch_size: usize,
    n_chunks: usize,
    gain: f64,
    temperature: f64,
    pressure: f64,
    priority_exponent: f64,
    weight_exponent: f64,
    duplicates_above: Option<f64>,
    clip_score_at_least: Option<f64>,
    neg_clip_loss_keep: Option<f64>,
    pub threads: Option<usize>,
}

impl Request {
    pub(crate) fn learner(&self) -> PyResult<Option<ModelEmbeddings<'_>>> {
        self.learner.as_ref().map(Model::view).transpose()
    }

    pub(crate) fn reference(&self) -> PyResult<Option<ModelEmbeddings<'_>>> {
        self.reference.as_ref().map(Model::view).transpose()
    }

    pub(crate) fn holes(&self) -> PyResult<Vec<u32>> {
        values(&self.holes).map(<[u32]>::to_vec)
    }

    pub(crate) fn noise(&self) -> PyResult<Noise<'_>> {
        Ok(match &self.noise {
            Some(given) => Noise::Given(values(given)?),
            None => {
                let Self {
                    seed,
                    generation,
                    step,
                    ..
                } = *self;
                Noise::Seeded {
                    seed,
                    generation,
                    step,
                    keys: values(&self.keys)?,
                }
            }
        })
    }

    pub(crate) fn settings(&self) -> PyResult<Settings> {
        let unknown = |error: UnknownWord| PyValueError::new_err(error.to_string());
        Ok(Settings {
            policy: self.policy.parse().map_err(unknown)?,
            loss: self.loss.parse().map_err(unknown)?,
            criterion: self.criterion.parse().map_err(unknown)?,
            sub_batch_size: self.sub_batch_size,
            n_chunks: self.n_chunks,
            gain: self.gain,
        })
    }

    pub(crate) fn tuning(&self) -> Tuning {
        Tuning {
            temperature: self.temperature,
            pressure: self.pressure,
            priority_exponent: self.priority_exponent,
            weight_exponent: self.weight_exponent,
            duplicates_above: self.duplicates_above,
            clip_score_at_least: self.clip_score_at_least,
            neg_clip_loss_keep: self.neg_clip_loss_keep,
        }
    }
}
