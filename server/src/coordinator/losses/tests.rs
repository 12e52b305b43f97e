//! Losses against a store in memory: whose come first, what is written together, what is read.
use super::*;
use crate::storage::{StorageConfig, Stores};
use async_trait::async_trait;
use futures::{FutureExt, future::join_all, stream::BoxStream};
use object_store::{
    CopyOptions, GetOptions, GetResult, ListResult, MultipartUpload, ObjectMeta, ObjectStore,
    PutMultipartOptions, PutOptions, PutPayload, PutResult, path::Path,
};
use std::fmt;
use tokio::sync::Semaphore;

/// A store that writes only what the test lets it, and says that a write has come.
#[derive(Debug)]
struct Gated {
    store: Arc<dyn ObjectStore>,
    come: Arc<Semaphore>,
    may: Arc<Semaphore>,
}

impl fmt::Display for Gated {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Gated({})", self.store)
    }
}

#[async_trait]
impl ObjectStore for Gated {
    async fn put_opts(
        &self,
        at: &Path,
        p: PutPayload,
        o: PutOptions,
    ) -> object_store::Result<PutResult> {
        self.come.add_permits(1);
        self.may.acquire().await.unwrap().forget();
        self.store.put_opts(at, p, o).await
    }
    async fn put_multipart_opts(
        &self,
        at: &Path,
        o: PutMultipartOptions,
    ) -> object_store::Result<Box<dyn MultipartUpload>> {
        self.store.put_multipart_opts(at, o).await
    }
    async fn get_opts(&self, at: &Path, o: GetOptions) -> object_store::Result<GetResult> {
        self.store.get_opts(at, o).await
    }
    fn delete_stream(
        &self,
        at: BoxStream<'static, object_store::Result<Path>>,
    ) -> BoxStream<'static, object_store::Result<Path>> {
        self.store.delete_stream(at)
    }
    fn list(&self, at: Option<&Path>) -> BoxStream<'static, object_store::Result<ObjectMeta>> {
        self.store.list(at)
    }
    async fn list_with_delimiter(&self, at: Option<&Path>) -> object_store::Result<ListResult> {
        self.store.list_with_delimiter(at).await
    }
    async fn copy_opts(&self, from: &Path, to: &Path, o: CopyOptions) -> object_store::Result<()> {
        self.store.copy_opts(from, to, o).await
    }
}

fn run() -> Location {
    let stores = Stores::new(StorageConfig::default());
    stores.open("memory:///state/runs/r").unwrap()
}

#[tokio::test]
async fn the_last_report_counts_and_outlives_the_process() {
    let run = run();
    let losses = Losses::new(run.clone());
    let (a, b, c) = ((0, 0, 7), (1, 2, 3), (0, 0, 8));
    assert!(losses.of(vec![a]).await.unwrap()[0].is_nan());
    losses.report(vec![(a, 0.5), (b, 2.0)]).await.unwrap();
    losses.report(vec![(a, 0.25)]).await.unwrap();
    for losses in [losses, Losses::new(run)] {
        let found = losses.of(vec![a, b, c]).await.unwrap();
        assert_eq!(found[..2], [0.25, 2.0]);
        assert!(found[2].is_nan());
    }
}

#[tokio::test]
async fn a_former_owners_report_comes_first_and_is_known() {
    let run = run();
    let (old, new) = (Losses::new(run.clone()), Losses::new(run.clone()));
    let (a, b) = ((0, 0, 1), (0, 0, 2));
    assert!(new.of(vec![a]).await.unwrap()[0].is_nan());
    old.report(vec![(a, 1.0), (b, 1.0)]).await.unwrap();
    new.report(vec![(a, 3.0)]).await.unwrap();
    for losses in [new, Losses::new(run)] {
        assert_eq!(losses.of(vec![a, b]).await.unwrap(), [3.0, 1.0]);
    }
}

#[tokio::test]
async fn no_read_waits_for_a_write_and_what_waits_is_written_together() {
    let (come, may) = (Arc::new(Semaphore::new(0)), Arc::new(Semaphore::new(0)));
    let gates = (come.clone(), may.clone());
    let wrap = move |store| {
        let (come, may) = gates.clone();
        Arc::new(Gated { store, come, may }) as Arc<dyn ObjectStore>
    };
    let stores = Stores::wrapped(StorageConfig::default(), Arc::new(wrap));
    let run = stores.open("memory:///state/runs/r").unwrap();
    let losses = Losses::new(run.clone());
    let at = |row| (0, 0, row);
    assert!(losses.of(vec![at(0)]).await.unwrap()[0].is_nan());
    // The first one is being written; three ranks report meanwhile.
    let mut first = losses.report(vec![(at(0), 1.0)]).boxed();
    tokio::select! {
        _ = &mut first => panic!("the store writes nothing yet"),
        come = come.acquire() => come.unwrap().forget(),
    }
    let mut ranks: Vec<_> = (1..4)
        .map(|rank| losses.report(vec![(at(rank), rank as f32)]).boxed())
        .collect();
    assert!(ranks.iter_mut().all(|rank| rank.now_or_never().is_none()));
    let rows: Vec<_> = (0..4).map(at).collect();
    let unwritten = losses.of(rows.clone()).await.unwrap();
    assert!(unwritten.iter().all(|loss| loss.is_nan()));
    may.add_permits(2);
    first.await.unwrap();
    for answer in join_all(ranks).await {
        answer.unwrap();
    }
    assert_eq!(run.list("losses").await.unwrap().len(), 2);
    for losses in [losses, Losses::new(run)] {
        assert_eq!(losses.of(rows.clone()).await.unwrap(), [1.0, 1.0, 2.0, 3.0]);
    }
}

#[tokio::test]
async fn a_full_table_answers_overloaded_and_takes_what_it_knows() {
    let run = run();
    let losses = Losses {
        examples_max: 2,
        ..Losses::new(run.clone())
    };
    let at = |row| (0, 0, row);
    let both = vec![(at(0), 1.0), (at(1), 1.0)];
    losses.report(both).await.unwrap();
    let error = losses.report(vec![(at(2), 1.0)]).await.unwrap_err();
    assert_eq!(error.reason(), Reason::Overloaded);
    assert_eq!(error.value("examples_max"), Some("2"));
    losses.report(vec![(at(1), 4.0)]).await.unwrap();
    let found = Losses::new(run).of((0..3).map(at).collect()).await.unwrap();
    assert_eq!(found[..2], [1.0, 4.0]);
    assert!(found[2].is_nan());
}

/// Reports one loss `count` times, and waits for the summaries.
async fn reported(losses: &Losses, numbers: std::ops::Range<u64>) {
    for number in numbers {
        let loss = ((0, 0, number % 8), number as f32);
        losses.report(vec![loss]).await.unwrap();
        losses.summaries.close();
        losses.summaries.wait().await;
    }
}

async fn summaries(run: &Location) -> Vec<String> {
    let listed = run.list("loss-summaries").await.unwrap();
    let mut keys: Vec<String> = listed.into_iter().map(|(key, _)| key).collect();
    keys.sort();
    keys
}

#[tokio::test]
async fn many_reports_are_read_from_their_summary() {
    let run = run();
    let losses = Losses::new(run.clone());
    reported(&losses, 0..257).await;
    // What the summary holds is not read again: it may even be unreadable by now.
    run.put(&report_key(3), "{}".into()).await.unwrap();
    let again = Losses::new(run.clone());
    let found = again.of(vec![(0, 0, 0), (0, 0, 1)]).await.unwrap();
    assert_eq!(found, [256.0, 249.0]);
    run.put(&report_key(257), "{}".into()).await.unwrap();
    assert!(Losses::new(run).of(vec![(0, 0, 0)]).await.is_err());
}

#[tokio::test]
async fn summaries_come_as_the_table_grows_and_old_ones_go() {
    let run = run();
    let losses = Losses::new(run.clone());
    reported(&losses, 0..800).await;
    let named = |next: u64| format!("loss-summaries/{next:012}.bin");
    assert_eq!(summaries(&run).await, [named(512), named(768)]);
    // A large table is not written again for a few losses: first when they are a quarter of it.
    let many = (0..4_000).map(|row| ((1, 0, row), 1.0)).collect();
    losses.report(many).await.unwrap();
    reported(&losses, 0..300).await;
    assert_eq!(summaries(&run).await, [named(768), named(1024)]);
    reported(&losses, 300..1_200).await;
    assert_eq!(summaries(&run).await, [named(768), named(1024)]);
    reported(&losses, 1_200..1_300).await;
    assert_eq!(summaries(&run).await, [named(1024), named(2026)]);
    let again = Losses::new(run);
    let found = again.of(vec![(1, 0, 3_999), (0, 0, 3)]).await.unwrap();
    assert_eq!(found, [1.0, 1_299.0]);
}
