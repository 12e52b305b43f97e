//! A local disk as an object store, which waits for the disk as seldom as durability allows.
//!
//! `object_store` flushes a new folder, and the one above it, before the file in it is written, and
//! the file after that: each of them is a commit of the file system's journal. Here the folders
//! above a new one are flushed after the file. Its flush has written them too on most file systems,
//! so that theirs wait for nothing new. The file gets its name when all of that is durable, since
//! who finds the name takes the file for created. The flush of its own folder then makes the name
//! durable.
use async_trait::async_trait;
use bytes::Bytes;
use futures::stream::BoxStream;
use object_store::{
    CopyOptions, Error, GetOptions, GetResult, ListResult, MultipartUpload, ObjectMeta,
    ObjectStore, PutMode, PutMultipartOptions, PutOptions, PutPayload, PutResult, RenameOptions,
    Result, local::LocalFileSystem, path::Path,
};
use std::{
    fmt,
    fs::{self, File},
    io::{self, Write},
    ops::Range,
    path::{Path as FilePath, PathBuf},
};

/// The local disk. All that it has written is durable when it answers.
#[derive(Debug)]
pub(super) struct Disk(LocalFileSystem);

impl Disk {
    pub(super) fn new() -> Self {
        // A receipt counts as committed once `put` returns, and its batch is then sent. Without
        // fsync a power cut could lose the receipt of a batch that a trainer has already trained
        // on.
        Self(LocalFileSystem::new().with_fsync(true))
    }
}

/// A new file under a name that no listing shows.
#[derive(Debug)]
pub(super) struct Unnamed {
    pub file: File,
    pub path: PathBuf,
    /// The folders that were made for it, the deepest first.
    pub made: Vec<PathBuf>,
}

impl Unnamed {
    /// Opens a new file beside `path`, and makes the folders that are missing.
    pub(super) fn beside(path: &FilePath) -> io::Result<Self> {
        let mut made = Vec::new();
        match open_beside(path, &mut made) {
            Ok((file, path)) => Ok(Self { file, path, made }),
            Err(cause) => {
                remove_folders(&made);
                Err(cause)
            }
        }
    }
}

fn open_beside(path: &FilePath, made: &mut Vec<PathBuf>) -> io::Result<(File, PathBuf)> {
    let mut number = 1_u32;
    loop {
        // Names that end so are those of `object_store` for what is not finished.
        let mut name = path.as_os_str().to_owned();
        name.push(format!("#{number}"));
        let unnamed = PathBuf::from(name);
        let cause = match File::create_new(&unnamed) {
            Ok(file) => return Ok((file, unnamed)),
            Err(cause) => cause,
        };
        match cause.kind() {
            io::ErrorKind::AlreadyExists => number += 1,
            io::ErrorKind::NotFound => make_folders(path, made)?,
            _ => return Err(cause),
        }
    }
}

/// Makes the folders of `path` that are missing, and adds them to `made`.
fn make_folders(path: &FilePath, made: &mut Vec<PathBuf>) -> io::Result<()> {
    let Some(folder) = path.parent() else {
        return Ok(());
    };
    let missing = folder.ancestors().take_while(|folder| !folder.exists());
    let missing: Vec<PathBuf> = missing.map(FilePath::to_path_buf).collect();
    let done = fs::create_dir_all(folder);
    made.extend(missing);
    done
}

/// Makes the entry of `path` in its folder durable.
pub(super) fn sync_entry(path: &FilePath) -> io::Result<()> {
    match path.parent() {
        Some(folder) => File::open(folder)?.sync_all(),
        None => Ok(()),
    }
}

/// Makes the entries of the folders `made` durable.
pub(super) fn sync_entries(made: &[PathBuf]) -> io::Result<()> {
    made.iter().try_for_each(|folder| sync_entry(folder))
}

/// Removes folders that were made for a file which did not come to be. If they stayed, the next
/// attempt would find them, and never learn that nobody has flushed them.
pub(super) fn remove_folders(made: &[PathBuf]) {
    for folder in made {
        // One that holds what somebody else wrote stays. They found it, and did not flush it.
        if fs::remove_dir(folder).is_err() {
            drop(sync_entry(folder));
        }
    }
}

/// Creates `path` with these bytes unless it exists.
fn create(path: &FilePath, payload: &PutPayload) -> Result<()> {
    let failed = |cause| at(path, cause);
    let Unnamed {
        mut file,
        path: unnamed,
        made,
    } = Unnamed::beside(path).map_err(failed)?;
    let mut pieces = payload.iter();
    let written = pieces
        .try_for_each(|piece| file.write_all(piece))
        .and_then(|()| file.sync_all())
        .and_then(|()| sync_entries(&made));
    drop(file);
    // Its bytes and folders are durable by now. A name that came before them could outlive them in
    // a power cut, and others would read it until then.
    let linked = written.and_then(|()| fs::hard_link(&unnamed, path));
    drop(fs::remove_file(&unnamed));
    match linked {
        Ok(()) => sync_entry(path).map_err(failed),
        Err(source) if source.kind() == io::ErrorKind::AlreadyExists => {
            // Who reads the other writer's file relies on its name, which may not be flushed yet.
            sync_entry(path).map_err(failed)?;
            Err(Error::AlreadyExists {
                path: path.display().to_string(),
                source: source.into(),
            })
        }
        Err(cause) => {
            remove_folders(&made);
            Err(failed(cause))
        }
    }
}

/// Returns the error for a file that could not be written.
fn at(path: &FilePath, cause: io::Error) -> Error {
    let text = format!("cannot write {}: {cause}", path.display());
    Error::Generic {
        store: "local disk",
        source: io::Error::new(cause.kind(), text).into(),
    }
}

impl fmt::Display for Disk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

#[async_trait]
#[deny(clippy::missing_trait_methods)]
impl ObjectStore for Disk {
    async fn put_opts(
        &self,
        location: &Path,
        payload: PutPayload,
        options: PutOptions,
    ) -> Result<PutResult> {
        if options.mode != PutMode::Create || !options.attributes.is_empty() {
            return self.0.put_opts(location, payload, options).await;
        }
        let path = self.0.path_to_filesystem(location)?;
        tokio::task::spawn_blocking(move || create(&path, &payload)).await??;
        Ok(PutResult {
            e_tag: None,
            version: None,
            extensions: Default::default(),
        })
    }

    async fn put_multipart_opts(
        &self,
        location: &Path,
        options: PutMultipartOptions,
    ) -> Result<Box<dyn MultipartUpload>> {
        self.0.put_multipart_opts(location, options).await
    }

    async fn get_opts(&self, location: &Path, options: GetOptions) -> Result<GetResult> {
        self.0.get_opts(location, options).await
    }

    async fn get_ranges(&self, location: &Path, ranges: &[Range<u64>]) -> Result<Vec<Bytes>> {
        self.0.get_ranges(location, ranges).await
    }

    fn delete_stream(
        &self,
        locations: BoxStream<'static, Result<Path>>,
    ) -> BoxStream<'static, Result<Path>> {
        self.0.delete_stream(locations)
    }

    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, Result<ObjectMeta>> {
        self.0.list(prefix)
    }

    fn list_with_offset(
        &self,
        prefix: Option<&Path>,
        offset: &Path,
    ) -> BoxStream<'static, Result<ObjectMeta>> {
        self.0.list_with_offset(prefix, offset)
    }

    async fn list_with_delimiter(&self, prefix: Option<&Path>) -> Result<ListResult> {
        self.0.list_with_delimiter(prefix).await
    }

    async fn copy_opts(&self, from: &Path, to: &Path, options: CopyOptions) -> Result<()> {
        self.0.copy_opts(from, to, options).await
    }

    async fn rename_opts(&self, from: &Path, to: &Path, options: RenameOptions) -> Result<()> {
        self.0.rename_opts(from, to, options).await
    }
}

#[cfg(test)]
mod tests;
