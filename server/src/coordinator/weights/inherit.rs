//! The weights that a fork takes over from the run that it is a fork of.
//!
//! What is taken over is part of the fork's definition, so that it is fixed together with the run:
//! were it written before, a run of the same id that never came to be would leave its weights to
//! the next one; were it chosen afterwards, the other run could have deleted a file by then, and
//! the fork could never be opened.
use super::{
    Book,
    book::Snapshot,
    history,
    look::{self, RollBack},
    publish::Fact,
    snapshots::{self, Listed},
};
use crate::{
    coordinator::facts::chain::{Began, Chain},
    error::{Error, Result},
    storage::{Location, nonce},
};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use superbatch_proto::v1::Reason;

/// What a fork takes over, as its definition has it.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Inheritance {
    pushes: Vec<Fact>,
    rollbacks: Vec<RollBack>,
}

/// The pushes that a fork needs, by their steps.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Needed {
    /// The first of those that its next steps may be scored with.
    pub oldest: i64,
    /// The last one before its own.
    pub last: i64,
    /// Those that are the reference of its phases.
    pub references: BTreeSet<i64>,
}

/// What a fork can take over now.
#[derive(Debug, Default)]
pub struct Inherited {
    pub fact: Inheritance,
    /// Keys of the files in the other run, by their keys in the fork.
    pub(super) files: BTreeMap<String, String>,
    /// Steps whose weights are no longer there, rising.
    pub lost: BTreeSet<i64>,
}

/// What is known of a run's pushes.
struct ParentPushes<'a> {
    facts: &'a [Fact],
    book: Book,
    began: Vec<Began>,
    listed: &'a Listed,
}

impl ParentPushes<'_> {
    /// Returns the pushes of the trajectory up to step `last`, by their steps.
    fn up_to(&self, last: i64) -> BTreeMap<i64, &Fact> {
        let steps = self.facts.iter().map(|fact| fact.step);
        let steps: BTreeSet<i64> = steps.filter(|step| *step <= last).collect();
        let of_step = |step: i64| Some((step, self.of(self.book.push_of(step, &self.began)?)?));
        steps.into_iter().filter_map(of_step).collect()
    }

    fn of(&self, version: u64) -> Option<&Fact> {
        self.facts.iter().find(|fact| fact.version == version)
    }

    /// Returns the versions to take over, each with whether its weights are needed, and the steps
    /// whose weights are lost.
    ///
    /// # Errors
    /// `WeightsMissing` if weights of another trajectory serve for a step.
    fn choose(&self, needed: &Needed) -> Result<(BTreeMap<u64, bool>, BTreeSet<i64>)> {
        let pushed = self.up_to(needed.last);
        // The newest one before the oldest serves where a step is scored with what is there.
        let newest = pushed.keys().next_back().copied();
        let from = needed.oldest.min(newest.unwrap_or(needed.oldest));
        let is_needed = |step: &i64| *step >= from || needed.references.contains(step);
        let not_pushed = |step: &&i64| !pushed.contains_key(step);
        let mut lost: BTreeSet<i64> = needed
            .references
            .iter()
            .filter(not_pushed)
            .copied()
            .collect();
        let mut chosen = BTreeMap::new();
        for (step, own) in pushed.iter().filter(|(step, _)| is_needed(step)) {
            let serves = self.book.in_force(own.version);
            chosen.entry(own.version).or_insert(false);
            // Other weights than the phase names would be another reference.
            if serves != own.version && needed.references.contains(step) {
                lost.insert(*step);
            }
            // Version 0 is the learner that both runs began with.
            if serves == 0 {
                continue;
            }
            let stand_in = self.of(serves);
            let stand_in = stand_in
                .filter(|at| {
                    pushed
                        .get(&at.step)
                        .is_some_and(|of| of.version == at.version)
                })
                .ok_or_else(|| of_no_trajectory(*step, serves))?;
            if self.listed.find(stand_in).is_none() {
                lost.insert(*step);
            }
            chosen.insert(serves, true);
        }
        Ok((chosen, lost))
    }
}

fn of_no_trajectory(step: i64, version: u64) -> Error {
    let message = format!(
        "the weights pushed after step {step} were rolled back to version {version}, which a \
        rewind took back; roll back to a version of this trajectory, or fork at another step"
    );
    Error::new(Reason::WeightsMissing, message).with("step", step)
}

/// Returns what a fork takes over of `needed`, of the trajectory of `chain`: pushes under their own
/// steps and versions, those that serve in their place, and the roll-backs that say so.
///
/// # Errors
/// `WeightsMissing` if weights of another trajectory serve for a step; `StorageUnreachable`;
/// `Internal` if a fact cannot be read.
pub async fn inherited(parent: &Location, chain: &Chain, needed: &Needed) -> Result<Inherited> {
    let facts = history::read(parent).await?.facts;
    let listed = Listed::read(parent).await?;
    let rollbacks = look::facts(parent).await?;
    let mut book = Book::default();
    for fact in &facts {
        let key = fact.snapshot_key();
        book.insert(
            fact.push_id.clone(),
            fact.published(parent, &key),
            Snapshot::Kept(key),
        );
    }
    let numbers = rollbacks.iter().map(RollBack::numbers);
    numbers.for_each(|back| book.roll_back(back));
    let known = ParentPushes {
        facts: &facts,
        book,
        began: chain.began(),
        listed: &listed,
    };
    let (chosen, lost) = known.choose(needed)?;
    let newest = chosen.keys().next_back().copied().unwrap_or(0);
    let mut found = Inherited {
        lost,
        ..Inherited::default()
    };
    // One file for all versions of the same bytes: a trainer that resumes pushes its checkpoint's
    // weights for several steps.
    let mut keys: BTreeMap<&str, String> = BTreeMap::new();
    for (fact, serves) in chosen
        .iter()
        .filter_map(|(v, serves)| Some((known.of(*v)?, serves)))
    {
        let key = keys.entry(&fact.digest);
        let key = key
            .or_insert_with(|| snapshots::new_key(&fact.digest))
            .clone();
        if let Some(file) = known.listed.find(fact).filter(|_| *serves) {
            found.files.insert(key.clone(), file);
        }
        found.fact.pushes.push(Fact {
            nonce: nonce(),
            // As the client names it, so that a trainer which pushes it again is answered.
            push_id: format!("g0-s{}", fact.step),
            generation: 0,
            snapshot: key,
            ..fact.clone()
        });
    }
    let within = rollbacks.iter().filter_map(|back| back.up_to(newest));
    found.fact.rollbacks.extend(within);
    Ok(found)
}

impl Inherited {
    /// Copies the files into a fork at `own`. To be called before the fork is created. If one of
    /// them cannot be copied, those that were are deleted again: their keys are those of this call
    /// alone, and a fork that never comes to be has no run by which they could be found.
    ///
    /// # Errors
    /// `WeightsMissing` if one was deleted since; `StorageUnreachable`.
    pub async fn copy_files(&self, parent: &Location, own: &Location) -> Result<()> {
        let copied = self.try_copy_files(parent, own).await;
        if copied.is_err() {
            for key in self.files.keys() {
                if let Err(error) = own.delete(key).await {
                    tracing::debug!(uri = own.uri_of(key), %error, "no copy is deleted");
                }
            }
        }
        copied
    }

    async fn try_copy_files(&self, parent: &Location, own: &Location) -> Result<()> {
        for (key, file) in &self.files {
            if !parent.copy_to(file, own, key).await? {
                let uri = parent.uri_of(file);
                let message = format!(
                    "the weights at {uri} were deleted while the fork was opened; open it again"
                );
                return Err(Error::new(Reason::WeightsMissing, message).with("uri", uri));
            }
        }
        Ok(())
    }
}

impl Inheritance {
    /// Returns it for the fork's definition.
    ///
    /// # Errors
    /// `Internal`.
    pub fn to_value(&self) -> Result<Value> {
        serde_json::to_value(self).map_err(|e| Error::internal("cannot write a fact").because(e))
    }

    /// Reads it from the fork's definition; nothing is taken over if that does not say.
    ///
    /// # Errors
    /// `Internal`.
    pub fn from_value(value: &Value) -> Result<Self> {
        if value.is_null() {
            return Ok(Self::default());
        }
        let read = Self::deserialize(value);
        read.map_err(|e| Error::internal("a fork does not say what it takes over").because(e))
    }

    /// Writes what the fork at `own` takes over, unless it is there. Its files are there already.
    ///
    /// # Errors
    /// `StorageUnreachable`.
    pub async fn write(&self, own: &Location) -> Result<()> {
        // What is there already has the same bytes: all come from the fork's definition.
        for fact in &self.pushes {
            own.create(&fact.key(), encoded(fact)?.into()).await?;
        }
        for (number, back) in self.rollbacks.iter().enumerate() {
            own.create(&look::key(number), encoded(back)?.into())
                .await?;
        }
        Ok(())
    }
}

fn encoded(fact: &impl Serialize) -> Result<Vec<u8>> {
    serde_json::to_vec(fact).map_err(|e| Error::internal("cannot write a fact").because(e))
}
