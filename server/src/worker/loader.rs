//! Loads models: each folder and snapshot is fetched, verified and loaded once, for all calls that
//! name it.
use super::{
    device::{Device, Embedded, LoadModel, MicroBatch, Weights},
    inputs::model_inputs::Inputs,
    kept::cache::Cache,
    model::{Compute, ModelFolder, ModelInfo},
};
use crate::{
    bounds::{LABEL_BYTES_MAX, URI_BYTES_MAX, check_bytes},
    error::{Error, Result},
    fidelity::Fidelity,
    pushed::Pushed,
    storage::{Location, Stores},
};
use std::sync::Arc;
use superbatch_proto::v1::{ModelRef, Reason};
use tokio::sync::Mutex;

/// Folders and descriptions kept; the weights are bounded by the device.
const KEPT_MAX: usize = 64;
/// Bytes of the files of all folders kept. An exported module is among its folder's files.
const FOLDERS_BYTES_MAX: usize = 2 << 30;

/// A model on the device.
pub(super) struct Loaded {
    pub info: ModelInfo,
    pub inputs: Arc<Inputs>,
    /// At which `info` and `inputs` are.
    pub fidelity: Fidelity,
    id: ModelId,
}

impl Loaded {
    /// Returns the same weights with the inputs and the cost of a fidelity.
    ///
    /// # Errors
    /// `ModelInvalid` if the model cannot be run at that fidelity.
    pub(super) fn at(self: Arc<Self>, fidelity: Fidelity) -> Result<Arc<Self>> {
        if fidelity == Fidelity::Full {
            return Ok(self);
        }
        let tower = &self.info.image_tower;
        if let Some(problem) = tower.refuses(fidelity) {
            let folder = &self.id.folder;
            let message = format!("{folder} cannot be run at {fidelity}: it {problem}");
            let error = Error::new(Reason::ModelInvalid, message).with("uri", folder);
            return Err(error.with("field", fidelity.field()));
        }
        Ok(Arc::new(Self {
            info: ModelInfo {
                image_size: tower.side(fidelity) as usize,
                image_flops: tower.flops(fidelity),
                ..self.info.clone()
            },
            inputs: self.inputs.clone().at(fidelity),
            fidelity,
            id: self.id.clone(),
        }))
    }
}

struct Folder {
    files: Arc<ModelFolder>,
    inputs: Arc<Inputs>,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct ModelId {
    folder: String,
    weights: WeightsId,
    compute: Compute,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
enum WeightsId {
    /// The folder's own weights, with their digest if it is known.
    Folder {
        digest: String,
    },
    Snapshot {
        uri: String,
        digest: String,
    },
    Random(u64),
}

/// Models by `ModelRef`: fetched, verified and loaded once, then shared by all calls.
pub(super) struct Models {
    stores: Stores,
    /// The state, which holds pushed weights.
    state: Location,
    device: Device,
    /// SHA-256 of the exported modules that may be run.
    modules: Vec<String>,
    folders: Cache<String, Arc<Folder>>,
    loaded: Cache<ModelId, Arc<Loaded>>,
    reloading: Mutex<()>,
}

impl Models {
    pub(super) fn new(
        stores: Stores,
        state: Location,
        device: Device,
        modules: Vec<String>,
    ) -> Self {
        let of_folder = |folder: &Arc<Folder>| weight(folder.files.held_bytes());
        let folders = Cache::new(FOLDERS_BYTES_MAX, of_folder);
        let loaded = Cache::new(KEPT_MAX, |_| 1);
        Self {
            stores,
            state,
            device,
            modules,
            folders,
            loaded,
            reloading: Mutex::new(()),
        }
    }

    /// Returns how rows become a model's inputs, without reading its weights.
    ///
    /// # Errors
    /// `ModelInvalid` naming the file, `StorageUnreachable`.
    pub(super) async fn inputs(&self, model: &ModelRef) -> Result<Arc<Inputs>> {
        Ok(self.folder(&model.model_uri).await?.inputs.clone())
    }

    /// Returns the model on the device. Its weights are verified: names, shapes, dtypes, finite
    /// values, and a canary batch.
    ///
    /// # Errors
    /// `WeightsRefused` naming the first bad tensor or the digest, `ModelInvalid`,
    /// `StorageUnreachable`.
    pub(super) async fn load(&self, model: &ModelRef) -> Result<Arc<Loaded>> {
        self.load_by_id(&ModelId::of(model, &self.device)?, None)
            .await
    }

    /// As [`Models::load`] of a snapshot that the coordinator of this process has in memory.
    pub(super) async fn load_pushed(
        &self,
        model: &ModelRef,
        pushed: Pushed,
    ) -> Result<Arc<Loaded>> {
        self.load_by_id(&ModelId::of(model, &self.device)?, Some(pushed))
            .await
    }

    /// As [`Models::load`]. If no digest says what the folder must hold, the folder is read again:
    /// it may have been written since the last read.
    pub(super) async fn load_anew(&self, model: &ModelRef) -> Result<Arc<Loaded>> {
        let id = ModelId::of(model, &self.device)?;
        if !id.weights.is_pinned() {
            self.folders.remove(&id.folder);
            self.loaded.remove(&id);
        }
        self.load_by_id(&id, None).await
    }

    /// Loads a model again that has left the device.
    ///
    /// # Errors
    /// As [`Models::load`], and `ModelInvalid` if its folder holds another model now.
    pub(super) async fn reload(&self, model: &Loaded) -> Result<()> {
        self.loaded.remove(&model.id);
        let again = self.load_by_id(&model.id, None).await?;
        if again.info.key == model.info.key {
            return Ok(());
        }
        Err(replaced(
            &model.id.folder,
            &again.info.digest,
            &model.info.digest,
        ))
    }

    /// Embeds with a model that others push off the device before it can be used: loads it for this
    /// micro-batch alone. One call at a time does this, because each holds the weights in host
    /// memory.
    ///
    /// # Errors
    /// As [`Models::reload`] and [`Device::embed`].
    pub(super) async fn embed_reloading(
        &self,
        model: &Loaded,
        batch: MicroBatch,
    ) -> Result<Embedded> {
        let _turn = self.reloading.lock().await;
        let folder = self.folder(&model.id.folder).await?;
        // The same weights passed the canary when the call first loaded them.
        let load = LoadModel {
            canary: false,
            ..Self::request(&folder, &model.id, self.weights(&model.id.weights).await?)
        };
        let embedded = self.device.load_and_embed(load, batch).await;
        embedded.map_err(|error| match error.reason() {
            Reason::WeightsMissing => {
                replaced(&model.id.folder, "another model", &model.info.digest)
            }
            _ => error,
        })
    }

    async fn load_by_id(&self, id: &ModelId, pushed: Option<Pushed>) -> Result<Arc<Loaded>> {
        let make = async {
            let loaded = self.make(id, pushed).await?;
            let WeightsId::Folder { digest } = &id.weights else {
                id.weights.check(&loaded.info)?;
                return Ok(loaded);
            };
            if digest.is_empty() || *digest == loaded.info.weights_digest {
                return Ok(loaded);
            }
            // The cached folder may be older than the run: the operator may have replaced it and
            // then opened a run with the new digest. So it is read once more before the mismatch is
            // an error.
            self.folders.remove(&id.folder);
            let again = self.make(id, None).await?;
            let found = &again.info.weights_digest;
            if digest == found {
                Ok(again)
            } else {
                Err(replaced(&id.folder, found, digest))
            }
        };
        self.loaded.get(id, make).await
    }

    async fn make(&self, id: &ModelId, pushed: Option<Pushed>) -> Result<Arc<Loaded>> {
        let folder = self.folder(&id.folder).await?;
        let weights = match pushed {
            Some(pushed) => Weights::Pushed(pushed),
            None => self.weights(&id.weights).await?,
        };
        let info = self
            .device
            .load(Self::request(&folder, id, weights))
            .await?;
        Ok(Arc::new(Loaded {
            info,
            inputs: folder.inputs.clone(),
            fidelity: Fidelity::Full,
            id: id.clone(),
        }))
    }

    fn request(folder: &Folder, id: &ModelId, weights: Weights) -> LoadModel {
        LoadModel {
            folder: folder.files.clone(),
            weights,
            compute: folder.files.config.compute(id.compute),
            canary: true,
        }
    }

    /// Opens a URI that a call names. The coordinator has checked it, but a worker cannot know who
    /// is at the other end, so the worker's own allow-list is applied too.
    fn open(&self, uri: &str) -> Result<Location> {
        self.stores.open_named(uri, &self.state)
    }

    async fn folder(&self, uri: &str) -> Result<Arc<Folder>> {
        let make = async {
            let files = ModelFolder::fetch_allowing(&self.open(uri)?, &self.modules).await?;
            let files = Arc::new(files);
            let inputs = Arc::new(Inputs::of(&files)?);
            Ok(Arc::new(Folder { files, inputs }))
        };
        self.folders.get(&uri.to_owned(), make).await
    }

    async fn weights(&self, id: &WeightsId) -> Result<Weights> {
        Ok(match id {
            WeightsId::Folder { .. } => Weights::Folder,
            WeightsId::Random(seed) => Weights::Random(*seed),
            WeightsId::Snapshot { uri, .. } => {
                Weights::Safetensors(self.open(uri)?.get_large("").await?)
            }
        })
    }
}

impl ModelId {
    fn of(model: &ModelRef, device: &Device) -> Result<Self> {
        if model.model_uri.is_empty() {
            return Err(Error::invalid(
                "model_uri",
                "the model's folder is not named",
            ));
        }
        check_bytes("model_uri", &model.model_uri, URI_BYTES_MAX)?;
        check_bytes("snapshot_uri", &model.snapshot_uri, URI_BYTES_MAX)?;
        check_bytes("snapshot_digest", &model.snapshot_digest, LABEL_BYTES_MAX)?;
        let weights = match (model.random_seed, model.snapshot_uri.as_str()) {
            (None, "") => WeightsId::Folder {
                digest: model.snapshot_digest.clone(),
            },
            (Some(seed), "") => WeightsId::Random(seed),
            (None, uri) => WeightsId::Snapshot {
                uri: uri.to_owned(),
                digest: model.snapshot_digest.clone(),
            },
            (Some(_), _) => {
                return Err(Error::invalid(
                    "random_seed",
                    "a model has a snapshot or random weights, not both",
                ));
            }
        };
        let compute = device.compute(model.compute_dtype());
        Ok(Self {
            folder: model.model_uri.clone(),
            weights,
            compute,
        })
    }
}

impl WeightsId {
    /// Returns whether it names the weights by digest.
    fn is_pinned(&self) -> bool {
        match self {
            Self::Folder { digest } | Self::Snapshot { digest, .. } => !digest.is_empty(),
            Self::Random(_) => false,
        }
    }

    /// Checks that the loaded snapshot has the digest that the call named.
    fn check(&self, info: &ModelInfo) -> Result<()> {
        let Self::Snapshot { uri, digest } = self else {
            return Ok(());
        };
        if digest.is_empty() || *digest == info.weights_digest {
            return Ok(());
        }
        let found = &info.weights_digest;
        let message = format!(
            "{uri} has digest {found}, not {digest}: it was damaged or replaced; push the weights \
            again"
        );
        Err(Error::new(Reason::WeightsRefused, message)
            .with("uri", uri)
            .with("digest", found))
    }
}

fn replaced(folder: &str, found: &str, wanted: &str) -> Error {
    let message = format!(
        "{folder} holds {found} now, not {wanted}, with which its run was opened: put that model \
        back, or open another run"
    );
    let error = Error::new(Reason::ModelInvalid, message).with("uri", folder);
    error.with("found", found).with("expected", wanted)
}

/// Returns what a folder of so many bytes counts as: at least its share, so that there are never
/// more than [`KEPT_MAX`], and at most all, so that the one used last stays.
fn weight(bytes: usize) -> usize {
    bytes.clamp(FOLDERS_BYTES_MAX / KEPT_MAX, FOLDERS_BYTES_MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn folders_are_kept_by_their_bytes() {
        let cache: Cache<usize, usize> =
            Cache::new(FOLDERS_BYTES_MAX, |bytes: &usize| weight(*bytes));
        let keep = async |key: usize, bytes: usize| {
            cache.get(&key, async { Ok(bytes) }).await.unwrap();
            cache.used()
        };
        for key in 0..2 * KEPT_MAX {
            assert!(keep(key, 1000).await <= FOLDERS_BYTES_MAX);
        }
        assert_eq!(cache.used() / weight(0), KEPT_MAX, "small ones are counted");
        let third = FOLDERS_BYTES_MAX / 3;
        for key in 200..210 {
            keep(key, third).await;
        }
        assert_eq!(cache.used(), 3 * third, "three modules");
        assert_eq!(keep(300, usize::MAX).await, FOLDERS_BYTES_MAX, "one alone");
    }
}
