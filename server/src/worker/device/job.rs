//! The device's requests and answers.
use super::blocking;
use crate::{
    error::Result,
    fidelity::Fidelity,
    pushed::Pushed,
    worker::model::{
        Compute, Images, ModelFolder, ModelKey, Normalisation, Snapshot,
        exported::no_random_weights, init,
    },
};
use bytes::Bytes;
use std::sync::Arc;
use superbatch_proto::v1::{EmbeddingDtype, Reason};

/// Checked weights on their way to the device.
pub struct Source {
    pub folder: Arc<ModelFolder>,
    pub snapshot: Snapshot,
    pub weights_digest: String,
    /// The name and the reason of errors about the weights.
    pub name: String,
    pub reason: Reason,
}

/// The origin of a model's weights.
#[derive(Debug, Clone)]
pub enum Weights {
    /// One safetensors file.
    Safetensors(Bytes),
    /// The weights of a push, from the coordinator of this process.
    Pushed(Pushed),
    /// The model folder's own.
    Folder,
    /// The service's own initial weights, by seed.
    Random(u64),
}

/// One forward pass of both towers.
#[derive(Debug, Clone)]
pub struct MicroBatch {
    pub model: ModelKey,
    pub fidelity: Fidelity,
    /// A number for each row that is the same wherever its image is embedded; it decides which
    /// patches are left out.
    pub keys: Vec<u64>,
    /// RGB bytes, as [`Images::pixels`].
    pub pixels: Vec<u8>,
    /// As [`Images::grids`].
    pub grids: Vec<[u32; 2]>,
    pub normalisation: Normalisation,
    /// `[rows, text_length]`.
    pub ids: Vec<i64>,
    /// What embeddings are rounded to; f16 if unspecified.
    pub dtype: EmbeddingDtype,
}

impl MicroBatch {
    pub fn rows(&self) -> usize {
        self.keys.len()
    }

    pub(super) fn images(&self) -> Images<'_> {
        Images {
            pixels: &self.pixels,
            keys: &self.keys,
            grids: &self.grids,
        }
    }
}

/// L2-normalised embeddings `[rows, dim]`, rounded to the request's dtype, little endian.
#[derive(Debug)]
pub struct Embedded {
    pub image: Bytes,
    pub text: Bytes,
    pub dim: usize,
    /// Tokens of each caption that were embedded, padding included.
    pub text_length: usize,
    /// On the device's thread, transfers included.
    pub seconds: f64,
    /// Rows whose image or text embedding is NaN or infinite; they are zero in both.
    pub not_finite: Vec<u32>,
}

/// A model to have on the device.
#[derive(Debug, Clone)]
pub struct LoadModel {
    pub folder: Arc<ModelFolder>,
    pub weights: Weights,
    pub compute: Compute,
    /// Embed a canary batch, and refuse the model if an embedding is not finite.
    pub canary: bool,
}

impl LoadModel {
    /// Returns the weights' digest, if it is known without reading them.
    pub async fn weights_digest(&self) -> Result<Option<String>> {
        Ok(match &self.weights {
            Weights::Safetensors(file) => {
                let file = file.clone();
                Some(blocking(move || blake3::hash(&file).to_hex().to_string()).await?)
            }
            Weights::Pushed(pushed) => Some(pushed.digest.clone()),
            Weights::Folder => self.folder.weights_digest.get().cloned(),
            Weights::Random(seed) => Some(init::digest(*seed)),
        })
    }

    /// Returns the reason and the name for errors about these weights.
    pub fn reason_and_name(&self) -> (Reason, String) {
        let uri = &self.folder.uri;
        match &self.weights {
            Weights::Safetensors(_) | Weights::Pushed(_) => {
                (Reason::WeightsRefused, format!("a snapshot for {uri}"))
            }
            Weights::Folder => (Reason::ModelInvalid, uri.clone()),
            Weights::Random(seed) => (Reason::WeightsRefused, format!("{uri} from seed {seed}")),
        }
    }

    /// Reads or draws the weights, and checks them.
    pub async fn read(self, known: Option<String>) -> Result<Source> {
        let (reason, name) = self.reason_and_name();
        let Self {
            folder, weights, ..
        } = self;
        let is_folder = matches!(weights, Weights::Folder);
        let of = folder.clone();
        let checked = match weights {
            Weights::Pushed(pushed) => {
                blocking(move || of.checked(Snapshot::of_pushed(pushed))).await
            }
            Weights::Safetensors(file) => blocking(move || of.verify(vec![file])).await,
            Weights::Folder => {
                let files = folder.weights().await?;
                blocking(move || of.verify(files)).await
            }
            Weights::Random(_) if folder.config.exported.is_some() => {
                return Err(no_random_weights(&folder.uri));
            }
            Weights::Random(seed) => {
                let drawn = move || {
                    let file = init::random(&of.config.parameters(), seed)?;
                    Ok(of.verify(vec![file]))
                };
                blocking(drawn).await?
            }
        };
        let snapshot = checked?.map_err(|refusal| refusal.into_error(reason, &name))?;
        // The folder's weights may have been replaced since its digest was taken. The digest of the
        // bytes just read is the true one; a stale one would put the wrong model into receipts and
        // the sidecar.
        let weights_digest = known
            .filter(|_| !is_folder)
            .unwrap_or_else(|| snapshot.digest().to_owned());
        if is_folder {
            // Fails if another caller has loaded the folder at the same time and set it first.
            let _ = folder.weights_digest.set(weights_digest.clone());
        }
        Ok(Source {
            folder,
            snapshot,
            weights_digest,
            name,
            reason,
        })
    }
}
