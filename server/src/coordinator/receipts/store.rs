//! A run's receipts in object storage: one fact for each step and generation.
use super::{accounts::largest, before::Before, parquet, summaries};
use crate::{
    blocking::blocking,
    coordinator::facts::{chain::Chain, trail::Trail},
    error::{Error, Result},
    storage::{Budget, Created, Location},
};
use bytes::Bytes;
use futures::{FutureExt, StreamExt, TryStreamExt, stream};
use std::sync::Arc;
use superbatch_proto::v1::{Accounts, Receipt, ReceiptSummary};

/// Steps in one folder, so that the newest step is found without listing a whole run.
const FOLDER_STEPS: u64 = 1000;
/// Folders that are listed at the same time.
const LISTS_AT_ONCE: usize = 8;
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

/// The receipts below a run's location, `receipts/{step/1000}/{step}/{generation}.parquet`, and of
/// a fork those of the run that it left.
#[derive(Debug, Clone)]
pub struct Receipts {
    run: Location,
    before: Option<Arc<Before>>,
}

impl Receipts {
    pub fn new(run: Location) -> Self {
        Self { run, before: None }
    }

    /// Makes the receipts of a fork at `run`, with the history of the run that it left.
    pub fn forked(run: Location, before: Option<Before>) -> Self {
        let before = before.map(Arc::new);
        Self { run, before }
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
        let bytes = encoded(receipt.clone()).await?;
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
        if let Some(before) = self.elsewhere(step, generation) {
            return before.find(step).await;
        }
        let key = key(step, generation);
        let Some(bytes) = self.run.find(&key).await? else {
            return Ok(None);
        };
        let receipt = decoded(bytes).await;
        let named = receipt.map_err(|e| e.about(self.run.uri_of(&key)).with("file", &key));
        named.map(Some)
    }

    /// Returns the receipt that holds for a step in the trajectory of a generation.
    pub async fn find_of(
        &self,
        chain: &Chain,
        step: u64,
        generation: u32,
    ) -> Result<Option<Receipt>> {
        for generation in chain.candidates(step, generation) {
            if let Some(receipt) = self.find(step, generation).await? {
                return Ok(Some(receipt));
            }
        }
        Ok(None)
    }

    /// Returns the step before which the trajectory that `chain` describes is another run's.
    pub fn forked_at(&self, chain: &Chain) -> u64 {
        let before = self.before();
        before.map_or(0, |before| before.step.min(chain.kept_of(0)))
    }

    /// As [`Self::find`], without the rows: reads only the end of the file.
    pub async fn summary(&self, step: u64, generation: u32) -> Result<Option<ReceiptSummary>> {
        if let Some(before) = self.elsewhere(step, generation) {
            return before.summary(step).await;
        }
        let key = key(step, generation);
        let Some((end, size)) = self.run.end(&key, SUMMARY_BYTES).await? else {
            return Ok(None);
        };
        if let Some(summary) = parquet::decode_summary(&end, size) {
            return Ok(Some(summary));
        }
        Ok(self
            .find(step, generation)
            .await?
            .and_then(|receipt| receipt.summary))
    }

    /// Returns the newest committed step of the trajectory that `chain` describes. Lists only the
    /// newest folders.
    pub async fn newest(&self, chain: &Chain) -> Result<Option<u64>> {
        for number in self.folders().await?.into_iter().rev() {
            let holds = |(step, generation): &(u64, u32)| {
                chain
                    .candidates(*step, chain.current())
                    .contains(generation)
            };
            let found = self.list(&folder(number)).await?;
            if let Some((step, _)) = found.into_iter().rev().find(holds) {
                return Ok(Some(step));
            }
        }
        Ok(self.forked_at(chain).checked_sub(1))
    }

    /// As [`Self::newest`], with the receipts of which one is the run's last commit, whose totals
    /// are the run's: they are of the same moment as the newest step. See [`Self::totals`].
    pub async fn newest_commits(
        &self,
        chain: &Chain,
        max_ahead: usize,
    ) -> Result<(Option<u64>, Vec<(u64, u32)>)> {
        let (mut newest, mut listed) = (None, Vec::new());
        for number in self.folders().await?.into_iter().rev() {
            let holds = |(step, generation): &&(u64, u32)| {
                let holding = chain.candidates(*step, chain.current());
                holding.contains(generation)
            };
            let found = self.list(&folder(number)).await?;
            newest = newest.or_else(|| found.iter().rev().find(holds).map(|(step, _)| *step));
            listed.extend(found);
            if newest.is_some() && listed.len() > max_ahead {
                break;
            }
        }
        let newest = newest.or(self.forked_at(chain).checked_sub(1));
        Ok((newest, last(listed, max_ahead)))
    }

    /// Returns the committed steps of the trajectory that `chain` describes, and the totals of the
    /// run. Steps that a summary covers are not listed.
    ///
    /// # Errors
    /// `StorageUnreachable`; `Internal` if a receipt cannot be read.
    pub async fn opened(&self, chain: &Chain, max_ahead: u32) -> Result<(Trail, Accounts)> {
        let known = summaries::known(&self.run, chain).await?;
        let known = known.max(self.forked_at(chain));
        // With the receipts of the newest commits, whose totals are the run's.
        let from = known.saturating_sub(1 + u64::from(max_ahead)) / FOLDER_STEPS;
        let numbers = self.folders().await?;
        let lists = numbers.into_iter().filter(|number| *number >= from);
        let lists = lists.map(|number| async move { self.list(&folder(number)).await });
        let lists: Vec<_> = lists.map(FutureExt::boxed).collect();
        let lists = stream::iter(lists).buffered(LISTS_AT_ONCE);
        let listed: Vec<(u64, u32)> = lists.try_concat().await?;
        let holds = |(step, generation): &&(u64, u32)| {
            let holding = chain.candidates(*step, chain.current());
            holding.contains(generation)
        };
        let trail = Trail::beyond(known, listed.iter().filter(holds).map(|(step, _)| *step));
        if trail.next() >= known + 2 * FOLDER_STEPS {
            let (receipts, next, generation) = (self.clone(), trail.next(), chain.current());
            tokio::spawn(async move { receipts.summarise(next, generation).await });
        }
        let mut totals = self.totals(listed, max_ahead as usize).await?;
        let is_new = totals == Accounts::default();
        if let Some(before) = self.before().filter(|_| is_new) {
            totals = before.totals(before.step).await?;
        }
        Ok((trail, totals))
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

    /// Returns the numbers of the folders that hold receipts, rising.
    pub async fn folders(&self) -> Result<Vec<u64>> {
        let folders = self.run.folders("receipts").await?;
        let numbers = folders.iter().filter_map(|name| name.parse().ok());
        let mut numbers: Vec<u64> = numbers.collect();
        numbers.sort_unstable();
        Ok(numbers)
    }

    /// Returns all committed (step, generation), rising. Lists the whole run.
    pub async fn committed(&self) -> Result<Vec<(u64, u32)>> {
        self.list("receipts").await
    }

    /// Returns the committed (step, generation) of one folder, rising.
    pub async fn committed_in(&self, number: u64) -> Result<Vec<(u64, u32)>> {
        self.list(&folder(number)).await
    }

    async fn list(&self, below: &str) -> Result<Vec<(u64, u32)>> {
        let objects = self.run.list(below).await?;
        let mut steps: Vec<_> = objects.iter().filter_map(|(key, _)| parse(key)).collect();
        steps.sort_unstable();
        Ok(steps)
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
async fn encoded(receipt: Receipt) -> Result<Bytes> {
    blocking("writing a receipt", move || parquet::encode(&receipt)).await
}

async fn decoded(bytes: Bytes) -> Result<Receipt> {
    blocking("reading a receipt", move || parquet::decode(bytes)).await
}

fn folder(number: u64) -> String {
    format!("receipts/{number}")
}

fn folder_of_step(step: u64) -> String {
    format!("{}/{step}", folder(step / FOLDER_STEPS))
}

fn key(step: u64, generation: u32) -> String {
    format!("{}/{generation}.parquet", folder_of_step(step))
}

/// Returns the (step, generation) of a receipt's key; `None` for any other object there.
fn parse(found: &str) -> Option<(u64, u32)> {
    let (step, generation) = found.strip_suffix(".parquet")?.rsplit_once('/')?;
    let (_, step) = step.rsplit_once('/')?;
    let parsed = (step.parse().ok()?, generation.parse().ok()?);
    (key(parsed.0, parsed.1) == found).then_some(parsed)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        coordinator::{facts::chain::Rewound, receipts::parquet::tests::sample},
        storage::{StorageConfig, Stores},
    };

    /// The same test on a store in memory and on a disk.
    async fn on_each_store<F: Future<Output = ()>>(test: impl Fn(Receipts, Location) -> F) {
        let folder = tempfile::tempdir().unwrap();
        for uri in [
            "memory:///state".to_owned(),
            format!("file://{}", folder.path().display()),
        ] {
            let run = Stores::new(StorageConfig::default())
                .open(&uri)
                .unwrap()
                .below("runs/r");
            test(Receipts::new(run.clone()), run).await;
        }
    }

    #[tokio::test]
    async fn the_first_writer_decides_a_step_and_a_repeat_is_still_its_own() {
        on_each_store(|receipts, run| async move {
            let (a, b) = (sample(1234, 2, "a"), sample(1234, 2, "b"));
            assert_eq!(receipts.find(1234, 2).await.unwrap(), None);
            assert_eq!(
                receipts.commit(&a, &Budget::default()).await.unwrap(),
                Committed::Ours
            );
            assert_eq!(
                receipts.commit(&a, &Budget::default()).await.unwrap(),
                Committed::Ours
            );
            assert_eq!(
                receipts.commit(&b, &Budget::default()).await.unwrap(),
                Committed::Theirs(Box::new(a.clone()))
            );
            assert_eq!(receipts.find(1234, 2).await.unwrap(), Some(a));
            assert!(
                run.find("receipts/1/1234/2.parquet")
                    .await
                    .unwrap()
                    .is_some(),
                "the documented key"
            );
            assert!(
                receipts
                    .commit(&sample(1, 0, ""), &Budget::default())
                    .await
                    .is_err(),
                "no nonce"
            );
        })
        .await;
    }

    #[tokio::test]
    async fn totals_are_those_of_the_newest_commit_whatever_its_step() {
        on_each_store(|receipts, _| async move {
            for (step, scanned) in [(0, 10), (2, 20), (1, 30)] {
                let mut receipt = sample(step, 0, "a");
                let summary = receipt.summary.get_or_insert_default();
                summary
                    .run_totals
                    .get_or_insert_default()
                    .candidates_scanned = scanned;
                receipts.commit(&receipt, &Budget::default()).await.unwrap();
            }
            let listed = receipts.committed().await.unwrap();
            let totals = receipts.totals(listed, 2).await.unwrap();
            assert_eq!(totals.candidates_scanned, 30);
            assert_eq!(
                receipts.totals(Vec::new(), 2).await.unwrap(),
                Accounts::default()
            );
        })
        .await;
    }

    /// What a summary knows is not looked at again: there it may even be gone.
    #[tokio::test]
    async fn a_run_is_opened_from_a_summary_of_what_is_behind_it() {
        on_each_store(|receipts, run| async move {
            for step in (0..2).chain(999..1003) {
                let mut receipt = sample(step, 0, "a");
                let summary = receipt.summary.get_or_insert_default();
                let totals = summary.run_totals.get_or_insert_default();
                totals.candidates_scanned = step + 1;
                let committed = receipts.commit(&receipt, &Budget::default()).await;
                committed.unwrap();
            }
            let chain = Chain::default();
            let (trail, totals) = receipts.opened(&chain, 2).await.unwrap();
            assert_eq!((trail.next(), trail.newest()), (2, Some(1002)));
            assert_eq!(totals.candidates_scanned, 1003);
            receipts.summarise(1002, 0).await;
            let (trail, totals) = receipts.opened(&chain, 2).await.unwrap();
            assert_eq!((trail.next(), trail.newest()), (1003, Some(1002)));
            assert_eq!(totals.candidates_scanned, 1003);
            // Old state has none, and a rewind takes steps back.
            let rewound = |to_step, replay| {
                let generation = 1;
                Chain::new(vec![Rewound {
                    generation,
                    to_step,
                    replay,
                }])
            };
            for (chain, next) in [(rewound(1, false), 1), (rewound(1, true), 1003)] {
                let (trail, totals) = receipts.opened(&chain, 2).await.unwrap();
                assert_eq!((trail.next(), totals.candidates_scanned), (next, 1003));
            }
            assert_eq!(run.list("trail-summaries").await.unwrap().len(), 1);
        })
        .await;
    }

    #[tokio::test]
    async fn of_two_writers_at_once_exactly_one_wins() {
        on_each_store(|receipts, _| async move {
            for step in 0..20 {
                let (a, b) = (sample(step, 0, "a"), sample(step, 0, "b"));
                let (first, second) = (receipts.clone(), receipts.clone());
                let (a2, b2) = (a.clone(), b.clone());
                let race = (
                    tokio::spawn(
                        async move { first.commit(&a2, &Budget::default()).await.unwrap() },
                    ),
                    tokio::spawn(
                        async move { second.commit(&b2, &Budget::default()).await.unwrap() },
                    ),
                );
                let outcome = (race.0.await.unwrap(), race.1.await.unwrap());
                let winner = receipts.find(step, 0).await.unwrap().unwrap();
                let expected = if winner == a {
                    (Committed::Ours, Committed::Theirs(Box::new(a)))
                } else {
                    (Committed::Theirs(Box::new(b)), Committed::Ours)
                };
                assert_eq!(outcome, expected);
            }
        })
        .await;
    }

    #[tokio::test]
    async fn steps_are_found_by_generation() {
        on_each_store(|receipts, run| async move {
            assert_eq!(receipts.committed().await.unwrap(), []);
            assert_eq!(receipts.newest(&Chain::default()).await.unwrap(), None);
            for (step, generation) in [
                (8, 0),
                (9, 0),
                (999, 0),
                (1000, 0),
                (10_000, 0),
                (9, 2),
                (12, 2),
            ] {
                receipts
                    .commit(&sample(step, generation, "n"), &Budget::default())
                    .await
                    .unwrap();
            }
            run.put("receipts/0/8/notes.txt", "not ours".into())
                .await
                .unwrap();
            let all = [
                (8, 0),
                (9, 0),
                (9, 2),
                (12, 2),
                (999, 0),
                (1000, 0),
                (10_000, 0),
            ];
            assert_eq!(receipts.committed().await.unwrap(), all);
            let reselected = |generation, to_step| Rewound {
                generation,
                to_step,
                replay: false,
            };
            let chain = Chain::new(vec![reselected(1, 10), reselected(2, 9)]);
            assert_eq!(
                receipts.newest(&Chain::default()).await.unwrap(),
                Some(10_000)
            );
            assert_eq!(
                receipts.newest(&chain).await.unwrap(),
                Some(12),
                "in an older folder"
            );
            let whole = receipts.find(12, 2).await.unwrap().unwrap();
            assert_eq!(receipts.summary(12, 2).await.unwrap(), whole.summary);
            assert_eq!(receipts.summary(12, 1).await.unwrap(), None);
        })
        .await;
    }
}
