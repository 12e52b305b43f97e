//! Assembles a batch from the messages of one or several streams.
use crate::{Error, Result};
use arrow::{array::RecordBatch, compute::concat_batches, error::ArrowError};
use std::mem::MaybeUninit;
#[cfg(target_os = "linux")]
use std::sync::OnceLock;
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

/// Room from this many bytes on is asked to lie in huge pages.
const HUGE_MIN: usize = 4 << 20;

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
            prefer_huge_pages(self.bytes.spare_capacity_mut());
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

/// Asks for huge pages in memory that is about to be filled. A batch takes megabytes that are
/// mostly new to the process, and in pages of 4 KiB their faults may take longer than the copy into
/// them.
fn prefer_huge_pages(room: &mut [MaybeUninit<u8>]) {
    let (start, bytes) = (room.as_mut_ptr(), room.len());
    if bytes < HUGE_MIN {
        return;
    }
    #[cfg(target_os = "linux")]
    // SAFETY: the call changes no byte, neither of the room nor of what lies beside it in its first
    // and last page. It is advice: it may fail, and then the pages are small.
    unsafe {
        // Of whole pages: a mapping that is advised in part is cut into several, and the system
        // extends and moves a buffer without a copy only within one.
        let page = page_bytes();
        let first = start.addr() - start.addr() % page;
        let end = (start.addr() + bytes).next_multiple_of(page);
        let first_page = start.with_addr(first).cast::<libc::c_void>();
        libc::madvise(first_page, end - first, libc::MADV_HUGEPAGE);
    }
    #[cfg(not(target_os = "linux"))]
    let _ = start;
}

/// The size of the system's small pages.
#[cfg(target_os = "linux")]
fn page_bytes() -> usize {
    static BYTES: OnceLock<usize> = OnceLock::new();
    // SAFETY: it takes a number, and returns one.
    *BYTES.get_or_init(|| match unsafe { libc::sysconf(libc::_SC_PAGESIZE) } {
        bytes @ 1.. => bytes as usize,
        _ => 4096,
    })
}

/// Decodes a whole Arrow IPC stream into one record batch.
pub(super) fn decode(bytes: Vec<u8>) -> Result<RecordBatch, ArrowError> {
    let (schema, batches) = arrow_stream::read([bytes.into()])?;
    match <[RecordBatch; 1]>::try_from(batches) {
        Ok([only]) => Ok(only),
        Err(batches) => concat_batches(&schema, &batches),
    }
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;

    /// The mapping in which an address lies, and its flags; `None` where the system tells none.
    fn mapping_at(address: usize) -> Option<(std::ops::Range<usize>, String)> {
        let maps = std::fs::read_to_string("/proc/self/smaps").ok()?;
        let mut here = None;
        for line in maps.lines() {
            let first = line.split(' ').next().unwrap_or_default();
            let ends = first.split_once('-');
            let ends = ends.map(|(a, b)| [a, b].map(|end| usize::from_str_radix(end, 16)));
            if let Some([Ok(start), Ok(end)]) = ends {
                here = (start..end).contains(&address).then_some(start..end);
            } else if let (Some(here), Some(flags)) = (&here, line.strip_prefix("VmFlags:")) {
                return Some((here.clone(), flags.to_owned()));
            }
        }
        None
    }

    #[test]
    fn room_for_a_large_batch_is_one_mapping_that_is_asked_to_have_huge_pages() {
        let here = std::ptr::from_ref(&RESERVE_BYTES_MAX).addr();
        let huge = std::path::Path::new("/sys/kernel/mm/transparent_hugepage");
        if !huge.exists() || mapping_at(here).is_none() {
            eprintln!("skipped: this system has no huge pages, or does not tell where they are");
            return;
        }
        let mut assembly = Assembly::new(0);
        let header = BatchHeader {
            stream_bytes: RESERVE_BYTES_MAX,
            ..Default::default()
        };
        assembly.begin(header).unwrap();
        let start = assembly.bytes.as_ptr().addr();
        let end = start + assembly.bytes.capacity();
        let (mapping, flags) = mapping_at(start).unwrap();
        assert!(flags.contains(" hg"), "{flags}");
        assert!(mapping.start <= start && end <= mapping.end);
        // Less than asks for a huge page.
        for bytes in [0, 100, 2 << 20, HUGE_MIN - 1] {
            prefer_huge_pages(Vec::with_capacity(bytes).spare_capacity_mut());
        }
    }
}
