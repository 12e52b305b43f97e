//! The weights of a run as they lie in the state, for commands that look at it from outside.
use super::{
    Book,
    book::Snapshot,
    history::{self, SUMMARIES},
    publish::Fact,
    snapshots::Listed,
};
use crate::{error::Result, storage::Location};
use std::time::SystemTime;

/// What lies there.
pub struct Stored {
    /// Publications, read one by one and not from a summary, by version.
    pub facts: Vec<Fact>,
    listed: Listed,
    /// Keys of summaries, rising: the last one is in use.
    summaries: Vec<String>,
}

impl Stored {
    /// # Errors
    /// `StorageUnreachable`; `Internal` where a fact cannot be read.
    pub async fn read(run: &Location) -> Result<Self> {
        let mut facts = history::read_each(run).await?;
        facts.sort_by_key(|fact| fact.version);
        let summaries = run.list(SUMMARIES).await?.into_iter();
        let mut summaries: Vec<String> = summaries.map(|(key, _)| key).collect();
        summaries.sort();
        Ok(Self {
            facts,
            // After the facts: the weights of a version are there before its fact is.
            listed: Listed::read(run).await?,
            summaries,
        })
    }

    /// Keys of all weights files.
    pub fn files(&self) -> Vec<String> {
        self.listed.keys().cloned().collect()
    }

    /// Whether the weights of the push after `step` are there, in any generation.
    pub fn holds(&self, step: i64) -> bool {
        let mut of_step = self.facts.iter().filter(|fact| fact.step == step);
        of_step.any(|fact| self.listed.find(fact).is_some())
    }

    /// Keys of what nothing needs: uploads that were never published and are old, summaries that
    /// newer ones replace, and of a run that is closed all weights but the newest version's.
    pub fn unneeded(&self, run: &Location, is_closed: bool, now: SystemTime) -> Vec<String> {
        let newest = self.facts.last().and_then(|fact| self.listed.find(fact));
        let is_last = |key: &String| newest.as_ref() == Some(key);
        let book = self.book(run);
        let mut found = self.listed.orphans(&book, now);
        if is_closed {
            let retired = self
                .listed
                .keys()
                .filter(|key| book.holds(key) && !is_last(key));
            found.extend(retired.cloned());
        }
        let replaced = self.summaries.len().saturating_sub(1);
        found.extend_from_slice(&self.summaries[..replaced]);
        found
    }

    fn book(&self, run: &Location) -> Book {
        let mut book = Book::default();
        for fact in &self.facts {
            if let Some(key) = self.listed.find(fact) {
                let published = fact.published(run, &key);
                book.insert(fact.push_id.clone(), published, Snapshot::Kept(key));
            }
        }
        book
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::{StorageConfig, Stores};
    use std::time::Duration;

    fn fact(version: u64) -> Fact {
        Fact {
            nonce: String::new(),
            push_id: "p".into(),
            version,
            generation: 0,
            step: version as i64 - 1,
            digest: format!("d{version}"),
            snapshot: format!("snapshots/d{version}.x.safetensors"),
            logit_scale: 1.0,
            logit_bias: None,
        }
    }

    #[tokio::test]
    async fn nothing_is_unneeded_that_a_run_may_ask_for() {
        let run = Stores::new(StorageConfig::default())
            .open("memory:///runs/r")
            .unwrap();
        for fact in [fact(1), fact(2)] {
            let bytes = serde_json::to_vec(&fact).unwrap();
            run.put(&fact.key(), bytes.into()).await.unwrap();
            run.put(&fact.snapshot, "w".into()).await.unwrap();
        }
        let orphan = "snapshots/d3.y.safetensors";
        for key in [orphan, "push-summaries/01.json", "push-summaries/02.json"] {
            run.put(key, "{}".into()).await.unwrap();
        }
        let stored = Stored::read(&run).await.unwrap();
        let (now, day) = (SystemTime::now(), Duration::from_secs(25 * 3600));
        let replaced = "push-summaries/01.json";
        assert_eq!(stored.unneeded(&run, false, now), [replaced]);
        assert_eq!(
            stored.unneeded(&run, false, now + day),
            [orphan, replaced],
            "an upload that is on its way is left alone"
        );
        let first = "snapshots/d1.x.safetensors";
        assert_eq!(stored.unneeded(&run, true, now), [first, replaced]);
        assert!(stored.holds(0) && !stored.holds(2));
    }
}
