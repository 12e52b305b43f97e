//! Faults of object storage, as a script: which requests fail, and how. Put around the stores that
//! the service opens.
use async_trait::async_trait;
use bytes::Bytes;
use futures::stream::{self, BoxStream, StreamExt};
use object_store::{
    CopyOptions, Error, GetOptions, GetResult, GetResultPayload, ListResult, MultipartUpload,
    ObjectMeta, ObjectStore, PutMode, PutMultipartOptions, PutOptions, PutPayload, PutResult,
    RenameOptions, Result, path::Path,
};
use std::{
    fmt,
    ops::Range,
    sync::{Arc, Mutex},
};
use superbatch_server::storage::Wrap;
use tokio::sync::Notify;

/// What is asked of a store.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Operation {
    /// Conditional creation: facts, receipts.
    Create,
    /// Writing what has a name of its own: snapshots, reference embeddings.
    Write,
    /// Reading whole or in ranges.
    Read,
}

/// How a request fails.
#[derive(Debug, Clone)]
pub enum How {
    /// It goes well: a request before the one that fails.
    Passes,
    /// Nothing happens, and the store says so.
    Fails,
    /// It happens, and the answer is lost.
    AnswerLost,
    /// It happens after `Notify` is told.
    Waits(Arc<Notify>),
    /// It is never answered.
    Silent,
    /// It is answered, and of what is read not a byte comes. Of a whole object only.
    Stalls,
}

/// One entry of a script: the next `times` requests of this operation on a path that contains
/// `path`.
#[derive(Debug, Clone)]
pub struct Fault {
    pub operation: Operation,
    pub path: &'static str,
    pub how: How,
    pub times: usize,
}

/// A script that is being played.
#[derive(Debug, Clone, Default)]
pub struct Script(Arc<Mutex<Vec<Fault>>>);

impl Script {
    pub fn new(faults: impl IntoIterator<Item = Fault>) -> Self {
        Self(Arc::new(Mutex::new(faults.into_iter().collect())))
    }

    /// Wraps the stores of a service.
    pub fn wrap(&self) -> Wrap {
        let script = self.clone();
        Arc::new(move |store| {
            Arc::new(Faulty {
                store,
                script: script.clone(),
            })
        })
    }

    /// Entries that did not happen (yet).
    pub fn left(&self) -> Vec<Fault> {
        self.0.lock().expect("no panic while held").clone()
    }

    fn next(&self, operation: Operation, at: &Path) -> Option<How> {
        let mut faults = self.0.lock().expect("no panic while held");
        let matches =
            |fault: &Fault| fault.operation == operation && at.as_ref().contains(fault.path);
        let found = faults.iter().position(matches)?;
        let how = faults[found].how.clone();
        faults[found].times -= 1;
        if faults[found].times == 0 {
            faults.remove(found);
        }
        Some(how)
    }

    /// Plays the script on one request.
    async fn play<T>(
        &self,
        operation: Operation,
        at: &Path,
        request: impl Future<Output = Result<T>>,
    ) -> Result<T> {
        Self::act(self.next(operation, at), request).await
    }

    async fn act<T>(how: Option<How>, request: impl Future<Output = Result<T>>) -> Result<T> {
        match how {
            None | Some(How::Passes) => request.await,
            Some(How::Fails) => Err(scripted()),
            Some(How::Silent | How::Stalls) => std::future::pending().await,
            Some(How::AnswerLost) => request.await.and(Err(scripted())),
            Some(How::Waits(until)) => {
                until.notified().await;
                request.await
            }
        }
    }
}

fn scripted() -> Error {
    Error::Generic {
        store: "scripted",
        source: "a scripted fault".into(),
    }
}

#[derive(Debug)]
struct Faulty {
    store: Arc<dyn ObjectStore>,
    script: Script,
}

impl fmt::Display for Faulty {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Faulty({})", self.store)
    }
}

#[async_trait]
impl ObjectStore for Faulty {
    async fn put_opts(
        &self,
        at: &Path,
        payload: PutPayload,
        options: PutOptions,
    ) -> Result<PutResult> {
        let creates = options.mode == PutMode::Create;
        let request = self.store.put_opts(at, payload, options);
        let operation = if creates {
            Operation::Create
        } else {
            Operation::Write
        };
        self.script.play(operation, at, request).await
    }

    async fn put_multipart_opts(
        &self,
        at: &Path,
        options: PutMultipartOptions,
    ) -> Result<Box<dyn MultipartUpload>> {
        self.store.put_multipart_opts(at, options).await
    }

    async fn get_opts(&self, at: &Path, options: GetOptions) -> Result<GetResult> {
        let request = self.store.get_opts(at, options);
        match self.script.next(Operation::Read, at) {
            Some(How::Stalls) => {
                let payload = GetResultPayload::Stream(stream::pending().boxed());
                Ok(GetResult {
                    payload,
                    ..request.await?
                })
            }
            how => Script::act(how, request).await,
        }
    }

    async fn get_ranges(&self, at: &Path, ranges: &[Range<u64>]) -> Result<Vec<Bytes>> {
        self.script
            .play(Operation::Read, at, self.store.get_ranges(at, ranges))
            .await
    }

    fn delete_stream(
        &self,
        locations: BoxStream<'static, Result<Path>>,
    ) -> BoxStream<'static, Result<Path>> {
        self.store.delete_stream(locations)
    }

    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, Result<ObjectMeta>> {
        self.store.list(prefix)
    }

    async fn list_with_delimiter(&self, prefix: Option<&Path>) -> Result<ListResult> {
        self.store.list_with_delimiter(prefix).await
    }

    async fn copy_opts(&self, from: &Path, to: &Path, options: CopyOptions) -> Result<()> {
        self.store.copy_opts(from, to, options).await
    }

    async fn rename_opts(&self, from: &Path, to: &Path, options: RenameOptions) -> Result<()> {
        self.store.rename_opts(from, to, options).await
    }
}
