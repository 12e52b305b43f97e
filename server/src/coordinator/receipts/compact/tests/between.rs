//! A store between whose requests something happens, or that ends at one, as a process that is
//! killed does.
use crate::storage::{Location, StorageConfig, Stores};
use async_trait::async_trait;
use futures::{
    FutureExt, StreamExt,
    future::BoxFuture,
    stream::{self, BoxStream},
};
use object_store::{
    CopyOptions, Error, GetOptions, GetResult, ListResult, MultipartUpload, ObjectMeta,
    ObjectStore, ObjectStoreExt, PutMultipartOptions, PutOptions, PutPayload, PutResult, Result,
    memory::InMemory, path::Path,
};
use std::{
    fmt,
    sync::{Arc, Mutex},
};

type Each = Box<dyn Fn(usize) -> BoxFuture<'static, ()> + Send>;

#[derive(Default)]
struct Script {
    asked: usize,
    each: Option<Each>,
    ends_at: Option<usize>,
    happens: Option<(usize, BoxFuture<'static, ()>)>,
}

/// What happens at which request, from 1 on.
#[derive(Clone, Default)]
pub(super) struct Control(Arc<Mutex<Script>>);

impl fmt::Debug for Control {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Control").finish_non_exhaustive()
    }
}

impl Control {
    /// This request and all later ones fail.
    pub(super) fn ends_at(&self, request: usize) {
        self.0.lock().unwrap().ends_at = Some(request);
    }

    /// Before this request, `what` happens.
    pub(super) fn before(&self, request: usize, what: impl Future<Output = ()> + Send + 'static) {
        self.0.lock().unwrap().happens = Some((request, what.boxed()));
    }

    /// Before each request, `what` of its number happens.
    pub(super) fn before_each(
        &self,
        what: impl Fn(usize) -> BoxFuture<'static, ()> + Send + 'static,
    ) {
        self.0.lock().unwrap().each = Some(Box::new(what));
    }

    /// Returns whether it has happened.
    pub(super) fn has_happened(&self) -> bool {
        self.0.lock().unwrap().happens.is_none()
    }

    async fn request(&self) -> Result<()> {
        let (each, what) = {
            let mut script = self.0.lock().unwrap();
            script.asked += 1;
            let asked = script.asked;
            if script.ends_at.is_some_and(|end| asked >= end) {
                return Err(Error::Generic {
                    store: "between",
                    source: "the process was killed".into(),
                });
            }
            let each = script.each.as_ref().map(|what| what(asked));
            (each, script.happens.take_if(|(at, _)| *at == asked))
        };
        if let Some(what) = each {
            what.await;
        }
        if let Some((_, what)) = what {
            what.await;
        }
        Ok(())
    }
}

/// Opens one store twice: as it is, and with what `Control` says.
pub(super) fn opened_twice() -> (Location, Location, Control) {
    let (store, control) = (Arc::new(InMemory::new()), Control::default());
    let open = |wrap: crate::storage::Wrap| {
        let stores = Stores::wrapped(StorageConfig::default(), wrap);
        stores.open("memory:///state/runs/r").unwrap()
    };
    let (inner, script) = (store.clone(), control.clone());
    let between = open(Arc::new(move |_| {
        Arc::new(Between {
            store: inner.clone(),
            control: script.clone(),
        })
    }));
    let plain = open(Arc::new(move |_| store.clone()));
    (plain, between, control)
}

#[derive(Debug)]
struct Between {
    store: Arc<InMemory>,
    control: Control,
}

impl fmt::Display for Between {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Between({})", self.store)
    }
}

#[async_trait]
impl ObjectStore for Between {
    async fn put_opts(&self, at: &Path, p: PutPayload, o: PutOptions) -> Result<PutResult> {
        self.control.request().await?;
        self.store.put_opts(at, p, o).await
    }
    async fn put_multipart_opts(
        &self,
        at: &Path,
        o: PutMultipartOptions,
    ) -> Result<Box<dyn MultipartUpload>> {
        self.control.request().await?;
        self.store.put_multipart_opts(at, o).await
    }
    async fn get_opts(&self, at: &Path, o: GetOptions) -> Result<GetResult> {
        self.control.request().await?;
        self.store.get_opts(at, o).await
    }
    fn delete_stream(
        &self,
        locations: BoxStream<'static, Result<Path>>,
    ) -> BoxStream<'static, Result<Path>> {
        let (store, control) = (self.store.clone(), self.control.clone());
        let delete = move |path: Result<Path>| {
            let (store, control) = (store.clone(), control.clone());
            async move {
                control.request().await?;
                let path = path?;
                store.delete(&path).await.map(|()| path)
            }
        };
        locations.then(delete).boxed()
    }
    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, Result<ObjectMeta>> {
        let (store, control) = (self.store.clone(), self.control.clone());
        let prefix = prefix.cloned();
        let asked = stream::once(async move { control.request().await });
        let listed = move |asked: Result<()>| match asked {
            Ok(()) => store.list(prefix.as_ref()),
            Err(error) => stream::once(async { Err(error) }).boxed(),
        };
        asked.flat_map(listed).boxed()
    }
    async fn list_with_delimiter(&self, at: Option<&Path>) -> Result<ListResult> {
        self.control.request().await?;
        self.store.list_with_delimiter(at).await
    }
    async fn copy_opts(&self, from: &Path, to: &Path, o: CopyOptions) -> Result<()> {
        self.control.request().await?;
        self.store.copy_opts(from, to, o).await
    }
}
