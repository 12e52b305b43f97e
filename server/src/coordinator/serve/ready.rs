//! Chosen batches that wait for their trainer, and the memory that they use together.
//!
//! A batch is counted until its last reader lets go of it, and not until its step is over. A rank
//! that reads slowly holds its rows long after the other ranks have moved on and the run has
//! dropped the step. If the count ended with the step, the process would prepare new batches into
//! memory that is not there. It is one count over all runs for the same reason: each run within its
//! own bound, many runs together would still not fit.
//!
//! Beside its rows a batch may have the streams that were made of them, so that a rank that asks
//! again costs neither a copy of its rows nor a checksum. They are kept only where they fit, and
//! those of all runs go as soon as rows need the room.
use crate::{
    coordinator::score::{kept::Data, table::Table},
    error::Result,
    metrics,
};
use bytes::Bytes;
use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex, MutexGuard, Weak,
        atomic::{AtomicU64, Ordering},
    },
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
    /// Streams that were made of the rows.
    streams: Arc<Streams>,
    held: Held,
}

/// The streams that are kept of one batch.
#[derive(Debug, Default)]
struct Streams(Mutex<BTreeMap<Share, (Encoded, Held)>>);

impl Streams {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<Share, (Encoded, Held)>> {
        self.0.lock().expect("no panic while held")
    }
}

/// Whose rows a stream has, and in which form.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Share {
    pub rank: u32,
    pub world_size: u32,
    /// Whether it says where images lie in place of the images.
    pub is_located: bool,
}

/// The stream of a share, whole. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Encoded {
    pub parts: Vec<Bytes>,
    /// XXH3-128 of the parts.
    pub checksum: Bytes,
}

impl Encoded {
    pub fn bytes(&self) -> u64 {
        self.parts.iter().map(|part| part.len() as u64).sum()
    }
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
        let streams = self.streams.lock();
        let streams: u64 = streams.values().map(|(_, held)| held.bytes).sum();
        self.held.bytes + again + streams
    }

    /// Returns the stream of a share, if it is kept.
    pub fn stream(&self, share: Share) -> Option<Encoded> {
        let streams = self.streams.lock();
        streams.get(&share).map(|(stream, _)| stream.clone())
    }

    /// Keeps the stream of a share, if it fits beside all that is in memory. Its parts may lie in
    /// the memory of the rows, which the budget then counts twice: it errs on the safe side.
    pub fn keep_stream(&self, share: Share, stream: &Encoded) {
        let budget = &self.held.budget;
        let mut streams = self.streams.lock();
        if streams.contains_key(&share) {
            return;
        }
        let Some(held) = Held::if_it_fits(budget, stream.bytes()) else {
            return;
        };
        if streams.is_empty() {
            budget.remember(&self.streams);
        }
        streams.insert(share, (stream.clone(), held));
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
    /// Those that hold some. They are within `bytes`, and need not be kept.
    streams: Mutex<Vec<Weak<Streams>>>,
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
        if budget.is_exceeded() {
            budget.forget_streams();
        }
        Self {
            budget: budget.clone(),
            bytes,
            batches,
        }
    }

    /// Counts bytes that need not be held; `None` if that would exceed the budget.
    fn if_it_fits(budget: &Arc<Budget>, bytes: u64) -> Option<Self> {
        let fits = |held: u64| {
            let sum = held.checked_add(bytes)?;
            (sum <= budget.bytes_max).then_some(sum)
        };
        let counted = budget
            .bytes
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, fits);
        counted.ok().map(|_| Self {
            budget: budget.clone(),
            bytes,
            batches: 0.0,
        })
    }
}

impl Budget {
    pub fn new(bytes_max: u64) -> Arc<Self> {
        Arc::new(Self {
            bytes: AtomicU64::new(0),
            bytes_max,
            streams: Mutex::default(),
        })
    }

    /// Counts a batch until it is dropped. A batch is never refused, even over the budget: its
    /// ranks wait for it. Room is made by dropping others, see `make_room` of the run.
    pub fn hold(self: &Arc<Self>, receipt: Receipt, rows: Data) -> Ready {
        let bytes = match &rows {
            Data::Here(rows) => rows.bytes() as u64 + of_masks(&receipt),
            // Whatever counts may be dropped, and these rows would be lost for the masks alone.
            Data::OnWorkers(_) | Data::Nowhere => 0,
        };
        Ready {
            receipt,
            rows,
            again: OnceCell::new(),
            streams: Arc::default(),
            held: Held::new(self, bytes, 1.0),
        }
    }

    fn remember(&self, streams: &Arc<Streams>) {
        let mut all = self.streams.lock().expect("no panic while held");
        all.retain(|streams| streams.strong_count() > 0);
        all.push(Arc::downgrade(streams));
    }

    /// Drops the streams of all batches. They are made again of rows in memory, where rows of a
    /// batch that is dropped are read again.
    fn forget_streams(&self) {
        let all = std::mem::take(&mut *self.streams.lock().expect("no panic while held"));
        for streams in all.iter().filter_map(Weak::upgrade) {
            streams.lock().clear();
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

/// Returns the bytes of the masks of tokens, which may be more than those of the texts.
fn of_masks(receipt: &Receipt) -> u64 {
    let rows = receipt.chosen.iter();
    rows.map(|row| row.token_mask.len() as u64).sum()
}

impl Drop for Held {
    fn drop(&mut self) {
        self.budget.bytes.fetch_sub(self.bytes, Ordering::Relaxed);
        metrics::ready_batches().decrement(self.batches);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::coordinator::score::table::tests::table;
    use arrow::array::{ArrayRef, RecordBatch, UInt32Array};
    use superbatch_proto::v1::ChosenRow;

    fn share(rank: u32) -> Share {
        Share {
            rank,
            world_size: 2,
            is_located: false,
        }
    }

    fn stream(bytes: usize) -> Encoded {
        Encoded {
            parts: vec![Bytes::from(vec![7; bytes]), Bytes::from_static(b"end")],
            checksum: Bytes::from_static(b"sum"),
        }
    }

    #[test]
    fn a_stream_is_kept_where_it_fits_and_comes_back_as_it_was() {
        let budget = Budget::new(100);
        let ready = budget.hold(Receipt::default(), Data::Nowhere);
        let first = stream(57);
        ready.keep_stream(share(0), &first);
        // A second time, as by two calls that did not find it: counted once.
        ready.keep_stream(share(0), &first);
        assert_eq!((budget.bytes(), ready.bytes()), (60, 60));
        let kept = ready.stream(share(0)).unwrap();
        assert_eq!(kept.parts[0].as_ptr(), first.parts[0].as_ptr(), "no copy");
        assert_eq!((kept.bytes(), &kept.checksum[..]), (60, &b"sum"[..]));
        for other in [
            share(1),
            Share {
                world_size: 1,
                ..share(0)
            },
            Share {
                is_located: true,
                ..share(0)
            },
        ] {
            assert!(ready.stream(other).is_none(), "{other:?}");
        }
        ready.keep_stream(share(1), &stream(38));
        assert!(ready.stream(share(1)).is_none(), "41 bytes do not fit");
        ready.keep_stream(share(1), &stream(37));
        assert_eq!((budget.bytes(), budget.is_exceeded()), (100, false));
    }

    #[test]
    fn masks_of_tokens_count_with_their_rows() {
        let row = ChosenRow {
            token_mask: vec![true; 7],
            ..Default::default()
        };
        let receipt = Receipt {
            chosen: vec![row; 2],
            ..Default::default()
        };
        let numbers: ArrayRef = Arc::new(UInt32Array::from_iter_values(0..8));
        let rows = table(vec![RecordBatch::try_from_iter([("n", numbers)]).unwrap()]);
        let of_rows = rows.bytes() as u64;
        let budget = Budget::new(1 << 20);
        let ready = budget.hold(receipt.clone(), Data::Here(rows));
        assert_eq!(
            (budget.bytes(), ready.bytes()),
            (of_rows + 14, of_rows + 14)
        );
        drop(ready);
        let elsewhere = budget.hold(receipt, Data::Nowhere);
        assert_eq!((budget.bytes(), elsewhere.bytes()), (0, 0));
    }

    #[test]
    fn rows_of_any_run_take_the_room_of_streams() {
        let numbers: ArrayRef = Arc::new(UInt32Array::from_iter_values(0..8));
        let rows = table(vec![RecordBatch::try_from_iter([("n", numbers)]).unwrap()]);
        let of_rows = rows.bytes() as u64;
        let budget = Budget::new(of_rows + 119);
        let of_runs = [0, 1].map(|_| budget.hold(Receipt::default(), Data::Nowhere));
        // Twice: what was forgotten is remembered again.
        for _ in 0..2 {
            for ready in &of_runs {
                ready.keep_stream(share(0), &stream(57));
            }
            assert_eq!(budget.bytes(), 120);
            let other = budget.hold(Receipt::default(), Data::Here(rows.clone()));
            assert_eq!((budget.bytes(), other.bytes()), (of_rows, of_rows));
            assert!(of_runs.iter().all(|ready| ready.stream(share(0)).is_none()));
            assert!(of_runs.iter().all(|ready| ready.bytes() == 0));
        }
        let [ready, _] = of_runs;
        ready.keep_stream(share(0), &stream(57));
        assert_eq!(budget.bytes(), 60);
        drop(ready);
        assert_eq!(budget.bytes(), 0);
    }
}
