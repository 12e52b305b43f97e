//! Reads large objects in parts.
use super::{
    Location,
    location::{PART_BYTES, PARTS_AT_ONCE},
};
use crate::error::Result;
use bytes::Bytes;
use futures::{FutureExt, Stream, StreamExt, TryStreamExt};
use object_store::{GetOptions, GetRange, ObjectStore, ObjectStoreExt};
use std::{ops::Range, pin::pin};

impl Location {
    /// Reads the bytes `range` of an object.
    ///
    /// # Errors
    /// As [`Location::get`].
    pub async fn part(&self, key: &str, range: Range<u64>) -> Result<Bytes> {
        let read = self.store().get_range(&self.path(key), range).await;
        read.map_err(|e| self.error("read", key, e))
    }

    /// As [`Location::get`], of a large object: over several streams at once, since one connection
    /// to an object store is slower than the line.
    ///
    /// # Errors
    /// As [`Location::get`].
    pub async fn get_large(&self, key: &str) -> Result<Bytes> {
        let part_bytes = PART_BYTES as u64;
        let read = async {
            let size = self.store().head(&self.path(key)).await?.size;
            if size <= part_bytes {
                return self.store().get(&self.path(key)).await?.bytes().await;
            }
            let mut parts = pin!(self.parts(key, 0..size, part_bytes));
            let mut whole = Vec::with_capacity(usize::try_from(size).unwrap_or_default());
            while let Some(part) = parts.try_next().await? {
                whole.extend_from_slice(&part);
            }
            Ok(whole.into())
        };
        read.await.map_err(|e| self.error("read", key, e))
    }

    /// As [`Location::get_large`], in parts of at most `part_bytes` in their order, which a reader
    /// can let go of one by one. An object that is no larger than a part takes one request.
    ///
    /// # Errors
    /// As [`Location::get`]; also if the object is empty.
    pub async fn get_in_parts(&self, key: &str, part_bytes: u64) -> Result<Vec<Bytes>> {
        let first = GetOptions {
            range: Some(GetRange::Bounded(0..part_bytes)),
            ..GetOptions::default()
        };
        let read = async {
            let first = self.store().get_opts(&self.path(key), first).await?;
            let rest = part_bytes.min(first.meta.size)..first.meta.size;
            let mut parts = vec![first.bytes().await?];
            let rest: Vec<_> = self.parts(key, rest, part_bytes).try_collect().await?;
            parts.extend(rest);
            Ok(parts)
        };
        read.await.map_err(|e| self.error("read", key, e))
    }

    fn parts(
        &self,
        key: &str,
        range: Range<u64>,
        part_bytes: u64,
    ) -> impl Stream<Item = object_store::Result<Bytes>> {
        let (store, path, end) = (self.store().clone(), self.path(key), range.end);
        let starts = range.step_by(usize::try_from(part_bytes).unwrap_or(usize::MAX));
        let reads = starts.map(move |at| {
            let (store, path) = (store.clone(), path.clone());
            let part = at..end.min(at + part_bytes);
            async move { store.get_range(&path, part).await }.boxed()
        });
        futures::stream::iter(reads).buffered(PARTS_AT_ONCE)
    }
}
