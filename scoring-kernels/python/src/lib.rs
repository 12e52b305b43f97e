//! The extension module under the Python package `superbatch_kernels`: memory of Python arrays in,
//! the sub-batch out.
//!
//! The functions for users, and their messages about wrong arguments, are in Python, in
//! `python/superbatch_kernels`. Here an argument is checked only as far as memory safety needs.
mod arrays;
mod pool;
mod request;
mod select;

/// The extension module.
#[pyo3::pymodule]
mod _kernels {
    #[pymodule_export]
    use crate::select::{defaults, readers, select, words};
    use pyo3::prelude::*;

    /// The package's version is the crate's.
    #[pymodule_init]
    fn init(module: &Bound<'_, PyModule>) -> PyResult<()> {
        module.add("__version__", env!("CARGO_PKG_VERSION"))
    }
}
