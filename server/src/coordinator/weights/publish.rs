//! From staged parts to a published version.
use super::{Inner, Published, assemble::assemble, gauge_newest, staging::Staged};
use crate::{
    error::{Error, Result},
    metrics,
    storage::{Created, Location, nonce},
};
use futures::FutureExt;
use object_store::PutPayload;
use serde::{Deserialize, Serialize};
use std::panic::AssertUnwindSafe;
use superbatch_proto::v1::{Reason, WeightsVersion};
use tokio::time::Instant;

/// Published facts, below the run.
pub const PUSHES: &str = "pushes";
/// Weights files by digest, below the run.
pub const SNAPSHOTS: &str = "snapshots";

pub fn snapshot_key(digest: &str) -> String {
    format!("{SNAPSHOTS}/{digest}.safetensors")
}

/// The inverse of [`snapshot_key`].
pub fn digest_of(key: &str) -> Option<&str> {
    key.strip_prefix(SNAPSHOTS)?
        .strip_prefix('/')?
        .strip_suffix(".safetensors")
}

/// A publication, as it is stored. The snapshot's URI follows from the digest, so that state may
/// move.
#[derive(Serialize, Deserialize)]
pub struct Fact {
    pub nonce: String,
    pub push_id: String,
    pub version: u64,
    pub generation: u32,
    pub step: i64,
    pub digest: String,
    pub logit_scale: f64,
    pub logit_bias: Option<f64>,
}

impl Fact {
    pub fn parse(bytes: &[u8], uri: &str) -> Result<Self> {
        serde_json::from_slice(bytes)
            .map_err(|e| Error::internal(format!("{uri} is no fact of a push")).because(e))
    }

    pub fn published(&self, run: &Location) -> Published {
        let (version, step, generation, digest) = (
            self.version,
            self.step,
            self.generation,
            self.digest.clone(),
        );
        Published {
            snapshot_uri: run.uri_of(&snapshot_key(&digest)),
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

/// A push that is whole.
pub struct Whole {
    pub generation: u32,
    pub step: i64,
    pub push_id: String,
    pub staged: Staged,
    pub started: Instant,
}

impl Inner {
    /// Publishes a whole push; never panics, so that its streams always get an answer.
    pub async fn publish(&self, whole: Whole) -> Result<WeightsVersion> {
        let (started, step) = (whole.started, whole.step);
        let publishing = AssertUnwindSafe(self.try_publish(whole))
            .catch_unwind()
            .await;
        let version = publishing
            .unwrap_or_else(|_| Err(Error::internal("publishing the weights panicked")))?;
        metrics::weight_push_duration().record(started.elapsed().as_secs_f64());
        tracing::info!(
            step,
            version = version.version,
            digest = version.digest,
            "weights published"
        );
        Ok(version)
    }

    async fn try_publish(&self, whole: Whole) -> Result<WeightsVersion> {
        let Whole {
            generation,
            step,
            push_id,
            staged,
            ..
        } = whole;
        let joined = tokio::task::spawn_blocking(move || assemble(staged)).await;
        let snapshot =
            joined.map_err(|e| Error::internal("joining the weights failed").because(e))??;
        let _alone = self.publishing.lock().await;
        let key = snapshot_key(&snapshot.digest);
        self.run
            .put_pieces(&key, PutPayload::from_iter(snapshot.pieces))
            .await?;
        let verified = self
            .verifier
            .verify(&self.run.uri_of(&key), &snapshot.digest)
            .await;
        if verified.is_err() && !self.book.borrow().holds(&snapshot.digest) {
            // Best effort: what stays behind goes with the next `forget`.
            drop(self.run.delete(&key).await);
        }
        let shape = verified?;
        let fact = Fact {
            nonce: nonce(),
            push_id,
            version: self.book.borrow().next_version(),
            generation,
            step,
            digest: snapshot.digest,
            logit_scale: shape.logit_scale,
            logit_bias: shape.logit_bias,
        };
        self.announce(fact).await
    }

    /// Creates the fact that makes a snapshot a version.
    ///
    /// # Errors
    /// `PushConflict` where another push of this step was first.
    async fn announce(&self, fact: Fact) -> Result<WeightsVersion> {
        let key = format!("{PUSHES}/{}/{}.json", fact.generation, fact.step);
        let bytes = serde_json::to_vec(&fact)
            .map_err(|e| Error::internal("cannot write a fact").because(e))?;
        let fact = match self.run.create(&key, bytes.into()).await? {
            Created::Ours => fact,
            Created::Theirs(bytes) => {
                let theirs = Fact::parse(&bytes, &self.run.uri_of(&key))?;
                if theirs.push_id != fact.push_id {
                    return Err(conflict(fact.step, &theirs.push_id));
                }
                theirs
            }
        };
        let published = fact.published(&self.run);
        let version = published.version.clone();
        self.book
            .send_modify(|book| book.insert(fact.push_id, published, true));
        gauge_newest(&self.book.borrow());
        Ok(version)
    }
}

/// Another push of the step exists.
pub fn conflict(step: i64, push_id: &str) -> Error {
    let message = format!(
        "step {step} has another push, {push_id:?}; push each step once, under one push_id for \
        all ranks"
    );
    Error::new(Reason::PushConflict, message).with("push_id", push_id)
}
