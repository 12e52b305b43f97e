//! Scores on a CUDA device, by this crate's kernels: NVRTC compiles `kernels.cu` for the device
//! when it is opened.
//!
//! Both libraries are found at run time, so that one binary runs with and without them.
mod check;
mod device;
mod driver;
mod engine;
pub(crate) mod error;
mod job;
mod library;
mod memory;
mod nvrtc;
mod rows;
mod spread;
mod stream;
#[cfg(test)]
mod tests;

use crate::{problem::Problem, types::ModelEmbeddings};
use device::Device;
use engine::CudaEngine;
pub use error::CudaError;
pub use library::CudaLibraries;
use spread::CudaSpread;
use std::{fmt, sync::Mutex};

/// A CUDA device whose kernels were compiled and passed their check. It stays open for the rest of
/// the process, in a context of its own: our kernels share no memory on the device with LibTorch.
#[derive(Clone, Copy)]
pub struct CudaDevice(&'static Device);

/// Devices that were opened, with the libraries that opened them.
static OPEN: Mutex<Vec<(CudaLibraries, CudaDevice)>> = Mutex::new(Vec::new());

impl CudaDevice {
    /// Opens a device: compiles the kernels, and compares their results of a built-in case with the
    /// CPU's. A device that is open already is returned.
    ///
    /// # Errors
    ///
    /// Why the kernels cannot be used on this device. LibTorch's form of the computation may still
    /// work.
    pub fn open(libraries: &CudaLibraries, ordinal: u32) -> Result<Self, CudaError> {
        // A poisoned lock is harmless: a device enters the list only when it is complete.
        let mut open = OPEN
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner);
        if let Some((_, known)) = open
            .iter()
            .find(|(by, known)| by == libraries && known.0.ordinal == ordinal)
        {
            return Ok(*known);
        }
        let device = Device::open(libraries, ordinal)?;
        check::run(&device)?;
        let device = Self(Box::leak(Box::new(device)));
        open.push((libraries.clone(), device));
        Ok(device)
    }

    /// Returns the driver's number of the device.
    pub fn ordinal(&self) -> u32 {
        self.0.ordinal
    }

    /// Returns the driver's name of the device.
    pub fn name(&self) -> &'static str {
        &self.0.name
    }

    pub(crate) fn engine<'a>(&self, problem: &'a Problem<'a>) -> Result<CudaEngine<'a>, CudaError> {
        CudaEngine::new(problem, self.0)
    }

    pub(crate) fn spread(
        &self,
        embeddings: &ModelEmbeddings<'_>,
        count: usize,
    ) -> Result<CudaSpread<'static>, CudaError> {
        CudaSpread::new(embeddings, count, self.0)
    }
}

impl PartialEq for CudaDevice {
    fn eq(&self, other: &Self) -> bool {
        std::ptr::eq(self.0, other.0)
    }
}

impl fmt::Debug for CudaDevice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({})", self.0.ordinal, self.0.name)
    }
}
