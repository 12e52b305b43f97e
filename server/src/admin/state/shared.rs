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

/// Returns those blocks of reference embeddings that `is_wanted`, and whose they are. Blocks that
/// do not say it are none.
async fn embeddings(
    state: &Location,
    listed: Vec<(String, ObjectMeta)>,
    is_wanted: impl Fn(&Origin) -> bool,
) -> Result<Vec<(String, ObjectMeta, Origin)>> {
    let looks = listed.into_iter().map(|(key, meta)| async move {
        let beginning = state.beginning(&key, origin::BEGINNING_BYTES).await?;
        let origin = beginning.and_then(|bytes| Origin::of(&bytes));
        Ok::<_, Error>((key, meta, origin))
    });
    let mut looks = stream::iter(looks).buffer_unordered(AT_ONCE);
    let mut found = Vec::new();
    while let Some((key, meta, origin)) = looks.try_next().await? {
        if let Some(origin) = origin.filter(&is_wanted) {
            found.push((key, meta, origin));
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
/// `StorageUnreachable`; `InvalidArgument` if a source's store cannot be opened.
pub(super) async fn check(
    stores: &Stores,
    state: &Location,
    facts: &RunFacts,
    found: &mut CheckResult,
) -> Result<()> {
    if !found.has_manifest {
        return Ok(());
    }
    let mut needed = Needed::of(stores, state, facts).await?;
    // Of other models' embeddings the run needs none today.
    needed.is_open = false;
    let listed = state.list(origin::FOLDER).await?;
    let embedded = embeddings(state, listed, |origin| needed.has(origin)).await?;
    let embedded = embedded.into_iter().map(|(key, ..)| key);
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

/// Reads the runs that are not in `read`, and takes what they need out of `unneeded`. Returns what
/// tells their embeddings. A run has a key for each shard and column: those of one run are in
/// memory at a time.
async fn take_needed(
    stores: &Stores,
    state: &Location,
    read: &mut BTreeSet<String>,
    unneeded: &mut Vec<(String, ObjectMeta)>,
) -> Result<Vec<Needed>> {
    let mut runs = Vec::new();
    for id in state.folders("runs").await? {
        if read.contains(&id) {
            continue;
        }
        // One that has no facts is being opened, and may have them the next time.
        let Some(facts) = run::load(&state.below(&format!("runs/{id}"))).await? else {
            continue;
        };
        let mut run = Needed::of(stores, state, &facts).await?;
        let keys = std::mem::take(&mut run.keys);
        unneeded.retain(|(key, _)| !keys.contains(key));
        runs.push(run);
        read.insert(id);
    }
    Ok(runs)
}

/// Deletes indexes of tars, score columns and reference embeddings that are old and that no run's
/// data set needs. Returns what was done.
///
/// # Errors
/// `StorageUnreachable`; those of a run or manifest that cannot be read: then nothing is deleted.
pub(super) async fn gc(stores: &Stores, state: &Location, dry_run: bool) -> Result<String> {
    let mut unneeded = Vec::new();
    for folder in sidecars::FOLDERS {
        unneeded.extend(old(state, folder).await?);
    }
    let embedded = old(state, origin::FOLDER).await?;
    let mut read = BTreeSet::new();
    let runs = take_needed(stores, state, &mut read, &mut unneeded).await?;
    let is_nobodys = |origin: &Origin| !runs.iter().any(|run| run.has(origin));
    let mut nobodys = embeddings(state, embedded, is_nobodys).await?;
    // Looking at many embeddings takes long, and runs may have been opened meanwhile. One that is
    // opened from here on makes anew what it does not find.
    let opened = take_needed(stores, state, &mut read, &mut unneeded).await?;
    nobodys.retain(|(_, _, origin)| !opened.iter().any(|run| run.has(origin)));
    unneeded.extend(nobodys.into_iter().map(|(key, meta, _)| (key, meta)));
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        coordinator::facts::{chain::Chain, run::RunFact},
        dataset::{
            fixtures::{put, request, stores},
            index, tar_fixtures,
        },
    };
    use bytes::Bytes;
    use std::sync::Arc;
    use superbatch_proto::v1::RunSpec;

    /// Returns a run on one tar, whose manifest says that it lies below `root_uri`.
    async fn facts(stores: &Stores, state: &Location, root_uri: &str) -> RunFacts {
        put(stores, &[("0.tar", tar_fixtures::img2dataset(0..4))]).await;
        let asked = request("memory:///data");
        let indexed = index(stores, Some(state), &[asked]).await.unwrap();
        let mut manifest = Manifest {
            version: Manifest::VERSION,
            sources: indexed.sources.clone(),
        };
        manifest.sources[0].root_uri = root_uri.into();
        let digest = Arc::new(manifest).save(state).await.unwrap();
        let spec = RunSpec::default();
        RunFacts {
            run: RunFact::new(&spec, digest, None, None, None),
            spec,
            appended: 0,
            chain: Chain::default(),
            closed: false,
            failure: None,
        }
    }

    #[tokio::test]
    async fn what_keeps_a_check_from_reading_is_an_error() {
        let stores = stores();
        let state = stores.open("memory:///state").unwrap();
        let facts = facts(&stores, &state, "nowhere://data").await;
        let mut found = CheckResult {
            has_manifest: true,
            ..CheckResult::default()
        };
        assert!(check(&stores, &state, &facts, &mut found).await.is_err());
        // The problem is that there is no manifest.
        found.has_manifest = false;
        check(&stores, &state, &facts, &mut found).await.unwrap();
    }

    #[tokio::test]
    async fn a_run_that_is_opened_meanwhile_keeps_what_it_needs() {
        let stores = stores();
        let state = stores.open("memory:///state").unwrap();
        let facts = facts(&stores, &state, "memory:///data").await;
        let (mut read, mut unneeded) = (BTreeSet::new(), Vec::new());
        for folder in sidecars::FOLDERS {
            unneeded.extend(state.list(folder).await.unwrap());
        }
        assert_eq!(unneeded.len(), 1, "the tar's index");
        // It has a folder, and no facts yet.
        state.put("runs/r/owner/0", "{}".into()).await.unwrap();
        let take = async |read: &mut BTreeSet<String>, unneeded: &mut Vec<_>| {
            let runs = take_needed(&stores, &state, read, unneeded).await;
            runs.unwrap().len()
        };
        assert_eq!(take(&mut read, &mut unneeded).await, 0);
        assert_eq!(unneeded.len(), 1);
        let run: Bytes = serde_json::to_vec(&facts.run).unwrap().into();
        state.put("runs/r/run.json", run).await.unwrap();
        assert_eq!(take(&mut read, &mut unneeded).await, 1);
        assert_eq!(unneeded.len(), 0);
        assert_eq!(take(&mut read, &mut unneeded).await, 0, "it is read once");
    }
}
