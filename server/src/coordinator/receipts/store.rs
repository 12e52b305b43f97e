//! A run's receipts in object storage: one fact for each step and generation, in an object of its
//! own or in a pack with others.
mod listing;
mod packed;

use super::{
    accounts::largest,
    before::Before,
    packs::{Pack, Packs},
    parquet::{self, Gathered},
    summaries,
};
use crate::{
    blocking::blocking,
    coordinator::facts::chain::Chain,
    error::{Error, Result},
    storage::{Budget, Created, Location},
};
use bytes::Bytes;
use futures::future::BoxFuture;
use std::sync::Arc;
use superbatch_proto::v1::{Accounts, Receipt, ReceiptSummary};

/// Steps in one folder, so that the newest step is found without listing a whole run.
pub(super) const FOLDER_STEPS: u64 = 1000;
/// Bytes of a file's end that are read for its summary. Most summaries fit; a larger one costs a
/// second read.
const SUMMARY_BYTES: u64 = 64 << 10;

/// The outcome of a commit.
#[derive(Debug, Clone, PartialEq)]
pub enum Committed {
    Ours,
    /// An earlier attempt of this writer had succeeded. What it wrote is in force: it may hold
    /// other totals than this attempt's, since others may have committed in between.
    OursEarlier(Box<Receipt>),
    /// Another writer was first. Its receipt is in force and is served.
    Theirs(Box<Receipt>),
}

/// The receipts below a run's location, `receipts/{step/1000}/{step}/{generation}.parquet` or in
/// packs ([`Packs`]), and of a fork those of the run that it left.
///
/// A receipt that is in a pack counts as the pack has it. Its own object may be there too, for as
/// long as it takes to delete it, and counts if the pack is damaged and no object of it is gone.
#[derive(Debug, Clone)]
pub struct Receipts {
    run: Location,
    packs: Arc<Packs>,
    before: Option<Arc<Before>>,
}

/// Where a receipt is.
enum Found<B> {
    /// In an object of its own, with what was read of it.
    Single(String, B),
    Packed(Pack),
    /// With the run that this one left.
    Elsewhere,
}

impl Receipts {
    pub fn new(run: Location) -> Self {
        Self::forked(run, None)
    }

    /// Makes the receipts of a fork at `run`, with the history of the run that it left.
    pub fn forked(run: Location, before: Option<Before>) -> Self {
        Self {
            packs: Arc::new(Packs::new(run.clone())),
            run,
            before: before.map(Arc::new),
        }
    }

    pub(super) fn run(&self) -> &Location {
        &self.run
    }

    pub fn packs(&self) -> &Packs {
        &self.packs
    }

    /// Returns the history of a fork.
    pub(super) fn before(&self) -> Option<&Before> {
        self.before.as_deref()
    }

    /// Returns the run that has the receipt of `step`, if that is another one: the first generation
    /// of a fork has the other run's steps before its own.
    fn elsewhere(&self, step: u64, generation: u32) -> Option<&Before> {
        let before = self.before();
        before.filter(|before| generation == 0 && step < before.step)
    }

    /// Commits a step: creates its receipt unless there is one, by one attempt. Committing the same
    /// receipt again returns `Ours` again.
    ///
    /// # Errors
    /// `StorageUnreachable`; `Internal` for a receipt without a writer's nonce, by which a writer
    /// recognises its own.
    pub async fn commit(&self, receipt: &Receipt, budget: &Budget) -> Result<Committed> {
        let Some(summary) = receipt
            .summary
            .as_ref()
            .filter(|summary| !summary.writer_nonce.is_empty())
        else {
            return Err(Error::internal(
                "a receipt without a writer's nonce cannot be committed",
            ));
        };
        let key = key(summary.step, summary.generation);
        let gathered = Gathered::of(receipt)?;
        let bytes = blocking("writing a receipt", move || gathered.encode()).await?;
        match self.run.create_once(&key, bytes, budget).await? {
            Created::Ours => Ok(Committed::Ours),
            Created::Theirs(bytes) => {
                let theirs = decoded(bytes).await?;
                // Compared by nonce and not by bytes: the retried receipt may differ in bytes from
                // the one that was written (another compression library, another field), and yet be
                // ours.
                let nonce = theirs.summary.as_ref().map(|theirs| &theirs.writer_nonce);
                Ok(if nonce == Some(&summary.writer_nonce) {
                    Committed::OursEarlier(Box::new(theirs))
                } else {
                    Committed::Theirs(Box::new(theirs))
                })
            }
        }
    }

    /// Returns the receipt of a step in one generation.
    pub async fn find(&self, step: u64, generation: u32) -> Result<Option<Receipt>> {
        let found = self.find_first(step, &[generation]).await?;
        Ok(found.map(|(_, receipt)| receipt))
    }

    /// Returns the receipt that holds for a step in the trajectory of a generation.
    pub async fn find_of(
        &self,
        chain: &Chain,
        step: u64,
        generation: u32,
    ) -> Result<Option<Receipt>> {
        let generations = chain.candidates(step, generation);
        let found = self.find_first(step, &generations).await?;
        Ok(found.map(|(_, receipt)| receipt))
    }

    /// Returns the first of `generations` that has a receipt of the step, and the receipt.
    pub async fn find_first(
        &self,
        step: u64,
        generations: &[u32],
    ) -> Result<Option<(u32, Receipt)>> {
        let read = |key: String| async move { self.run.find(&key).await };
        let Some((generation, found)) = self.locate(step, generations, read).await? else {
            return Ok(None);
        };
        let receipt = match found {
            Found::Single(key, bytes) => Some(self.single(&key, bytes).await?),
            Found::Packed(pack) => Some(self.packed(&pack, step).await?),
            Found::Elsewhere => self.of_before(|before| before.find(step)).await?,
        };
        Ok(receipt.map(|receipt| (generation, receipt)))
    }

    /// As [`Self::find_of`], of a step that is not committed as far as the run's owner knows: looks
    /// at objects alone.
    ///
    /// What is packed was committed long before, and the owner would know it. If it does not, the
    /// run is not its own any more, which it learns before it serves anything (`step/decide.rs`).
    pub async fn find_new(
        &self,
        chain: &Chain,
        step: u64,
        generation: u32,
    ) -> Result<Option<Receipt>> {
        let generations = chain.candidates(step, generation);
        let is_elsewhere = |generation: &u32| self.elsewhere(step, *generation).is_some();
        if generations.iter().any(is_elsewhere) {
            return self.find_of(chain, step, generation).await;
        }
        for generation in generations {
            let key = key(step, generation);
            if let Some(bytes) = self.run.find(&key).await? {
                return self.single(&key, bytes).await.map(Some);
            }
        }
        Ok(None)
    }

    async fn single(&self, key: &str, bytes: Bytes) -> Result<Receipt> {
        let receipt = decoded(bytes).await;
        receipt.map_err(|e| e.about(self.run.uri_of(key)).with("file", key))
    }

    /// Finds the first of `generations` that has a receipt of the step; `read` reads objects.
    async fn locate<B, F: Future<Output = Result<Option<B>>>>(
        &self,
        step: u64,
        generations: &[u32],
        read: impl Fn(String) -> F,
    ) -> Result<Option<(u32, Found<B>)>> {
        let (known, mut absent, mut found) = (self.packs.known(), Vec::new(), None);
        for &generation in generations {
            let here = if self.elsewhere(step, generation).is_some() {
                Some(Found::Elsewhere)
            } else if let Some(pack) = known.find(step, generation) {
                Some(Found::Packed(pack.clone()))
            } else {
                let key = key(step, generation);
                let read = read(key.clone()).await?;
                read.map(|bytes| Found::Single(key, bytes))
            };
            match here {
                Some(here) => {
                    found = Some((generation, here));
                    break;
                }
                None => absent.push(generation),
            }
        }
        if absent.is_empty() {
            return Ok(found);
        }
        // They may have been packed since the last look.
        let now = self.packs.look().await?;
        let packed = absent
            .into_iter()
            .find_map(|generation| Some((generation, now.find(step, generation)?)));
        Ok(match packed {
            Some((generation, pack)) => Some((generation, Found::Packed(pack.clone()))),
            None => found,
        })
    }

    async fn of_before<'a, T>(
        &'a self,
        find: impl FnOnce(&'a Before) -> BoxFuture<'a, Result<Option<T>>>,
    ) -> Result<Option<T>> {
        match self.before() {
            Some(before) => find(before).await,
            None => Ok(None),
        }
    }

    /// Returns the step before which the trajectory that `chain` describes is another run's.
    pub fn forked_at(&self, chain: &Chain) -> u64 {
        let before = self.before();
        before.map_or(0, |before| before.step.min(chain.kept_of(0)))
    }

    /// As [`Self::find`], without the rows: reads only the end of the file.
    pub async fn summary(&self, step: u64, generation: u32) -> Result<Option<ReceiptSummary>> {
        let found = self.summary_first(step, &[generation]).await?;
        Ok(found.map(|(_, summary)| summary))
    }

    /// As [`Self::find_first`], without the rows.
    pub async fn summary_first(
        &self,
        step: u64,
        generations: &[u32],
    ) -> Result<Option<(u32, ReceiptSummary)>> {
        let read = |key: String| async move { self.run.end(&key, SUMMARY_BYTES).await };
        let Some((generation, found)) = self.locate(step, generations, read).await? else {
            return Ok(None);
        };
        let summary = match found {
            Found::Single(_, (end, size)) => match parquet::decode_summary(&end, size) {
                Some(summary) => Some(summary),
                None => {
                    let whole = self.find(step, generation).await?;
                    whole.and_then(|receipt| receipt.summary)
                }
            },
            Found::Packed(pack) => self.packed_summary(&pack, step).await?,
            Found::Elsewhere => self.of_before(|before| before.summary(step)).await?,
        };
        Ok(summary.map(|summary| (generation, summary)))
    }

    /// Notes how far the run is committed if a commit took it from `before` to `next`, once for
    /// each folder.
    pub fn summarise_after(&self, before: u64, next: u64, generation: u32) {
        if before / FOLDER_STEPS != next / FOLDER_STEPS {
            let receipts = self.clone();
            tokio::spawn(async move { receipts.summarise(next, generation).await });
        }
    }

    async fn summarise(&self, next: u64, generation: u32) {
        summaries::write(&self.run, next, generation).await;
    }

    /// Returns the step before which, by the summaries of the run, all steps are committed in the
    /// trajectory that `chain` describes.
    pub async fn summarised(&self, chain: &Chain) -> Result<u64> {
        summaries::known(&self.run, chain).await
    }

    /// Returns the run's totals from its committed receipts `listed`: those of the last commit,
    /// which are the largest. The last commit need not be the last step: commits may be out of
    /// order by `max_ahead`, so that many receipts are read.
    pub async fn totals(&self, listed: Vec<(u64, u32)>, max_ahead: usize) -> Result<Accounts> {
        let mut totals = Vec::new();
        for (step, generation) in last(listed, max_ahead) {
            let summary = self.summary(step, generation).await?;
            totals.extend(summary.and_then(|summary| summary.run_totals));
        }
        Ok(largest(totals).unwrap_or_default())
    }
}

/// Returns those of the (step, generation) `listed` that may be of the last commit.
fn last(mut listed: Vec<(u64, u32)>, max_ahead: usize) -> Vec<(u64, u32)> {
    listed.sort_by_key(|(step, generation)| (*generation, *step));
    listed.into_iter().rev().take(max_ahead + 1).collect()
}

/// Parquet of a hundred thousand rows takes long enough to hold up every call of the process.
async fn decoded(bytes: Bytes) -> Result<Receipt> {
    blocking("reading a receipt", move || parquet::decode(bytes)).await
}

pub(super) fn folder(number: u64) -> String {
    format!("receipts/{number}")
}

fn folder_of_step(step: u64) -> String {
    format!("{}/{step}", folder(step / FOLDER_STEPS))
}

pub(super) fn key(step: u64, generation: u32) -> String {
    format!("{}/{generation}.parquet", folder_of_step(step))
}

/// Returns the (step, generation) of a receipt's key; `None` for any other object there.
pub(super) fn parse(found: &str) -> Option<(u64, u32)> {
    let (step, generation) = found.strip_suffix(".parquet")?.rsplit_once('/')?;
    let (_, step) = step.rsplit_once('/')?;
    let parsed = (step.parse().ok()?, generation.parse().ok()?);
    (key(parsed.0, parsed.1) == found).then_some(parsed)
}

#[cfg(test)]
mod tests;
