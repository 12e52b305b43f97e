//! Blocks of remote stores on this machine's disk, so that later epochs and other runs do not read
//! them over the network again.
//!
//! The cache helps and never hinders: a file that is damaged is a miss, and what cannot be written
//! is not kept. Either is logged and counted. A process that is killed loses nothing of it but the
//! entry that it was writing.
//!
//! A disk may also hang. A read that takes longer than `READ_TIME_MAX` is a miss, and is logged
//! and counted. It keeps its thread until the disk answers, so at most `READS_AT_ONCE_MAX` read
//! at a time, and what would be one more is a miss at once. Writes are in the background, one at a
//! time.
mod folder;
mod index;
#[cfg(test)]
mod tests;

use self::{
    folder::{DIR, Folder, room_for},
    index::{Index, Name},
};
use super::retried::LastLogged;
use crate::{
    error::{Error, Result},
    metrics,
};
use bytes::Bytes;
use std::{
    ffi::CString,
    fmt, io,
    mem::MaybeUninit,
    ops::Range,
    os::unix::ffi::OsStrExt,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard},
    time::{Duration, Instant},
};
use tokio::sync::Semaphore;

/// Memory for entries that wait to be written. What does not fit, because the disk is slower than
/// the network, is not kept this time.
const WAITING_BYTES_MAX: u32 = 256 << 20;

/// Reads of the disk at a time: a small part of the runtime's threads for blocking work.
const READS_AT_ONCE_MAX: usize = 64;
/// How long a read may take. A store is asked after that.
const READ_TIME_MAX: Duration = Duration::from_secs(5);

/// A cache in a folder that this process owns. Clones are the same cache.
#[derive(Clone)]
pub struct DiskCache(Arc<Shared>);

/// Which bytes: a range of one object in one state.
#[derive(Debug, Clone, Copy)]
pub struct Key {
    name: Name,
    bytes: u64,
}

struct Shared {
    folder: Folder,
    /// The service behind the stores' URIs.
    place: String,
    index: Mutex<Index>,
    /// Held while an entry is written: the limit is kept by removing before each write.
    turn: Arc<tokio::sync::Mutex<()>>,
    waiting: Arc<Semaphore>,
    /// A permit for each read, which it holds until the disk answered.
    reading: Arc<Semaphore>,
    last_logged: LastLogged,
}

impl fmt::Debug for DiskCache {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("DiskCache")
            .field(&self.0.folder.path())
            .finish()
    }
}

impl DiskCache {
    /// Takes a folder for a cache of at most `bytes_max`, and removes what is beyond. `place` names
    /// the service behind URIs: the same URI may mean another object elsewhere. For a thread that
    /// may block.
    ///
    /// # Errors
    /// `InvalidArgument` if another process has the folder, or it cannot be used.
    pub(super) fn open(path: PathBuf, bytes_max: u64, place: String) -> Result<Self> {
        let folder = Folder::open(path)?;
        let mut index = Index::new(bytes_max);
        for found in folder.entries()? {
            index.insert(found.name, found.bytes);
        }
        while let Some(oldest) = index.in_the_way_of(0) {
            folder.remove(&oldest).map_err(|cause| {
                let message = format!(
                    "{} cannot be removed, and the cache holds more than \
                     worker.disk_cache_bytes; make its files writable",
                    folder.file(&oldest).display()
                );
                Error::invalid(DIR, message).because(cause)
            })?;
            metrics::disk_cache_evicted_bytes().increment(index.remove(&oldest));
        }
        tracing::info!(
            folder = %folder.path().display(),
            bytes = index.used(),
            bytes_max,
            "disk cache opened"
        );
        metrics::disk_cache_bytes_max().set(bytes_max as f64);
        metrics::disk_cache_bytes().set(index.used() as f64);
        Ok(Self(Arc::new(Shared {
            folder,
            place,
            index: Mutex::new(index),
            turn: Arc::default(),
            waiting: Arc::new(Semaphore::new(WAITING_BYTES_MAX as usize)),
            reading: Arc::new(Semaphore::new(READS_AT_ONCE_MAX)),
            last_logged: LastLogged::default(),
        })))
    }

    /// Returns the key of a range of the object at `uri` that has this size and ETag.
    pub fn key(&self, uri: &str, size: u64, etag: &str, range: &Range<u64>) -> Key {
        let numbers = [size, range.start, range.end].map(|number| number.to_string());
        let [size, start, end] = numbers.each_ref().map(String::as_str);
        let parts = [self.0.place.as_str(), uri, etag, size, start, end];
        Key {
            name: *blake3::hash(parts.join("\0").as_bytes()).as_bytes(),
            bytes: range.end.saturating_sub(range.start),
        }
    }

    /// Returns what was kept under `key`, if it is there and whole and the disk answers in time.
    pub async fn get(&self, key: Key) -> Option<Bytes> {
        let found = self.read_within(key, READ_TIME_MAX).await;
        let outcome = if found.is_some() { "hit" } else { "miss" };
        metrics::disk_cache_reads(outcome).increment(1);
        if let Some(bytes) = &found {
            metrics::disk_cache_bytes_read().increment(bytes.len() as u64);
        }
        found
    }

    async fn read_within(&self, key: Key, time_max: Duration) -> Option<Bytes> {
        let shared = self.0.clone();
        let is_there = shared.index().touch(&key.name);
        if !is_there {
            return None;
        }
        let permit = shared.reading.clone().try_acquire_owned().ok()?;
        let read = tokio::task::spawn_blocking(move || {
            let found = shared.read(key);
            // As for a write: the folder is let go of first.
            drop(shared);
            drop(permit);
            found
        });
        match tokio::time::timeout(time_max, read).await {
            Ok(read) => read.ok().flatten(),
            Err(late) => {
                metrics::disk_cache_failures("read").increment(1);
                self.0.warn("read", &key.name, &io::Error::from(late));
                None
            }
        }
    }

    /// Keeps `bytes` under `key`, in the background.
    pub fn put(&self, key: Key, bytes: Bytes) {
        {
            let index = self.0.index();
            if index.holds(&key.name) || !index.has_room_for(room_for(key.bytes)) {
                return;
            }
        }
        // A larger entry takes all of it, and is then the only one that waits.
        let asked = u32::try_from(bytes.len()).unwrap_or(WAITING_BYTES_MAX);
        let asked = asked.min(WAITING_BYTES_MAX);
        let Ok(permit) = self.0.waiting.clone().try_acquire_many_owned(asked) else {
            metrics::disk_cache_failures("busy").increment(1);
            return;
        };
        let shared = self.0.clone();
        tokio::spawn(async move {
            let turn = shared.turn.clone().lock_owned().await;
            // The blocking thread has the turn: it goes on if this task is dropped.
            let write = tokio::task::spawn_blocking(move || {
                shared.write(key, &bytes);
                // The folder is let go of first: who waits for the permit may want to open it.
                drop(shared);
                drop((turn, permit));
            });
            drop(write.await);
        });
    }

    /// Waits until everything that was put before is written.
    #[cfg(test)]
    pub(crate) async fn settled(&self) {
        let all = self.0.waiting.acquire_many(WAITING_BYTES_MAX).await;
        drop(all.expect("nobody closes it"));
    }

    /// Tries whether a cache can be opened in the folder at `path`, entries can be written, and the
    /// disk has room for all of `bytes_max`. Returns what is found, for people. Entries stay as
    /// they are, and what was made for the trial is removed. For a thread that may block.
    ///
    /// # Errors
    /// `InvalidArgument`.
    pub fn check(path: &Path, bytes_max: u64) -> Result<String> {
        Folder::try_with(path, |folder| check(folder, bytes_max))
    }
}

fn check(folder: &Folder, bytes_max: u64) -> Result<String> {
    let path = folder.path();
    let used: u64 = folder.entries()?.iter().map(|found| found.bytes).sum();
    folder.try_write().map_err(|cause| {
        let message = format!("cannot write into {}; make it writable", path.display());
        Error::invalid(DIR, message).because(cause)
    })?;
    let gib = |bytes: u64| bytes as f64 / f64::from(1 << 30);
    let (held, most) = (gib(used), gib(bytes_max));
    let Some(free) = free_bytes(path) else {
        return Ok(format!("{held:.3} of {most:.3} GiB held"));
    };
    let left = gib(free);
    if used.saturating_add(free) < bytes_max {
        let message = format!(
            "{} holds {held:.3} GiB and its disk has {left:.3} GiB left, of \
             worker.disk_cache_bytes {most:.3} GiB; lower it, or name a larger disk",
            path.display()
        );
        return Err(Error::invalid("worker.disk_cache_bytes", message));
    }
    Ok(format!(
        "{held:.3} of {most:.3} GiB held, {left:.3} GiB free"
    ))
}

impl Shared {
    fn index(&self) -> MutexGuard<'_, Index> {
        self.index.lock().expect("no panic while held")
    }

    fn read(&self, key: Key) -> Option<Bytes> {
        let cause = match self.folder.read(&key.name, key.bytes) {
            Ok(bytes) => return Some(bytes),
            Err(cause) => cause,
        };
        // One that is not there was removed to make room, since the index was asked.
        if cause.kind() != io::ErrorKind::NotFound {
            metrics::disk_cache_failures("read").increment(1);
            self.warn("read", &key.name, &cause);
        }
        self.remove(&key.name);
        None
    }

    /// Makes room and writes. The caller has the turn.
    fn write(&self, key: Key, bytes: &[u8]) {
        let room = room_for(key.bytes);
        if self.index().holds(&key.name) {
            return;
        }
        loop {
            let oldest = self.index().in_the_way_of(room);
            match oldest.map(|oldest| self.remove(&oldest)) {
                None => break,
                Some(Some(freed)) => metrics::disk_cache_evicted_bytes().increment(freed),
                // Without its room the limit would be exceeded.
                Some(None) => return,
            }
        }
        match self.folder.write(&key.name, bytes) {
            Ok(()) => {
                let mut index = self.index();
                index.insert(key.name, room);
                metrics::disk_cache_bytes().set(index.used() as f64);
            }
            Err(cause) => {
                metrics::disk_cache_failures("write").increment(1);
                self.warn("write", &key.name, &cause);
            }
        }
    }

    /// Removes an entry, and returns the room that it took; `None` if its file cannot be removed.
    /// It then still counts.
    fn remove(&self, name: &Name) -> Option<u64> {
        if let Err(cause) = self.folder.remove(name) {
            metrics::disk_cache_failures("remove").increment(1);
            self.warn("remove", name, &cause);
            return None;
        }
        let mut index = self.index();
        let freed = index.remove(name);
        metrics::disk_cache_bytes().set(index.used() as f64);
        Some(freed)
    }

    fn warn(&self, operation: &str, name: &Name, cause: &io::Error) {
        if self.last_logged.is_due(operation, Instant::now()) {
            let file = self.folder.file(name);
            tracing::warn!(
                operation,
                file = %file.display(),
                error = %cause,
                "an entry of the disk cache failed; its block is read from its store"
            );
        }
    }
}

/// Returns the bytes that this process may still write to a folder's disk, where the system says.
fn free_bytes(folder: &Path) -> Option<u64> {
    let path = CString::new(folder.as_os_str().as_bytes()).ok()?;
    let mut found = MaybeUninit::<libc::statvfs>::uninit();
    // SAFETY: the path ends in a zero byte, and the result is written to memory of its type.
    let status = unsafe { libc::statvfs(path.as_ptr(), found.as_mut_ptr()) };
    if status != 0 {
        return None;
    }
    // SAFETY: a call that succeeds fills the whole of it.
    let found = unsafe { found.assume_init() };
    #[allow(clippy::unnecessary_cast, reason = "other systems have narrower types")]
    let free = (found.f_bavail as u64).saturating_mul(found.f_frsize as u64);
    Some(free)
}
