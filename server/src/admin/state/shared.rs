//! What runs share of data sets in the state, and none needs any more.
use super::check::CheckResult;
use crate::{
    blocking::blocking,
    coordinator::facts::run::{self, RunFacts},
    dataset::{Manifest, sidecars},
    error::{Error, Result},
    storage::{Location, Stores},
};
use futures::{StreamExt, TryStreamExt, stream};
use std::{
    collections::BTreeSet,
    time::{Duration, SystemTime},
};
use superbatch_proto::columns::LOSS;

/// Younger objects stay: they may be of a data set that is being indexed, for a run to come.
const STAYS: Duration = Duration::from_secs(7 * 24 * 3600);

/// Objects that are read or deleted at the same time.
const AT_ONCE: usize = 16;

/// Returns the keys of what a run reads.
async fn needed(stores: &Stores, state: &Location, facts: &RunFacts) -> Result<BTreeSet<String>> {
    let manifest = Manifest::load(state, &facts.run.manifest).await?;
    let phases = facts.spec.phases.iter();
    let names = phases.flat_map(|phase| &phase.score_columns);
    let names = names.map(|column| column.name.clone());
    let columns: BTreeSet<String> = names.filter(|name| name != LOSS).collect();
    let stores = stores.clone();
    // A million shards are a million hashes.
    let keys = move || sidecars::keys(&stores, &manifest, &columns);
    blocking("naming what is kept of a data set", keys).await
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
    let Ok(keys) = needed(stores, state, facts).await else {
        return Ok(());
    };
    let looks = stream::iter(keys).map(|key| async move {
        let is_damaged = sidecars::is_damaged(state, &key).await?;
        Ok::<_, Error>((key, is_damaged))
    });
    let mut looks = looks.buffer_unordered(AT_ONCE);
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

/// Deletes indexes of tars and score columns that are old and that no run's data set names. Returns
/// what was done.
///
/// # Errors
/// `StorageUnreachable`; those of a run or manifest that cannot be read: then nothing is deleted.
pub(super) async fn gc(stores: &Stores, state: &Location, dry_run: bool) -> Result<String> {
    // Before the runs: of a run that is opened meanwhile nothing is deleted.
    let (now, mut old) = (SystemTime::now(), Vec::new());
    for folder in sidecars::FOLDERS {
        let listed = state.list(folder).await?.into_iter();
        old.extend(listed.filter(|(_, meta)| {
            let written = SystemTime::from(meta.last_modified);
            now.duration_since(written).is_ok_and(|age| age > STAYS)
        }));
    }
    let mut kept = BTreeSet::new();
    for id in state.folders("runs").await? {
        if let Some(facts) = run::load(&state.below(&format!("runs/{id}"))).await? {
            kept.extend(needed(stores, state, &facts).await?);
        }
    }
    old.retain(|(key, _)| !kept.contains(key));
    let (mut text, mut bytes) = (String::new(), 0);
    for (key, meta) in &old {
        text.push_str(&format!("{}\n", state.uri_of(key)));
        bytes += meta.size;
    }
    if !dry_run {
        let keys: Vec<String> = old.iter().map(|(key, _)| key.clone()).collect();
        state.delete_all(&keys).await?;
    }
    let verb = if dry_run { "would delete" } else { "deleted" };
    text.push_str(&format!("{verb} {} objects, {bytes} bytes\n", old.len()));
    Ok(text)
}
