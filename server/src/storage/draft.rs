//! Files of a local disk that are written while their bytes arrive, in any order.
//!
//! A draft has a name that no listing shows, and gets its own when it is durable. One whose writer
//! is gone stays behind; its lock has gone with the writer, and so it is told from one that is
//! being written.
use super::{
    Location,
    disk::{Unnamed, remove_folders, sync_entries, sync_entry},
};
use crate::{
    blocking::blocking,
    error::{Error, Result},
    metrics,
};
use std::{
    fs::{self, File, OpenOptions, TryLockError},
    io,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, SystemTime},
};
use superbatch_proto::v1::Reason;
use tokio::{runtime::Handle, time::timeout};

/// How the names of drafts begin.
const ARRIVING: &str = "arriving.";
/// Bytes after which the disk begins to write.
const PIECE_BYTES: usize = 8 << 20;
/// Longest wait for a draft's flush, as for a store's answer.
pub const FLUSHED_WITHIN: Duration = Duration::from_secs(240);
/// The age at which unfinished files are given up if no lock tells whether they are written.
const GIVEN_UP_AFTER: Duration = Duration::from_secs(24 * 3600);

/// A file that has no name yet. If it is dropped before it has one, it is removed.
#[derive(Debug)]
pub struct Draft(
    /// `None` once it is named or dropped.
    Option<Unnamed>,
);

/// What is left of a draft. It is removed when this is dropped, on the thread that drops it.
struct Left(Option<Unnamed>);

impl Location {
    /// Returns whether drafts can be made here: on a local disk.
    pub fn takes_drafts(&self) -> bool {
        self.uri().starts_with("file:")
    }

    /// Begins a draft in the folder `key`. It blocks.
    ///
    /// # Errors
    /// `StorageUnreachable`.
    pub fn draft(&self, key: &str) -> Result<Draft> {
        let name = format!("{ARRIVING}{}", super::nonce());
        let path = self.local(key).join(name);
        let begun = Unnamed::beside(&path).map_err(|cause| unwritable(&path, cause))?;
        // Some network file systems have no locks. Its age then tells whether it was left.
        drop(begun.file.try_lock());
        Ok(Draft(Some(begun)))
    }

    /// Removes unfinished files in the folder `key` of a local disk whose writers are gone. What
    /// cannot be removed stays: it costs room and no more.
    pub async fn sweep_drafts(&self, key: &str) {
        if !self.takes_drafts() {
            return;
        }
        let folder = self.local(key);
        let swept = blocking("removing unfinished files", move || {
            sweep(&folder);
            Ok(())
        });
        if timeout(FLUSHED_WITHIN, swept).await.is_err() {
            let uri = self.uri_of(key);
            tracing::warn!(
                uri,
                "unfinished files were not looked for within {FLUSHED_WITHIN:?}"
            );
        }
    }

    fn local(&self, key: &str) -> PathBuf {
        let path = self.path(key);
        Path::new("/").join(path.as_ref())
    }
}

impl Draft {
    /// Writes bytes to their place. It blocks.
    ///
    /// # Errors
    /// `StorageUnreachable`.
    pub fn write_at(&self, at: u64, bytes: &[u8]) -> Result<()> {
        let Unnamed { file, path, .. } = self.0.as_ref().expect("it has no name yet");
        let mut begin = at;
        for piece in bytes.chunks(PIECE_BYTES) {
            let written = file.write_all_at(piece, begin);
            written.map_err(|cause| unwritable(path, cause))?;
            begin_flushing(file, begin, piece.len());
            begin += piece.len() as u64;
        }
        Ok(())
    }

    /// Makes the file durable, and gives it the name `key` in the folder of the draft.
    ///
    /// # Errors
    /// `StorageUnreachable`. The file may have its name nevertheless.
    pub async fn name(self, at: &Location, key: &str) -> Result<()> {
        let to = at.local(key);
        let given_up = Arc::new(AtomicBool::new(false));
        let is_given_up = given_up.clone();
        let naming = blocking("naming a file", move || {
            let named = self.try_name(&to, &is_given_up);
            named.map_err(|cause| unwritable(&to, cause))
        });
        let named = timeout(FLUSHED_WITHIN, naming).await.unwrap_or_else(|_| {
            given_up.store(true, Ordering::Release);
            let uri = at.uri_of(key);
            let message = format!("{uri} was not flushed within {FLUSHED_WITHIN:?}");
            Err(Error::new(Reason::StorageUnreachable, message).with("uri", uri))
        });
        let outcome = if named.is_ok() { "ok" } else { "error" };
        metrics::object_store_requests("put", outcome).increment(1);
        named
    }

    /// It blocks. A draft that cannot be named is removed when this returns.
    fn try_name(mut self, to: &Path, is_given_up: &AtomicBool) -> io::Result<()> {
        let mut left = Left(self.0.take());
        let unnamed = left.0.as_ref().expect("it has no name yet");
        unnamed.file.sync_all()?;
        sync_entries(&unnamed.made)?;
        // By then the caller writes the file in another way, or has deleted it.
        if is_given_up.load(Ordering::Acquire) {
            return Err(io::ErrorKind::TimedOut.into());
        }
        fs::rename(&unnamed.path, to)?;
        left.0 = None;
        sync_entry(to)
    }
}

impl Drop for Draft {
    fn drop(&mut self) {
        let Some(unnamed) = self.0.take() else {
            return;
        };
        let left = Left(Some(unnamed));
        // A disk takes its time to free gigabytes. A runtime that ends drops the work, and with it
        // what is left, which is then removed as well.
        if let Ok(runtime) = Handle::try_current() {
            drop(runtime.spawn_blocking(move || drop(left)));
        }
    }
}

impl Drop for Left {
    fn drop(&mut self) {
        if let Some(Unnamed { file, path, made }) = self.0.take() {
            // Some network file systems keep a file that is open under another name.
            drop(file);
            drop(fs::remove_file(path));
            remove_folders(&made);
        }
    }
}

/// Has the disk begin to write these bytes, so that little is left for the flush at the end. A
/// hint: what goes wrong shows in the flush.
#[cfg(target_os = "linux")]
fn begin_flushing(file: &File, at: u64, bytes: usize) {
    use std::os::fd::AsRawFd;
    if let (Ok(at), Ok(bytes)) = (i64::try_from(at), i64::try_from(bytes)) {
        // SAFETY: the descriptor is open while `file` is borrowed, and no memory is handed over.
        unsafe {
            libc::sync_file_range(file.as_raw_fd(), at, bytes, libc::SYNC_FILE_RANGE_WRITE);
        }
    }
}

#[cfg(not(target_os = "linux"))]
fn begin_flushing(_file: &File, _at: u64, _bytes: usize) {}

fn sweep(folder: &Path) {
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let path = entry.path();
        if is_unfinished(&path) && is_given_up(&path) && fs::remove_file(&path).is_ok() {
            let path = path.display();
            tracing::info!(%path, "removed what was left of a write that was never finished");
        }
    }
}

/// Returns whether a file has the name of one that is not finished: a `#` and a number at its end.
fn is_unfinished(path: &Path) -> bool {
    let number = name(path).and_then(|name| name.rsplit_once('#'));
    number.is_some_and(|(_, number)| {
        !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit())
    })
}

fn is_given_up(path: &Path) -> bool {
    if name(path).is_some_and(|name| name.starts_with(ARRIVING)) {
        // NFS locks a file for one writer only if it is open for writing.
        let opened = OpenOptions::new().write(true).open(path);
        match opened.map(|file| file.try_lock()) {
            Ok(Ok(())) => return true,
            Ok(Err(TryLockError::WouldBlock)) => return false,
            // Its age tells.
            Ok(Err(_)) | Err(_) => {}
        }
    }
    let written = fs::metadata(path).and_then(|meta| meta.modified());
    let age = written.map(|written| SystemTime::now().duration_since(written));
    age.is_ok_and(|age| age.is_ok_and(|age| age > GIVEN_UP_AFTER))
}

fn name(path: &Path) -> Option<&str> {
    path.file_name().and_then(|name| name.to_str())
}

fn unwritable(path: &Path, cause: io::Error) -> Error {
    let message = format!("cannot write {}", path.display());
    Error::new(Reason::StorageUnreachable, message).because(cause)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        blocking::tests::needs_a_thread,
        storage::{StorageConfig, Stores},
    };

    fn opened(folder: &Path) -> Location {
        let uri = url::Url::from_file_path(folder).unwrap();
        let stores = Stores::new(StorageConfig::default());
        stores.open(uri.as_str()).unwrap()
    }

    fn names(folder: &Path) -> Vec<String> {
        let entries = fs::read_dir(folder).unwrap();
        let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
        let mut names: Vec<String> = names.collect();
        names.sort();
        names
    }

    #[tokio::test]
    async fn a_draft_is_seen_by_nobody_until_it_has_its_name() {
        let folder = tempfile::tempdir().unwrap();
        let at = opened(folder.path());
        let draft = at.draft("of/it").unwrap();
        draft.write_at(3, b"def").unwrap();
        draft.write_at(0, b"abc").unwrap();
        assert!(at.list("").await.unwrap().is_empty());
        draft.name(&at, "of/it/named").await.unwrap();
        assert_eq!(at.get("of/it/named").await.unwrap(), "abcdef");
        assert_eq!(names(&folder.path().join("of/it")), ["named"]);
    }

    #[test]
    fn a_draft_that_is_dropped_is_removed_and_no_call_waits_for_it() {
        let folder = tempfile::tempdir().unwrap();
        let begun = || {
            let draft = opened(folder.path()).draft("of/it").unwrap();
            draft.write_at(0, b"abc").unwrap();
            assert_eq!(names(folder.path()), ["of"]);
            draft
        };
        needs_a_thread(async {
            drop(begun());
            while !names(folder.path()).is_empty() {
                tokio::task::yield_now().await;
            }
        });
        let runtime = tokio::runtime::Runtime::new().unwrap();
        let draft = runtime.block_on(async { begun() });
        // There is no runtime here.
        drop(draft);
        assert_eq!(names(folder.path()), [""; 0]);
    }

    #[tokio::test]
    async fn a_draft_that_cannot_be_named_or_is_given_up_meanwhile_leaves_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let at = opened(folder.path());
        let draft = at.draft("of/it").unwrap();
        draft.write_at(0, b"abc").unwrap();
        let to = folder.path().join("of/it/named");
        let error = draft.try_name(&to, &AtomicBool::new(true)).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        assert_eq!(names(folder.path()), [""; 0]);
        let draft = at.draft("of/it").unwrap();
        fs::create_dir_all(folder.path().join("of/it/taken/by/folders")).unwrap();
        let error = draft.name(&at, "of/it/taken").await.unwrap_err();
        assert_eq!(error.reason(), Reason::StorageUnreachable);
        assert_eq!(names(&folder.path().join("of/it")), ["taken"]);
    }

    #[test]
    fn the_age_tells_what_was_left_if_no_lock_does() {
        let folder = tempfile::tempdir().unwrap();
        // A folder cannot be locked, as a file cannot where there are no locks.
        let left = folder.path().join("arriving.n#1");
        fs::create_dir(&left).unwrap();
        assert!(!is_given_up(&left));
        let day = GIVEN_UP_AFTER + Duration::from_secs(60);
        let file = File::open(&left).unwrap();
        file.set_modified(SystemTime::now() - day).unwrap();
        assert!(is_given_up(&left));
    }

    #[tokio::test]
    async fn only_what_nobody_writes_any_more_is_swept() {
        let folder = tempfile::tempdir().unwrap();
        let at = opened(folder.path());
        let of = folder.path().join("of");
        let draft = at.draft("of").unwrap();
        draft.write_at(0, b"abc").unwrap();
        let left = ["arriving.n#1", "upload#1", "old#12", "old", "old#x"];
        let day = GIVEN_UP_AFTER + Duration::from_secs(60);
        for name in left {
            let file = File::create(of.join(name)).unwrap();
            if name.starts_with("old") {
                file.set_modified(SystemTime::now() - day).unwrap();
            }
        }
        at.sweep_drafts("of").await;
        let swept = names(&of);
        assert_eq!(swept.len(), 4, "{swept:?}");
        for kept in ["upload#1", "old", "old#x"] {
            assert!(swept.iter().any(|name| name == kept), "{kept}: {swept:?}");
        }
        draft.name(&at, "of/named").await.unwrap();
        at.sweep_drafts("nothing").await;
        assert_eq!(at.get("of/named").await.unwrap(), "abc");
    }
}
