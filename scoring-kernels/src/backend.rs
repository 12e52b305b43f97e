//! The backends that compute scores.
use crate::{
    cuda::CudaDevice,
    engine::{self, Engine, Spread},
    error::Result,
    filter,
    native::{NativeEngine, NativeSpread},
    noise::Noise,
    problem::Problem,
    types::{Candidates, Selection, Settings, Tuning},
};

/// Where the scores are computed. All backends get the same noise and draw the same examples, up to
/// rounding.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Backend {
    /// Plain Rust on the rayon pool that the caller runs in. The draw does not depend on the number
    /// of threads.
    Native,
    /// Kernels of our own on a CUDA device. The same inputs give the same draw, bit for bit, on the
    /// same kind of device.
    Cuda(CudaDevice),
    /// LibTorch on a device, which the caller has made available; threads on the CPU are LibTorch's
    /// own.
    #[cfg(feature = "torch")]
    Torch(tch::Device),
}

impl Backend {
    /// Draws a sub-batch from the candidates.
    ///
    /// # Errors
    ///
    /// [`Error`](crate::Error) says which input is wrong; nothing is drawn then.
    pub fn select(
        &self,
        candidates: &Candidates<'_>,
        settings: &Settings,
        noise: &Noise<'_>,
    ) -> Result<Selection> {
        self.select_tuned(candidates, settings, &Tuning::default(), noise)
    }

    /// As [`Self::select`], with a [`Tuning`].
    ///
    /// # Errors
    ///
    /// As [`Self::select`].
    pub fn select_tuned(
        &self,
        candidates: &Candidates<'_>,
        settings: &Settings,
        tuning: &Tuning,
        noise: &Noise<'_>,
    ) -> Result<Selection> {
        self.select_with_terms(candidates, settings, tuning, None, noise)
    }

    /// [`Self::select_tuned`] with a term for each candidate that is added to its score, `[B]`,
    /// after gain: another model's score, or a column of the data. Without embeddings of either
    /// model the terms are the scores.
    ///
    /// # Errors
    ///
    /// As [`Self::select`].
    pub fn select_with_terms(
        &self,
        candidates: &Candidates<'_>,
        settings: &Settings,
        tuning: &Tuning,
        terms: Option<&[f64]>,
        noise: &Noise<'_>,
    ) -> Result<Selection> {
        let mut problem = Problem::new(candidates, settings, tuning, terms, noise)?;
        // The rules of `tuning` run first and on the CPU for every backend, so that the candidates
        // offered to the draw do not depend on the device.
        let filtered = filter::filter(candidates, tuning, &problem.offered)?;
        problem.leave_out(&filtered)?;
        let (engine, spread) = (self.engine(&problem)?, self.spread(&problem)?);
        let mut selection = engine::run(&problem, engine, spread, noise)?;
        selection.left_out = filtered.left_out;
        selection.flops += filtered.flops;
        Ok(selection)
    }

    /// Returns the engine that computes losses, if the criterion or the report needs them.
    fn engine<'a>(&self, problem: &'a Problem<'a>) -> Result<Option<Box<dyn Engine + 'a>>> {
        if problem.models.is_empty() {
            return Ok(None);
        }
        Ok(Some(match self {
            Self::Native => Box::new(NativeEngine::new(problem)),
            Self::Cuda(device) => Box::new(device.engine(problem)?),
            #[cfg(feature = "torch")]
            Self::Torch(device) => Box::new(crate::torch::TorchEngine::new(problem, *device)?),
        }))
    }

    /// Returns the engine that computes distances, under k-center.
    fn spread<'a>(&self, problem: &'a Problem<'a>) -> Result<Option<Box<dyn Spread + 'a>>> {
        let Some(embeddings) = &problem.spread else {
            return Ok(None);
        };
        Ok(Some(match self {
            Self::Native => Box::new(NativeSpread::new(embeddings, problem.count)),
            Self::Cuda(device) => Box::new(device.spread(embeddings, problem.count)?),
            #[cfg(feature = "torch")]
            Self::Torch(device) => Box::new(crate::torch::TorchSpread::new(embeddings, *device)?),
        }))
    }
}
