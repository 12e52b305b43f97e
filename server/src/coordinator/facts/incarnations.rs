//! Starts of the trainer, in the order in which their first ranks arrived: facts at
//! `incarnations/{n}.json`. They are durable because the last one is the trainer that runs now:
//! after a restart of the coordinator a late rank of an older start must still be refused.
use super::numbered;
use crate::{
    error::{Error, Result},
    storage::{Created, Location, nonce},
};
use serde::{Deserialize, Serialize};
use tokio::sync::Mutex;

#[derive(Debug, Serialize, Deserialize)]
struct IncarnationFact {
    incarnation: String,
    nonce: String,
}

/// The incarnations of one run.
#[derive(Debug)]
pub struct Incarnations {
    run: Location,
    known: Mutex<Vec<String>>,
}

impl Incarnations {
    /// # Errors
    /// `StorageUnreachable`; `Internal` for a damaged fact.
    pub async fn load(run: &Location) -> Result<Self> {
        let facts = numbered::read(run, 0, |n| key(n as usize)).await?;
        let facts = facts.iter().enumerate();
        let known = facts
            .map(|(n, bytes)| decode(run, n, bytes))
            .collect::<Result<_>>()?;
        Ok(Self {
            run: run.clone(),
            known: Mutex::new(known),
        })
    }

    pub async fn known(&self) -> Vec<String> {
        self.known.lock().await.clone()
    }

    /// Adds `incarnation` as the newest one, unless it is known.
    pub async fn add(&self, incarnation: &str) -> Result<()> {
        let mut known = self.known.lock().await;
        while !known.iter().any(|one| one == incarnation) {
            let fact = IncarnationFact {
                incarnation: incarnation.to_owned(),
                nonce: nonce(),
            };
            let bytes = serde_json::to_vec(&fact).expect("plain data encodes");
            // The lock orders the calls of this process. Another coordinator that took the run over
            // may create the same number; its incarnation then comes first, and the loop tries the
            // next number. So the order is the same for every process that reads the facts.
            let found = match self.run.create(&key(known.len()), bytes.into()).await? {
                Created::Ours => incarnation.to_owned(),
                Created::Theirs(bytes) => decode(&self.run, known.len(), &bytes)?,
            };
            known.push(found);
        }
        Ok(())
    }
}

fn key(number: usize) -> String {
    format!("incarnations/{number}.json")
}

fn decode(run: &Location, number: usize, bytes: &[u8]) -> Result<String> {
    let fact: IncarnationFact = serde_json::from_slice(bytes).map_err(|e| {
        Error::internal(format!("{} is no incarnation", run.uri_of(&key(number)))).because(e)
    })?;
    Ok(fact.incarnation)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::{StorageConfig, Stores};

    #[tokio::test]
    async fn their_order_outlives_the_process() {
        let run = Stores::new(StorageConfig::default())
            .open("memory:///runs/r")
            .unwrap();
        let first = Incarnations::load(&run).await.unwrap();
        for incarnation in ["a", "b", "a", ""] {
            first.add(incarnation).await.unwrap();
        }
        let second = Incarnations::load(&run).await.unwrap();
        assert_eq!(second.known().await, ["a", "b", ""]);
        first.add("c").await.unwrap();
        second.add("d").await.unwrap();
        assert_eq!(
            second.known().await,
            ["a", "b", "", "c", "d"],
            "another writer's is kept"
        );
    }
}
