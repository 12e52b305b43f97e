//! Publishes staged parts as a version.
use super::{
    Inner, ModelShape, Published, ahead::Layout, assemble::join, book::Snapshot, gauge_newest,
    snapshots, staging::Staged,
};
use crate::{
    error::{Error, Result},
    metrics,
    pushed::Pushed,
    storage::{Created, Draft, Location, nonce},
};
use futures::FutureExt;
use object_store::PutPayload;
use serde::{Deserialize, Serialize};
use std::{panic::AssertUnwindSafe, time::Duration};
use superbatch_proto::v1::{Reason, WeightsVersion};
use tokio::time::{Instant, timeout};

/// How long a push that failed waits for the deletion of its upload.
const DISCARDED_WITHIN: Duration = Duration::from_secs(5);

/// Folder of the published facts, below the run.
pub(super) const PUSHES: &str = "pushes";

/// A publication as it is stored. It holds keys and no URI, so that the state can be moved.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Fact {
    pub nonce: String,
    pub push_id: String,
    pub version: u64,
    pub generation: u32,
    pub step: i64,
    pub digest: String,
    /// Key of the weights file, below the run. Empty in facts of earlier versions of this program.
    #[serde(default)]
    pub snapshot: String,
    pub logit_scale: f64,
    pub logit_bias: Option<f64>,
}

impl Fact {
    pub fn parse(bytes: &[u8], uri: &str) -> Result<Self> {
        serde_json::from_slice(bytes)
            .map_err(|e| Error::internal(format!("{uri} is no fact of a push")).because(e))
    }

    pub fn key(&self) -> String {
        Self::key_of(self.generation, self.step)
    }

    /// Returns the key of the push after `step`.
    pub(super) fn key_of(generation: u32, step: i64) -> String {
        format!("{PUSHES}/{generation}/{step}.json")
    }

    pub fn snapshot_key(&self) -> String {
        match self.snapshot.as_str() {
            "" => snapshots::shared_key(&self.digest),
            key => key.to_owned(),
        }
    }

    /// Returns the version, whose weights are at `snapshot`.
    pub fn published(&self, run: &Location, snapshot: &str) -> Published {
        let (version, step, generation, digest) = (
            self.version,
            self.step,
            self.generation,
            self.digest.clone(),
        );
        Published {
            snapshot_uri: run.uri_of(snapshot),
            version: WeightsVersion {
                version,
                step,
                generation,
                digest,
            },
            logit_scale: self.logit_scale,
            logit_bias: self.logit_bias,
        }
    }
}

/// A push whose parts are all here.
pub struct Whole {
    pub generation: u32,
    pub step: i64,
    pub push_id: String,
    pub base: Option<u64>,
    pub staged: Staged,
    pub started: Instant,
}

impl Inner {
    /// Publishes a whole push. A panic inside becomes an error, so that its streams always get an
    /// answer.
    pub async fn publish(&self, whole: Whole) -> Result<WeightsVersion> {
        let (started, step) = (whole.started, whole.step);
        let publishing = AssertUnwindSafe(self.try_publish(whole))
            .catch_unwind()
            .await;
        let version = publishing
            .unwrap_or_else(|_| Err(Error::internal("publishing the weights panicked")))?;
        metrics::weight_push_duration().record(started.elapsed().as_secs_f64());
        self.summarise_if_due();
        tracing::info!(
            step,
            version = version.version,
            digest = version.digest,
            "weights published"
        );
        Ok(version)
    }

    /// Begins to write a summary of all publications, if that is due.
    pub(super) fn summarise_if_due(&self) {
        let count = self.book.borrow().count();
        if self.summaries.is_due(count) {
            let summaries = self.summaries.clone();
            self.tasks.spawn(async move { summaries.write().await });
        }
    }

    async fn try_publish(&self, whole: Whole) -> Result<WeightsVersion> {
        let Whole {
            generation,
            step,
            push_id,
            base,
            mut staged,
            ..
        } = whole;
        if let Some(base) = base {
            self.fill(&mut staged, base).await?;
        }
        let written = match staged.ahead.take() {
            Some(ahead) => ahead.finish().await,
            None => None,
        };
        let known = written.as_ref().map(|written| written.known.clone());
        let joined = tokio::task::spawn_blocking(move || join(staged, known)).await;
        let pushed =
            joined.map_err(|e| Error::internal("joining the weights failed").because(e))??;
        let (layout, digest) = (Layout::of(&pushed), pushed.digest.clone());
        let written = written.filter(|written| written.known.digest == digest);
        let draft = written.map(|written| written.draft);
        let key = snapshots::new_key(&digest);
        let shape = self.verified(&key, pushed, draft).await?;
        self.expect(layout);
        // Held only while the fact is created: two pushes must not take the same version number,
        // and numbers must rise in the order of the facts. The upload and the check are done by
        // now, so a commit that looks for weights to delete never waits for them.
        let _alone = self.publishing.lock().await;
        let fact = Fact {
            nonce: nonce(),
            push_id,
            version: self.book.borrow().next_version(),
            generation,
            step,
            digest,
            snapshot: key,
            logit_scale: shape.logit_scale,
            logit_bias: shape.logit_bias,
        };
        self.announce(fact).await
    }

    /// Uploads the weights and has a worker check them. Both are done when it returns.
    async fn verified(
        &self,
        key: &str,
        pushed: Pushed,
        draft: Option<Draft>,
    ) -> Result<ModelShape> {
        // One at a time: a worker has room on its device for one model more than it serves with.
        let _alone = self.verifying.lock().await;
        let (uri, digest) = (self.run.uri_of(key), pushed.digest.clone());
        let pieces = PutPayload::from_iter(pushed.pieces());
        // The upload waits for the disk or the network, and the check for the processor or a
        // device. A worker in another process has to wait for the upload's end.
        let (put, checked) = tokio::join!(
            self.put(key, pieces, draft),
            self.verifier.verify_in_memory(&uri, pushed),
        );
        if let Err(error) = put {
            // It may have arrived all the same, and the push sends its weights under another key.
            // The store has just failed, and the next push waits: what stays is found later.
            drop(timeout(DISCARDED_WITHIN, self.discard(key)).await);
            return Err(error);
        }
        let verified = match checked {
            Ok(Some(shape)) => Ok(shape),
            Err(error) if !error.reason().is_transient() => Err(error),
            Ok(None) | Err(_) => self.verifier.verify(&uri, &digest).await,
        };
        if verified.is_err() {
            self.discard(key).await;
        }
        verified
    }

    /// Puts the weights at `key`: by naming their draft, or by writing them.
    async fn put(&self, key: &str, pieces: PutPayload, draft: Option<Draft>) -> Result<()> {
        if let Some(draft) = draft {
            match draft.name(&self.run, key).await {
                Ok(()) => return Ok(()),
                Err(error) => tracing::warn!(
                    key,
                    error = error.chain(),
                    "weights that were written as they arrived are written again"
                ),
            }
        }
        self.run.put_pieces(key, pieces).await
    }

    /// Deletes an upload that belongs to no version. A failure is only logged: the file is found
    /// when the run is opened the next time.
    async fn discard(&self, key: &str) {
        if let Err(error) = self.run.delete(key).await {
            tracing::debug!(
                key,
                error = error.chain(),
                "an unused snapshot stays for now"
            );
        }
    }

    /// Creates the fact that makes a snapshot a version. If the push was published before and its
    /// snapshot is lost, this upload replaces it.
    ///
    /// # Errors
    /// `PushConflict` if another push of this step was first.
    async fn announce(&self, fact: Fact) -> Result<WeightsVersion> {
        let (ours, digest) = (fact.snapshot.clone(), fact.digest.clone());
        let key = fact.key();
        let bytes = serde_json::to_vec(&fact)
            .map_err(|e| Error::internal("cannot write a fact").because(e))?;
        let (fact, snapshot) = match self.run.create(&key, bytes.into()).await? {
            Created::Ours => (fact, Snapshot::Kept(ours)),
            Created::Theirs(bytes) => {
                let theirs = Fact::parse(&bytes, &self.run.uri_of(&key))?;
                if theirs.push_id != fact.push_id {
                    self.discard(&ours).await;
                    return Err(conflict(fact.step, &theirs.push_id));
                }
                // The same push was published before, perhaps by another coordinator. Its fact is
                // in force; this upload is a copy. The copy is kept only if the first file is lost
                // and the bytes are the same.
                let known = theirs.snapshot_key();
                let snapshot = match self.run.head(&known).await?.is_some() {
                    true => Snapshot::Kept(known),
                    false if theirs.digest == digest => Snapshot::Kept(ours.clone()),
                    false => Snapshot::Missing,
                };
                if snapshot != Snapshot::Kept(ours.clone()) {
                    self.discard(&ours).await;
                }
                (theirs, snapshot)
            }
        };
        let at = match &snapshot {
            Snapshot::Kept(key) => key.clone(),
            Snapshot::Retired | Snapshot::Missing => fact.snapshot_key(),
        };
        let published = fact.published(&self.run, &at);
        let version = published.version.clone();
        self.book
            .send_modify(|book| book.insert(fact.push_id, published, snapshot));
        gauge_newest(&self.book.borrow());
        Ok(version)
    }
}

/// Returns the error if another push of the step exists.
pub(super) fn conflict(step: i64, push_id: &str) -> Error {
    let message = format!(
        "step {step} has another push, {push_id:?}; push each step once, under one push_id for \
        all ranks"
    );
    Error::new(Reason::PushConflict, message).with("push_id", push_id)
}
