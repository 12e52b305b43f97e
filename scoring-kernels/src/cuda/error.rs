//! Why a CUDA device cannot be used.
use std::ffi::c_int;

/// CUDA_ERROR_OUT_OF_MEMORY of cuda.h.
pub(super) const OUT_OF_MEMORY: c_int = 2;

/// Why the kernels cannot run. Nothing is drawn then; LibTorch's form of the computation may still
/// work.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs, reason = "each message says what its fields are")]
pub enum CudaError {
    /// A library is missing, or is not what its name says.
    #[error("cannot load {library}: {detail}; {remedy}")]
    Library {
        library: &'static str,
        detail: String,
        remedy: &'static str,
    },
    /// The machine has fewer devices.
    #[error("there is no CUDA device {ordinal}: this machine has {count}")]
    NoDevice { ordinal: u32, count: u32 },
    /// A device without the instructions that the kernels need.
    #[error(
        "{name} has compute capability {major}.{minor}: our kernels need 8.0 or more, use \
        LibTorch there"
    )]
    TooOld {
        name: String,
        major: u32,
        minor: u32,
    },
    /// A function of the driver failed.
    #[error("{call} failed with {name} ({code}): {remedy}")]
    Call {
        call: &'static str,
        name: String,
        code: i32,
        remedy: &'static str,
    },
    /// NVRTC refused the kernels.
    #[error("NVRTC cannot compile the kernels for {architecture}: {log}")]
    Compile { architecture: String, log: String },
    /// The selection does not fit.
    #[error(
        "the selection needs {needed} bytes on the CUDA device and {free} are free: free some, or \
        select on the CPU"
    )]
    Memory { needed: usize, free: usize },
    /// The device's result differs from the CPU's.
    #[error(
        "the kernels failed their check on {device}: {what} is {found}, on the CPU {expected}; do \
        not use them there"
    )]
    WrongResult {
        device: String,
        what: String,
        found: f64,
        expected: f64,
    },
}

impl CudaError {
    /// Returns whether the device's memory was not enough. It may be enough at another time.
    pub fn is_out_of_memory(&self) -> bool {
        matches!(
            self,
            Self::Memory { .. }
                | Self::Call {
                    code: OUT_OF_MEMORY,
                    ..
                }
        )
    }
}

pub(super) type Result<T> = std::result::Result<T, CudaError>;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_told_from_other_failures() {
        let call = |code| CudaError::Call {
            call: "cuMemAlloc",
            name: String::new(),
            code,
            remedy: "",
        };
        assert!(CudaError::Memory { needed: 2, free: 1 }.is_out_of_memory());
        assert!(call(2).is_out_of_memory());
        assert!(!call(700).is_out_of_memory());
        assert!(
            !CudaError::NoDevice {
                ordinal: 2,
                count: 2
            }
            .is_out_of_memory()
        );
    }
}
