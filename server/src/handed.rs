//! Rows that a worker hands over to the coordinator of its own process, in the record batches in
//! which it has them. Coordinator and worker share it.
use arrow::{array::RecordBatch, datatypes::SchemaRef};
use std::sync::{Arc, Mutex};

/// Rows of several record batches of one schema. The batches may have other rows too.
#[derive(Debug)]
pub struct Rows {
    pub schema: SchemaRef,
    pub batches: Vec<RecordBatch>,
    /// For each row, its batch and its row there.
    pub places: Vec<(usize, usize)>,
    /// Bytes of the rows' values.
    pub value_bytes: u64,
    /// The memory that the batches hold.
    pub bytes: usize,
}

/// Where the rows of one call are put, and taken from when the call says that it is done.
#[derive(Debug, Clone, Default)]
pub struct Handover(Arc<Mutex<Option<Rows>>>);

impl Handover {
    pub fn put(&self, rows: Rows) {
        *self.0.lock().expect("no panic while held") = Some(rows);
    }

    pub fn take(&self) -> Option<Rows> {
        self.0.lock().expect("no panic while held").take()
    }
}
