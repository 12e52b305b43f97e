//! Pushes to stores whose clock is behind this machine's, and whose answers get lost.
use super::*;
use crate::coordinator::facts::owner::{Identity, Ownership};
use futures::stream::BoxStream;
use object_store::{
    CopyOptions, GetOptions, GetResult, ListResult, MultipartUpload, ObjectMeta, ObjectStore,
    PutMultipartOptions, PutOptions, PutPayload, PutResult, path::Path,
};
use std::{fmt, sync::atomic::AtomicBool};
use superbatch_transport::Dialer;

#[derive(Debug)]
struct Odd {
    store: Arc<dyn ObjectStore>,
    /// How far its clock is behind.
    behind: Duration,
    /// Whether weights arrive and it says that they did not.
    loses_answers: Arc<AtomicBool>,
}

impl Odd {
    fn at_its_time(meta: ObjectMeta, behind: Duration) -> ObjectMeta {
        let written = SystemTime::from(meta.last_modified) - behind;
        ObjectMeta {
            last_modified: written.into(),
            ..meta
        }
    }
}

impl fmt::Display for Odd {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Odd({})", self.store)
    }
}

#[async_trait]
impl ObjectStore for Odd {
    async fn put_opts(
        &self,
        at: &Path,
        p: PutPayload,
        o: PutOptions,
    ) -> object_store::Result<PutResult> {
        let put = self.store.put_opts(at, p, o).await?;
        let is_lost = self.loses_answers.load(Ordering::SeqCst);
        if is_lost && at.as_ref().contains("snapshots/") {
            return Err(object_store::Error::PermissionDenied {
                path: at.to_string(),
                source: "said after it was written".into(),
            });
        }
        Ok(put)
    }

    async fn put_multipart_opts(
        &self,
        at: &Path,
        o: PutMultipartOptions,
    ) -> object_store::Result<Box<dyn MultipartUpload>> {
        self.store.put_multipart_opts(at, o).await
    }

    async fn get_opts(&self, at: &Path, o: GetOptions) -> object_store::Result<GetResult> {
        let found = self.store.get_opts(at, o).await?;
        let meta = Self::at_its_time(found.meta.clone(), self.behind);
        Ok(GetResult { meta, ..found })
    }

    fn delete_stream(
        &self,
        at: BoxStream<'static, object_store::Result<Path>>,
    ) -> BoxStream<'static, object_store::Result<Path>> {
        self.store.delete_stream(at)
    }

    fn list(&self, at: Option<&Path>) -> BoxStream<'static, object_store::Result<ObjectMeta>> {
        let behind = self.behind;
        let listed = self.store.list(at);
        listed
            .map(move |meta| meta.map(|meta| Self::at_its_time(meta, behind)))
            .boxed()
    }

    async fn list_with_delimiter(&self, at: Option<&Path>) -> object_store::Result<ListResult> {
        self.store.list_with_delimiter(at).await
    }

    async fn copy_opts(&self, from: &Path, to: &Path, o: CopyOptions) -> object_store::Result<()> {
        self.store.copy_opts(from, to, o).await
    }
}

fn run_in(behind: Duration, loses_answers: &Arc<AtomicBool>) -> Location {
    let loses_answers = loses_answers.clone();
    let wrap = move |store| {
        Arc::new(Odd {
            store,
            behind,
            loses_answers: loses_answers.clone(),
        }) as Arc<dyn ObjectStore>
    };
    let stores = Stores::wrapped(StorageConfig::default(), Arc::new(wrap));
    stores.open("memory:///state/runs/r").unwrap()
}

#[tokio::test]
async fn an_upload_is_as_old_as_the_store_says() {
    let (bench, day) = (Bench::new(), Duration::from_secs(24 * 3600));
    let run = run_in(2 * day, &Arc::default());
    let upload = "snapshots/d.x.safetensors";
    run.put(upload, "x".into()).await.unwrap();
    let identity = Identity {
        address: "http://127.0.0.1:1".into(),
        instance: "a".into(),
        dialer: Dialer::default(),
    };
    let owner = Ownership::claim(&run, &identity).await.unwrap();
    let open = |owner| {
        let spec = RunWeights {
            owner,
            ..bench.spec.clone()
        };
        Weights::open(run.clone(), spec, bench.verifier.clone())
    };
    open(Some(owner)).await.unwrap();
    assert!(run.head(upload).await.unwrap().is_some(), "it is new");
    // By the clock of this machine it is two days old.
    open(None).await.unwrap();
    assert_eq!(run.head(upload).await.unwrap(), None);
}

#[tokio::test]
async fn an_upload_that_arrived_and_failed_does_not_stay() {
    let (bench, loses_answers) = (Bench::new(), Arc::new(AtomicBool::new(true)));
    let run = run_in(Duration::ZERO, &loses_answers);
    let weights = Weights::open(run.clone(), bench.spec.clone(), bench.verifier.clone());
    let weights = weights.await.unwrap();
    let failed = push(&weights, start(0, "p"), whole(1.0)).await;
    assert_eq!(failed.unwrap_err().reason(), Reason::StorageUnreachable);
    assert!(run.list("snapshots").await.unwrap().is_empty());
}
