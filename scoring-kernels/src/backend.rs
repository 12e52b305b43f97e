//! Where scores are computed.
use crate::{
    cuda::CudaDevice,
    engine::{self, Engine},
    error::Result,
    filter,
    native::NativeEngine,
    noise::Noise,
    problem::Problem,
    types::{Candidates, Selection, Settings, Tuning},
};

/// What computes the scores. All backends are handed the same noise and draw the same examples, up to rounding.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Backend {
    /// Plain Rust on the rayon pool that the caller runs in. The draw does not depend on the number of threads.
    Native,
    /// Kernels of our own on a CUDA device. The same inputs give the same draw, bit for bit, on the same kind of device.
    Cuda(CudaDevice),
    /// LibTorch on a device, which the caller has made available; threads on the CPU are LibTorch's own.
    #[cfg(feature = "torch")]
    Torch(tch::Device),
}

impl Backend {
    /// Draws a sub-batch from the candidates.
    ///
    /// # Errors
    ///
    /// [`Error`](crate::Error) says which input is wrong; nothing is drawn then.
    pub fn select(&self, candidates: &Candidates<'_>, settings: &Settings, noise: &Noise<'_>) -> Result<Selection> {
        self.select_tuned(candidates, settings, &Tuning::default(), noise)
    }

    /// [`Self::select`] with other than the default [`Tuning`].
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
        let mut problem = Problem::new(candidates, settings, tuning, noise)?;
        let filtered = filter::filter(candidates, tuning, &problem.offered)?;
        problem.leave_out(&filtered)?;
        let mut selection = if problem.models.is_empty() {
            engine::run(&problem, None, noise)?
        } else {
            let mut engine: Box<dyn Engine> = match self {
                Self::Native => Box::new(NativeEngine::new(&problem)),
                Self::Cuda(device) => Box::new(device.engine(&problem)?),
                #[cfg(feature = "torch")]
                Self::Torch(device) => Box::new(crate::torch::TorchEngine::new(&problem, *device)?),
            };
            engine::run(&problem, Some(engine.as_mut()), noise)?
        };
        selection.left_out = filtered.left_out;
        selection.flops += filtered.flops;
        Ok(selection)
    }
}
