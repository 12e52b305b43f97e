//! Loads models: each folder and snapshot is fetched, verified and loaded once, for all calls that
//! name it.
use super::{
    device::{Device, Embedded, LoadModel, MicroBatch, Weights},
    inputs::model_inputs::Inputs,
    kept::cache::Cache,
    model::{Compute, Fidelity, ModelFolder, ModelInfo},
};
use crate::{
    bounds::{LABEL_BYTES_MAX, URI_BYTES_MAX, check_bytes},
    error::{Error, Result},
    storage::{Location, Stores},
};
use std::sync::Arc;
use superbatch_proto::v1::{ModelRef, Reason};
use tokio::sync::Mutex;

/// Folders and descriptions kept. They are small; the weights are bounded by the device.
const KEPT_MAX: usize = 64;

/// A model on the device.
pub(super) struct Loaded {
    pub info: ModelInfo,
    pub inputs: Arc<Inputs>,
    id: ModelId,
}

impl Loaded {
    /// Returns the same weights with the inputs and the cost of a fidelity.
    ///
    /// # Errors
    /// `ModelInvalid` if the model cannot be run at that fidelity.
    pub fn at(self: Arc<Self>, fidelity: Fidelity) -> Result<Arc<Self>> {
        if fidelity == Fidelity::Full {
            return Ok(self);
        }
        let side = fidelity
            .side(&self.info.image_tower)
            .map_err(|error| error.with("uri", &self.id.folder))?;
        Ok(Arc::new(Self {
            info: ModelInfo {
                image_size: side,
                image_flops: self.info.image_tower.flops(side),
                ..self.info.clone()
            },
            inputs: self.inputs.clone().at(fidelity),
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
    folders: Cache<String, Arc<Folder>>,
    loaded: Cache<ModelId, Arc<Loaded>>,
    reloading: Mutex<()>,
}

impl Models {
    pub fn new(stores: Stores, state: Location, device: Device) -> Self {
        let (folders, loaded) = (Cache::new(KEPT_MAX, |_| 1), Cache::new(KEPT_MAX, |_| 1));
        Self {
            stores,
            state,
            device,
            folders,
            loaded,
            reloading: Mutex::new(()),
        }
    }

    /// Returns how rows become a model's inputs, without reading its weights.
    ///
    /// # Errors
    /// `ModelInvalid` naming the file, `StorageUnreachable`.
    pub async fn inputs(&self, model: &ModelRef) -> Result<Arc<Inputs>> {
        Ok(self.folder(&model.model_uri).await?.inputs.clone())
    }

    /// Returns the model on the device. Its weights are verified: names, shapes, dtypes, finite
    /// values, and a canary batch.
    ///
    /// # Errors
    /// `WeightsRefused` naming the first bad tensor or the digest, `ModelInvalid`,
    /// `StorageUnreachable`.
    pub async fn load(&self, model: &ModelRef) -> Result<Arc<Loaded>> {
        self.load_by_id(&ModelId::of(model, &self.device)?).await
    }

    /// As [`Models::load`]. If no digest says what the folder must hold, the folder is read again:
    /// it may have been written since the last read.
    pub async fn load_anew(&self, model: &ModelRef) -> Result<Arc<Loaded>> {
        let id = ModelId::of(model, &self.device)?;
        if !id.weights.is_pinned() {
            self.folders.remove(&id.folder);
            self.loaded.remove(&id);
        }
        self.load_by_id(&id).await
    }

    /// Loads a model again that has left the device.
    ///
    /// # Errors
    /// As [`Models::load`], and `ModelInvalid` if its folder holds another model now.
    pub async fn reload(&self, model: &Loaded) -> Result<()> {
        self.loaded.remove(&model.id);
        let again = self.load_by_id(&model.id).await?;
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
    pub async fn embed_reloading(&self, model: &Loaded, batch: MicroBatch) -> Result<Embedded> {
        let _turn = self.reloading.lock().await;
        let folder = self.folder(&model.id.folder).await?;
        // The same weights passed the canary when the call first loaded them.
        let load = LoadModel {
            canary: false,
            ..self.request(&folder, &model.id).await?
        };
        let embedded = self.device.load_and_embed(load, batch).await;
        embedded.map_err(|error| match error.reason() {
            Reason::WeightsMissing => {
                replaced(&model.id.folder, "another model", &model.info.digest)
            }
            _ => error,
        })
    }

    async fn load_by_id(&self, id: &ModelId) -> Result<Arc<Loaded>> {
        let make = async {
            let loaded = self.make(id).await?;
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
            let again = self.make(id).await?;
            let found = &again.info.weights_digest;
            if digest == found {
                Ok(again)
            } else {
                Err(replaced(&id.folder, found, digest))
            }
        };
        self.loaded.get(id, make).await
    }

    async fn make(&self, id: &ModelId) -> Result<Arc<Loaded>> {
        let folder = self.folder(&id.folder).await?;
        let info = self.device.load(self.request(&folder, id).await?).await?;
        Ok(Arc::new(Loaded {
            info,
            inputs: folder.inputs.clone(),
            id: id.clone(),
        }))
    }

    async fn request(&self, folder: &Folder, id: &ModelId) -> Result<LoadModel> {
        let weights = self.weights(&id.weights).await?;
        Ok(LoadModel {
            folder: folder.files.clone(),
            weights,
            compute: id.compute,
            canary: true,
        })
    }

    /// Opens a URI that a call names. The coordinator has checked it, but a worker cannot know who
    /// is at the other end, so the worker's own allow-list is applied too.
    fn open(&self, uri: &str) -> Result<Location> {
        self.stores.open_named(uri, &self.state)
    }

    async fn folder(&self, uri: &str) -> Result<Arc<Folder>> {
        let make = async {
            let files = Arc::new(ModelFolder::fetch(&self.open(uri)?).await?);
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
