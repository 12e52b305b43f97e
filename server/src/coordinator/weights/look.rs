//! What people and trainers ask of the published weights: a list, digests by tensor, and going back
//! to an older version by hand.
use super::{
    Book, Weights,
    book::{Listed, Published, RolledBack, Snapshot},
    book_of,
    file::TensorFile,
    history,
};
use crate::{
    bounds::TENSORS_AT_ONCE_MAX,
    coordinator::facts::chain::Began,
    error::{Error, Result},
    metrics,
    storage::{Created, Location, nonce},
};
use serde::{Deserialize, Serialize};
use superbatch_proto::v1::{
    GetWeightsDigestsResponse, KeptWeights, Reason, TensorDigest, WeightsState, WeightsVersion,
};

/// Folder of the roll-backs, below the run.
const ROLLBACKS: &str = "rollbacks";

/// Numbers that are tried for one roll-back where others take them.
const TRIES: usize = 8;

/// A roll-back as it is stored.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct RollBack {
    nonce: String,
    to: u64,
    through: u64,
}

impl RollBack {
    fn parse(bytes: &[u8], uri: &str) -> Result<Self> {
        serde_json::from_slice(bytes)
            .map_err(|e| Error::internal(format!("{uri} is no fact of a roll-back")).because(e))
    }

    pub(super) fn numbers(&self) -> RolledBack {
        RolledBack {
            to: self.to,
            through: self.through,
        }
    }

    /// Returns it as it is for a run whose newest version is `newest`: those that the run publishes
    /// later are not taken back. `None` if it takes none back there.
    pub(super) fn up_to(&self, newest: u64) -> Option<Self> {
        let through = self.through.min(newest);
        (self.to < through).then(|| Self {
            nonce: nonce(),
            to: self.to,
            through,
        })
    }
}

/// Returns the key of a run's roll-back, by its number.
pub(super) fn key(number: usize) -> String {
    format!("{ROLLBACKS}/{number:06}.json")
}

/// Returns all roll-backs of a run, in their order.
///
/// # Errors
/// As [`facts`].
pub(super) async fn rollbacks(run: &Location) -> Result<Vec<RolledBack>> {
    let facts = facts(run).await?;
    Ok(facts.iter().map(RollBack::numbers).collect())
}

/// Returns all roll-backs of a run as they are stored, in their order.
///
/// # Errors
/// `StorageUnreachable`; `Internal` if one cannot be read.
pub(super) async fn facts(run: &Location) -> Result<Vec<RollBack>> {
    let mut keys: Vec<String> = run
        .list(ROLLBACKS)
        .await?
        .into_iter()
        .map(|(key, _)| key)
        .collect();
    keys.sort();
    let mut all = Vec::with_capacity(keys.len());
    for key in keys {
        all.push(RollBack::parse(&run.get(&key).await?, &run.uri_of(&key))?);
    }
    Ok(all)
}

fn described(listed: Listed) -> KeptWeights {
    let state = match listed.snapshot {
        Snapshot::Kept(_) => WeightsState::Kept,
        Snapshot::Retired => WeightsState::Retired,
        Snapshot::Missing => WeightsState::Missing,
    };
    let own = listed.version.version;
    KeptWeights {
        version: Some(listed.version),
        push_id: listed.push_id,
        state: state.into(),
        replaced_by: (listed.in_force != own).then_some(listed.in_force),
    }
}

/// The published weights of a run that is not in memory, as they are in the state.
pub struct Asleep {
    run: Location,
    pub book: Book,
}

impl Asleep {
    /// Reads them; `initial` as in [`super::RunWeights`]. Nothing is written or deleted.
    ///
    /// # Errors
    /// `StorageUnreachable`; `Internal` if a fact cannot be read.
    pub async fn read(run: Location, initial: Option<Published>) -> Result<Self> {
        let (mut book, _) = book_of(&run, &history::read(&run).await?.facts).await?;
        if let Some(initial) = initial {
            book.set_initial(initial);
        }
        Ok(Self { run, book })
    }

    /// As [`Weights::list`].
    pub fn list(&self, newest: usize) -> Vec<KeptWeights> {
        list(&self.book, newest)
    }

    /// As [`Weights::digests`].
    ///
    /// # Errors
    /// As [`Weights::digests`].
    pub async fn digests(
        &self,
        version: Option<u64>,
        offset: u32,
    ) -> Result<GetWeightsDigestsResponse> {
        let version = version.unwrap_or_else(|| newest(&self.book));
        let located = locate(&self.run, &self.book, version)?;
        let (version, file) = located.open().await?;
        digests(version, &file, offset).await
    }
}

fn list(book: &Book, newest: usize) -> Vec<KeptWeights> {
    book.list(newest).into_iter().map(described).collect()
}

fn newest(book: &Book) -> u64 {
    book.in_force(book.last_version())
}

async fn digests(
    version: WeightsVersion,
    file: &TensorFile,
    offset: u32,
) -> Result<GetWeightsDigestsResponse> {
    let weights: Vec<_> = file
        .tensors
        .iter()
        .filter_map(|tensor| Some((tensor, tensor.kind()?)))
        .collect();
    let from = weights.len().min(offset as usize);
    let to = weights.len().min(from + TENSORS_AT_ONCE_MAX);
    let mut tensors = Vec::with_capacity(to - from);
    for (tensor, kind) in &weights[from..to] {
        tensors.push(TensorDigest {
            name: tensor.name.clone(),
            dtype: (*kind).into(),
            shape: tensor.shape.clone(),
            blake3: file.digest(tensor).await?.as_bytes().to_vec().into(),
        });
    }
    Ok(GetWeightsDigestsResponse {
        version: Some(version),
        tensors,
        next_tensor_offset: (to < weights.len()).then_some(to as u32),
    })
}

/// The file of a version's weights.
struct Located {
    version: WeightsVersion,
    at: Location,
}

/// # Errors
/// `WeightsMissing` if there is no such version, or its weights are not kept.
fn locate(run: &Location, book: &Book, version: u64) -> Result<Located> {
    let kept = book
        .kept(version)
        .filter(|kept| !kept.snapshot_uri.is_empty())
        .ok_or_else(|| not_kept(version, book.is_known(version), book.last_version()))?;
    // Its key below the run, as the book has it.
    let uri = &kept.snapshot_uri;
    let key = uri.strip_prefix(run.uri()).unwrap_or(uri);
    Ok(Located {
        version: kept.version.clone(),
        at: run.below(key.trim_start_matches('/')),
    })
}

impl Located {
    /// # Errors
    /// `WeightsMissing` if the file is not there.
    async fn open(self) -> Result<(WeightsVersion, TensorFile)> {
        match TensorFile::open(self.at, u64::MAX).await? {
            Some(file) => Ok((self.version, file)),
            None => Err(not_kept(self.version.version, true, self.version.version)),
        }
    }
}

impl Weights {
    /// Returns the newest versions, the newest first.
    pub fn list(&self, newest: usize) -> Vec<KeptWeights> {
        list(&self.0.book.borrow(), newest)
    }

    /// Returns the digests of a version's tensors from `offset` on, as many as fit into an answer:
    /// of the newest version that serves, if none is named.
    ///
    /// # Errors
    /// `WeightsMissing` if there is no such version, or its weights are not kept; `WeightsRefused`
    /// if the file is damaged; `StorageUnreachable`.
    pub async fn digests(
        &self,
        version: Option<u64>,
        offset: u32,
    ) -> Result<GetWeightsDigestsResponse> {
        let version = version.unwrap_or_else(|| newest(&self.0.book.borrow()));
        let (version, file) = self.0.file_of(version).await?;
        // One at a time: each reads up to a whole version.
        let _alone = self.0.reading.lock().await;
        digests(version, &file, offset).await
    }

    /// Takes back all versions after `to`, which serves in their place from now on. The caller has
    /// checked that this process owns the run, and keeps out commits, which rest on what serves,
    /// and the retirement of versions. `began` is the run's trajectory, `references` are the steps
    /// whose weights are the reference of its phases.
    ///
    /// # Errors
    /// `WeightsMissing` if there is no such version, or its weights are not kept;
    /// `InvalidArgument` if there is none after it, if it is of another trajectory, or if a
    /// reference would be taken back; `PushConflict` if other coordinators roll back all the time;
    /// `StorageUnreachable`.
    pub async fn roll_back(
        &self,
        to: u64,
        began: &[Began],
        references: &[u64],
    ) -> Result<(WeightsVersion, u64)> {
        // No version is published meanwhile: `through` is the newest one.
        let _alone = self.0.publishing.lock().await;
        for _ in 0..TRIES {
            let (version, back, number) = {
                let book = self.0.book.borrow();
                let version = may_roll_back(&book, to, began, references)?;
                let through = book.last_version();
                let is_done = book.last_rollback() == Some(RolledBack { to, through });
                if is_done {
                    return Ok((version, through));
                }
                (version, RolledBack { to, through }, book.rollbacks())
            };
            let found = self.0.write_roll_back(number, back).await?;
            self.0.book.send_modify(|book| book.roll_back(found));
            // Another one took the number: an attempt of this process of which it did not know the
            // outcome, or a former owner's.
            if found == back {
                metrics::weights_rolled_back().increment(1);
                let (run, through) = (&self.0.spec.run_id, back.through);
                tracing::warn!(run, to, through, "weights rolled back");
                return Ok((version, through));
            }
        }
        let message = "other coordinators roll back at the same time; look again";
        Err(Error::new(Reason::PushConflict, message))
    }
}

/// Checks a roll-back, and returns the version that it goes to.
fn may_roll_back(
    book: &Book,
    to: u64,
    began: &[Began],
    references: &[u64],
) -> Result<WeightsVersion> {
    let newest = book.last_version();
    let Some(published) = book.kept(to) else {
        return Err(not_kept(to, book.is_known(to), newest));
    };
    if !book.is_of(to, began) {
        let step = published.version.step;
        let message = format!(
            "version {to} was pushed after step {step} of a trajectory that a rewind took back; \
            name a version of this one"
        );
        return Err(Error::invalid("version", message));
    }
    if newest <= to {
        let message = format!("version {to} is the newest; there is nothing to take back");
        return Err(Error::invalid("version", message));
    }
    let pushes = references.iter().filter_map(|step| {
        let push = book.push_of(i64::try_from(*step).ok()?, began)?;
        (to < push).then_some((*step, push))
    });
    match pushes.max_by_key(|(_, push)| *push) {
        None => Ok(published.version.clone()),
        Some((step, push)) => {
            let message = format!(
                "version {push}, pushed after step {step}, is the reference of a phase \
                (reference_step); roll back to it or to a later one, or fork the run with other \
                phases"
            );
            Err(Error::invalid("version", message).with("reference_step", step))
        }
    }
}

impl super::Inner {
    /// Writes a roll-back under its number, and returns the one that is there.
    async fn write_roll_back(&self, number: usize, back: RolledBack) -> Result<RolledBack> {
        let fact = RollBack {
            nonce: nonce(),
            to: back.to,
            through: back.through,
        };
        let bytes = serde_json::to_vec(&fact)
            .map_err(|e| Error::internal("cannot write a fact").because(e))?;
        let key = key(number);
        match self.run.create(&key, bytes.into()).await? {
            Created::Ours => Ok(back),
            Created::Theirs(bytes) => {
                Ok(RollBack::parse(&bytes, &self.run.uri_of(&key))?.numbers())
            }
        }
    }

    /// Opens the file of a version's weights.
    ///
    /// # Errors
    /// `WeightsMissing` if there is no such version, or its file is not there.
    pub(super) async fn file_of(&self, version: u64) -> Result<(WeightsVersion, TensorFile)> {
        let located = locate(&self.run, &self.book.borrow(), version)?;
        located.open().await
    }
}

/// Returns the error for a version whose weights cannot be used.
pub(super) fn not_kept(version: u64, is_known: bool, newest: u64) -> Error {
    let message = match (version, is_known) {
        (0, _) => "version 0 is the learner that the run began with, and was not pushed".to_owned(),
        (_, true) => format!(
            "the weights of version {version} are no longer kept (coordinator.snapshots_kept); \
            `superbatch weights RUN list` shows which are"
        ),
        (_, false) => format!("there is no version {version}; the newest is {newest}"),
    };
    Error::new(Reason::WeightsMissing, message).with("version", version)
}
