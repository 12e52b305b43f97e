//! Which form of selection runs on a CUDA device.
use std::sync::{Mutex, PoisonError};
use superbatch_kernels::{Backend, CudaDevice, CudaLibraries};

/// Our own kernels, or LibTorch's form where they cannot be used: tried, and said, once a device.
pub fn backend(device: tch::Device) -> Backend {
    static KNOWN: Mutex<Vec<(usize, Backend)>> = Mutex::new(Vec::new());
    let tch::Device::Cuda(ordinal) = device else { return Backend::Torch(device) };
    let mut known = KNOWN.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some((_, backend)) = known.iter().find(|(of, _)| *of == ordinal) {
        return *backend;
    }
    let backend = match CudaDevice::open(&CudaLibraries::default(), ordinal as u32) {
        Ok(device) => Backend::Cuda(device),
        Err(error) => {
            tracing::warn!(device = ordinal, %error, "our CUDA kernels cannot be used: selecting by LibTorch's form");
            Backend::Torch(device)
        }
    };
    known.push((ordinal, backend));
    backend
}
