//! The run page, for researchers. It reads receipts and facts from the state, as any process may,
//! and writes nothing. What it takes of its process is bounded by shares of its own (`shares.rs`),
//! so that no step waits for a reader of the page.
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
mod shares;
mod shown;
mod steps;
mod timeline;
mod turns;

pub use gate::Gate;
pub use replay::Replays;

use crate::{
    blocking::blocking,
    coordinator::{facts::run, receipts::store::Receipts, runs::fork},
    dataset::Manifest,
    error::{Error, Result},
    storage::Location,
};
use answer::Json;
use arrow::array::RecordBatch;
use async_trait::async_trait;
use axum::{Router, middleware, routing::get};
use keep::Keep;
use shares::Share;
use std::{sync::Arc, time::Duration};
use superbatch_proto::{
    ids::is_run_id,
    v1::{Reason, Receipt, ReceiptSummary},
};
use tokio::time::Instant;
use turns::Turns;

/// Summaries that are kept. A timeline needs some hundreds, of about 1 KiB each.
const SUMMARIES: usize = 8_192;
/// Manifests that are kept; they may be large.
const MANIFESTS: usize = 2;
/// Scores of pairs that are kept; those of a step take up to 1 MiB.
const REPLAYED: usize = 16;
/// Requests that wait for a replay.
const REPLAYS_WAITING: usize = 8;
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
    mixes: mix::Mixes,
    reads: Share,
    blocks_held: Share,
    receipts_held: Share,
    threads: Share,
    /// By run, step and the best generation that was asked for, with the one that has it: no better
    /// one will. A missing receipt is not kept: the step may be committed later.
    summaries: Keep<StepKey, (u32, Arc<ReceiptSummary>)>,
    manifests: Keep<String, Arc<Manifest>>,
    runs: Keep<String, (Instant, Arc<Known>)>,
    /// Scores of pairs, by the generation that decided the step.
    replayed: Keep<StepKey, Json>,
}

/// The nonce of a run's definition, a step and a generation. Ids are used again where a state was
/// removed; nonces are not.
type StepKey = (String, u64, u32);

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
            turns: Turns::new(
                REPLAYS_WAITING,
                "try again later, or use `superbatch replay`",
            ),
            mixes: mix::Mixes::default(),
            reads: Share::of(shares::READS),
            blocks_held: Share::of(shares::BLOCKS),
            receipts_held: Share::of(shares::RECEIPTS),
            threads: Share::of(shares::THREADS),
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
            .route("/runs/{run}/mix/rows", get(mix::rows))
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
        if let Some(known) = self.read_lately(id) {
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
        let _read = self.reads.take().await?;
        // Another request may have read it meanwhile.
        if let Some(known) = self.read_lately(id) {
            return Ok(known);
        }
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

    fn read_lately(&self, id: &str) -> Option<Arc<Known>> {
        let (read, known) = self.runs.get(&id.to_owned())?;
        (read.elapsed() < FACTS_LAST).then_some(known)
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
        let key = (known.nonce().to_owned(), step, *best);
        let kept = self.summaries.get(&key);
        let is_asked = |(generation, _): &(u32, _)| generations.contains(generation);
        if let Some(kept) = kept.filter(is_asked) {
            return Ok(Some(kept));
        }
        let _read = self.reads.take().await?;
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
        let _read = self.reads.take().await?;
        let manifest = Arc::new(Manifest::load(&self.state, digest).await?);
        self.manifests.put(key, manifest.clone());
        Ok(manifest)
    }

    /// Hands the receipt of a step, of the first of `generations` that has one, to `shown` on a
    /// thread for blocking work. Few receipts are in memory at a time. A receipt that is read is
    /// read to its end, and counts until then, even if the request is given up meanwhile.
    async fn with_receipt<T: Send + 'static>(
        self: &Arc<Self>,
        known: &Arc<Known>,
        step: u64,
        generations: Vec<u32>,
        shown: impl FnOnce(Receipt) -> Result<T> + Send + 'static,
    ) -> Result<Option<T>> {
        let held = self.receipts_held.take().await?;
        let (page, known) = (self.clone(), known.clone());
        let read = tokio::spawn(async move {
            let done = page.read_receipt(&known, step, &generations, shown).await;
            drop(held);
            done
        });
        let done = read.await;
        done.map_err(|e| Error::internal("reading a receipt panicked").because(e))?
    }

    async fn read_receipt<T: Send + 'static>(
        &self,
        known: &Known,
        step: u64,
        generations: &[u32],
        shown: impl FnOnce(Receipt) -> Result<T> + Send + 'static,
    ) -> Result<Option<T>> {
        let read = self.reads.take().await?;
        let found = known.receipts.find_first(step, generations).await?;
        drop(read);
        let Some((_, receipt)) = found else {
            return Ok(None);
        };
        let shown = move || shown(receipt);
        self.work("showing a receipt", shown).await.map(Some)
    }

    /// Does `work` on a thread for blocking work; `what` names it if it panics. A request that is
    /// given up still has its thread until the work ends, since nothing can stop it.
    async fn work<T: Send + 'static>(
        &self,
        what: &str,
        work: impl FnOnce() -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let thread = self.threads.take().await?;
        let work = move || {
            let done = work();
            drop(thread);
            done
        };
        blocking(what, work).await
    }
}

impl Known {
    /// Returns what tells the run from one that had its id before.
    pub fn nonce(&self) -> &str {
        &self.facts.run.nonce
    }

    /// Returns what tells the run's data from others, in the addresses of pictures.
    pub fn data(&self) -> &str {
        let digest = &self.facts.run.manifest;
        digest.get(..16).unwrap_or(digest)
    }

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

#[cfg(test)]
mod tests;
