//! Work that would hold up all calls of the process, on threads of its own.
use crate::error::{Error, Result};

/// Runs `work` on a thread for blocking work; `what` names it if it panics.
///
/// # Errors
/// `Internal` for a panic, and the work's own.
pub(crate) async fn blocking<T: Send + 'static>(
    what: &str,
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    let done = tokio::task::spawn_blocking(work).await;
    done.map_err(|e| Error::internal(format!("{what} panicked")).because(e))?
}

#[cfg(test)]
pub(crate) mod tests {
    use std::{future::Future, pin::pin, sync::mpsc};

    /// Polls to see whether a future comes to its end without a thread for blocking work.
    const POLLS: usize = 100;

    /// Runs `work` while the runtime's only thread for blocking work is taken, and asserts that it
    /// waits for that thread: what is heavy in it does not run on the threads of all calls.
    /// Then the thread is released, and the result returned.
    pub(crate) fn needs_a_thread<T>(work: impl Future<Output = T>) -> T {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .max_blocking_threads(1)
            .enable_all()
            .build()
            .unwrap();
        runtime.block_on(async {
            let (release, held) = mpsc::channel::<()>();
            let (taken, is_taken) = tokio::sync::oneshot::channel();
            drop(tokio::task::spawn_blocking(move || {
                let _ = taken.send(());
                let _ = held.recv();
            }));
            is_taken.await.unwrap();
            let mut work = pin!(work);
            for _ in 0..POLLS {
                let polled = futures::poll!(work.as_mut());
                assert!(polled.is_pending(), "the work ran on a thread of all calls");
                tokio::task::yield_now().await;
            }
            drop(release);
            work.await
        })
    }
}
