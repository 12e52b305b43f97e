//! Copies of objects.
use super::{
    Location,
    location::{PART_BYTES, PARTS_AT_ONCE},
};
use crate::error::Result;
use futures::{FutureExt, StreamExt, TryStreamExt};
use object_store::{Error as Cause, ObjectStoreExt, WriteMultipart};
use std::{sync::Arc, time::Duration};
use tokio::time::timeout;

/// Largest object that a store copies which answers only when the copy is done: copies of larger
/// ones take longer than the limits of a request allow.
const COPIED_MAX: u64 = 1 << 30;
/// How long the store's own copy is waited for. Requests that do not end are repeated for minutes,
/// and each of them would copy anew.
const COPIED_WITHIN: Duration = Duration::from_secs(20);

impl Location {
    /// Copies an object to `to_key` of another location. Returns whether there is such an object.
    /// The store copies it, if it can: the bytes do not pass through this process.
    ///
    /// # Errors
    /// `StorageUnreachable`.
    pub async fn copy_to(&self, key: &str, to: &Self, to_key: &str) -> Result<bool> {
        let Some(size) = self.head(key).await?.map(|meta| meta.size) else {
            return Ok(false);
        };
        let scheme = self.uri().split_once(':').map_or("", |(scheme, _)| scheme);
        if Arc::ptr_eq(self.store(), to.store()) && is_copied_by_store(scheme, size) {
            let (from, onto) = (self.path(key), to.path(to_key));
            match within(COPIED_WITHIN, self.store().copy(&from, &onto)).await {
                Some(Ok(())) => return Ok(true),
                Some(Err(Cause::NotFound { .. })) => return Ok(false),
                // Some file systems have no links.
                failed => {
                    let (uri, error) =
                        (self.uri_of(key), failed.and_then(std::result::Result::err));
                    tracing::debug!(uri, ?error, "the store does not copy; this process does");
                }
            }
        }
        self.copy_parts(key, to, to_key, (size, PART_BYTES as u64))
            .await?;
        Ok(true)
    }

    /// Reads and writes an object of `size` bytes in parts of `part_bytes`.
    async fn copy_parts(
        &self,
        key: &str,
        to: &Self,
        to_key: &str,
        (size, part_bytes): (u64, u64),
    ) -> Result<()> {
        let (store, path) = (self.store(), self.path(key));
        let upload = to.store().put_multipart(&to.path(to_key)).await;
        let upload = upload.map_err(|e| to.error("write", to_key, e))?;
        let chunk = usize::try_from(part_bytes).unwrap_or(usize::MAX);
        let mut write = WriteMultipart::new_with_chunk_size(upload, chunk);
        let parts = (0..size).step_by(chunk);
        let reads: Vec<_> = parts
            .map(|at| {
                store
                    .get_range(&path, at..size.min(at + part_bytes))
                    .boxed()
            })
            .collect();
        let mut reads = futures::stream::iter(reads).buffered(PARTS_AT_ONCE);
        loop {
            let passed = match reads.try_next().await {
                Ok(None) => break,
                Ok(Some(part)) => {
                    let room = write.wait_for_capacity(PARTS_AT_ONCE).await;
                    room.map(|()| write.put(part))
                        .map_err(|e| to.error("write", to_key, e))
                }
                Err(cause) => Err(self.error("read", key, cause)),
            };
            if let Err(error) = passed {
                // `abort` may fail too. Its error is dropped, since the first one says what
                // happened.
                drop(write.abort().await);
                return Err(error);
            }
        }
        let written = write.finish().await;
        written.map_err(|e| to.error("write", to_key, e)).map(drop)
    }
}

/// Returns whether a store of this kind copies an object of `size` bytes by itself, and says that
/// it did only when the copy is there. Azure answers before, so that the copy may still fail.
fn is_copied_by_store(scheme: &str, size: u64) -> bool {
    match scheme {
        "file" | "memory" | "gs" => true,
        "s3" | "s3a" => size <= COPIED_MAX,
        _ => false,
    }
}

/// Returns what `copy` comes to; `None` if it does not end within `limit`.
async fn within<T>(limit: Duration, copy: impl Future<Output = T>) -> Option<T> {
    timeout(limit, copy).await.ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::{StorageConfig, Stores};

    #[tokio::test]
    async fn a_copy_has_the_same_bytes_whether_the_store_makes_it_or_not() {
        let open = |uri: &str| Stores::new(StorageConfig::default()).open(uri).unwrap();
        let (from, other) = (open("memory:///a"), open("memory:///b"));
        let bytes: Vec<u8> = (0..1000_u32).map(|n| n as u8).collect();
        from.put("x", bytes.clone().into()).await.unwrap();
        let own = from.below("own");
        assert!(from.copy_to("x", &own, "y").await.unwrap());
        assert!(from.copy_to("x", &other, "y").await.unwrap());
        let sizes = (bytes.len() as u64, 64);
        from.copy_parts("x", &own, "z", sizes).await.unwrap();
        for (at, key) in [(&own, "y"), (&other, "y"), (&own, "z")] {
            assert_eq!(at.get(key).await.unwrap(), bytes);
        }
        for to in [&own, &other] {
            assert!(!from.copy_to("none", to, "n").await.unwrap());
            assert!(to.head("n").await.unwrap().is_none());
        }
    }

    #[test]
    fn a_store_copies_what_it_has_copied_when_it_answers() {
        for (scheme, size, copied) in [
            ("file", u64::MAX, true),
            ("memory", u64::MAX, true),
            ("gs", u64::MAX, true),
            ("s3", COPIED_MAX, true),
            ("s3a", COPIED_MAX, true),
            ("s3", COPIED_MAX + 1, false),
            ("az", 1, false),
            ("abfss", 1, false),
            ("https", 1, false),
        ] {
            assert_eq!(is_copied_by_store(scheme, size), copied, "{scheme} {size}");
        }
    }

    #[tokio::test]
    async fn a_copy_that_does_not_end_is_given_up() {
        let endless = std::future::pending::<()>();
        assert_eq!(within(Duration::ZERO, endless).await, None);
        assert_eq!(within(COPIED_WITHIN, async { 1 }).await, Some(1));
    }
}
