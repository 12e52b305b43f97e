//! Reads a model folder of Hugging Face or open_clip in object storage.
mod files;

use self::files::{find, missing, need};
use super::{
    clip_vocabulary,
    config::{Family, ModelConfig},
    exported,
    losses::Input,
    open_clip_config, other_forms,
    positions::Resizes,
    snapshot::{Refusal, Snapshot},
};
use crate::{
    blocking::blocking,
    error::{Error, Result},
    storage::Location,
};
use bytes::Bytes;
use serde::Deserialize;
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use superbatch_proto::v1::Reason;
use tokio::sync::OnceCell;

const WEIGHTS: &str = "model.safetensors";
const OPEN_CLIP_WEIGHTS: &str = "open_clip_model.safetensors";
const PREPROCESSOR: &str = "preprocessor_config.json";
const CONFIG: &str = "config.json";
const TOKENIZER: &str = "tokenizer.json";
const TOKENIZER_CONFIG: &str = "tokenizer_config.json";
const WEIGHTS_INDEX: &str = "model.safetensors.index.json";
/// Configuration, vocabulary and index files.
const JSON_BYTES_MAX: u64 = 128 << 20;
/// One file of weights.
const WEIGHTS_BYTES_MAX: u64 = 64 << 30;

/// A folder's small files. Its weights are read by [`ModelFolder::weights`].
#[derive(Debug)]
pub struct ModelFolder {
    pub uri: String,
    pub config: ModelConfig,
    pub config_json: Bytes,
    /// For open_clip, the configuration itself, which contains the preprocessing.
    pub preprocessor_json: Bytes,
    pub tokenizer_json: Bytes,
    /// Names the padding token, if the file exists. It is not part of the model's digest; the
    /// padding id is part of the digest of the model's inputs.
    pub tokenizer_config_json: Option<Bytes>,
    resize_json: Option<Bytes>,
    location: Location,
    /// The digest of the weights, once they have been read. With it a later load finds the model on
    /// the device without reading gigabytes again.
    pub(crate) weights_digest: OnceCell<String>,
}

impl ModelFolder {
    /// Reads `config.json`, `preprocessor_config.json` and `tokenizer.json`, or open_clip's
    /// `open_clip_config.json` and `tokenizer.json`. If both configurations exist, the folder is
    /// Hugging Face's if it has `model.safetensors`.
    ///
    /// # Errors
    /// `ModelInvalid` naming the `file` that is missing or the `field` that is not supported;
    /// `StorageUnreachable`.
    pub async fn fetch(location: &Location) -> Result<Self> {
        Self::fetch_allowing(location, &[]).await
    }

    /// As [`ModelFolder::fetch`], or `module.json` and the module beside it where its SHA-256 is
    /// one of `modules`.
    ///
    /// # Errors
    /// As [`ModelFolder::fetch`].
    pub async fn fetch_allowing(location: &Location, modules: &[String]) -> Result<Self> {
        if let Some(problem) = other_forms::wrong_uri(location.uri()) {
            let message = format!("{} {problem}", location.uri());
            return Err(Error::new(Reason::ModelInvalid, message).with("uri", location.uri()));
        }
        let (config_json, form) = configuration(location).await?;
        let config = match form {
            Form::Transformers => ModelConfig::parse(&config_json),
            Form::OpenClip => open_clip_config::parse(&config_json),
            Form::Exported => module(location, &config_json, modules).await,
        };
        let mut config = config.map_err(|e| e.with("uri", location.uri()))?;
        let losses = config.losses();
        let preprocessor = async {
            match form {
                Form::OpenClip => Ok(config_json.clone()),
                _ if losses.is_some_and(|form| form.input == Input::Text) => Ok(Bytes::new()),
                _ => preprocessor_config(location).await,
            }
        };
        let tokenizer = async {
            match losses {
                Some(form) if !form.has_text() => Ok(Bytes::new()),
                _ => tokenizer(location, config.family).await,
            }
        };
        let (preprocessor_json, tokenizer_json, tokenizer_config_json) = tokio::try_join!(
            preprocessor,
            tokenizer,
            find(location, TOKENIZER_CONFIG, JSON_BYTES_MAX)
        )?;
        let taken = config.take_max_patches(&preprocessor_json);
        taken.map_err(|e| e.with("uri", location.uri()))?;
        let resize_json = find(location, Resizes::FILE, JSON_BYTES_MAX).await?;
        if let Some(json) = &resize_json {
            let changed = config.resizes.changed(json);
            config.resizes = changed.map_err(|e| e.with("uri", location.uri()))?;
        }
        Ok(Self {
            uri: location.uri().to_owned(),
            config,
            config_json,
            preprocessor_json,
            tokenizer_json,
            tokenizer_config_json,
            resize_json,
            location: location.clone(),
            weights_digest: OnceCell::new(),
        })
    }

    /// Returns whether there are any weights: a learner whose trainer pushes them first needs none.
    ///
    /// # Errors
    /// `StorageUnreachable`.
    pub async fn has_weights(&self) -> Result<bool> {
        for name in self.weights_names().iter().chain(&[WEIGHTS_INDEX]) {
            if self.location.head(name).await?.is_some() {
                return Ok(true);
            }
        }
        Ok(false)
    }

    fn weights_names(&self) -> &'static [&'static str] {
        match self.config.family {
            Family::OpenClip(_) => &[OPEN_CLIP_WEIGHTS, WEIGHTS],
            _ => &[WEIGHTS],
        }
    }

    /// Reads `model.safetensors`, or all shards that `model.safetensors.index.json` names.
    ///
    /// # Errors
    /// `ModelInvalid` naming the `file`; `StorageUnreachable`.
    pub async fn weights(&self) -> Result<Vec<Bytes>> {
        let names = self.weights_names();
        for name in names {
            if let Some(file) = find(&self.location, name, WEIGHTS_BYTES_MAX).await? {
                return Ok(vec![file]);
            }
        }
        let Some(index) = find(&self.location, WEIGHTS_INDEX, JSON_BYTES_MAX).await? else {
            let more = if self.location.head("pytorch_model.bin").await?.is_some() {
                "; pytorch_model.bin is a pickle, which runs code: \
                 AutoModel.from_pretrained(FOLDER).save_pretrained(FOLDER) writes safetensors"
            } else {
                " (nor an index of shards); weights are never read from pickles"
            };
            return Err(missing(&self.location, names[0], more));
        };
        let mut files = Vec::new();
        for shard in shards(&index).map_err(|e| e.with("uri", &self.uri))? {
            files.push(need(&self.location, &shard, WEIGHTS_BYTES_MAX).await?);
        }
        Ok(files)
    }

    /// Returns BLAKE3 over configuration, preprocessing, tokenizer and weights, in hex. It names
    /// the model in receipts.
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

    /// Returns BLAKE3 of each file except the weights, in hex.
    pub fn file_digests(&self) -> BTreeMap<String, String> {
        self.small_files()
            .into_iter()
            .map(|(name, file)| (name.to_owned(), blake3::hash(file).to_hex().to_string()))
            .collect()
    }

    /// Returns the bytes of all files that are held in memory; an exported module's code and
    /// weights are among them.
    pub(crate) fn held_bytes(&self) -> usize {
        let small = self.small_files().into_iter().map(|(_, file)| file);
        small
            .chain(&self.tokenizer_config_json)
            .map(Bytes::len)
            .sum()
    }

    fn small_files(&self) -> Vec<(&'static str, &Bytes)> {
        let tokenizer = (TOKENIZER, &self.tokenizer_json);
        let mut files = match self.config.family {
            Family::OpenClip(_) => {
                vec![(open_clip_config::FILE, &self.config_json), tokenizer]
            }
            Family::Exported => vec![
                (exported::FILE, &self.config_json),
                (PREPROCESSOR, &self.preprocessor_json),
                tokenizer,
            ],
            _ => vec![
                (CONFIG, &self.config_json),
                (PREPROCESSOR, &self.preprocessor_json),
                tokenizer,
            ],
        };
        if self.config.losses().is_some() {
            // What a module without texts or images does not read.
            files.retain(|(_, file)| !file.is_empty());
        }
        let module = self.config.exported.iter();
        files.extend(module.map(|of| (exported::MODULE, &of.bytes)));
        files.extend(self.resize_json.iter().map(|file| (Resizes::FILE, file)));
        files
    }

    /// Reads weights' headers and checks them against the model. It reads all bytes.
    pub(crate) fn verify(&self, files: Vec<Bytes>) -> Result<Snapshot, Refusal> {
        self.checked(Snapshot::parse(files)?)
    }

    /// Checks weights against the model.
    pub(crate) fn checked(&self, snapshot: Snapshot) -> Result<Snapshot, Refusal> {
        snapshot.check(&self.config.parameters())?;
        Ok(snapshot)
    }
}

/// Reads `preprocessor_config.json`, or the same object inside `processor_config.json`, which
/// transformers 5 writes.
async fn preprocessor_config(location: &Location) -> Result<Bytes> {
    if let Some(file) = find(location, PREPROCESSOR, JSON_BYTES_MAX).await? {
        return Ok(file);
    }
    let outer = find(location, "processor_config.json", JSON_BYTES_MAX).await?;
    let outer: Option<Value> = outer.and_then(|file| serde_json::from_slice(&file).ok());
    match outer
        .as_ref()
        .and_then(|outer| outer.get("image_processor"))
    {
        Some(inner) => Ok(Bytes::from(inner.to_string())),
        None => Err(missing(
            location,
            PREPROCESSOR,
            " (nor a processor_config.json with it)",
        )),
    }
}

/// Whose folder it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Form {
    Transformers,
    OpenClip,
    Exported,
}

/// Reads the configuration. Returns it, and whose it is.
async fn configuration(location: &Location) -> Result<(Bytes, Form)> {
    let (own, open_clip, exported) = tokio::try_join!(
        find(location, CONFIG, JSON_BYTES_MAX),
        find(location, open_clip_config::FILE, JSON_BYTES_MAX),
        find(location, exported::FILE, JSON_BYTES_MAX)
    )?;
    if let Some(exported) = exported {
        return Ok((exported, Form::Exported));
    }
    match (own, open_clip) {
        (Some(own), None) => Ok((own, Form::Transformers)),
        (None, Some(open_clip)) => Ok((open_clip, Form::OpenClip)),
        (Some(own), Some(open_clip)) => {
            if location.head(WEIGHTS).await?.is_some() {
                Ok((own, Form::Transformers))
            } else {
                Ok((open_clip, Form::OpenClip))
            }
        }
        (None, None) => {
            let more = format!(
                " (nor open_clip_config.json){}",
                other_forms::hint(location).await?
            );
            Err(missing(location, CONFIG, &more))
        }
    }
}

async fn module(location: &Location, json: &Bytes, modules: &[String]) -> Result<ModelConfig> {
    exported::allowed(modules)?;
    let bytes = need(location, exported::MODULE, WEIGHTS_BYTES_MAX).await?;
    let (json, modules) = (json.clone(), modules.to_vec());
    let read = move || exported::config(&json, bytes, &modules);
    blocking("reading an exported module", read).await
}

/// Reads `tokenizer.json`, or makes it from CLIP's `vocab.json` and `merges.txt`.
async fn tokenizer(location: &Location, family: Family) -> Result<Bytes> {
    if let Some(file) = find(location, TOKENIZER, JSON_BYTES_MAX).await? {
        return Ok(file);
    }
    let (vocabulary, merges) = tokio::try_join!(
        find(location, "vocab.json", JSON_BYTES_MAX),
        find(location, "merges.txt", JSON_BYTES_MAX)
    )?;
    match (family, vocabulary, merges) {
        (Family::Clip | Family::OpenClip(_), Some(vocabulary), Some(merges)) => {
            clip_vocabulary::tokenizer(&vocabulary, &merges)
                .map_err(|e| e.with("uri", location.uri()))
        }
        (Family::OpenClip(_), ..) => {
            let more = "; python -m superbatch.open_clip FOLDER MODEL_NAME writes it (MODEL_NAME \
                        as open_clip names the model, \
                        such as ViT-B-16)";
            Err(missing(location, TOKENIZER, more))
        }
        (Family::Siglip, ..) if location.head("spiece.model").await?.is_some() => {
            let more = "; python -m superbatch.siglip FOLDER makes it of spiece.model";
            Err(missing(location, TOKENIZER, more))
        }
        _ => {
            let more = "; write it with transformers: \
                        AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER), of a fast \
                        tokenizer";
            Err(missing(location, TOKENIZER, more))
        }
    }
}

#[derive(Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}

/// Returns the files that an index of shards names, each once, in order of name.
fn shards(index: &[u8]) -> Result<BTreeSet<String>> {
    let invalid =
        |message: String| Error::new(Reason::ModelInvalid, message).with("file", WEIGHTS_INDEX);
    let index: Index = serde_json::from_slice(index)
        .map_err(|e| invalid(format!("{WEIGHTS_INDEX} has no usable weight_map")).because(e))?;
    let shards: BTreeSet<String> = index.weight_map.into_values().collect();
    match shards
        .iter()
        // The index comes from the folder, not from the operator. A name with a slash could lead to
        // files outside the folder and so past the allow-list.
        .find(|shard| shard.contains(['/', '\\']) || !shard.ends_with(".safetensors"))
    {
        Some(shard) => Err(invalid(format!(
            "{WEIGHTS_INDEX} names '{shard}', which is no safetensors file of the folder"
        ))),
        None => Ok(shards),
    }
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
    async fn other_layouts_are_read() {
        let nested = r#"{"image_processor": {"size": 7}, "processor_class": "CLIPProcessor"}"#;
        let vocabulary = r#"{"a</w>": 0, "<|startoftext|>": 1, "<|endoftext|>": 2}"#;
        let files = [
            CONFIG,
            ("processor_config.json", nested),
            ("vocab.json", vocabulary),
            ("merges.txt", "#version: 0.2"),
        ];
        let of_five = ModelFolder::fetch(&folder(&files).await).await.unwrap();
        assert_eq!(&of_five.preprocessor_json[..], br#"{"size":7}"#);
        assert!(of_five.tokenizer_json.starts_with(b"{"));

        let open_clip = (
            "open_clip_config.json",
            r#"{"model_cfg": {"embed_dim": 512}}"#,
        );
        let tokenizer = ("tokenizer.json", "{}");
        let both = [open_clip, tokenizer, CONFIG];
        let read = ModelFolder::fetch(&folder(&both).await).await.unwrap();
        assert_eq!(read.config.model_type(), "open_clip");
        assert_eq!(read.file_digests().len(), 2);
        let error = read.weights().await.unwrap_err();
        assert_eq!(error.value("file"), Some("open_clip_model.safetensors"));
        let weights = ("model.safetensors", "");
        let files = [
            open_clip,
            tokenizer,
            CONFIG,
            weights,
            ("preprocessor_config.json", "{}"),
        ];
        let read = ModelFolder::fetch(&folder(&files).await).await.unwrap();
        assert_eq!(
            read.config.model_type(),
            "clip",
            "its weights are transformers'"
        );
        let error = ModelFolder::fetch(&folder(&[open_clip]).await)
            .await
            .unwrap_err();
        assert!(
            error.to_string().contains("python -m superbatch.open_clip"),
            "{error}"
        );
    }

    #[tokio::test]
    async fn a_siglip_without_tokenizer_json_says_how_to_make_it() {
        let files = [
            ("config.json", r#"{"model_type": "siglip"}"#),
            ("preprocessor_config.json", "{}"),
            ("spiece.model", "pieces"),
        ];
        let error = ModelFolder::fetch(&folder(&files).await).await.unwrap_err();
        assert_eq!(error.value("file"), Some("tokenizer.json"));
        assert!(
            error.to_string().contains("python -m superbatch.siglip"),
            "{error}"
        );
    }

    #[tokio::test]
    async fn folders_that_need_something_first_say_what() {
        let small = [
            CONFIG,
            ("preprocessor_config.json", "{}"),
            ("tokenizer.json", "{}"),
        ];
        let pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n";
        for (files, said) in [
            (vec![("modules.json", "[]")], "0_CLIPModel"),
            (vec![("adapter_config.json", "{}")], "merge_and_unload"),
            (vec![("config.json", pointer)], "git lfs pull"),
            (vec![("module.json", "{}")], "worker.exported_modules"),
        ] {
            let error = ModelFolder::fetch(&folder(&files).await).await.unwrap_err();
            assert_eq!(error.reason(), Reason::ModelInvalid);
            assert!(error.to_string().contains(said), "{error}");
        }
        for (file, said) in [
            (("pytorch_model.bin", ""), "save_pretrained"),
            (
                ("model.safetensors", pointer),
                "model.safetensors is a pointer of Git LFS",
            ),
        ] {
            let files = [&small[..], &[file]].concat();
            let folder = ModelFolder::fetch(&folder(&files).await).await.unwrap();
            let error = folder.weights().await.unwrap_err();
            assert!(error.to_string().contains(said), "{error}");
        }
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
