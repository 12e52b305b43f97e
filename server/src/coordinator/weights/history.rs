//! Reads all publications of a run when it is opened.
//!
//! Each publication is a fact of its own, and a long run has thousands of them. So now and then a
//! summary of all facts is written. It only saves reads: the facts stay the truth, and those that
//! the newest summary lacks are read one by one.
use super::publish::{Fact, PUSHES};
use crate::{
    error::{Error, Result},
    storage::Location,
};
use futures::{StreamExt, TryStreamExt, stream};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// Folder of the summaries, below the run.
pub(super) const SUMMARIES: &str = "push-summaries";

/// Facts that are read one by one before they are summarised.
pub(super) const SUMMARISED_FROM: usize = 256;

/// How often the summaries are listed again because the newest one had gone when it was read.
const LISTS_MAX: usize = 4;

/// Facts that are read at the same time.
const READS_AT_ONCE: usize = 32;

#[derive(Default, Serialize, Deserialize)]
struct Summary {
    facts: Vec<Fact>,
}

/// Returns all publications, in no particular order. Writes a summary if many were read one by one.
///
/// # Errors
/// `StorageUnreachable`; `Internal` if a fact cannot be read.
pub(super) async fn read(run: &Location) -> Result<Vec<Fact>> {
    let summary = newest_summary(run).await?;
    let mut known: BTreeMap<String, Fact> = summary
        .facts
        .into_iter()
        .map(|fact| (fact.key(), fact))
        .collect();
    let unread = read_new(run, |key| !known.contains_key(key)).await?;
    let count = unread.len();
    known.extend(unread.into_iter().map(|fact| (fact.key(), fact)));
    let facts: Vec<Fact> = known.into_values().collect();
    if count >= SUMMARISED_FROM {
        summarise(run, &facts).await;
    }
    Ok(facts)
}

/// Returns all publications, each from its own fact.
///
/// # Errors
/// As [`read`].
pub(super) async fn read_each(run: &Location) -> Result<Vec<Fact>> {
    read_new(run, |_| true).await
}

async fn read_new(run: &Location, is_new: impl Fn(&String) -> bool) -> Result<Vec<Fact>> {
    let listed = run.list(PUSHES).await?.into_iter().map(|(key, _)| key);
    let unread: Vec<String> = listed.filter(is_new).collect();
    let facts = stream::iter(unread).map(|key| read_fact(run, key));
    facts.buffer_unordered(READS_AT_ONCE).try_collect().await
}

async fn read_fact(run: &Location, key: String) -> Result<Fact> {
    Fact::parse(&run.get(&key).await?, &run.uri_of(&key))
}

async fn newest_summary(run: &Location) -> Result<Summary> {
    for _ in 0..LISTS_MAX {
        let keys = run.list(SUMMARIES).await?.into_iter().map(|(key, _)| key);
        if let Some(summary) = newest_of(run, keys).await? {
            return Ok(summary);
        }
    }
    // The facts are complete without it.
    Ok(Summary::default())
}

/// Returns the newest summary of those that were listed; `None` if it has gone since: `state gc`
/// deletes those that a newer one replaces, and a coordinator may write that newer one between this
/// process's list and its read. To take that for an unreachable store would keep the run from being
/// opened.
async fn newest_of(run: &Location, keys: impl Iterator<Item = String>) -> Result<Option<Summary>> {
    let Some(newest) = keys.max() else {
        return Ok(Some(Summary::default()));
    };
    let Some(bytes) = run.find(&newest).await? else {
        return Ok(None);
    };
    let summary = serde_json::from_slice(&bytes).unwrap_or_else(|error| {
        let uri = run.uri_of(&newest);
        tracing::warn!(uri, %error, "a summary of pushes is damaged; the pushes are read one by \
        one");
        Summary::default()
    });
    Ok(Some(summary))
}

/// Writes a summary. A failure is only logged: the facts are complete without it.
async fn summarise(run: &Location, facts: &[Fact]) {
    // Names sort by the number of facts, so the last name is the most complete summary. Facts are
    // never deleted, so two summaries of the same number hold the same facts.
    let key = format!("{SUMMARIES}/{:012}.json", facts.len());
    #[derive(Serialize)]
    struct Borrowed<'a> {
        facts: &'a [Fact],
    }
    let written = match serde_json::to_vec(&Borrowed { facts }) {
        Ok(bytes) => run.create(&key, bytes.into()).await.map(drop),
        Err(error) => Err(Error::internal("cannot write a summary of pushes").because(error)),
    };
    if let Err(error) = written {
        tracing::warn!(
            key,
            error = error.chain(),
            "pushes are not summarised for now"
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::{StorageConfig, Stores};

    fn fact(step: i64) -> Fact {
        Fact {
            nonce: String::new(),
            push_id: "p".into(),
            version: step.unsigned_abs() + 1,
            generation: 0,
            step,
            digest: "d".into(),
            snapshot: String::new(),
            logit_scale: 1.0,
            logit_bias: None,
        }
    }

    async fn put(run: &Location, steps: std::ops::Range<i64>) {
        for step in steps {
            let bytes = serde_json::to_vec(&fact(step)).unwrap();
            run.put(&fact(step).key(), bytes.into()).await.unwrap();
        }
    }

    #[tokio::test]
    async fn many_pushes_are_read_once_and_then_from_their_summary() {
        let run = Stores::new(StorageConfig::default())
            .open("memory:///state/runs/r")
            .unwrap();
        let many = SUMMARISED_FROM as i64;
        put(&run, 0..many).await;
        assert_eq!(read(&run).await.unwrap().len(), SUMMARISED_FROM);
        // What a summary holds is not read again: it may even be unreadable by now.
        run.put(&fact(7).key(), "{}".into()).await.unwrap();
        put(&run, many..many + 3).await;
        let mut steps: Vec<i64> = read(&run).await.unwrap().iter().map(|f| f.step).collect();
        steps.sort_unstable();
        assert_eq!(steps, (0..many + 3).collect::<Vec<_>>());
        assert_eq!(run.list(SUMMARIES).await.unwrap().len(), 1);
    }

    #[tokio::test]
    async fn a_damaged_summary_costs_time_and_no_push() {
        let run = Stores::new(StorageConfig::default())
            .open("memory:///state/runs/r")
            .unwrap();
        put(&run, 0..3).await;
        let key = format!("{SUMMARIES}/000000000009.json");
        run.put(&key, "{".into()).await.unwrap();
        assert_eq!(read(&run).await.unwrap().len(), 3);
    }

    #[tokio::test]
    async fn a_summary_that_was_replaced_while_it_was_sought_is_no_lost_store() {
        let run = Stores::new(StorageConfig::default())
            .open("memory:///runs/r")
            .unwrap();
        let keys = |names: &[&str]| {
            let keys: Vec<String> = names.iter().map(|n| format!("{SUMMARIES}/{n}")).collect();
            keys.into_iter()
        };
        // Listed before a coordinator wrote the second one, and `state gc` deleted the first.
        summarise(&run, &[fact(0), fact(1)]).await;
        let stale = newest_of(&run, keys(&["000000000001.json"])).await;
        assert!(stale.unwrap().is_none());
        assert_eq!(newest_summary(&run).await.unwrap().facts.len(), 2);
    }
}
