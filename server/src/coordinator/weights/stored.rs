//! The weights of a run as they lie in the state, for commands that look at it from outside.
use super::{
    Book, book_of,
    history::{self, SUMMARIES},
    publish::Fact,
    snapshots::Listed,
};
use crate::{coordinator::weights::Published, error::Result, storage::Location};
use std::time::SystemTime;
use superbatch_proto::v1::WeightsVersion;

/// Returns the weights of a version; `None` where their file is no longer there.
///
/// # Errors
/// `StorageUnreachable`; `Internal` if the fact cannot be read.
pub async fn find(run: &Location, version: &WeightsVersion) -> Result<Option<Published>> {
    let key = Fact::key_of(version.generation, version.step);
    let Some(bytes) = run.find(&key).await? else {
        return Ok(None);
    };
    let fact = Fact::parse(&bytes, &run.uri_of(&key))?;
    let file = Listed::read(run).await?.find(&fact);
    Ok(file
        .filter(|_| fact.digest == version.digest)
        .map(|key| fact.published(run, &key)))
}

/// What lies there.
pub struct Stored {
    /// Publications, read one by one and not from a summary, by version.
    pub facts: Vec<Fact>,
    listed: Listed,
    /// All of them, and the roll-backs: what serves for a version may be an older one.
    book: Book,
    /// Keys of summaries, rising: the last one is in use.
    summaries: Vec<String>,
}

impl Stored {
    /// # Errors
    /// `StorageUnreachable`; `Internal` if a fact cannot be read.
    pub async fn read(run: &Location) -> Result<Self> {
        let mut facts = history::read_each(run).await?;
        facts.sort_by_key(|fact| fact.version);
        let summaries = run.list(SUMMARIES).await?.into_iter();
        let mut summaries: Vec<String> = summaries.map(|(key, _)| key).collect();
        summaries.sort();
        let (book, listed) = book_of(run, &facts).await?;
        Ok(Self {
            facts,
            listed,
            book,
            summaries,
        })
    }

    /// Returns the keys of all weights files.
    pub fn files(&self) -> Vec<String> {
        self.listed.keys().cloned().collect()
    }

    /// Returns whether the weights that serve for the push after `step` are there, in any
    /// generation.
    pub fn holds(&self, step: i64) -> bool {
        let of_step = self.facts.iter().filter(|fact| fact.step == step);
        let mut serving = of_step.map(|fact| self.book.in_force(fact.version));
        // Version 0 is the initial learner, which is no file of the run.
        serving.any(|version| version == 0 || self.book.kept(version).is_some())
    }

    /// Returns keys of what nothing needs: uploads that were never published and are old, summaries
    /// that newer ones replace, and of a run that is closed all weights but those in force.
    pub fn unneeded(&self, is_closed: bool, now: SystemTime) -> Vec<String> {
        let in_force = self.book.in_force(self.book.last_version());
        let in_force = self.facts.iter().find(|fact| fact.version == in_force);
        let in_force = in_force.and_then(|fact| self.listed.find(fact));
        let serves = |key: &String| in_force.as_ref() == Some(key);
        let mut found = self.listed.orphans(&self.book, now);
        if is_closed {
            let retired = self
                .listed
                .keys()
                .filter(|key| self.book.holds(key) && !serves(key));
            found.extend(retired.cloned());
        }
        let replaced = self.summaries.len().saturating_sub(1);
        found.extend_from_slice(&self.summaries[..replaced]);
        found
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
        assert_eq!(stored.unneeded(false, now), [replaced]);
        assert_eq!(
            stored.unneeded(false, now + day),
            [orphan, replaced],
            "an upload that is on its way is left alone"
        );
        let first = "snapshots/d1.x.safetensors";
        assert_eq!(stored.unneeded(true, now), [first, replaced]);
        assert!(stored.holds(0) && !stored.holds(2));
    }

    #[tokio::test]
    async fn what_serves_for_rolled_back_weights_is_there_and_is_kept() {
        let run = Stores::new(StorageConfig::default())
            .open("memory:///runs/r")
            .unwrap();
        // As a fork has them: versions 3 and 4 were taken back, and their files were not copied.
        for fact in [1, 2, 3, 4].map(fact) {
            let bytes = serde_json::to_vec(&fact).unwrap();
            run.put(&fact.key(), bytes.into()).await.unwrap();
            if fact.version < 3 {
                run.put(&fact.snapshot, "w".into()).await.unwrap();
            }
        }
        let lost = Stored::read(&run).await.unwrap();
        assert!(!lost.holds(2) && !lost.holds(3), "nothing serves for them");
        let back = |to| format!(r#"{{"nonce":"n","to":{to},"through":4}}"#);
        run.put("rollbacks/000000.json", back(1).into())
            .await
            .unwrap();
        let stored = Stored::read(&run).await.unwrap();
        assert!([0, 1, 2, 3].iter().all(|step| stored.holds(*step)));
        let now = SystemTime::now();
        let [first, second] = [1, 2].map(|version| fact(version).snapshot);
        assert_eq!(stored.unneeded(true, now), std::slice::from_ref(&second));

        // Taken back to the learner that the run began with: it needs none of them.
        run.put("rollbacks/000001.json", back(0).into())
            .await
            .unwrap();
        let stored = Stored::read(&run).await.unwrap();
        assert!(stored.holds(3));
        assert_eq!(stored.unneeded(true, now), [first, second]);
        run.delete("snapshots/d1.x.safetensors").await.unwrap();
        assert!(Stored::read(&run).await.unwrap().holds(0));
    }
}
