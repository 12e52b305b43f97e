//! Reads all publications of a run when it is opened.
//!
//! Each publication is a fact of its own, and a long run has thousands of them. So now and then the
//! run's owner writes a summary of all facts. It only saves reads: the facts stay the truth, and
//! those that the newest summary lacks are read one by one.
use super::publish::{Fact, PUSHES};
use crate::{
    blocking::blocking,
    coordinator::facts::owner::Ownership,
    error::{Error, Result},
    storage::{Created, Location},
};
use bytes::Bytes;
use futures::{StreamExt, TryStreamExt, stream};
use serde::{Deserialize, Serialize};
use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, PoisonError},
};

/// Folder of the summaries, below the run.
pub(super) const SUMMARIES: &str = "push-summaries";

/// Facts that are read one by one before they are summarised, at least and at most. Between the
/// two, the next summary comes if there are a quarter as many new ones as the last one holds: so
/// all summaries that were ever written are a few times as large as the facts.
const SUMMARISED_EVERY: (usize, usize) = (256, 1 << 12);

/// Summaries that are kept: another process may be reading the one before the newest.
const SUMMARIES_KEPT: usize = 2;

/// How often the summaries are listed again because the newest one had gone when it was read.
const LISTS_MAX: usize = 4;

/// Facts that are read at the same time.
const READS_AT_ONCE: usize = 32;

#[derive(Default, Serialize, Deserialize)]
struct Summary {
    facts: Vec<Fact>,
}

/// All publications of a run.
#[derive(Debug)]
pub(super) struct History {
    /// In no particular order.
    pub facts: Vec<Fact>,
    /// How many of them the newest summary holds.
    pub summarised: usize,
}

/// The summaries of a run, for its owner. Cheap to clone.
#[derive(Debug, Clone)]
pub(super) struct Summaries {
    run: Location,
    owner: Option<Ownership>,
    /// Publications of the newest one, or of the one that is being written.
    summarised: Arc<Mutex<usize>>,
}

impl Summaries {
    /// `summarised` as in [`History`]. Without an `owner` nobody is asked before one is deleted.
    pub(super) fn new(run: Location, owner: Option<Ownership>, summarised: usize) -> Self {
        Self {
            run,
            owner,
            summarised: Arc::new(Mutex::new(summarised)),
        }
    }

    /// Returns whether a summary is due at this number of publications. It is due once.
    pub(super) fn is_due(&self, count: usize) -> bool {
        let mut summarised = self
            .summarised
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let (at_least, at_most) = SUMMARISED_EVERY;
        let is_due =
            count.saturating_sub(*summarised) >= (*summarised / 4).clamp(at_least, at_most);
        if is_due {
            *summarised = count;
        }
        is_due
    }

    /// Writes a summary of all publications, then deletes older ones. A failure is only logged: the
    /// facts are complete without a summary.
    pub(super) async fn write(&self) {
        let written = async {
            let all = read(&self.run).await?.facts;
            if !summarise(&self.run, all).await? {
                return Ok(());
            }
            // A former owner leaves the run alone.
            if let Some(owner) = &self.owner {
                owner.check().await?;
            }
            delete_older(&self.run).await
        };
        let written: Result<()> = written.await;
        if let Err(error) = written {
            // It is due again sooner than after a whole interval.
            let mut summarised = self
                .summarised
                .lock()
                .unwrap_or_else(PoisonError::into_inner);
            *summarised -= (*summarised / 4).clamp(0, SUMMARISED_EVERY.1 - SUMMARISED_EVERY.0);
            drop(summarised);
            let (run, error) = (self.run.uri(), error.chain());
            tracing::warn!(run, error, "pushes are not summarised for now");
        }
    }
}

/// Returns all publications. Writes nothing.
///
/// # Errors
/// `StorageUnreachable`; `Internal` if a fact cannot be read.
pub(super) async fn read(run: &Location) -> Result<History> {
    let mut known = newest_summary(run).await?;
    let summarised = known.len();
    let unread = read_new(run, |key| !known.contains_key(key)).await?;
    blocking("joining the pushes of a run", move || {
        known.extend(unread.into_iter().map(|fact| (fact.key(), fact)));
        let facts = known.into_values().collect();
        Ok(History { facts, summarised })
    })
    .await
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

/// Facts by their keys.
type Known = BTreeMap<String, Fact>;

async fn newest_summary(run: &Location) -> Result<Known> {
    for _ in 0..LISTS_MAX {
        if let Some(summary) = newest_of(run, keys(run).await?).await? {
            return Ok(summary);
        }
    }
    // The facts are complete without it.
    Ok(Known::new())
}

/// Returns the keys of all summaries, rising: the last one holds the most facts.
async fn keys(run: &Location) -> Result<Vec<String>> {
    let listed = run.list(SUMMARIES).await?.into_iter();
    let mut keys: Vec<String> = listed.map(|(key, _)| key).collect();
    keys.sort();
    Ok(keys)
}

/// Returns the newest summary of those that were listed; `None` if it has gone since: its run's
/// owner, or `state gc`, deletes those that newer ones replace, and may do so between this
/// process's list and its read. To take that for an unreachable store would keep the run from being
/// opened.
async fn newest_of(run: &Location, keys: Vec<String>) -> Result<Option<Known>> {
    let Some(newest) = keys.last() else {
        return Ok(Some(Known::new()));
    };
    let Some(bytes) = run.find(newest).await? else {
        return Ok(None);
    };
    let uri = run.uri_of(newest);
    // The summary of a long run has many megabytes.
    blocking("reading a summary of pushes", move || {
        Ok(Some(parsed(&bytes).unwrap_or_else(|error| {
            tracing::warn!(uri, %error, "a summary of pushes is damaged; the pushes are read one \
            by one");
            Known::new()
        })))
    })
    .await
}

fn parsed(bytes: &[u8]) -> serde_json::Result<Known> {
    let facts = serde_json::from_slice::<Summary>(bytes)?.facts;
    Ok(facts.into_iter().map(|fact| (fact.key(), fact)).collect())
}

/// Writes a summary. Returns whether it is there and whole.
///
/// # Errors
/// `StorageUnreachable`.
async fn summarise(run: &Location, facts: Vec<Fact>) -> Result<bool> {
    // Names sort by the number of facts, so the last name is the most complete summary. Facts are
    // never deleted, so two summaries of the same number hold the same facts.
    let (count, key) = (facts.len(), format!("{SUMMARIES}/{:012}.json", facts.len()));
    let encoded = blocking("summarising pushes", move || {
        let bytes = serde_json::to_vec(&Summary { facts });
        bytes.map_err(|e| Error::internal("cannot write a summary of pushes").because(e))
    });
    let theirs = match run.create(&key, Bytes::from(encoded.await?)).await? {
        Created::Ours => return Ok(true),
        Created::Theirs(theirs) => theirs,
    };
    // Another process wrote it, with the facts in another order or damaged.
    blocking("reading a summary of pushes", move || {
        Ok(parsed(&theirs).is_ok_and(|known| known.len() == count))
    })
    .await
}

/// Deletes all summaries but the newest ones. Any of them may go once a newer one is there: whoever
/// has listed it and does not find it lists again.
///
/// # Errors
/// `StorageUnreachable`.
async fn delete_older(run: &Location) -> Result<()> {
    let mut keys = keys(run).await?;
    keys.truncate(keys.len().saturating_sub(SUMMARIES_KEPT));
    run.delete_all(&keys).await
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        blocking::tests::needs_a_thread,
        storage::{StorageConfig, Stores},
    };

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

    async fn summaries(run: &Location) -> Vec<String> {
        keys(run).await.unwrap()
    }

    #[tokio::test]
    async fn many_pushes_are_read_once_and_then_from_their_summary() {
        let run = Stores::new(StorageConfig::default())
            .open("memory:///state/runs/r")
            .unwrap();
        let many = SUMMARISED_EVERY.0 as i64;
        put(&run, 0..many).await;
        assert_eq!(read(&run).await.unwrap().facts.len(), many as usize);
        assert!(summaries(&run).await.is_empty(), "a reader writes nothing");
        Summaries::new(run.clone(), None, 0).write().await;
        // What a summary holds is not read again: it may even be unreadable by now.
        run.put(&fact(7).key(), "{}".into()).await.unwrap();
        put(&run, many..many + 3).await;
        let all = read(&run).await.unwrap();
        assert_eq!(all.summarised, many as usize);
        let mut steps: Vec<i64> = all.facts.iter().map(|f| f.step).collect();
        steps.sort_unstable();
        assert_eq!(steps, (0..many + 3).collect::<Vec<_>>());
        assert_eq!(summaries(&run).await.len(), 1);
    }

    #[test]
    fn all_summaries_together_are_a_few_times_as_large_as_the_pushes() {
        let run = Stores::new(StorageConfig::default())
            .open("memory:///state/runs/r")
            .unwrap();
        let of = Summaries::new(run, None, 0);
        let written: Vec<usize> = (1..=60_000).filter(|count| of.is_due(*count)).collect();
        assert_eq!(written[..3], [256, 512, 768]);
        let all: usize = written.iter().sum();
        assert!(all < 12 * 60_000, "{all} in {} summaries", written.len());
        assert!(60_000 - written.last().unwrap() < SUMMARISED_EVERY.1);
    }

    #[tokio::test]
    async fn only_the_newest_summaries_stay() {
        let run = Stores::new(StorageConfig::default())
            .open("memory:///state/runs/r")
            .unwrap();
        let of = Summaries::new(run.clone(), None, 0);
        for count in [3, 5, 5, 8] {
            put(&run, 0..count).await;
            of.write().await;
        }
        let name = |count: usize| format!("{SUMMARIES}/{count:012}.json");
        assert_eq!(summaries(&run).await, [5, 8].map(name));
        // What is there under the name, and damaged, replaces nothing.
        put(&run, 0..9).await;
        run.put(&name(9), "{".into()).await.unwrap();
        of.write().await;
        assert_eq!(summaries(&run).await, [5, 8, 9].map(name));
        assert_eq!(read(&run).await.unwrap().facts.len(), 9);
    }

    #[test]
    fn a_summary_is_written_on_a_thread_of_its_own() {
        let facts: Vec<Fact> = (0..3).map(fact).collect();
        let written = needs_a_thread(async {
            let stores = Stores::new(StorageConfig::default());
            summarise(&stores.open("memory:///runs/r").unwrap(), facts).await
        });
        assert!(written.unwrap());
    }

    #[tokio::test]
    async fn a_damaged_summary_costs_time_and_no_push() {
        let run = Stores::new(StorageConfig::default())
            .open("memory:///state/runs/r")
            .unwrap();
        put(&run, 0..3).await;
        let key = format!("{SUMMARIES}/000000000009.json");
        run.put(&key, "{".into()).await.unwrap();
        assert_eq!(read(&run).await.unwrap().facts.len(), 3);
    }

    #[tokio::test]
    async fn a_summary_that_was_replaced_while_it_was_sought_is_no_lost_store() {
        let run = Stores::new(StorageConfig::default())
            .open("memory:///runs/r")
            .unwrap();
        // Listed before a coordinator wrote the second one, and `state gc` deleted the first.
        assert!(summarise(&run, vec![fact(0), fact(1)]).await.unwrap());
        let stale = newest_of(&run, vec![format!("{SUMMARIES}/000000000001.json")]).await;
        assert!(stale.unwrap().is_none());
        assert_eq!(newest_summary(&run).await.unwrap().len(), 2);
    }
}
