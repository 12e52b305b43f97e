//! Chosen batches that wait for their trainer, and the memory that they use together.
use crate::coordinator::score::table::Table;
use crate::metrics;
use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};
use superbatch_proto::v1::Receipt;

/// A step whose receipt is durable and whose chosen rows are in memory. Both must be true before
/// the first byte is sent: a batch without a receipt could not be served again after a crash.
#[derive(Debug)]
pub struct Ready {
    pub receipt: Receipt,
    /// Data columns of the chosen rows, in the order of the draw.
    pub rows: Table,
    _held: Held,
}

/// Bytes of all batches in memory, over all runs.
#[derive(Debug)]
pub struct Budget {
    bytes: AtomicU64,
    bytes_max: u64,
}

#[derive(Debug)]
struct Held {
    budget: Arc<Budget>,
    bytes: u64,
}

impl Budget {
    pub fn new(bytes_max: u64) -> Arc<Self> {
        Arc::new(Self {
            bytes: AtomicU64::new(0),
            bytes_max,
        })
    }

    /// Counts a batch until it is dropped. A batch is never refused, even over the budget: its
    /// ranks wait for it. Room is made by dropping others, see `make_room` of the run.
    pub fn hold(self: &Arc<Self>, receipt: Receipt, rows: Table) -> Ready {
        let bytes = rows.bytes() as u64;
        self.bytes.fetch_add(bytes, Ordering::Relaxed);
        metrics::ready_batches().increment(1.0);
        Ready {
            receipt,
            rows,
            _held: Held {
                budget: self.clone(),
                bytes,
            },
        }
    }

    /// Returns the bytes of all batches in memory.
    pub fn bytes(&self) -> u64 {
        self.bytes.load(Ordering::Relaxed)
    }

    /// Returns whether batches without waiting ranks should be dropped; their rows can be read
    /// again.
    pub fn is_exceeded(&self) -> bool {
        self.bytes.load(Ordering::Relaxed) > self.bytes_max
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.budget.bytes.fetch_sub(self.bytes, Ordering::Relaxed);
        metrics::ready_batches().decrement(1.0);
    }
}
