//! Assembles a batch from the messages of one or several streams.
use crate::{Error, Result};
use arrow::{array::RecordBatch, compute::concat_batches, error::ArrowError};
use superbatch_proto::{
    Checksum, arrow_stream,
    v1::{BatchHeader, BatchTrailer, ReceiptSummary, Ticket},
};

/// One rank's share of a step's sub-batch.
#[derive(Debug, Clone)]
pub struct Batch {
    /// The rows, in the run's output schema: image as stored, caption, extra columns, and
    /// `_superbatch_*`.
    pub record_batch: RecordBatch,
    /// How the step was decided.
    pub receipt: ReceiptSummary,
    /// The global step, the same on all ranks.
    pub step: u64,
    /// The rank whose share this is.
    pub rank: u32,
    /// The number of ranks that share the step.
    pub world_size: u32,
}

/// Most bytes that are reserved because a header announces them. A wrong header must not take all
/// memory; a larger batch grows as its bytes arrive.
const RESERVE_BYTES_MAX: u64 = 64 << 20;

/// The part of a batch that has arrived. It outlives broken streams, so that a batch of gigabytes
/// is not sent again from the start.
pub(crate) struct Assembly {
    step: u64,
    header: Option<BatchHeader>,
    bytes: Vec<u8>,
    checksum: Checksum,
}

impl Assembly {
    pub(super) fn new(step: u64) -> Self {
        Self {
            step,
            header: None,
            bytes: Vec::new(),
            checksum: Checksum::default(),
        }
    }

    /// Returns the bytes received so far: the offset at which to resume.
    pub(super) fn received(&self) -> u64 {
        self.bytes.len() as u64
    }

    /// Begins a stream. If it is of another batch than the bytes received so far, these are thrown
    /// away.
    pub(super) fn begin(&mut self, header: BatchHeader) -> Result<()> {
        if header.offset != self.received() {
            let what = format!(
                "asked for byte {}, was sent byte {}",
                self.received(),
                header.offset
            );
            return Err(self.corrupt(what));
        }
        if let Some(known) = &self.header {
            // A rewind in between may have chosen other rows for this step. The streams would then
            // have the same offsets and different content, and a batch joined of both would decode
            // with luck and be wrong. The receipt names the choice, so it must be the same.
            let same = known.stream_bytes == header.stream_bytes && known.receipt == header.receipt;
            if !same && self.received() > 0 {
                return Err(self
                    .corrupt("the step was decided anew while its stream was broken".to_owned()));
            }
        }
        if self.header.is_none() {
            self.bytes
                .reserve(header.stream_bytes.min(RESERVE_BYTES_MAX) as usize);
        }
        self.header = Some(header);
        Ok(())
    }

    pub(super) fn extend(&mut self, part: &[u8]) -> Result<()> {
        if self.received() + part.len() as u64 > self.expected() {
            return Err(self.corrupt(format!(
                "more than the {} bytes that its header announced",
                self.expected()
            )));
        }
        self.checksum.update(part);
        self.bytes.extend_from_slice(part);
        Ok(())
    }

    /// Checks a complete stream against its trailer, and decodes it. Returns the tickets for the
    /// columns that workers have.
    pub(super) fn finish(&mut self, trailer: &BatchTrailer) -> Result<(Batch, Vec<Ticket>)> {
        if self.received() != self.expected() {
            return Err(self.incomplete());
        }
        if self.checksum.finish()[..] != trailer.xxh3[..] {
            return Err(self.corrupt("its checksum does not match".to_owned()));
        }
        let header = self.header.take().unwrap_or_default();
        let record_batch = match decode(std::mem::take(&mut self.bytes)) {
            Ok(record_batch) => record_batch,
            Err(error) => return Err(self.corrupt(error.to_string())),
        };
        let rows = record_batch.num_rows();
        if rows != header.rows as usize || rows != trailer.rows as usize {
            let what = format!(
                "{rows} rows, header says {}, trailer {}",
                header.rows, trailer.rows
            );
            return Err(self.corrupt(what));
        }
        let Some(receipt) = header.receipt else {
            return Err(self.corrupt("it has no receipt".to_owned()));
        };
        let batch = Batch {
            record_batch,
            receipt,
            step: self.step,
            rank: header.rank,
            world_size: header.world_size,
        };
        Ok((batch, header.tickets))
    }

    /// Returns the error for a stream that ended without a trailer.
    pub(super) fn incomplete(&self) -> Error {
        Error::Incomplete {
            step: self.step,
            received: self.received(),
            expected: self.expected(),
        }
    }

    /// Throws away the bytes received so far, which cannot be trusted. The next attempt begins at
    /// byte 0.
    pub(super) fn corrupt(&mut self, what: String) -> Error {
        *self = Self::new(self.step);
        Error::Corrupt {
            step: self.step,
            what,
        }
    }

    fn expected(&self) -> u64 {
        self.header.as_ref().map_or(0, |header| header.stream_bytes)
    }
}

/// Decodes a whole Arrow IPC stream into one record batch.
pub(super) fn decode(bytes: Vec<u8>) -> Result<RecordBatch, ArrowError> {
    let (schema, batches) = arrow_stream::read([bytes.into()])?;
    match <[RecordBatch; 1]>::try_from(batches) {
        Ok([only]) => Ok(only),
        Err(batches) => concat_batches(&schema, &batches),
    }
}
