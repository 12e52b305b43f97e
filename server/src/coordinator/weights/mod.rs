//! Learner weights: parts from one or several ranks are staged, verified, published, and found
//! again by the lag.
//!
//! A push is staged in memory ([`staging`]), joined into one safetensors file ([`assemble`]), put
//! at `snapshots/{blake3}`, loaded by a worker ([`Verifier`]), and published by creating the fact
//! `pushes/{generation}/{step}.json`. Until that fact exists nothing is seen of it, and the old
//! version serves on.
mod assemble;
mod book;
mod lag;
pub mod member;
mod publish;
mod staging;
mod streams;
#[cfg(test)]
mod tests;

use crate::coordinator::facts::chain::Began;
use crate::{
    error::{Error, Result},
    metrics,
    storage::Location,
};
use async_trait::async_trait;
pub use book::Book;
pub use book::Published;
use futures::{StreamExt, TryStreamExt, stream};
pub use lag::Due;
pub use lag::due;
pub use lag::on_cadence;
use std::{
    collections::{BTreeMap, BTreeSet, HashSet},
    sync::{Arc, Mutex},
    time::Duration,
};
use superbatch_proto::v1::{Lag, Reason};
use tokio::sync::{OnceCell, watch};
use tokio_util::task::TaskTracker;

/// Facts that are read at the same time when a run is opened.
const READS_AT_ONCE: usize = 32;

/// What the learner's weights look like.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelShape {
    /// Shapes by name: what a push must hold, no more and no less.
    pub tensors: BTreeMap<String, Vec<u64>>,
    /// Factor on cosines, exp applied.
    pub logit_scale: f64,
    pub logit_bias: Option<f64>,
}

/// Loads weights for real, on a worker.
#[async_trait]
pub trait Verifier: Send + Sync {
    /// Loads a snapshot and runs a canary batch. `digest` is the BLAKE3 of the file, in hex.
    ///
    /// # Errors
    /// `WeightsRefused`, with `tensor` where one is to blame; others where no worker can say.
    async fn verify(&self, snapshot_uri: &str, digest: &str) -> Result<ModelShape>;

    /// The shape of the learner, from its model folder alone.
    async fn shape(&self) -> Result<ModelShape>;
}

/// What a run's spec and the config say about its weights.
#[derive(Debug, Clone)]
pub struct RunWeights {
    /// For the log.
    pub run_id: String,
    pub lag: Lag,
    pub push_every_steps: u32,
    /// Whether the trainer pushes its initial weights, as step -1.
    pub first_push: bool,
    /// The initial learner (version 0, step -1) where the trainer does not push it.
    pub initial: Option<Published>,
    /// Largest push, in bytes: it is held in memory until it is whole.
    pub push_bytes_max: u64,
    /// How long a rank's ended stream waits for the others, and how long a stream may be silent.
    pub push_deadline: Duration,
}

/// Pushes that are not published, by (generation, step).
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Traffic {
    /// Staging or being verified. A push leaves this set only after it has entered the [`Book`] or
    /// `refused`.
    pub staging: BTreeSet<(u32, i64)>,
    /// Why each was refused, until it is sent again.
    pub refused: BTreeMap<(u32, i64), String>,
    /// Why each failed last, for a cause that passes: the trainer sends it again.
    pub failed: BTreeMap<(u32, i64), String>,
}

/// The weights of one run. Cloned freely.
#[derive(Clone)]
pub struct Weights(Arc<Inner>);

pub struct Inner {
    /// The run's own prefix in the state.
    run: Location,
    spec: RunWeights,
    verifier: Arc<dyn Verifier>,
    shape: OnceCell<Arc<ModelShape>>,
    book: watch::Sender<Book>,
    staging: Mutex<streams::Staging>,
    traffic: watch::Sender<Traffic>,
    /// One publication at a time, and none while snapshots are forgotten.
    publishing: tokio::sync::Mutex<()>,
    tasks: TaskTracker,
}

impl Weights {
    /// Opens the weights of the run at `run`, with all versions published so far.
    ///
    /// # Errors
    /// `StorageUnreachable`; `Internal` where a fact cannot be read.
    pub async fn open(
        run: Location,
        spec: RunWeights,
        verifier: Arc<dyn Verifier>,
    ) -> Result<Self> {
        let mut book = Book::default();
        if let Some(initial) = spec.initial.clone() {
            book.set_initial(initial);
        }
        let snapshots: HashSet<String> = run
            .list(publish::SNAPSHOTS)
            .await?
            .into_iter()
            .map(|(key, _)| key)
            .collect();
        let keys = run.list(publish::PUSHES).await?;
        let mut facts = stream::iter(keys)
            .map(|(key, _)| read_fact(&run, key))
            .buffer_unordered(READS_AT_ONCE);
        while let Some(fact) = facts.try_next().await? {
            let kept = snapshots.contains(&publish::snapshot_key(&fact.digest));
            book.insert(fact.push_id.clone(), fact.published(&run), kept);
        }
        drop(facts);
        gauge_newest(&book);
        let inner = Inner {
            run,
            spec,
            verifier,
            shape: OnceCell::new(),
            book: watch::Sender::new(book),
            staging: Mutex::default(),
            traffic: watch::Sender::default(),
            publishing: tokio::sync::Mutex::default(),
            tasks: TaskTracker::new(),
        };
        Ok(Self(Arc::new(inner)))
    }

    /// The published versions, as they are now and as they become.
    pub fn book(&self) -> watch::Receiver<Book> {
        self.0.book.subscribe()
    }

    /// The pushes that are not in the [`Book`], as they are now and as they become.
    pub fn traffic(&self) -> watch::Receiver<Traffic> {
        self.0.traffic.subscribe()
    }

    /// Whether a push is on its way.
    pub fn is_receiving(&self) -> bool {
        !self.0.traffic.borrow().staging.is_empty()
    }

    /// Whether [`Weights::forget_before`] would delete anything.
    pub fn has_before(&self, oldest_step: i64, kept: u64) -> bool {
        self.0.book.borrow().has_before(oldest_step, kept)
    }

    /// Deletes the snapshots of versions from before `oldest_step` but the newest `kept`, and those
    /// of pushes that were never published. The facts of all stay. Returns how many were deleted.
    pub async fn forget_before(&self, oldest_step: i64, kept: u64) -> Result<usize> {
        let _alone = self.0.publishing.lock().await;
        if !self
            .0
            .book
            .send_if_modified(|book| book.forget_before(oldest_step, kept))
        {
            return Ok(0);
        }
        let keys = self.0.run.list(publish::SNAPSHOTS).await?;
        let needed = |key: &str| {
            publish::digest_of(key).is_some_and(|digest| self.0.book.borrow().holds(digest))
        };
        let gone: Vec<String> = keys
            .into_iter()
            .map(|(key, _)| key)
            .filter(|key| !needed(key))
            .collect();
        for key in &gone {
            self.0.run.delete(key).await?;
        }
        Ok(gone.len())
    }

    /// Checks that the weights pushed after `step` can still be scored with.
    ///
    /// # Errors
    /// `WeightsMissing`.
    pub fn check_kept(&self, step: u64, chain: &[Began]) -> Result<()> {
        let push = i64::try_from(step).unwrap_or(i64::MAX);
        if !self.0.book.borrow().is_forgotten(push, chain) {
            return Ok(());
        }
        let message = format!(
            "the weights pushed after step {step} are no longer kept; replay instead of choosing \
            anew, go back less far, or keep \
             more (coordinator.snapshots_kept)"
        );
        Err(Error::new(Reason::WeightsMissing, message).with("step", step))
    }

    /// Waits for the publications that are under way; call it when no new push can come.
    pub async fn drain(&self) {
        self.0.tasks.close();
        self.0.tasks.wait().await;
    }
}

impl Inner {
    async fn shape(&self) -> Result<Arc<ModelShape>> {
        let shape = self
            .shape
            .get_or_try_init(|| async { Ok::<_, Error>(Arc::new(self.verifier.shape().await?)) });
        shape.await.cloned()
    }
}

async fn read_fact(run: &Location, key: String) -> Result<publish::Fact> {
    publish::Fact::parse(&run.get(&key).await?, &run.uri_of(&key))
}

fn gauge_newest(book: &Book) {
    // A run without pushes says nothing of the one that pushed last.
    if let Some(newest) = book.newest() {
        metrics::learner_version().set(newest.version.version as f64);
    }
}

fn count_failure(reason: Reason) {
    metrics::weight_push_failures(reason.as_str_name().trim_start_matches("REASON_")).increment(1);
}

/// Whether a fault passes: the trainer sends the push again.
fn passes(error: &Error) -> bool {
    use Reason::{NoWorkers, Overloaded, ShuttingDown, StorageUnreachable};
    matches!(
        error.reason(),
        NoWorkers | Overloaded | ShuttingDown | StorageUnreachable
    )
}
