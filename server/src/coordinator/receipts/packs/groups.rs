//! Row groups that were read last, for readers that go from step to step. All runs of the process
//! share one bound.
use super::Pack;
use crate::{
    dataset::Ranges,
    error::{Error, Result},
};
use std::{
    collections::{BTreeMap, VecDeque},
    sync::{
        Arc, LazyLock, Mutex, Weak,
        atomic::{AtomicU64, Ordering},
    },
};
use tokio::sync::OnceCell;

/// Bytes that the process keeps.
const BYTES_MAX: usize = 32 << 20;

static OF_PROCESS: LazyLock<Arc<Groups>> = LazyLock::new(|| Arc::new(Groups::new(BYTES_MAX)));

/// A row group: whose it is, by [`owner`], the pack, and its number there.
pub(super) type At = (u64, Pack, usize);

/// Returns a new number by which the groups of one run are told from those of others.
pub(super) fn owner() -> u64 {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    NEXT.fetch_add(1, Ordering::Relaxed)
}

#[derive(Debug)]
pub(super) struct Groups {
    bytes_max: usize,
    /// The oldest first.
    kept: Mutex<VecDeque<(At, Ranges)>>,
    /// Those that are being read, for as long as somebody waits for them.
    reading: Mutex<BTreeMap<At, Weak<OnceCell<Ranges>>>>,
}

impl Groups {
    pub(super) fn of_process() -> Arc<Self> {
        OF_PROCESS.clone()
    }

    pub(super) fn new(bytes_max: usize) -> Self {
        Self {
            bytes_max,
            kept: Mutex::default(),
            reading: Mutex::default(),
        }
    }

    /// Returns a group, which `read` reads unless it is kept. Readers of one group at once read it
    /// once; nobody waits for the read of another group.
    ///
    /// # Errors
    /// Those of `read`.
    pub(super) async fn get<F: Future<Output = Result<Ranges>>>(
        &self,
        at: At,
        read: impl FnOnce() -> F,
    ) -> Result<Ranges> {
        if let Some(kept) = self.find(&at) {
            return Ok(kept);
        }
        let cell = self.cell(&at);
        let read_and_keep = || async {
            let group = read().await?;
            self.keep(at, &group);
            Ok::<_, Error>(group)
        };
        cell.get_or_try_init(read_and_keep).await.cloned()
    }

    /// Lets go of the groups of an owner.
    pub(super) fn forget(&self, owner: u64) {
        let mut kept = self.kept.lock().expect("no panic while held");
        kept.retain(|((of, ..), _)| *of != owner);
    }

    pub(super) fn find(&self, at: &At) -> Option<Ranges> {
        let kept = self.kept.lock().expect("no panic while held");
        let found = kept.iter().find(|(known, _)| known == at);
        found.map(|(_, group)| group.clone())
    }

    fn cell(&self, at: &At) -> Arc<OnceCell<Ranges>> {
        let mut reading = self.reading.lock().expect("no panic while held");
        if let Some(cell) = reading.get(at).and_then(Weak::upgrade) {
            return cell;
        }
        reading.retain(|_, cell| cell.strong_count() > 0);
        let cell = Arc::new(OnceCell::new());
        reading.insert(at.clone(), Arc::downgrade(&cell));
        cell
    }

    fn keep(&self, at: At, group: &Ranges) {
        let size = group.bytes();
        if size > self.bytes_max {
            return;
        }
        let mut kept = self.kept.lock().expect("no panic while held");
        if kept.iter().any(|(known, _)| *known == at) {
            return;
        }
        let mut held: usize = kept.iter().map(|(_, group)| group.bytes()).sum();
        while held + size > self.bytes_max {
            let Some((_, oldest)) = kept.pop_front() else {
                break;
            };
            held -= oldest.bytes();
        }
        kept.push_back((at, group.clone()));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use bytes::Bytes;
    use futures::poll;

    fn at(owner: u64, number: usize) -> At {
        let pack = Pack {
            first: 0,
            last: 3,
            generation: 0,
            digest: "ab".into(),
            bytes: 100,
        };
        (owner, pack, number)
    }

    fn group(bytes: usize) -> Ranges {
        Ranges::one(100, 0, Bytes::from(vec![0; bytes]))
    }

    #[tokio::test]
    async fn a_read_that_stalls_holds_up_those_of_the_same_group_alone() {
        let groups = Groups::new(10);
        let hangs = groups.get(at(0, 0), std::future::pending::<Result<Ranges>>);
        let mut hangs = Box::pin(hangs);
        assert!(poll!(hangs.as_mut()).is_pending());
        let other = groups.get(at(0, 1), || async { Ok(group(3)) });
        assert_eq!(other.await.unwrap().bytes(), 3);
        let same = groups.get(at(0, 0), || async { Ok(group(4)) });
        let mut same = Box::pin(same);
        assert!(poll!(same.as_mut()).is_pending(), "it is read once");
        // Its reader gives up, and the next one reads.
        drop(hangs);
        assert_eq!(same.await.unwrap().bytes(), 4);
        let read_again = || async { Err(Error::internal("it was not kept")) };
        let again = groups.get(at(0, 0), read_again);
        assert_eq!(again.await.unwrap().bytes(), 4);
    }

    #[tokio::test]
    async fn no_more_bytes_are_kept_than_the_bound_for_all_owners() {
        let groups = Groups::new(10);
        let kept = || {
            let all = [(0, 0), (0, 1), (1, 0), (1, 1)].into_iter();
            let found = all.filter(|(owner, number)| groups.find(&at(*owner, *number)).is_some());
            found.collect::<Vec<_>>()
        };
        for (owner, number, bytes) in [(0, 0, 11), (0, 1, 6), (1, 0, 4)] {
            let read = groups.get(at(owner, number), || async { Ok(group(bytes)) });
            assert_eq!(read.await.unwrap().bytes(), bytes);
        }
        assert_eq!(
            kept(),
            [(0, 1), (1, 0)],
            "one that is too large is not kept"
        );
        let read = groups.get(at(1, 1), || async { Ok(group(5)) });
        read.await.unwrap();
        assert_eq!(kept(), [(1, 0), (1, 1)], "the oldest goes");
        groups.forget(1);
        assert_eq!(kept(), []);
    }
}
