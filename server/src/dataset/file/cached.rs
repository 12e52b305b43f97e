//! Ranges of a file that were read before, from the cache on disk.
use super::{ShardFile, is_local};
use crate::{error::Result, storage::DiskCache};
use bytes::Bytes;
use std::ops::Range;

impl ShardFile {
    /// Has what is read kept in `cache`, if this is one state of a remote object for certain: an
    /// object without an ETag may be replaced by another of its size, and a local file is on a disk
    /// already.
    #[must_use]
    pub fn cached_in(self, cache: Option<&DiskCache>) -> Self {
        let is_here = is_local(&self.location) || self.location.uri().starts_with("memory:");
        let is_state = self.etag.is_some() && !is_here;
        Self {
            cache: cache.filter(|_| is_state).cloned(),
            ..self
        }
    }

    /// Reads a range, from the cache if it is there.
    pub(in crate::dataset) async fn fetch(&self, range: Range<u64>) -> Result<Bytes> {
        let (Some(cache), Some(etag)) = (&self.cache, &self.etag) else {
            return Ok(self.read(range).await?.0);
        };
        let key = cache.key(self.uri(), self.size, etag, &range);
        if let Some(bytes) = cache.get(key).await {
            return Ok(bytes);
        }
        let (bytes, is_certain) = self.read(range).await?;
        if is_certain {
            cache.put(key, bytes.clone());
        }
        Ok(bytes)
    }
}
