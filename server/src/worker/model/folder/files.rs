//! Reads single files of a model folder.
use crate::{
    error::{Error, Result},
    storage::Location,
};
use bytes::Bytes;
use object_store::ObjectStoreExt;
use superbatch_proto::v1::Reason;

/// How the files begin that Git LFS leaves in the place of large ones.
const LFS_POINTER: &[u8] = b"version https://git-lfs.github.com/spec/";

/// Reads a whole file that the folder must have.
pub(super) async fn need(location: &Location, file: &str, bytes_max: u64) -> Result<Bytes> {
    find(location, file, bytes_max)
        .await?
        .ok_or_else(|| missing(location, file, ""))
}

pub(super) fn missing(location: &Location, file: &str, more: &str) -> Error {
    let message = format!("model folder {} has no {file}{more}", location.uri());
    Error::new(Reason::ModelInvalid, message)
        .with("file", file)
        .with("uri", location.uri())
}

/// Reads a whole file, after a check of its size; `None` if there is no file.
pub(super) async fn find(location: &Location, file: &str, bytes_max: u64) -> Result<Option<Bytes>> {
    let found = match location.store().get(&location.path(file)).await {
        Ok(found) => found,
        Err(object_store::Error::NotFound { .. }) => return Ok(None),
        Err(cause) => return Err(location.error("read", file, cause)),
    };
    if found.meta.size > bytes_max {
        let message = format!(
            "{} has {} bytes, over the limit of {bytes_max}",
            location.uri_of(file),
            found.meta.size
        );
        return Err(Error::new(Reason::ModelInvalid, message)
            .with("file", file)
            .with("uri", location.uri()));
    }
    let bytes = found
        .bytes()
        .await
        .map_err(|cause| location.error("read", file, cause))?;
    if bytes.starts_with(LFS_POINTER) {
        let message = format!(
            "{} is a pointer of Git LFS, not the file: run git lfs pull in the repository",
            location.uri_of(file)
        );
        let error = Error::new(Reason::ModelInvalid, message).with("file", file);
        return Err(error.with("uri", location.uri()));
    }
    Ok(Some(bytes))
}
