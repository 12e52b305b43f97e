//! The run page, for researchers. It reads receipts and facts from the state, as any process may,
//! and writes nothing. Its reads are bounded by semaphores of its own, so that no step waits for a
//! reader of the page.
//!
//! [`Page::router`] lists all addresses. `web/` holds the files of the page.
mod answer;
mod assets;
mod example;
mod gate;
mod keep;
mod mix;
mod pictures;
mod replay;
mod runs;
mod shown;
mod steps;
mod timeline;
mod turns;

pub use gate::Gate;
pub use replay::Replays;

use crate::{
    coordinator::{facts::run, receipts::store::Receipts, runs::fork},
    dataset::Manifest,
    error::{Error, Result},
    storage::Location,
};
use arrow::array::RecordBatch;
use async_trait::async_trait;
use axum::{Router, middleware, routing::get};
use keep::Keep;
use serde_json::Value;
use std::{sync::Arc, time::Duration};
use superbatch_proto::{
    ids::is_run_id,
    v1::{Reason, ReceiptSummary},
};
use tokio::{sync::Semaphore, time::Instant};
use turns::Turns;

/// Reads from storage at the same time, over all readers.
const READS: usize = 8;
/// Blocks of data in memory at the same time; each may be hundreds of megabytes.
const BLOCKS: usize = 2;
/// Summaries that are kept. A timeline needs some hundreds, of about 1 KiB each.
const SUMMARIES: usize = 8_192;
/// Manifests that are kept; they may be large.
const MANIFESTS: usize = 2;
/// Scores of pairs that are kept; those of a step take up to 1 MiB.
const REPLAYED: usize = 16;
/// How old a run's facts may be. With this bound, many readers cost as many reads of storage as
/// one.
const FACTS_LAST: Duration = Duration::from_secs(1);

/// Reads a block of a data set: image and caption are its first two columns. Of images that lie
/// beside the file only the one of row `picture` is there.
#[async_trait]
pub trait Blocks: Send + Sync {
    async fn block(
        &self,
        manifest: &Manifest,
        source: u32,
        shard: u32,
        block: u32,
        picture: Option<u32>,
    ) -> Result<Arc<RecordBatch>>;
}

/// The run page on one state.
pub struct Page {
    state: Location,
    blocks: Box<dyn Blocks>,
    /// Absent beside a service.
    replays: Option<Arc<dyn Replays>>,
    turns: Turns,
    reads: Semaphore,
    block_reads: Semaphore,
    /// By run, step and the best generation that was asked for, with the generation that has it: if
    /// an older one has, the better ones never will. A missing receipt is not kept: the step may be
    /// committed later.
    summaries: Keep<(String, u64, u32), (u32, Arc<ReceiptSummary>)>,
    manifests: Keep<String, Arc<Manifest>>,
    runs: Keep<String, (Instant, Arc<Known>)>,
    /// Scores of pairs, by run, step and the generation that decided it.
    replayed: Keep<(String, u64, u32), Arc<Value>>,
}

/// A run's facts at the time of a read.
pub struct Known {
    pub id: String,
    pub facts: run::RunFacts,
    pub receipts: Receipts,
    /// The newest committed step.
    pub newest: Option<u64>,
}

impl Page {
    /// Makes a page on `state`. It replays steps if it is given the means.
    pub fn new(
        state: Location,
        blocks: Box<dyn Blocks>,
        replays: Option<Arc<dyn Replays>>,
    ) -> Self {
        Self {
            state,
            blocks,
            replays,
            turns: Turns::default(),
            reads: Semaphore::new(READS),
            block_reads: Semaphore::new(BLOCKS),
            summaries: Keep::new(SUMMARIES),
            manifests: Keep::new(MANIFESTS),
            runs: Keep::new(1024),
            replayed: Keep::new(REPLAYED),
        }
    }

    /// Returns the routes of all addresses of the page.
    pub fn router(self: Arc<Self>, gate: Gate) -> Router {
        let of_one_run = Router::new()
            .route("/runs/{run}", get(runs::one))
            .route("/runs/{run}/timeline", get(timeline::timeline))
            .route("/runs/{run}/steps/{step}", get(steps::step))
            .route("/runs/{run}/steps/{step}/receipt", get(steps::receipt))
            .route("/runs/{run}/steps/{step}/pairs", get(replay::pairs))
            .route("/runs/{run}/steps/{step}/redraw", get(replay::redraw))
            .route("/runs/{run}/examples/{row}", get(example::example))
            .route("/runs/{run}/mix", get(mix::mix))
            .route("/runs/{run}/captions", get(pictures::captions))
            .route("/runs/{run}/pictures/{row}", get(pictures::picture))
            .route_layer(middleware::from_fn(gate::check_run));
        let api = Router::new()
            .route("/about", get(runs::about))
            .route("/runs", get(runs::list))
            .merge(of_one_run)
            .with_state(self);
        Router::new()
            .nest("/api", api)
            .fallback(assets::asset)
            .layer(middleware::from_fn_with_state(Arc::new(gate), gate::pass))
    }

    /// Returns a run's facts and its newest step, at most a second old.
    ///
    /// # Errors
    /// `RunNotFound`; those of storage.
    async fn find_or_load(&self, id: &str) -> Result<Arc<Known>> {
        let key = id.to_owned();
        if let Some((_, known)) = self
            .runs
            .get(&key)
            .filter(|(read, _)| read.elapsed() < FACTS_LAST)
        {
            return Ok(known);
        }
        let none = || {
            Error::new(
                Reason::RunNotFound,
                format!("there is no run '{id}' in {}", self.state.uri()),
            )
        };
        if !is_run_id(id) {
            return Err(none());
        }
        let _permit = self.permit(&self.reads).await?;
        let location = self.state.below(&format!("runs/{id}"));
        let facts = run::load(&location).await?.ok_or_else(none)?;
        let receipts = fork::receipts(&self.state, id, &facts).await?;
        let newest = receipts.newest(&facts.chain).await?;
        let known = Arc::new(Known {
            id: key.clone(),
            facts,
            receipts,
            newest,
        });
        self.runs.put(key, (Instant::now(), known.clone()));
        Ok(known)
    }

    /// Returns a step's receipt in force, without its rows.
    async fn summary(&self, known: &Known, step: u64) -> Result<Option<Arc<ReceiptSummary>>> {
        let found = self.summary_of(known, step, known.generations(step));
        Ok(found.await?.map(|(_, summary)| summary))
    }

    /// Returns the first of `generations` that has a receipt, and the receipt without its rows.
    async fn summary_of(
        &self,
        known: &Known,
        step: u64,
        generations: Vec<u32>,
    ) -> Result<Option<(u32, Arc<ReceiptSummary>)>> {
        let Some(best) = generations.first() else {
            return Ok(None);
        };
        let key = (known.id.clone(), step, *best);
        let kept = self.summaries.get(&key);
        let is_asked = |(generation, _): &(u32, _)| generations.contains(generation);
        if let Some(kept) = kept.filter(is_asked) {
            return Ok(Some(kept));
        }
        let _permit = self.permit(&self.reads).await?;
        let found = known.receipts.summary_first(step, &generations).await?;
        Ok(found.map(|(generation, summary)| {
            let found = (generation, Arc::new(summary));
            self.summaries.put(key, found.clone());
            found
        }))
    }

    async fn manifest(&self, digest: &str) -> Result<Arc<Manifest>> {
        let key = digest.to_owned();
        if let Some(manifest) = self.manifests.get(&key) {
            return Ok(manifest);
        }
        let _permit = self.permit(&self.reads).await?;
        let manifest = Arc::new(Manifest::load(&self.state, digest).await?);
        self.manifests.put(key, manifest.clone());
        Ok(manifest)
    }

    async fn permit<'a>(&self, of: &'a Semaphore) -> Result<tokio::sync::SemaphorePermit<'a>> {
        of.acquire()
            .await
            .map_err(|e| Error::internal("the run page stopped").because(e))
    }
}

impl Known {
    /// As [`Self::generations`], in the trajectory of the generation `asked`, if one is.
    pub fn generations_of(&self, step: u64, asked: Option<u64>) -> Vec<u32> {
        let Some(asked) = asked else {
            return self.generations(step);
        };
        let asked = u32::try_from(asked).unwrap_or(u32::MAX);
        self.facts.chain.candidates(step, asked)
    }

    /// Returns the generations whose receipt would be in force for a step, best first.
    pub fn generations(&self, step: u64) -> Vec<u32> {
        self.facts
            .chain
            .candidates(step, self.facts.chain.current())
    }
}
