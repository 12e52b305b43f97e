//! What runs share of data sets and references in the state, and none needs any more.
use super::check::CheckResult;
use crate::{
    blocking::blocking,
    coordinator::facts::run::{self, RunFacts},
    dataset::{Manifest, sidecars},
    error::{Error, Result},
    origin::{self, Origin},
    storage::{Location, Stores},
};
use futures::{StreamExt, TryStreamExt, stream};
use object_store::ObjectMeta;
use std::{
    collections::BTreeSet,
    time::{Duration, SystemTime},
};
use superbatch_proto::columns::LOSS;

/// Younger objects stay: they may be of a data set that is being indexed or embedded, for a run to
/// come.
const STAYS: Duration = Duration::from_secs(7 * 24 * 3600);

/// Objects that are read at the same time.
const AT_ONCE: usize = 16;

/// What a run reads.
#[derive(Debug, Default)]
struct Needed {
    /// Keys of indexes and of score columns.
    keys: BTreeSet<String>,
    /// `SourceManifest::rows_digest` of its sources.
    rows: BTreeSet<String>,
    reference: Option<String>,
    /// Whether it goes on. Then its reference may be another one later, such as the learner's
    /// weights of a step.
    is_open: bool,
}

impl Needed {
    async fn of(stores: &Stores, state: &Location, facts: &RunFacts) -> Result<Self> {
        let manifest = Manifest::load(state, &facts.run.manifest).await?;
        let phases = facts.spec.phases.iter();
        let names = phases.flat_map(|phase| &phase.score_columns);
        let names = names.map(|column| column.name.clone());
        let columns: BTreeSet<String> = names.filter(|name| name != LOSS).collect();
        let reference = facts.run.reference.as_ref();
        let reference = reference.map(|model| model.digest.clone());
        let (stores, is_open) = (stores.clone(), !facts.closed);
        // A million shards are a million hashes.
        blocking("naming what is kept of a data set", move || {
            Ok(Self {
                keys: sidecars::keys(&stores, &manifest, &columns)?,
                rows: manifest.sources.iter().map(|s| s.rows_digest()).collect(),
                reference,
                is_open,
            })
        })
        .await
    }

    fn has(&self, origin: &Origin) -> bool {
        let is_its_reference = self.reference.as_ref() == Some(&origin.model);
        self.rows.contains(&origin.rows) && (is_its_reference || self.is_open)
    }
}

/// Returns those blocks of reference embeddings that `is_wanted`. Blocks that do not say whose they
/// are, are none.
async fn embeddings(
    state: &Location,
    listed: Vec<(String, ObjectMeta)>,
    is_wanted: impl Fn(&Origin) -> bool,
) -> Result<Vec<(String, ObjectMeta)>> {
    let looks = listed.into_iter().map(|(key, meta)| async move {
        let beginning = state.beginning(&key, origin::BEGINNING_BYTES).await?;
        let origin = beginning.and_then(|bytes| Origin::of(&bytes));
        Ok::<_, Error>((key, meta, origin))
    });
    let mut looks = stream::iter(looks).buffer_unordered(AT_ONCE);
    let mut found = Vec::new();
    while let Some((key, meta, origin)) = looks.try_next().await? {
        if origin.is_some_and(|origin| is_wanted(&origin)) {
            found.push((key, meta));
        }
    }
    Ok(found)
}

/// Returns whether the object at `key` is there and does not have the bytes that were written.
async fn is_damaged(state: &Location, key: &str) -> Result<bool> {
    if !key.starts_with(origin::FOLDER) {
        return sidecars::is_damaged(state, key).await;
    }
    let Some(bytes) = state.find(key).await? else {
        return Ok(false);
    };
    let is_whole = move || Ok(origin::is_whole(&bytes));
    Ok(!blocking("checking reference embeddings", is_whole).await?)
}

/// Reads what a run's data set has in the state, and notes what is damaged.
///
/// # Errors
/// `StorageUnreachable`.
pub(super) async fn check(
    stores: &Stores,
    state: &Location,
    facts: &RunFacts,
    found: &mut CheckResult,
) -> Result<()> {
    // A manifest that cannot be read is told already.
    let Ok(mut needed) = Needed::of(stores, state, facts).await else {
        return Ok(());
    };
    // Of other models' embeddings the run needs none today.
    needed.is_open = false;
    let listed = state.list(origin::FOLDER).await?;
    let embedded = embeddings(state, listed, |origin| needed.has(origin)).await?;
    let embedded = embedded.into_iter().map(|(key, _)| key);
    let keys: Vec<String> = needed.keys.iter().cloned().chain(embedded).collect();
    let looks = keys.into_iter().map(|key| async move {
        let is_damaged = is_damaged(state, &key).await?;
        Ok::<_, Error>((key, is_damaged))
    });
    let mut looks = stream::iter(looks).buffer_unordered(AT_ONCE);
    while let Some((key, is_damaged)) = looks.try_next().await? {
        if is_damaged {
            let uri = state.uri_of(&key);
            found.problems.push(format!(
                "{uri} is damaged; it is made anew from the data when it is needed"
            ));
        }
    }
    Ok(())
}

/// Lists what is older than [`STAYS`].
async fn old(state: &Location, folder: &str) -> Result<Vec<(String, ObjectMeta)>> {
    let now = SystemTime::now();
    let is_old = |(_, meta): &(String, ObjectMeta)| {
        let written = SystemTime::from(meta.last_modified);
        now.duration_since(written).is_ok_and(|age| age > STAYS)
    };
    let listed = state.list(folder).await?.into_iter();
    Ok(listed.filter(is_old).collect())
}

/// Deletes indexes of tars, score columns and reference embeddings that are old and that no run's
/// data set needs. Returns what was done.
///
/// # Errors
/// `StorageUnreachable`; those of a run or manifest that cannot be read: then nothing is deleted.
pub(super) async fn gc(stores: &Stores, state: &Location, dry_run: bool) -> Result<String> {
    // Listed before the runs: of a run that is opened meanwhile nothing is deleted.
    let mut unneeded = Vec::new();
    for folder in sidecars::FOLDERS {
        unneeded.extend(old(state, folder).await?);
    }
    let embedded = old(state, origin::FOLDER).await?;
    let mut runs = Vec::new();
    for id in state.folders("runs").await? {
        if let Some(facts) = run::load(&state.below(&format!("runs/{id}"))).await? {
            runs.push(Needed::of(stores, state, &facts).await?);
        }
    }
    unneeded.retain(|(key, _)| !runs.iter().any(|run| run.keys.contains(key)));
    let is_nobodys = |origin: &Origin| !runs.iter().any(|run| run.has(origin));
    unneeded.extend(embeddings(state, embedded, is_nobodys).await?);
    let (mut text, mut bytes) = (String::new(), 0);
    for (key, meta) in &unneeded {
        text.push_str(&format!("{}\n", state.uri_of(key)));
        bytes += meta.size;
    }
    if !dry_run {
        let keys: Vec<String> = unneeded.iter().map(|(key, _)| key.clone()).collect();
        state.delete_all(&keys).await?;
    }
    let (verb, count) = (
        if dry_run { "would delete" } else { "deleted" },
        unneeded.len(),
    );
    text.push_str(&format!("{verb} {count} objects, {bytes} bytes\n"));
    Ok(text)
}
