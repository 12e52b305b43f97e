//! The process in which a connection was made.
use pyo3::{exceptions::PyRuntimeError, prelude::*};

/// Threads and sockets do not survive a fork: what was made in another process is refused instead
/// of hanging.
#[derive(Clone, Copy)]
pub(crate) struct Process(u32);

impl Process {
    pub(crate) fn this() -> Self {
        Self(std::process::id())
    }

    pub(crate) fn check(self) -> PyResult<()> {
        if self.0 == std::process::id() {
            return Ok(());
        }
        let hint = "connect after the fork (superbatch.torch.SelectedBatches does so by itself)";
        Err(PyRuntimeError::new_err(format!(
            "this connection was made in another process: {hint}"
        )))
    }
}
