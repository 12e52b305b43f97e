//! Learner weights: parts from one or several ranks are staged, verified and published, and later
//! found by the lag.
//!
//! A push is staged in memory ([`staging`]), joined into one safetensors file ([`assemble`]), put
//! at `snapshots/{blake3}.{nonce}.safetensors`, loaded by a worker ([`Verifier`]; that of the same
//! process takes it from memory while it is uploaded), and published by creating the fact
//! `pushes/{generation}/{step}.json`. Until that fact exists the push is invisible, and the old
//! version stays in use. A crash at any point before leaves only a file that no version names. On a
//! local disk the file is written while its parts arrive ([`ahead`]), without a name.
mod admission;
mod ahead;
mod announced;
pub(crate) mod assemble;
mod base;
mod book;
pub(crate) mod by_uri;
mod file;
mod history;
pub mod inherit;
mod lag;
mod look;
pub mod member;
mod missing;
mod names;
mod part;
mod publish;
mod push;
mod snapshots;
pub(crate) mod staging;
pub mod stored;
mod streams;
#[cfg(test)]
mod tests;

use crate::{
    coordinator::facts::{chain::Began, owner::Ownership},
    error::{Error, Result},
    metrics,
    pushed::Pushed,
    storage::Location,
};
pub use announced::Announced;
use async_trait::async_trait;
pub use book::Book;
pub use book::Published;
pub(crate) use book::Snapshot;
pub(crate) use file::TensorFile;
pub use lag::Due;
pub use lag::due;
pub use lag::on_cadence;
pub use look::Asleep;
pub use missing::missing;
pub use publish::Fact;
pub use snapshots::digest_of;
use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, Mutex},
    time::{Duration, SystemTime},
};
use superbatch_proto::v1::{Lag, Reason};
use tokio::sync::{OnceCell, watch};
use tokio_util::task::TaskTracker;

/// The names and shapes of the learner's weights.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelShape {
    /// Shapes by name. A push must have exactly these tensors.
    pub tensors: BTreeMap<String, Vec<u64>>,
    /// Names of the tensors that a push may leave out.
    pub optional: BTreeSet<String>,
    /// The logit scale, exp applied.
    pub logit_scale: f64,
    pub logit_bias: Option<f64>,
}

/// Verifies weights by loading them on a worker.
#[async_trait]
pub trait Verifier: Send + Sync {
    /// Loads a snapshot and runs a canary batch. `digest` is the BLAKE3 of the file, in hex.
    ///
    /// # Errors
    /// `WeightsRefused`, with `tensor` if one is at fault; other reasons if no worker could load
    /// them.
    async fn verify(&self, snapshot_uri: &str, digest: &str) -> Result<ModelShape>;

    /// As [`Verifier::verify`], without reading the snapshot: the worker of this process takes it
    /// from memory. So its upload need not be done. `None` if this process has no worker.
    ///
    /// # Errors
    /// As [`Verifier::verify`].
    async fn verify_in_memory(&self, uri: &str, pushed: Pushed) -> Result<Option<ModelShape>>;

    /// Returns the shape of the learner, from its model folder.
    async fn shape(&self) -> Result<ModelShape>;
}

/// The settings of a run's weights, from its spec and the config.
#[derive(Debug, Clone)]
pub struct RunWeights {
    /// For the log.
    pub run_id: String,
    pub lag: Lag,
    pub push_every_steps: u32,
    /// Whether the trainer pushes its initial weights, as step -1.
    pub first_push: bool,
    /// The initial learner (version 0, step -1), unless the trainer pushes it.
    pub initial: Option<Published>,
    /// Largest push, in bytes: it is held in memory until it is whole.
    pub push_bytes_max: u64,
    /// How long a rank's ended stream waits for the others, and how long a stream may be silent.
    pub push_deadline: Duration,
    /// Asked before a summary is deleted, and when it became the owner.
    pub owner: Option<Ownership>,
}

/// Pushes that are not published, by (generation, step).
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Traffic {
    /// Announced by a rank, and neither published nor refused.
    pub announced: Announced,
    /// Being staged or verified. A push leaves this set only after it has entered the [`Book`] or
    /// `refused`: a step that waits for it must always see it in one of them, else it would take
    /// the run for stalled.
    pub staging: BTreeSet<(u32, i64)>,
    /// Why each push was refused, until it is sent again.
    pub refused: BTreeMap<(u32, i64), String>,
    /// Why each push failed last, for a cause that may pass: the client sends it again.
    pub failed: BTreeMap<(u32, i64), String>,
}

/// The weights of one run. Cheap to clone.
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
    /// What the next push is expected to be like: the last one.
    layout: Mutex<Option<Arc<ahead::Layout>>>,
    summaries: history::Summaries,
    /// Keys of snapshots that are retired and not deleted yet: deleting may fail, and it ends when
    /// the call that does it is dropped.
    retired: watch::Sender<BTreeSet<String>>,
    /// Held during an upload and its check, one at a time.
    verifying: tokio::sync::Mutex<()>,
    /// Held while the digests of a version's tensors are computed, one version at a time.
    reading: tokio::sync::Mutex<()>,
    /// Held while a version is made public, one at a time. It is a lock of its own, so that nothing
    /// waits here for an upload.
    publishing: tokio::sync::Mutex<()>,
    tasks: TaskTracker,
}

impl Weights {
    /// Opens the weights of the run at `run`, with all published versions.
    ///
    /// # Errors
    /// `StorageUnreachable`; `Internal` if a fact cannot be read.
    pub async fn open(
        run: Location,
        spec: RunWeights,
        verifier: Arc<dyn Verifier>,
    ) -> Result<Self> {
        let history = history::read(&run).await?;
        let (mut book, listed) = book_of(&run, &history.facts).await?;
        if let Some(initial) = spec.initial.clone() {
            book.set_initial(initial);
        }
        let orphans = match now(&spec).await {
            Some(now) => listed.orphans(&book, now),
            None => Vec::new(),
        };
        gauge_newest(&book);
        let inner = Inner {
            summaries: history::Summaries::new(run.clone(), spec.owner.clone(), history.summarised),
            run,
            spec,
            verifier,
            shape: OnceCell::new(),
            book: watch::Sender::new(book),
            staging: Mutex::default(),
            traffic: watch::Sender::default(),
            layout: Mutex::default(),
            retired: watch::Sender::default(),
            verifying: tokio::sync::Mutex::default(),
            publishing: tokio::sync::Mutex::default(),
            reading: tokio::sync::Mutex::default(),
            tasks: TaskTracker::new(),
        };
        let weights = Self(Arc::new(inner));
        weights.0.summarise_if_due();
        if let Err(error) = weights.delete(&orphans).await {
            tracing::debug!(error = error.chain(), "unused snapshots stay for now");
        }
        weights.0.run.sweep_drafts(snapshots::SNAPSHOTS).await;
        Ok(weights)
    }

    /// Returns the published versions, now and as they change.
    pub fn book(&self) -> watch::Receiver<Book> {
        self.0.book.subscribe()
    }

    /// Returns the pushes that are not in the [`Book`], now and as they change.
    pub fn traffic(&self) -> watch::Receiver<Traffic> {
        self.0.traffic.subscribe()
    }

    /// Returns whether a push is under way.
    pub fn is_receiving(&self) -> bool {
        !self.0.traffic.borrow().staging.is_empty()
    }

    /// Returns whether [`Weights::retire_before`] would return anything.
    pub fn has_before(&self, oldest_step: i64, kept: u64, pinned: &[i64]) -> bool {
        let book = self.0.book.borrow();
        !self.0.retired.borrow().is_empty() || book.has_before(oldest_step, kept, pinned)
    }

    /// Retires versions from before `oldest_step`, except the newest `kept` and those of the steps
    /// that are `pinned`: no step is scored with them from now on. Returns the keys of their
    /// snapshots, for [`Weights::delete`], and of those that were retired before and are not
    /// deleted yet.
    pub fn retire_before(&self, oldest_step: i64, kept: u64, pinned: &[i64]) -> Vec<String> {
        let mut keys = Vec::new();
        self.0.book.send_if_modified(|book| {
            keys = book.forget_before(oldest_step, kept, pinned);
            !keys.is_empty()
        });
        self.0.retired.send_modify(|retired| retired.extend(keys));
        self.0.retired.borrow().iter().cloned().collect()
    }

    /// Deletes the snapshots that this book has retired, by their keys, and nothing else. Deleting
    /// by a rule ("all but the newest") would be wrong: another coordinator may own the run by now
    /// and have published versions that this book does not know. The facts of all versions stay.
    ///
    /// # Errors
    /// `StorageUnreachable`. Files that stay behind are deleted with the next ones.
    pub async fn delete(&self, keys: &[String]) -> Result<()> {
        for key in keys {
            if let Err(error) = self.0.run.delete(key).await {
                // Another call may have deleted it, or one that was dropped before it knew.
                let is_gone = matches!(self.0.run.head(key).await, Ok(None));
                if !is_gone {
                    return Err(error);
                }
            }
            self.0
                .retired
                .send_modify(|retired| _ = retired.remove(key));
        }
        Ok(())
    }

    /// Checks that the weights pushed after `step` are still kept.
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

    /// Checks that the weights pushed after `step` can be a reference: they are there and serve, or
    /// come yet. `is_past` if no push of this step can come, since it is another run's.
    ///
    /// # Errors
    /// `WeightsMissing`.
    pub fn check_reference(&self, step: u64, chain: &[Began], is_past: bool) -> Result<()> {
        let push = i64::try_from(step).unwrap_or(i64::MAX);
        let book = self.0.book.borrow();
        let problem = match book.push_of(push, chain) {
            Some(own) if book.in_force(own) != own => "were rolled back",
            Some(own) if book.kept(own).is_none() => "are not kept",
            None if is_past => "are not kept",
            _ => return Ok(()),
        };
        let message = format!(
            "the weights pushed after step {step} cannot be a reference (reference_step): they \
            {problem}; name a step whose weights are kept (`superbatch weights RUN list`), and \
            rewind into a phase with this reference only to replay it"
        );
        Err(Error::new(Reason::WeightsMissing, message).with("step", step))
    }

    /// Returns the number of roll-backs so far.
    pub fn rollbacks(&self) -> usize {
        self.0.book.borrow().rollbacks()
    }

    /// Returns whether a version was taken back since there were `seen` roll-backs.
    pub fn is_taken_back_since(&self, seen: usize, version: u64) -> bool {
        self.0.book.borrow().is_taken_back_since(seen, version)
    }

    /// Waits for the publications that are under way. To be called when no new push can arrive.
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

/// Returns the time by which the age of weights is judged. They carry the store's time, and the
/// clock of this machine may be days ahead of it: an upload that is under way would look old. So it
/// is the time at which the store took this process for the owner. `None` if the store does not
/// say.
async fn now(spec: &RunWeights) -> Option<SystemTime> {
    match &spec.owner {
        Some(owner) => owner.claimed_at().await,
        None => Some(SystemTime::now()),
    }
}

/// Makes the book of the publications `facts` of the run at `run`: lists the snapshots, and reads
/// the roll-backs.
///
/// The snapshots are listed after the facts were read, since a version's file exists before its
/// fact. In the other order a version that is published in between would look as if its file were
/// lost.
async fn book_of(run: &Location, facts: &[Fact]) -> Result<(Book, snapshots::Listed)> {
    let mut book = Book::default();
    let listed = snapshots::Listed::read(run).await?;
    for fact in facts {
        let (key, snapshot) = match listed.find(fact) {
            Some(key) => (key.clone(), Snapshot::Kept(key)),
            None => (fact.snapshot_key(), Snapshot::Missing),
        };
        book.insert(fact.push_id.clone(), fact.published(run, &key), snapshot);
    }
    let rollbacks = look::rollbacks(run).await?;
    rollbacks.into_iter().for_each(|back| book.roll_back(back));
    Ok((book, listed))
}

fn gauge_newest(book: &Book) {
    // A run without pushes must not reset the gauge, which shows the run that pushed last.
    if let Some(newest) = book.newest() {
        metrics::learner_version().set(newest.version.version as f64);
    }
}

fn count_failure(reason: Reason) {
    metrics::weight_push_failures(reason.as_str_name().trim_start_matches("REASON_")).increment(1);
}
