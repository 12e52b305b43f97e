//! Chosen batches that wait for their trainer, and the memory that they use together.
//!
//! A batch is counted until its last reader lets go of it, and not until its step is over. A rank
//! that reads slowly holds its rows long after the other ranks have moved on and the run has
//! dropped the step. If the count ended with the step, the process would prepare new batches into
//! memory that is not there. It is one count over all runs for the same reason: each run within its
//! own bound, many runs together would still not fit.
use crate::{
    coordinator::score::{kept::Data, table::Table},
    error::Result,
    metrics,
};
use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};
use superbatch_proto::v1::Receipt;
use tokio::sync::OnceCell;

/// A step whose receipt is durable and whose chosen rows are in memory, here or on workers. Both
/// must be true before the first byte is sent: a batch without a receipt could not be served again
/// after a crash.
#[derive(Debug)]
pub struct Ready {
    pub receipt: Receipt,
    /// Data columns of the chosen rows, in the order of the draw.
    pub rows: Data,
    /// Rows that were read again because a rank did not get them from a worker.
    again: OnceCell<(Table, Held)>,
    held: Held,
}

impl Ready {
    /// Returns the rows, if they are in hand here.
    pub fn table(&self) -> Option<&Table> {
        match &self.rows {
            Data::Here(rows) => Some(rows),
            Data::OnWorkers(_) | Data::Nowhere => self.again.get().map(|(rows, _)| rows),
        }
    }

    /// Returns the bytes that dropping it gives back to the budget. Rows on workers have none.
    pub fn bytes(&self) -> u64 {
        let again = self.again.get().map_or(0, |(_, held)| held.bytes);
        self.held.bytes + again
    }

    /// Has the rows in hand here; `read` reads them again. Ranks that ask together share one read.
    pub async fn fetched(&self, read: impl Future<Output = Result<Table>>) -> Result<()> {
        if self.table().is_some() {
            return Ok(());
        }
        let read = async {
            let rows = read.await?;
            let held = Held::new(&self.held.budget, rows.bytes() as u64, 0.0);
            Ok((rows, held))
        };
        self.again.get_or_try_init(|| read).await.map(drop)
    }
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
    batches: f64,
}

impl Held {
    fn new(budget: &Arc<Budget>, bytes: u64, batches: f64) -> Self {
        budget.bytes.fetch_add(bytes, Ordering::Relaxed);
        metrics::ready_batches().increment(batches);
        Self {
            budget: budget.clone(),
            bytes,
            batches,
        }
    }
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
    pub fn hold(self: &Arc<Self>, receipt: Receipt, rows: Data) -> Ready {
        let bytes = match &rows {
            Data::Here(rows) => rows.bytes() as u64,
            Data::OnWorkers(_) | Data::Nowhere => 0,
        };
        Ready {
            receipt,
            rows,
            again: OnceCell::new(),
            held: Held::new(self, bytes, 1.0),
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
        metrics::ready_batches().decrement(self.batches);
    }
}
