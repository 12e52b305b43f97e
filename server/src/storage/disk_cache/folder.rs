//! The folder of a disk cache: one owner, one file an entry.
//!
//! A file is a mark of its format, a checksum and the bytes. It is written beside and renamed, so a
//! process that is killed leaves at most a part of one file. It is not synced: a power cut may tear
//! any file, and the checksum tells.
use super::index::Name;
use crate::error::{Error, Result};
use bytes::Bytes;
use std::{
    fs::{self, DirBuilder, File, OpenOptions, TryLockError},
    io::{self, Read, Write},
    os::unix::fs::{DirBuilderExt, OpenOptionsExt},
    path::{Path, PathBuf},
    time::SystemTime,
};

/// The setting that errors name.
pub(super) const DIR: &str = "worker.disk_cache_dir";
/// The first bytes of each file. Another format gets another mark.
const MARK: &[u8; 8] = b"SBBLOCK1";
const HEADER_BYTES: usize = MARK.len() + blake3::OUT_LEN;
/// What disks allocate at least, and in whole numbers of.
const SECTOR_BYTES: u64 = 4096;
const LOCK: &str = "lock";
/// The file that is being written. One name is enough, as one is written at a time.
const PART: &str = "part";
const ENDING: &str = ".block";

/// A folder that this process owns: nobody else has it until this value is dropped, or the process
/// ends in any way.
pub(super) struct Folder {
    path: PathBuf,
    _lock: File,
}

/// A file of the folder.
pub(super) struct Found {
    pub name: Name,
    pub bytes: u64,
    last_used: SystemTime,
}

/// Returns the room that an entry of so many bytes takes on disk.
pub(super) fn room_for(bytes: u64) -> u64 {
    let whole = bytes.saturating_add(HEADER_BYTES as u64);
    whole.div_ceil(SECTOR_BYTES).saturating_mul(SECTOR_BYTES)
}

impl Folder {
    /// Makes the folder if there is none, and takes it for this process.
    ///
    /// # Errors
    /// `InvalidArgument` if another process has it, or it cannot be used.
    pub(super) fn open(path: PathBuf) -> Result<Self> {
        make(&path)
            .map_err(|cause| unusable(&path, "make it writable, or name another").because(cause))?;
        let opened = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .mode(0o600)
            .open(path.join(LOCK));
        let lock = opened
            .map_err(|cause| unusable(&path, "make it writable, or name another").because(cause))?;
        match lock.try_lock() {
            Ok(()) => Ok(Self { path, _lock: lock }),
            Err(TryLockError::WouldBlock) => {
                let message = format!(
                    "{} is in use by another process, and a cache has one owner; give each \
                     process a folder of its own by {DIR}, or stop the other one",
                    path.display()
                );
                Err(Error::invalid(DIR, message))
            }
            Err(TryLockError::Error(cause)) => {
                let remedy = "it cannot be locked; name a folder on a local disk";
                Err(unusable(&path, remedy).because(cause))
            }
        }
    }

    /// Opens a folder for `work` alone, and then removes what was made for that: who tries a
    /// folder may be another user than the process that is to own it.
    ///
    /// # Errors
    /// Those of [`Folder::open`] and of `work`.
    pub(super) fn try_with<T>(path: &Path, work: impl FnOnce(&Self) -> Result<T>) -> Result<T> {
        let (missing, lock) = (missing(path), path.join(LOCK));
        let is_lock_missing = matches!(lock.try_exists(), Ok(false));
        let done = Self::open(path.to_owned()).and_then(|folder| {
            let done = work(&folder);
            // While it is held: afterwards it may be another process's.
            if is_lock_missing {
                let _ = fs::remove_file(&lock);
            }
            done
        });
        for folder in missing {
            // One that holds anything by now stays.
            let _ = fs::remove_dir(folder);
        }
        done
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Returns the entries, the longest unused first, and removes what a killed process was
    /// writing. Other files are left alone.
    ///
    /// # Errors
    /// `InvalidArgument` if the folder cannot be read.
    pub(super) fn entries(&self) -> Result<Vec<Found>> {
        let unreadable = |cause: io::Error| unusable(&self.path, "make it readable").because(cause);
        self.remove_part().map_err(unreadable)?;
        let mut found = Vec::new();
        for entry in fs::read_dir(&self.path).map_err(unreadable)? {
            let entry = entry.map_err(unreadable)?;
            let Some(name) = entry.file_name().to_str().and_then(name_of) else {
                continue;
            };
            let meta = entry.metadata().map_err(unreadable)?;
            if meta.is_file() {
                found.push(Found {
                    name,
                    bytes: room_for(meta.len().saturating_sub(HEADER_BYTES as u64)),
                    last_used: meta.modified().map_err(unreadable)?,
                });
            }
        }
        found.sort_by_key(|found| (found.last_used, found.name));
        Ok(found)
    }

    /// Reads an entry of so many bytes.
    ///
    /// # Errors
    /// `NotFound`; `InvalidData` if the file does not hold what was written; those of the disk.
    pub(super) fn read(&self, name: &Name, bytes: u64) -> io::Result<Bytes> {
        let mut file = File::open(self.file(name))?;
        let (length, expected) = (file.metadata()?.len(), bytes + HEADER_BYTES as u64);
        if length != expected {
            return Err(damaged(format!("it has {length} bytes, not {expected}")));
        }
        let room = usize::try_from(expected).map_err(io::Error::other)?;
        let mut read = Vec::with_capacity(room);
        (&mut file).take(expected).read_to_end(&mut read)?;
        let Some((header, content)) = read.split_at_checked(HEADER_BYTES) else {
            return Err(damaged("it became shorter".to_owned()));
        };
        if header != header_of(name, content) {
            return Err(damaged("its checksum is another".to_owned()));
        }
        // So that the order of uses outlives the process. Without it the entry leaves earlier.
        let _ = file.set_modified(SystemTime::now());
        Ok(Bytes::from(read).slice(HEADER_BYTES..))
    }

    /// Writes an entry. The caller takes care that one is written at a time.
    pub(super) fn write(&self, name: &Name, bytes: &[u8]) -> io::Result<()> {
        let part = self.path.join(PART);
        let written =
            write_part(&part, name, bytes).and_then(|()| fs::rename(&part, self.file(name)));
        if written.is_err() {
            // On a full disk its bytes would be missing elsewhere. If this fails the next write
            // replaces them.
            let _ = fs::remove_file(&part);
        }
        written
    }

    /// Removes an entry; none is no error.
    pub(super) fn remove(&self, name: &Name) -> io::Result<()> {
        none_is_fine(fs::remove_file(self.file(name)))
    }

    /// Tries whether a file can be written. Not while entries are.
    pub(super) fn try_write(&self) -> io::Result<()> {
        write_part(&self.path.join(PART), &[0; 32], &[]).and(self.remove_part())
    }

    fn remove_part(&self) -> io::Result<()> {
        none_is_fine(fs::remove_file(self.path.join(PART)))
    }

    pub(super) fn file(&self, name: &Name) -> PathBuf {
        self.path.join(hex::encode(name) + ENDING)
    }
}

/// Makes a folder if there is none. It will hold copies of data, which may be private, so that only
/// its owner may enter it. The folders above it are made as others are.
fn make(path: &Path) -> io::Result<()> {
    if let Some(above) = path.parent() {
        fs::create_dir_all(above)?;
    }
    match DirBuilder::new().mode(0o700).create(path) {
        Err(_) if path.is_dir() => Ok(()),
        made => made,
    }
}

/// Returns which of a folder and those above it are not there, the innermost first.
fn missing(path: &Path) -> Vec<&Path> {
    let is_missing =
        |folder: &&Path| !folder.as_os_str().is_empty() && matches!(folder.try_exists(), Ok(false));
    path.ancestors().take_while(is_missing).collect()
}

/// The bytes before the content: the checksum is of the content and the name, so that a file under
/// another entry's name is damaged too.
fn header_of(name: &Name, content: &[u8]) -> [u8; HEADER_BYTES] {
    let mut header = [0; HEADER_BYTES];
    header[..MARK.len()].copy_from_slice(MARK);
    header[MARK.len()..].copy_from_slice(blake3::keyed_hash(name, content).as_bytes());
    header
}

fn write_part(part: &Path, name: &Name, bytes: &[u8]) -> io::Result<()> {
    let mut options = OpenOptions::new();
    let mut file = options
        .create(true)
        .truncate(true)
        .write(true)
        .mode(0o600)
        .open(part)?;
    file.write_all(&header_of(name, bytes))?;
    file.write_all(bytes)
}

/// Returns the entry's name of a file's; `None` for a file that is no entry.
fn name_of(file: &str) -> Option<Name> {
    let mut name = Name::default();
    hex::decode_to_slice(file.strip_suffix(ENDING)?, &mut name).ok()?;
    // Upper-case digits would be another file of the same name.
    (hex::encode(name) + ENDING == file).then_some(name)
}

fn none_is_fine(removed: io::Result<()>) -> io::Result<()> {
    match removed {
        Err(cause) if cause.kind() == io::ErrorKind::NotFound => Ok(()),
        removed => removed,
    }
}

fn damaged(how: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, how)
}

fn unusable(path: &Path, remedy: &str) -> Error {
    let message = format!("{DIR} {} cannot be used; {remedy}", path.display());
    Error::invalid(DIR, message)
}
