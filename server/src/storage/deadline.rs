//! Ends requests that an object store never answers, and reads in the middle of which it falls
//! silent.
use super::StorageConfig;
use crate::{buffers::Buffers, metrics};
use async_trait::async_trait;
use bytes::Bytes;
use futures::{
    StreamExt,
    stream::{self, BoxStream},
};
use object_store::{
    CopyOptions, Error, GetOptions, GetResult, GetResultPayload, ListResult, MultipartUpload,
    ObjectMeta, ObjectStore, PutMultipartOptions, PutOptions, PutPayload, PutResult, RenameOptions,
    Result, UploadPart, path::Path,
};
use std::{
    fmt,
    fs::File,
    io::{self, Read, Seek, SeekFrom},
    ops::Range,
    path::PathBuf,
    sync::Arc,
    time::Duration,
};

/// How long a store may be silent.
#[derive(Debug, Clone, Copy)]
pub(super) struct Deadlines {
    /// Until a request is answered, with all retries of the store's client.
    answer: Duration,
    /// Between two pieces of an object that is read.
    stall: Duration,
}

impl Deadlines {
    pub(super) fn new(config: &StorageConfig) -> Self {
        let seconds = Duration::from_secs_f64;
        Self {
            answer: seconds(config.answer_timeout_seconds),
            stall: seconds(config.stall_timeout_seconds),
        }
    }

    /// Wraps a store so that its requests end by these deadlines.
    pub(super) fn around(self, store: Arc<dyn ObjectStore>) -> Arc<dyn ObjectStore> {
        Arc::new(Deadlined {
            store,
            deadlines: self,
        })
    }

    async fn answer<T>(
        self,
        operation: &'static str,
        request: impl Future<Output = Result<T>>,
    ) -> Result<T> {
        tokio::time::timeout(self.answer, request)
            .await
            .unwrap_or_else(|_| {
                metrics::object_store_requests(operation, "error").increment(1);
                Err(no_answer_error("no answer", self.answer))
            })
    }
}

/// Returns the error for a store that was silent for too long.
fn no_answer_error(what: &str, after: Duration) -> Error {
    let cause = std::io::Error::new(
        std::io::ErrorKind::TimedOut,
        format!("{what} for {} s", after.as_secs_f64()),
    );
    Error::Generic {
        store: "object store",
        source: cause.into(),
    }
}

/// Reads a range of a local file at once, into a buffer of `buffers`.
async fn read_file(
    mut file: File,
    path: PathBuf,
    range: Range<u64>,
    buffers: Buffers,
) -> Result<Bytes> {
    let failed = move |cause: io::Error| {
        let text = format!("cannot read {}: {cause}", path.display());
        Error::Generic {
            store: "local disk",
            source: io::Error::new(cause.kind(), text).into(),
        }
    };
    let read = move || -> io::Result<Bytes> {
        let mut buffer = buffers.take((range.end - range.start) as usize);
        file.seek(SeekFrom::Start(range.start))?;
        file.read_exact(buffer.as_mut())?;
        Ok(buffer.into_bytes())
    };
    tokio::task::spawn_blocking(read).await?.map_err(failed)
}

/// Passes the items on, and ends with an error if one does not come within `each`. The deadline is
/// for each item and not for the whole: a large object may take long while bytes keep coming.
/// `metered` counted the request when it was answered, so nothing is counted here.
fn with_deadline_each<T: Send + 'static>(
    items: BoxStream<'static, Result<T>>,
    what: &'static str,
    each: Duration,
) -> BoxStream<'static, Result<T>> {
    let next = move |items: Option<BoxStream<'static, Result<T>>>| async move {
        let mut items = items?;
        match tokio::time::timeout(each, items.next()).await {
            Ok(item) => Some((item?, Some(items))),
            // The stream is dropped with its connection: the next poll of the same stream could
            // only hang again.
            Err(_) => Some((Err(no_answer_error(what, each)), None)),
        }
    };
    stream::unfold(Some(items), next).boxed()
}

#[derive(Debug)]
struct Deadlined {
    store: Arc<dyn ObjectStore>,
    deadlines: Deadlines,
}

impl fmt::Display for Deadlined {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.store.fmt(f)
    }
}

#[async_trait]
#[deny(clippy::missing_trait_methods)]
impl ObjectStore for Deadlined {
    async fn put_opts(
        &self,
        at: &Path,
        payload: PutPayload,
        options: PutOptions,
    ) -> Result<PutResult> {
        self.deadlines
            .answer("put", self.store.put_opts(at, payload, options))
            .await
    }

    async fn put_multipart_opts(
        &self,
        at: &Path,
        options: PutMultipartOptions,
    ) -> Result<Box<dyn MultipartUpload>> {
        let upload = self
            .deadlines
            .answer("put_multipart", self.store.put_multipart_opts(at, options))
            .await?;
        Ok(Box::new(DeadlinedUpload {
            upload,
            deadlines: self.deadlines,
        }))
    }

    async fn get_opts(&self, at: &Path, options: GetOptions) -> Result<GetResult> {
        let head = options.head;
        let operation = if head { "head" } else { "get" };
        let buffers = options.extensions.get::<Buffers>().cloned();
        let result = self
            .deadlines
            .answer(operation, self.store.get_opts(at, options))
            .await?;
        if head {
            return Ok(result);
        }
        let (meta, range) = (result.meta.clone(), result.range.clone());
        let (attributes, extensions) = (result.attributes.clone(), result.extensions.clone());
        let (body, each) = match result.payload {
            GetResultPayload::Stream(body) => (body, self.deadlines.stall),
            // `object_store` streams a local file in pieces of 8 KiB, each through the blocking
            // pool. One read is many times as fast. It comes as one piece, so the longer deadline
            // applies.
            GetResultPayload::File(file, path) => {
                let buffers = buffers.unwrap_or_else(|| Buffers::new(0));
                let read = read_file(file, path, range.clone(), buffers);
                (stream::once(read).boxed(), self.deadlines.answer)
            }
        };
        let payload = GetResultPayload::Stream(with_deadline_each(body, "nothing was read", each));
        Ok(GetResult {
            payload,
            meta,
            range,
            attributes,
            extensions,
        })
    }

    async fn get_ranges(&self, at: &Path, ranges: &[Range<u64>]) -> Result<Vec<Bytes>> {
        self.deadlines
            .answer("get", self.store.get_ranges(at, ranges))
            .await
    }

    fn delete_stream(
        &self,
        locations: BoxStream<'static, Result<Path>>,
    ) -> BoxStream<'static, Result<Path>> {
        with_deadline_each(
            self.store.delete_stream(locations),
            "no answer",
            self.deadlines.answer,
        )
    }

    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, Result<ObjectMeta>> {
        with_deadline_each(self.store.list(prefix), "no answer", self.deadlines.answer)
    }

    fn list_with_offset(
        &self,
        prefix: Option<&Path>,
        offset: &Path,
    ) -> BoxStream<'static, Result<ObjectMeta>> {
        with_deadline_each(
            self.store.list_with_offset(prefix, offset),
            "no answer",
            self.deadlines.answer,
        )
    }

    async fn list_with_delimiter(&self, prefix: Option<&Path>) -> Result<ListResult> {
        self.deadlines
            .answer("list", self.store.list_with_delimiter(prefix))
            .await
    }

    async fn copy_opts(&self, from: &Path, to: &Path, options: CopyOptions) -> Result<()> {
        self.deadlines
            .answer("copy", self.store.copy_opts(from, to, options))
            .await
    }

    async fn rename_opts(&self, from: &Path, to: &Path, options: RenameOptions) -> Result<()> {
        self.deadlines
            .answer("rename", self.store.rename_opts(from, to, options))
            .await
    }
}

#[derive(Debug)]
struct DeadlinedUpload {
    upload: Box<dyn MultipartUpload>,
    deadlines: Deadlines,
}

#[async_trait]
impl MultipartUpload for DeadlinedUpload {
    fn put_part(&mut self, data: PutPayload) -> UploadPart {
        Box::pin(
            self.deadlines
                .answer("put_part", self.upload.put_part(data)),
        )
    }

    async fn complete(&mut self) -> Result<PutResult> {
        self.deadlines
            .answer("put_complete", self.upload.complete())
            .await
    }

    async fn abort(&mut self) -> Result<()> {
        self.deadlines
            .answer("put_abort", self.upload.abort())
            .await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_range_of_a_file_is_read_as_it_is_or_refused_by_name() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("rows");
        let bytes: Vec<u8> = (0..=250).cycle().take(3_000_000).collect();
        std::fs::write(&path, &bytes).unwrap();
        // The second range is read into the buffer of the first.
        let buffers = Buffers::new(8 << 20);
        let read = async |range: Range<u64>| {
            let file = File::open(&path).unwrap();
            read_file(file, path.clone(), range, buffers.clone()).await
        };
        for range in [0..3_000_000, 7..2_500_001, 2_999_999..3_000_000, 5..5] {
            let found = read(range.clone()).await.unwrap();
            assert_eq!(found, bytes[range.start as usize..range.end as usize]);
        }
        let refused = read(2_999_000..3_000_001).await.unwrap_err().to_string();
        assert!(refused.contains(path.to_str().unwrap()), "{refused}");
    }
}
