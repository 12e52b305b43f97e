//! Loads functions of libraries that are found at run time.
use super::error::{CudaError, Result};
use libloading::Library;
use std::path::{Path, PathBuf};

/// Where the CUDA driver and its compiler are found: paths, or names that the system's loader
/// resolves.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CudaLibraries {
    /// The driver, `libcuda`.
    pub driver: PathBuf,
    /// NVRTC; the first that can be loaded is used.
    pub nvrtc: Vec<PathBuf>,
}

impl Default for CudaLibraries {
    /// Returns the names that the system's loader resolves, and the library through which LibTorch
    /// finds its NVRTC.
    fn default() -> Self {
        let nvrtc = ["libnvrtc.so.13", "libnvrtc.so.12", "libcaffe2_nvrtc.so"]
            .map(PathBuf::from)
            .to_vec();
        Self {
            driver: "libcuda.so.1".into(),
            nvrtc,
        }
    }
}

pub(super) fn open(path: &Path) -> std::result::Result<Library, libloading::Error> {
    // SAFETY: NVIDIA's libraries, whose initialisers have no conditions.
    unsafe { Library::new(path) }
}

pub(super) fn missing(
    library: &'static str,
    detail: &libloading::Error,
    remedy: &'static str,
) -> CudaError {
    CudaError::Library {
        library,
        detail: detail.to_string(),
        remedy,
    }
}

/// A struct of C functions that return a status, filled from a library, which stays loaded.
macro_rules! functions {
    ($(#[$doc:meta])* $name:ident($what:literal,
        $remedy:literal) { $($field:ident = $symbol:literal($($arg:ty),*);)+ }) => {
        $(#[$doc])*
        pub(super) struct $name {
            $(pub $field: unsafe extern "C" fn($($arg),*) -> std::ffi::c_int,)+
        }

        impl $name {
            pub(super) fn of(library: libloading::Library) -> super::error::Result<Self> {
                // Never unloaded: the driver and the compiler keep threads, thread-local state and
                // exit handlers, which would jump into unmapped code.
                let library = std::mem::ManuallyDrop::new(library);
                let missing = |error| super::library::missing($what, &error, $remedy);
                Ok(Self {
                    // SAFETY: the types are those of the library's header.
                    $($field: *unsafe { library.get($symbol) }.map_err(missing)?,)+
                })
            }
        }
    };
}
pub(super) use functions;

pub(super) fn open_first(
    paths: &[PathBuf],
    library: &'static str,
    remedy: &'static str,
) -> Result<(PathBuf, Library)> {
    let mut detail = String::from("no name was given");
    for path in paths {
        match open(path) {
            Ok(library) => return Ok((path.clone(), library)),
            Err(error) => detail = error.to_string(),
        }
    }
    Err(CudaError::Library {
        library,
        detail,
        remedy,
    })
}
