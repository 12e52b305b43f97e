//! Chooses the implementation of selection on a CUDA device.
use std::sync::{Mutex, MutexGuard, PoisonError};
use superbatch_kernels::{Backend, CudaDevice, CudaLibraries};

/// Locks the chosen backend of each device, by its number.
fn lock_backends() -> MutexGuard<'static, Vec<(usize, Backend)>> {
    static KNOWN: Mutex<Vec<(usize, Backend)>> = Mutex::new(Vec::new());
    KNOWN.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Returns Superbatch's own kernels, or LibTorch's form if they cannot be used. They are tried, and
/// a failure is logged, once for each device. A lack of memory is tried again, since it may pass.
pub(crate) fn backend(device: tch::Device) -> Backend {
    let tch::Device::Cuda(ordinal) = device else {
        return Backend::Torch(device);
    };
    let mut known = lock_backends();
    if let Some((_, backend)) = known.iter().find(|(of, _)| *of == ordinal) {
        return *backend;
    }
    match CudaDevice::open(&CudaLibraries::default(), ordinal as u32) {
        Ok(ours) => {
            tracing::info!(device = ordinal, "selecting by our own CUDA kernels");
            known.push((ordinal, Backend::Cuda(ours)));
            Backend::Cuda(ours)
        }
        Err(error) => {
            tracing::warn!(device = ordinal, %error, "our CUDA kernels cannot be used: selecting \
            by LibTorch's form");
            if !error.is_out_of_memory() {
                known.push((ordinal, Backend::Torch(device)));
            }
            Backend::Torch(device)
        }
    }
}

/// Returns the backend that draws after `failed` gave up with `error`: LibTorch's form, which can
/// use memory that LibTorch holds in reserve. After any other failure than a lack of memory,
/// Superbatch's kernels are not used on that device again. `None` if `failed` is no CUDA backend of
/// ours.
pub(crate) fn fallback_for(failed: Backend, error: &superbatch_kernels::Error) -> Option<Backend> {
    let superbatch_kernels::Error::Cuda(cause) = error else {
        return None;
    };
    let mut known = lock_backends();
    let (ordinal, backend) = known.iter_mut().find(|(_, backend)| *backend == failed)?;
    let torch = Backend::Torch(tch::Device::Cuda(*ordinal));
    tracing::warn!(device = *ordinal, %error, "a selection by our CUDA kernels failed: drawing by \
    LibTorch's form");
    if !cause.is_out_of_memory() {
        *backend = torch;
    }
    Some(torch)
}

/// Returns whether a selection failed for lack of the device's memory.
pub(crate) fn is_out_of_memory(error: &superbatch_kernels::Error) -> bool {
    match error {
        superbatch_kernels::Error::Cuda(error) => error.is_out_of_memory(),
        superbatch_kernels::Error::Torch(error) => torch_lacks_memory(error),
        _ => false,
    }
}

/// Returns whether LibTorch failed for want of memory. It has no kind for it, so its words decide:
/// those of CUDA's allocator and of the processor's. A test has the library say them.
pub(crate) fn torch_lacks_memory(error: &tch::TchError) -> bool {
    let said = error.to_string();
    ["out of memory", "can't allocate memory"]
        .iter()
        .any(|words| said.contains(words))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A petabyte: no machine has it.
    #[test]
    fn torch_says_that_memory_is_short_as_we_expect() {
        let mut devices = vec![tch::Device::Cpu];
        devices.extend(tch::Cuda::is_available().then_some(tch::Device::Cuda(0)));
        for device in devices {
            let asked = tch::Tensor::f_zeros([1 << 48], (tch::Kind::Float, device));
            let error = asked.unwrap_err();
            assert!(torch_lacks_memory(&error), "{error}");
        }
        let other = tch::Tensor::f_zeros([-1], (tch::Kind::Float, tch::Device::Cpu));
        assert!(!torch_lacks_memory(&other.unwrap_err()));
    }

    use superbatch_kernels::{CudaError, Error};

    #[test]
    fn only_a_failure_of_ours_is_drawn_by_another() {
        let missing = Error::Cuda(CudaError::NoDevice {
            ordinal: 0,
            count: 0,
        });
        assert_eq!(
            fallback_for(Backend::Native, &missing),
            None,
            "no device of ours"
        );
        let torch = Backend::Torch(tch::Device::Cuda(7));
        lock_backends().push((7, torch));
        assert_eq!(
            fallback_for(
                torch,
                &Error::TooFewCandidates {
                    sub_batch_size: 2,
                    candidates: 1,
                    holes: 0
                }
            ),
            None
        );
        assert_eq!(backend(tch::Device::Cuda(7)), torch);
        assert_eq!(backend(tch::Device::Cpu), Backend::Torch(tch::Device::Cpu));
    }
}
