//! A Hugging Face model folder in object storage.
use super::{
    config::ModelConfig,
    snapshot::{Refusal, Snapshot},
};
use crate::{
    error::{Error, Result},
    storage::Location,
};
use bytes::Bytes;
use object_store::ObjectStoreExt;
use serde::Deserialize;
use std::collections::{BTreeMap, BTreeSet};
use superbatch_proto::v1::Reason;
use tokio::sync::OnceCell;

const WEIGHTS: &str = "model.safetensors";
const WEIGHTS_INDEX: &str = "model.safetensors.index.json";
/// Configuration, vocabulary and index files.
const JSON_BYTES_MAX: u64 = 128 << 20;
/// One file of weights.
const WEIGHTS_BYTES_MAX: u64 = 64 << 30;

/// A folder's small files; its weights are read when they are asked for.
#[derive(Debug)]
pub struct ModelFolder {
    pub uri: String,
    pub config: ModelConfig,
    pub config_json: Bytes,
    pub preprocessor_json: Bytes,
    pub tokenizer_json: Bytes,
    location: Location,
    /// Known once the weights have been read; spares reading them again to find out that they are
    /// loaded.
    pub(crate) weights_digest: OnceCell<String>,
}

impl ModelFolder {
    /// Reads `config.json`, `preprocessor_config.json` and `tokenizer.json`.
    ///
    /// # Errors
    /// `ModelInvalid` naming the `file` that is missing or the `field` that is not supported;
    /// `StorageUnreachable`.
    pub async fn fetch(location: &Location) -> Result<Self> {
        let read = |file| need(location, file, JSON_BYTES_MAX);
        let config_json = read("config.json").await?;
        let config = ModelConfig::parse(&config_json).map_err(|e| e.with("uri", location.uri()))?;
        let (preprocessor_json, tokenizer_json) =
            tokio::try_join!(read("preprocessor_config.json"), read("tokenizer.json"))?;
        Ok(Self {
            uri: location.uri().to_owned(),
            config,
            config_json,
            preprocessor_json,
            tokenizer_json,
            location: location.clone(),
            weights_digest: OnceCell::new(),
        })
    }

    /// Reads `model.safetensors`, or all shards that `model.safetensors.index.json` names.
    ///
    /// # Errors
    /// `ModelInvalid` naming the `file`; `StorageUnreachable`.
    pub async fn weights(&self) -> Result<Vec<Bytes>> {
        if let Some(file) = find(&self.location, WEIGHTS, WEIGHTS_BYTES_MAX).await? {
            return Ok(vec![file]);
        }
        let Some(index) = find(&self.location, WEIGHTS_INDEX, JSON_BYTES_MAX).await? else {
            return Err(missing(
                &self.location,
                WEIGHTS,
                " (nor an index of shards); weights are never read from pickles",
            ));
        };
        let mut files = Vec::new();
        for shard in shards(&index).map_err(|e| e.with("uri", &self.uri))? {
            files.push(need(&self.location, &shard, WEIGHTS_BYTES_MAX).await?);
        }
        Ok(files)
    }

    /// BLAKE3 over configuration, preprocessing, tokenizer and weights, in hex: names the model in
    /// receipts.
    pub fn digest(&self, weights_digest: &str) -> String {
        let mut hasher = blake3::Hasher::new();
        for (_, file) in self.small_files() {
            hasher.update(blake3::hash(file).as_bytes());
        }
        hasher
            .update(weights_digest.as_bytes())
            .finalize()
            .to_hex()
            .to_string()
    }

    /// BLAKE3 of each file but the weights, in hex.
    pub fn file_digests(&self) -> BTreeMap<String, String> {
        self.small_files()
            .map(|(name, file)| (name.to_owned(), blake3::hash(file).to_hex().to_string()))
            .into()
    }

    fn small_files(&self) -> [(&'static str, &Bytes); 3] {
        [
            ("config.json", &self.config_json),
            ("preprocessor_config.json", &self.preprocessor_json),
            ("tokenizer.json", &self.tokenizer_json),
        ]
    }

    /// Reads weights' headers and checks them against the model. CPU work of a second or so a
    /// gigabyte.
    pub(crate) fn verify(&self, files: Vec<Bytes>) -> Result<Snapshot, Refusal> {
        let snapshot = Snapshot::parse(files)?;
        snapshot.check(&self.config.parameters())?;
        Ok(snapshot)
    }
}

#[derive(Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}

/// The files that an index of shards names, each once, in order of name.
fn shards(index: &[u8]) -> Result<BTreeSet<String>> {
    let invalid =
        |message: String| Error::new(Reason::ModelInvalid, message).with("file", WEIGHTS_INDEX);
    let index: Index = serde_json::from_slice(index)
        .map_err(|e| invalid(format!("{WEIGHTS_INDEX} has no usable weight_map")).because(e))?;
    let shards: BTreeSet<String> = index.weight_map.into_values().collect();
    match shards
        .iter()
        .find(|shard| shard.contains(['/', '\\']) || !shard.ends_with(".safetensors"))
    {
        Some(shard) => Err(invalid(format!(
            "{WEIGHTS_INDEX} names '{shard}', which is no safetensors file of the folder"
        ))),
        None => Ok(shards),
    }
}

async fn need(location: &Location, file: &str, bytes_max: u64) -> Result<Bytes> {
    find(location, file, bytes_max)
        .await?
        .ok_or_else(|| missing(location, file, ""))
}

fn missing(location: &Location, file: &str, more: &str) -> Error {
    let message = format!("model folder {} has no {file}{more}", location.uri());
    Error::new(Reason::ModelInvalid, message)
        .with("file", file)
        .with("uri", location.uri())
}

/// Reads a file whole once its size is known to be acceptable; `None` where there is none.
async fn find(location: &Location, file: &str, bytes_max: u64) -> Result<Option<Bytes>> {
    let found = match location.store().get(&location.path(file)).await {
        Ok(found) => found,
        Err(object_store::Error::NotFound { .. }) => return Ok(None),
        Err(cause) => return Err(location.error("read", file, cause)),
    };
    if found.meta.size > bytes_max {
        let message = format!(
            "{} has {} bytes, over the limit of {bytes_max}",
            location.uri_of(file),
            found.meta.size
        );
        return Err(Error::new(Reason::ModelInvalid, message)
            .with("file", file)
            .with("uri", location.uri()));
    }
    found
        .bytes()
        .await
        .map(Some)
        .map_err(|cause| location.error("read", file, cause))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::{StorageConfig, Stores};

    async fn folder(files: &[(&str, &str)]) -> Location {
        let location = Stores::new(StorageConfig::default())
            .open("memory:///model")
            .unwrap();
        for (file, content) in files {
            location
                .put(file, Bytes::copy_from_slice(content.as_bytes()))
                .await
                .unwrap();
        }
        location
    }

    const CONFIG: (&str, &str) = ("config.json", r#"{"model_type": "clip"}"#);

    #[tokio::test]
    async fn a_missing_file_is_named() {
        let small = [
            CONFIG,
            ("preprocessor_config.json", "{}"),
            ("tokenizer.json", "{}"),
        ];
        for missing in 0..small.len() {
            let files: Vec<_> = small
                .iter()
                .enumerate()
                .filter(|(i, _)| *i != missing)
                .map(|(_, file)| *file)
                .collect();
            let error = ModelFolder::fetch(&folder(&files).await).await.unwrap_err();
            assert_eq!(
                (error.reason(), error.value("file")),
                (Reason::ModelInvalid, Some(small[missing].0))
            );
        }
        let whole = ModelFolder::fetch(&folder(&small).await).await.unwrap();
        let error = whole.weights().await.unwrap_err();
        assert_eq!(
            (error.reason(), error.value("file")),
            (Reason::ModelInvalid, Some(WEIGHTS))
        );
    }

    #[tokio::test]
    async fn an_index_stays_inside_its_folder() {
        for (index, file) in [
            (
                r#"{"weight_map": {"a": "../b.safetensors"}}"#,
                WEIGHTS_INDEX,
            ),
            (r#"{"weight_map": {"a": "b.bin"}}"#, WEIGHTS_INDEX),
            (r#"{}"#, WEIGHTS_INDEX),
            (
                r#"{"weight_map": {"a": "gone.safetensors"}}"#,
                "gone.safetensors",
            ),
        ] {
            let files = [
                CONFIG,
                ("preprocessor_config.json", "{}"),
                ("tokenizer.json", "{}"),
                (WEIGHTS_INDEX, index),
            ];
            let folder = ModelFolder::fetch(&folder(&files).await).await.unwrap();
            let error = folder.weights().await.unwrap_err();
            assert_eq!(
                (error.reason(), error.value("file")),
                (Reason::ModelInvalid, Some(file)),
                "{index}"
            );
        }
    }
}
