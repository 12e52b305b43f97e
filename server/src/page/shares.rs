//! What the page takes of a process that it may share with a service. Every request takes its part
//! of these shares, and no step takes any of them. So however many readers there are, what a step
//! needs is not with them.
use crate::error::{Error, Result};
use std::sync::Arc;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// Reads from storage at the same time, over all readers.
pub(super) const READS: usize = 8;
/// Blocks of data in memory at the same time; each may be hundreds of megabytes.
pub(super) const BLOCKS: usize = 2;
/// Receipts in memory at the same time; one of 32,768 rows takes some ten megabytes.
pub(super) const RECEIPTS: usize = 4;
/// Threads for blocking work: of the process's hundreds, those that readers may have.
pub(super) const THREADS: usize = 2;

/// Something of which only so much is taken at a time. Requests have it in the order in which they
/// came.
pub(super) struct Share(Arc<Semaphore>);

/// A part of a share, until it is dropped.
pub(super) type Taken = OwnedSemaphorePermit;

impl Share {
    pub(super) fn of(most: usize) -> Self {
        Self(Arc::new(Semaphore::new(most)))
    }

    /// Waits for a part.
    pub(super) async fn take(&self) -> Result<Taken> {
        let taken = self.0.clone().acquire_owned().await;
        taken.map_err(|e| Error::internal("the run page stopped").because(e))
    }

    /// Returns how many parts are not taken.
    #[cfg(test)]
    pub(super) fn left(&self) -> usize {
        self.0.available_permits()
    }
}
