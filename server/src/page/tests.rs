//! The page takes no more than its shares, however many its readers are.
use super::*;
use crate::{
    blocking::tests::needs_a_thread,
    coordinator::{
        facts::run::{RunFact, create_run},
        plan::planner::Plan,
        receipts::parquet::tests::sample,
    },
    dataset::{Block, Layout, Shard, SourceManifest, fixtures::batch},
    storage::{Budget, StorageConfig, Stores},
};
use arrow::array::{BinaryArray, StringArray};
use axum::{
    extract::{Path, RawQuery, State},
    http::{HeaderMap, StatusCode},
    response::IntoResponse,
};
use futures::{FutureExt, future::join_all};
use serde_json::Value;
use std::{
    sync::{
        Mutex,
        atomic::{AtomicUsize, Ordering},
        mpsc,
    },
    thread,
};
use superbatch_proto::v1::{ChosenRow, Phase, Policy, RunSpec};
use tokio::{sync::Semaphore, task::yield_now};

/// Turns of the runtime after which what can begin has begun.
const LOOKS: usize = 200;
/// More than there are readers in any test.
const MANY: usize = 1000;
const SUPER: u32 = 16;
const SUB: u32 = 4;

/// Sources of so many shards, each of two blocks of eight rows.
pub(super) fn manifest(sources: &[u32]) -> Arc<Manifest> {
    let block = |n: u32| Block {
        rows: 8,
        first_row: u64::from(8 * n),
        bytes: (0, 1),
        mask: None,
    };
    let shard = |n: u32| Shard {
        path: format!("{n}.parquet"),
        size: 1,
        etag: Some("tag".into()),
        blocks: (0..2).map(block).collect(),
        ..Shard::default()
    };
    let source = |(n, shards): (usize, &u32)| SourceManifest {
        uri: format!("memory:///{n}"),
        root_uri: format!("memory:///{n}"),
        weight: 1.0,
        layout: Layout {
            image_column: "image".into(),
            caption_column: "caption".into(),
            ..Layout::default()
        },
        shards: (0..*shards).map(shard).collect(),
        ..SourceManifest::default()
    };
    Arc::new(Manifest {
        version: Manifest::VERSION,
        sources: sources.iter().enumerate().map(source).collect(),
    })
}

pub(super) fn spec() -> RunSpec {
    let joint = Phase {
        policy: Policy::Joint.into(),
        super_batch_size: SUPER,
        sub_batch_size: SUB,
        ..Phase::default()
    };
    RunSpec {
        seed: 3,
        window_blocks: 2,
        max_ahead: 1,
        phases: vec![joint],
        ..RunSpec::default()
    }
}

/// The receipt of a step that chose its first candidates.
pub(super) fn receipt(plan: &Plan, step: u64) -> Receipt {
    let candidates = plan.step(&spec().phases, step).unwrap().candidates;
    let chosen = candidates.iter().take(SUB as usize).map(|candidate| {
        let blocks = &plan.manifest().sources[candidate.source as usize].shards;
        let block = &blocks[candidate.shard as usize].blocks[candidate.block as usize];
        ChosenRow {
            source: candidate.source,
            shard: candidate.shard,
            row: block.row_in_shard(candidate.row),
            ..ChosenRow::default()
        }
    });
    Receipt {
        chosen: chosen.collect(),
        ..sample(step, 0, "nonce")
    }
}

pub(super) fn plan(manifest: &Arc<Manifest>) -> Plan {
    let spec = spec();
    Plan::new(manifest.clone(), spec.seed, spec.epochs, spec.window_blocks).unwrap()
}

/// A page on a state that holds the run `r` with so many steps.
pub(super) async fn page(
    manifest: &Arc<Manifest>,
    blocks: impl Blocks + 'static,
    steps: u64,
) -> Arc<Page> {
    let stores = Stores::new(StorageConfig::default());
    let state = stores.open("memory:///state").unwrap();
    let digest = manifest.save(&state).await.unwrap();
    let fact = RunFact::new(&spec(), digest, None, None, None);
    create_run(&state.below("runs/r"), fact).await.unwrap();
    let page = Arc::new(Page::new(state, Box::new(blocks), None));
    for step in 0..steps {
        commit(&page, manifest, step).await;
    }
    page
}

/// Commits a step of the run, as its coordinator does, and lets the page look anew.
pub(super) async fn commit(page: &Page, manifest: &Arc<Manifest>, step: u64) {
    let known = page.find_or_load("r").await.unwrap();
    let receipt = receipt(&plan(manifest), step);
    let budget = Budget::default();
    known.receipts.commit(&receipt, &budget).await.unwrap();
    let long_ago = Instant::now().checked_sub(FACTS_LAST).unwrap();
    page.runs.put("r".into(), (long_ago, known));
}

/// Returns the JSON of an answer.
pub(super) async fn json(answer: impl IntoResponse) -> Value {
    let answer = answer.into_response();
    assert_eq!(answer.status(), StatusCode::OK);
    let text = axum::body::to_bytes(answer.into_body(), usize::MAX);
    serde_json::from_slice(&text.await.unwrap()).unwrap()
}

/// Blocks of rows whose captions have as many letters as their number says, and that come when the
/// gate is opened. It counts those that are read at the same time.
#[derive(Clone)]
pub(super) struct Gated(Arc<Gate>);

struct Gate {
    open: Semaphore,
    reads: AtomicUsize,
    most: AtomicUsize,
}

impl Gated {
    pub(super) fn open(is_open: bool) -> Self {
        Self(Arc::new(Gate {
            open: Semaphore::new(if is_open { MANY } else { 0 }),
            reads: AtomicUsize::new(0),
            most: AtomicUsize::new(0),
        }))
    }

    fn reads(&self) -> usize {
        self.0.reads.load(Ordering::SeqCst)
    }
}

#[async_trait]
impl Blocks for Gated {
    async fn block(
        &self,
        _: &Manifest,
        _: u32,
        _: u32,
        _: u32,
        _: Option<u32>,
    ) -> Result<Arc<RecordBatch>> {
        let reads = 1 + self.0.reads.fetch_add(1, Ordering::SeqCst);
        self.0.most.fetch_max(reads, Ordering::SeqCst);
        let opened = self.0.open.acquire().await;
        drop(opened.unwrap());
        self.0.reads.fetch_sub(1, Ordering::SeqCst);
        let captions = (0..8).map(|row| "x".repeat(row));
        let images = (0..8).map(|row| (row != 5).then(|| vec![0_u8; 100 + row]));
        Ok(Arc::new(batch(vec![
            ("image", Arc::new(BinaryArray::from_iter(images))),
            ("caption", Arc::new(StringArray::from_iter_values(captions))),
        ])))
    }
}

/// Readers of pictures have all that the page may take, and wait. Meanwhile a step is committed and
/// served: nothing of what it needs is with them.
#[tokio::test]
async fn a_step_waits_for_no_reader() {
    let (manifest, blocks) = (manifest(&[3]), Gated::open(false));
    let page = page(&manifest, blocks.clone(), 1).await;
    let picture = |row: usize| {
        let path = Path(("r".to_owned(), format!("0.{}.{}", row % 3, row % 8)));
        let asked = (State(page.clone()), path, RawQuery(None), HeaderMap::new());
        tokio::spawn(async move {
            let (page, path, query, headers) = asked;
            let answer = pictures::picture(page, path, query, headers).await;
            answer.into_response().status()
        })
    };
    let readers: Vec<_> = (0..40).map(picture).collect();
    while blocks.reads() < shares::BLOCKS {
        yield_now().await;
    }
    for _ in 0..LOOKS {
        yield_now().await;
    }
    assert_eq!(blocks.reads(), shares::BLOCKS, "the others wait");
    commit(&page, &manifest, 1).await;
    let known = page.find_or_load("r").await.unwrap();
    let found = known.receipts.find(1, 0).await.unwrap().unwrap();
    assert_eq!(found, receipt(&plan(&manifest), 1));
    assert_eq!(blocks.reads(), shares::BLOCKS, "the readers still wait");
    blocks.0.open.add_permits(MANY);
    for status in join_all(readers).await {
        // Their images are none, which costs no more than to find that out.
        assert_eq!(status.unwrap(), StatusCode::NOT_FOUND);
    }
    assert_eq!(blocks.0.most.load(Ordering::SeqCst), shares::BLOCKS);
}

#[tokio::test]
async fn readers_of_receipts_hold_a_few_and_the_rest_wait() {
    let manifest = manifest(&[3]);
    let page = page(&manifest, Gated::open(true), 1).await;
    let known = page.find_or_load("r").await.unwrap();
    let (release, held) = mpsc::channel::<()>();
    let held = Arc::new(Mutex::new(held));
    let readers: Vec<_> = (0..20)
        .map(|_| {
            let (page, known, held) = (page.clone(), known.clone(), held.clone());
            tokio::spawn(async move {
                let shown = move |receipt: Receipt| {
                    // It ends when the other side is dropped.
                    let _ = held.lock().unwrap().recv();
                    Ok(receipt.chosen.len())
                };
                page.with_receipt(&known, 0, vec![0], shown).await.unwrap()
            })
        })
        .collect();
    let all_are_taken = || page.receipts_held.left() == 0 && page.threads.left() == 0;
    while !(all_are_taken() && page.reads.left() == shares::READS) {
        yield_now().await;
    }
    // Readers who go give nothing back before their work has ended: it goes on.
    readers.iter().take(10).for_each(|reader| reader.abort());
    for _ in 0..LOOKS {
        yield_now().await;
    }
    assert!(all_are_taken());
    drop(release);
    let found: Vec<_> = join_all(readers).await;
    assert!(found[10..].iter().all(|n| matches!(n, Ok(Some(4)))));
    while page.receipts_held.left() < shares::RECEIPTS || page.threads.left() < shares::THREADS {
        yield_now().await;
    }
}

#[tokio::test]
async fn work_has_its_thread_to_its_end_and_the_next_waits() {
    let page = page(&manifest(&[3]), Gated::open(true), 0).await;
    let mut releases = Vec::new();
    for _ in 0..shares::THREADS {
        let (release, held) = mpsc::channel::<()>();
        releases.push(release);
        let work = page.work("waiting", move || {
            let _ = held.recv();
            Ok(())
        });
        let mut work = Box::pin(work);
        assert!(work.as_mut().now_or_never().is_none(), "it works");
        // The reader goes.
        drop(work);
    }
    let here = thread::current().id();
    let mut next = Box::pin(page.work("the next", || Ok(thread::current().id())));
    for _ in 0..LOOKS {
        assert!(futures::poll!(next.as_mut()).is_pending(), "it waits");
        yield_now().await;
    }
    drop(releases);
    assert_ne!(next.await.unwrap(), here, "no thread of all calls");
}

/// What takes long for a large manifest or many steps would hold up all calls of the process.
#[test]
fn answers_are_made_on_threads_of_their_own() {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let page = runtime.block_on(async {
        let page = page(&manifest(&[3]), Gated::open(true), 3).await;
        // With this all that is read is known.
        json(runs::one(State(page.clone()), Path("r".into())).await).await;
        let line = timeline::timeline(State(page.clone()), Path("r".into()), RawQuery(None));
        json(line.await).await;
        page
    });
    let asked = || (State(page.clone()), Path("r".to_owned()));
    let (state, path) = asked();
    assert!(needs_a_thread(runs::one(state, path)).is_ok());
    let (state, path) = asked();
    let line = timeline::timeline(state, path, RawQuery(None));
    assert!(needs_a_thread(line).is_ok());
}

#[tokio::test]
async fn a_run_that_has_the_id_of_another_is_not_taken_for_it() {
    let manifest = manifest(&[3]);
    let page = page(&manifest, Gated::open(true), 1).await;
    let seed = async || {
        let line = timeline::timeline(State(page.clone()), Path("r".into()), RawQuery(None));
        json(line.await).await["batch_score"][0].clone()
    };
    assert_eq!(seed().await, 0.0);
    let objects = page.state.list("runs").await.unwrap();
    let keys: Vec<String> = objects.into_iter().map(|(key, _)| key).collect();
    page.state.delete_all(&keys).await.unwrap();
    let fact = RunFact::new(&spec(), manifest.digest(), None, None, None);
    let run = page.state.below("runs/r");
    create_run(&run, fact).await.unwrap();
    let mut other = receipt(&plan(&manifest), 0);
    other.summary.as_mut().unwrap().batch_score = 7.0;
    let receipts = Receipts::new(run);
    receipts.commit(&other, &Budget::default()).await.unwrap();
    let known = page.find_or_load("r").await.unwrap();
    let long_ago = Instant::now().checked_sub(FACTS_LAST).unwrap();
    page.runs.put("r".into(), (long_ago, known));
    assert_eq!(seed().await, 7.0);
}
