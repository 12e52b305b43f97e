//! Work that would hold up all calls of the process, on threads of its own.
use crate::error::{Error, Result};

/// Runs `work` on a thread for blocking work; `what` names it if it panics.
///
/// # Errors
/// `Internal` for a panic, and the work's own.
pub async fn blocking<T: Send + 'static>(
    what: &str,
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    let done = tokio::task::spawn_blocking(work).await;
    done.map_err(|e| Error::internal(format!("{what} panicked")).because(e))?
}
