//! The definition of a run in object storage: facts below `runs/R/`, each created once.
use super::{
    chain::{Chain, Rewound},
    format, numbered,
};
use crate::{
    coordinator::spec::{complete_later_fields, complete_phase},
    error::{Error, Result},
    fidelity::{Fidelity, ImageTower},
    storage::{Created, Location, nonce},
};
use prost::{Message, Name};
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use superbatch_proto::{
    reflect,
    v1::{self, Approximation, Phase, PrepareModelResponse, Reason, RunSpec},
};

/// A model as it was when the run was opened.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ModelFact {
    /// Digest over config, preprocessing, tokenizer and weights, in hex.
    pub digest: String,
    /// BLAKE3 of the weights, in hex.
    pub weights_digest: String,
    pub logit_scale: f64,
    pub logit_bias: Option<f64>,
    /// Operations of one forward pass of one pair.
    pub pair_flops: f64,
    /// The caption's part of `pair_flops`. 0 in runs that older builds opened.
    #[serde(default)]
    pub text_flops: f64,
    /// The sizes that decide which approximations it takes. Unknown in runs that older builds
    /// opened.
    #[serde(default)]
    pub image_tower: Option<ImageTower>,
    pub tensors: BTreeMap<String, Vec<u64>>,
    /// Names of the tensors that weights may leave out.
    #[serde(default)]
    pub optional_tensors: BTreeSet<String>,
    /// BLAKE3 of each file of its folder except the weights, in hex. Empty in runs that older
    /// builds opened.
    #[serde(default)]
    pub files: BTreeMap<String, String>,
    /// Length of an embedding; 0 in runs that older builds opened.
    #[serde(default)]
    dim: u32,
}

fn tower(tower: &v1::ImageTower) -> ImageTower {
    ImageTower {
        image_size: tower.image_size,
        patch_size: tower.patch_size,
        layers: tower.layers,
        constant: tower.constant,
        per_patch: tower.per_patch,
        per_patch_pair: tower.per_patch_pair,
        layer_constant: tower.layer_constant,
        layer_per_patch: tower.layer_per_patch,
        layer_per_patch_pair: tower.layer_per_patch_pair,
        per_pixel: tower.per_pixel,
        max_patches: tower.max_patches,
    }
}

impl ModelFact {
    /// Returns the operations of one forward pass of the image tower, at an approximation or at
    /// full fidelity.
    pub fn image_flops(&self, approximation: Option<&Approximation>) -> f64 {
        let full = self.pair_flops - self.text_flops;
        match (Fidelity::of(approximation), &self.image_tower) {
            (Ok(Fidelity::Full) | Err(_), _) | (_, None) => full,
            (Ok(fidelity), Some(tower)) => tower.flops(fidelity),
        }
    }

    /// Returns the fact of a run without that model.
    pub fn none() -> Self {
        Self {
            digest: String::new(),
            weights_digest: String::new(),
            logit_scale: 0.0,
            logit_bias: None,
            pair_flops: 0.0,
            text_flops: 0.0,
            image_tower: None,
            tensors: BTreeMap::new(),
            optional_tensors: BTreeSet::new(),
            files: BTreeMap::new(),
            dim: 0,
        }
    }

    /// Returns the length of an embedding, if the run knows it.
    pub fn embedding_dim(&self) -> Option<u32> {
        (self.dim > 0).then_some(self.dim)
    }
}

impl From<PrepareModelResponse> for ModelFact {
    fn from(model: PrepareModelResponse) -> Self {
        Self {
            digest: model.digest,
            weights_digest: model.weights_digest,
            files: model.files.into_iter().collect(),
            dim: model.embedding_dim,
            logit_scale: model.logit_scale,
            logit_bias: model.logit_bias,
            pair_flops: model.image_flops + model.text_flops,
            text_flops: model.text_flops,
            image_tower: model.image_tower.as_ref().map(tower),
            optional_tensors: model
                .tensors
                .iter()
                .filter(|t| t.optional)
                .map(|t| t.name.clone())
                .collect(),
            tensors: model
                .tensors
                .into_iter()
                .map(|t| (t.name, t.shape))
                .collect(),
        }
    }
}

/// `run.json`: what OpenRun fixed for the run's life.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct RunFact {
    #[serde(default = "format::first")]
    format: u32,
    /// The completed spec as JSON, without appended phases.
    spec: Value,
    pub manifest: String,
    pub reference: Option<ModelFact>,
    pub learner: Option<ModelFact>,
    /// Absent in runs that are no fork, and in those that older builds opened.
    #[serde(default)]
    pub fork: Option<ForkFact>,
    pub nonce: String,
}

/// Where a run leaves the one that it is a fork of.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ForkFact {
    pub run_id: String,
    /// The first step of its own.
    pub step: u64,
    /// The other run's rewinds when the fork was made: later ones change nothing of its history.
    pub chain: Chain,
    /// The weights that it takes over, as `weights/inherit.rs` writes them. Their files are copied
    /// before this is written. Null in runs that older builds opened.
    #[serde(default)]
    pub weights: Value,
}

impl RunFact {
    pub fn new(
        spec: &RunSpec,
        manifest: String,
        reference: Option<ModelFact>,
        learner: Option<ModelFact>,
        fork: Option<ForkFact>,
    ) -> Self {
        Self {
            format: format::FORMAT,
            spec: reflect::to_json(spec),
            manifest,
            reference,
            learner,
            fork,
            nonce: nonce(),
        }
    }

    /// Returns the spec. Fields that the build which opened the run did not know have this build's
    /// defaults.
    pub fn spec(&self) -> Result<RunSpec> {
        let mut spec: RunSpec = read(&self.spec, "a run's spec")?;
        spec.phases.iter_mut().for_each(complete_phase);
        complete_later_fields(&mut spec);
        Ok(spec)
    }
}

#[derive(Debug, Serialize, Deserialize)]
struct AppendedPhases {
    phases: Vec<Value>,
    nonce: String,
}

#[derive(Debug, Serialize, Deserialize)]
struct RewoundFact {
    rewound: Rewound,
    nonce: String,
}

/// `closed.json` and `failed.json`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct EndFact {
    pub why: String,
    nonce: String,
}

/// All facts of a run except its receipts and weights.
#[derive(Debug, Clone)]
pub struct RunFacts {
    pub run: RunFact,
    /// The spec with all appended phases.
    pub spec: RunSpec,
    pub appended: u32,
    pub chain: Chain,
    pub closed: bool,
    pub failure: Option<String>,
}

/// Creates `run.json`. If another writer was first, returns that writer's fact.
pub async fn create_run(location: &Location, fact: RunFact) -> Result<RunFact> {
    match location.create("run.json", encode(&fact)).await? {
        Created::Ours => Ok(fact),
        Created::Theirs(bytes) => decode(location, "run.json", &bytes),
    }
}

/// Reads a run's facts; `None` if there is no such run.
pub async fn load(location: &Location) -> Result<Option<RunFacts>> {
    let Some(bytes) = location.find("run.json").await? else {
        return Ok(None);
    };
    format::check(location, &bytes)?;
    let run: RunFact = decode(location, "run.json", &bytes)?;
    let mut spec = run.spec()?;
    let added = numbered::read(location, 0, phases_key).await?;
    let appended = added.len() as u32;
    for (n, bytes) in (0..).zip(&added) {
        let more: AppendedPhases = decode(location, &phases_key(n), bytes)?;
        let phases = more.phases.iter();
        let phases = phases.map(|phase| read::<Phase>(phase, "an appended phase"));
        let mut phases = phases.collect::<Result<Vec<_>>>()?;
        phases.iter_mut().for_each(complete_phase);
        spec.phases.extend(phases);
    }
    let facts = numbered::read(location, 1, |n| generation_key(n as u32)).await?;
    let mut rewinds = Vec::with_capacity(facts.len());
    for (generation, bytes) in (1..).zip(&facts) {
        let key = generation_key(generation);
        let fact: RewoundFact = decode(location, &key, bytes)?;
        if fact.rewound.generation != generation {
            let message = format!("{} is of another generation", location.uri_of(&key));
            return Err(Error::internal(message));
        }
        rewinds.push(fact.rewound);
    }
    let closed = find::<EndFact>(location, "closed.json").await?.is_some();
    let failure = find::<EndFact>(location, "failed.json")
        .await?
        .map(|fact| fact.why);
    Ok(Some(RunFacts {
        run,
        spec,
        appended,
        chain: Chain::new(rewinds),
        closed,
        failure,
    }))
}

/// Reads where the run at `location` left another one; `None` if it is no fork, or no run.
///
/// # Errors
/// As [`load`].
pub async fn fork_of(location: &Location) -> Result<Option<ForkFact>> {
    let Some(bytes) = location.find("run.json").await? else {
        return Ok(None);
    };
    format::check(location, &bytes)?;
    let run: RunFact = decode(location, "run.json", &bytes)?;
    Ok(run.fork)
}

/// Appends phases as the `number`-th addition.
///
/// # Errors
/// `RunSpecConflict` if another call was first.
pub async fn append_phases(location: &Location, number: u32, phases: &[Phase]) -> Result<()> {
    let phases = phases.iter().map(reflect::to_json).collect();
    let bytes = encode(&AppendedPhases {
        phases,
        nonce: nonce(),
    });
    match location.create(&phases_key(number.into()), bytes).await? {
        Created::Ours => Ok(()),
        Created::Theirs(_) => {
            let message =
                "other phases were appended at the same time; look at GetRun and append again";
            Err(Error::new(Reason::RunSpecConflict, message).with("field", "phases"))
        }
    }
}

/// Opens a generation.
///
/// # Errors
/// `GenerationStale` if another rewind was first.
pub async fn create_generation(location: &Location, rewound: &Rewound) -> Result<()> {
    let bytes = encode(&RewoundFact {
        rewound: rewound.clone(),
        nonce: nonce(),
    });
    match location
        .create(&generation_key(rewound.generation), bytes)
        .await?
    {
        Created::Ours => Ok(()),
        Created::Theirs(_) => {
            let message = format!(
                "generation {} was opened by another rewind at the same time",
                rewound.generation
            );
            Err(Error::new(Reason::GenerationStale, message).with("generation", rewound.generation))
        }
    }
}

pub async fn close(location: &Location) -> Result<()> {
    end(location, "closed.json", "closed").await
}

pub async fn fail(location: &Location, why: &str) -> Result<()> {
    end(location, "failed.json", why).await
}

async fn end(location: &Location, key: &str, why: &str) -> Result<()> {
    location
        .create(
            key,
            encode(&EndFact {
                why: why.to_owned(),
                nonce: nonce(),
            }),
        )
        .await?;
    Ok(())
}

async fn find<T: DeserializeOwned>(location: &Location, key: &str) -> Result<Option<T>> {
    location
        .find(key)
        .await?
        .map(|bytes| decode(location, key, &bytes))
        .transpose()
}

fn phases_key(number: u64) -> String {
    format!("phases/{number}.json")
}

fn generation_key(generation: u32) -> String {
    format!("generations/{generation}.json")
}

fn encode(fact: &impl Serialize) -> bytes::Bytes {
    serde_json::to_vec_pretty(fact)
        .expect("plain data encodes")
        .into()
}

fn decode<T: DeserializeOwned>(location: &Location, key: &str, bytes: &[u8]) -> Result<T> {
    serde_json::from_slice(bytes).map_err(|e| {
        Error::internal(format!(
            "{} is no fact of this version",
            location.uri_of(key)
        ))
        .because(e)
    })
}

/// Reads a message from its JSON. Older builds kept it as protobuf in hex.
fn read<M: Message + Name + Default>(kept: &Value, what: &str) -> Result<M> {
    let message =
        match kept {
            Value::String(text) => {
                let bytes = hex::decode(text).ok();
                bytes.and_then(|bytes| M::decode(bytes.as_slice()).ok())
            }
            kept => Some(reflect::from_json(kept.clone()).map_err(|e| {
                Error::internal(format!("{what} is not of this version")).because(e)
            })?),
        };
    message.ok_or_else(|| Error::internal(format!("{what} is damaged")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::{StorageConfig, Stores};
    use superbatch_proto::v1::Policy;

    #[tokio::test]
    async fn a_run_is_found_as_it_was_left() {
        let location = Stores::new(StorageConfig::default())
            .open("memory:///runs/r")
            .unwrap();
        assert!(load(&location).await.unwrap().is_none());
        let spec = RunSpec {
            seed: 7,
            phases: vec![Phase {
                sub_batch_size: 4,
                ..Default::default()
            }],
            ..Default::default()
        };
        let first = create_run(&location, RunFact::new(&spec, "m".into(), None, None, None))
            .await
            .unwrap();
        let second = create_run(
            &location,
            RunFact::new(&RunSpec::default(), "n".into(), None, None, None),
        )
        .await
        .unwrap();
        assert_eq!(first.nonce, second.nonce, "the first writer wins");
        append_phases(
            &location,
            0,
            &[Phase {
                from_step: 9,
                ..Default::default()
            }],
        )
        .await
        .unwrap();
        let again = append_phases(&location, 0, &[Phase::default()])
            .await
            .unwrap_err();
        assert_eq!(again.reason(), Reason::RunSpecConflict);
        let rewound = Rewound {
            generation: 1,
            to_step: 3,
            replay: true,
        };
        create_generation(&location, &rewound).await.unwrap();
        close(&location).await.unwrap();
        let found = load(&location).await.unwrap().unwrap();
        assert_eq!(
            (found.spec.seed, found.spec.phases.len(), found.appended),
            (7, 2, 1)
        );
        assert_eq!(
            (found.chain.current(), found.closed, found.failure),
            (1, true, None)
        );
    }

    /// Numbers that are not those of the keys would lead nowhere.
    #[tokio::test]
    async fn a_rewind_of_another_generation_is_told_as_damage() {
        let location = Stores::new(StorageConfig::default())
            .open("memory:///runs/torn")
            .unwrap();
        let fact = RunFact::new(&RunSpec::default(), "m".into(), None, None, None);
        create_run(&location, fact).await.unwrap();
        let rewound = Rewound {
            generation: 0,
            to_step: 3,
            replay: false,
        };
        let bytes = encode(&RewoundFact {
            rewound,
            nonce: nonce(),
        });
        location.create("generations/1.json", bytes).await.unwrap();
        let error = load(&location).await.unwrap_err();
        assert!(error.to_string().contains("generations/1.json"), "{error}");
    }

    #[tokio::test]
    async fn a_state_that_an_older_build_wrote_is_read() {
        let location = Stores::new(StorageConfig::default())
            .open("memory:///runs/old")
            .unwrap();
        let phase = |from_step| Phase {
            from_step,
            policy: Policy::Joint.into(),
            sub_batch_size: 4,
            ..Default::default()
        };
        let spec = RunSpec {
            seed: u64::MAX,
            phases: vec![phase(0)],
            ..Default::default()
        };
        let mut run =
            serde_json::to_value(RunFact::new(&spec, "m".into(), None, None, None)).unwrap();
        assert_eq!(
            run["spec"]["phases"][0]["policy"], "POLICY_JOINT",
            "people can read it"
        );
        let new = serde_json::from_value::<RunFact>(run.clone()).unwrap();
        run["spec"] = hex::encode(spec.encode_to_vec()).into();
        let old = serde_json::from_value::<RunFact>(run.clone()).unwrap();
        assert_eq!(old.spec().unwrap(), new.spec().unwrap());
        location.create("run.json", encode(&run)).await.unwrap();
        let appended = AppendedPhases {
            phases: vec![hex::encode(phase(9).encode_to_vec()).into()],
            nonce: nonce(),
        };
        let bytes = encode(&appended);
        location.create("phases/0.json", bytes).await.unwrap();
        append_phases(&location, 1, &[phase(12)]).await.unwrap();
        let found = load(&location).await.unwrap().unwrap();
        let begins: Vec<u64> = found.spec.phases.iter().map(|p| p.from_step).collect();
        assert_eq!((found.spec.seed, begins), (u64::MAX, vec![0, 9, 12]));
        run["spec"] = "0g".into();
        let damaged = serde_json::from_value::<RunFact>(run).unwrap();
        assert!(damaged.spec().unwrap_err().to_string().contains("damaged"));
    }

    #[test]
    fn a_run_of_an_earlier_version_has_the_defaults_of_this_one() {
        let phase = Phase {
            policy: Policy::Rank.into(),
            ..Default::default()
        };
        let known = RunFact::new(
            &RunSpec {
                phases: vec![phase.clone()],
                ..Default::default()
            },
            "m".into(),
            None,
            None,
            None,
        );
        let mut completed = phase;
        complete_phase(&mut completed);
        assert!(completed.tuning.is_some());
        assert_eq!(known.spec().unwrap().phases, [completed]);
    }
}
