//! The device's requests and answers.
use super::blocking;
use crate::{
    error::Result,
    worker::{
        inputs::preprocess::Normalisation,
        model::{Compute, ModelFolder, ModelKey, Snapshot, init},
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
    /// The model folder's own.
    Folder,
    /// The service's own initial weights, by seed.
    Random(u64),
}

/// One forward pass of both towers.
#[derive(Debug, Clone)]
pub struct MicroBatch {
    pub model: ModelKey,
    pub rows: usize,
    /// Of an image, in pixels: the model's `image_size`, or less of it by whole patches.
    pub side: usize,
    /// RGB bytes, `[rows, side, side, 3]`.
    pub pixels: Vec<u8>,
    pub normalisation: Normalisation,
    /// `[rows, text_length]`.
    pub ids: Vec<i64>,
    /// What embeddings are rounded to; f16 if unspecified.
    pub dtype: EmbeddingDtype,
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
            Weights::Folder => self.folder.weights_digest.get().cloned(),
            Weights::Random(seed) => Some(init::digest(*seed)),
        })
    }

    /// Returns the reason and the name for errors about these weights.
    pub fn reason_and_name(&self) -> (Reason, String) {
        let uri = &self.folder.uri;
        match &self.weights {
            Weights::Safetensors(_) => (Reason::WeightsRefused, format!("a snapshot for {uri}")),
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
        let files = match weights {
            Weights::Safetensors(file) => vec![file],
            Weights::Folder => folder.weights().await?,
            Weights::Random(seed) => {
                let folder = folder.clone();
                vec![blocking(move || init::random(&folder.config.parameters(), seed)).await??]
            }
        };
        let of = folder.clone();
        let snapshot = blocking(move || of.verify(files))
            .await?
            .map_err(|refusal| refusal.into_error(reason, &name))?;
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
