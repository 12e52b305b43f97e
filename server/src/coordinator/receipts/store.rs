//! A run's receipts in object storage: one fact for each step and generation.
use super::parquet;
use crate::{
    coordinator::facts::chain::Chain,
    error::{Error, Result},
    storage::{Created, Location},
};
use superbatch_proto::v1::{Accounts, Receipt, ReceiptSummary};

/// Steps in one folder, so that the newest step is found without listing a whole run.
const FOLDER_STEPS: u64 = 1000;
/// Bytes of a file's end that are read for its summary. Most summaries fit; a larger one costs a
/// second read.
const SUMMARY_BYTES: u64 = 64 << 10;

/// The outcome of a commit.
#[derive(Debug, Clone, PartialEq)]
pub enum Committed {
    Ours,
    /// Another writer was first. Its receipt is in force and is served.
    Theirs(Box<Receipt>),
}

/// The receipts below a run's location, `receipts/{step/1000}/{step}/{generation}.parquet`.
#[derive(Debug, Clone)]
pub struct Receipts {
    run: Location,
}

impl Receipts {
    pub fn new(run: Location) -> Self {
        Self { run }
    }

    /// Commits a step: creates its receipt unless there is one. Committing the same receipt again
    /// returns `Ours` again.
    ///
    /// # Errors
    /// `StorageUnreachable`; `Internal` for a receipt without a writer's nonce, by which a writer
    /// recognises its own.
    pub async fn commit(&self, receipt: &Receipt) -> Result<Committed> {
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
        match self.run.create(&key, parquet::encode(receipt)?).await? {
            Created::Ours => Ok(Committed::Ours),
            Created::Theirs(bytes) => {
                let theirs = parquet::decode(bytes)?;
                // Compared by nonce and not by bytes: the retried receipt may differ in bytes from
                // the one that was written (another compression library, another field), and yet be
                // ours.
                let nonce = theirs.summary.as_ref().map(|theirs| &theirs.writer_nonce);
                Ok(if nonce == Some(&summary.writer_nonce) {
                    Committed::Ours
                } else {
                    Committed::Theirs(Box::new(theirs))
                })
            }
        }
    }

    /// Returns the receipt of a step in one generation.
    pub async fn find(&self, step: u64, generation: u32) -> Result<Option<Receipt>> {
        let key = key(step, generation);
        let found = self.run.find(&key).await?.map(parquet::decode).transpose();
        found.map_err(|error| error.about(self.run.uri_of(&key)))
    }

    /// As [`Self::find`], without the rows: reads only the end of the file.
    pub async fn summary(&self, step: u64, generation: u32) -> Result<Option<ReceiptSummary>> {
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
        let folders = self.run.folders("receipts").await?;
        let mut numbers: Vec<u64> = folders
            .iter()
            .filter_map(|name| name.parse().ok())
            .collect();
        numbers.sort_unstable();
        for number in numbers.into_iter().rev() {
            let holds = |(step, generation): &(u64, u32)| {
                chain
                    .candidates(*step, chain.current())
                    .contains(generation)
            };
            let found = self.list(&format!("receipts/{number}")).await?;
            if let Some((step, _)) = found.into_iter().rev().find(holds) {
                return Ok(Some(step));
            }
        }
        Ok(None)
    }

    /// Returns all committed (step, generation), rising. Lists the whole run.
    pub async fn committed(&self) -> Result<Vec<(u64, u32)>> {
        self.list("receipts").await
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
    pub async fn totals(&self, mut listed: Vec<(u64, u32)>, max_ahead: usize) -> Result<Accounts> {
        listed.sort_by_key(|(step, generation)| (*generation, *step));
        let mut largest = Accounts::default();
        for (step, generation) in listed.into_iter().rev().take(max_ahead + 1) {
            let receipt = self.find(step, generation).await?;
            let totals = receipt.and_then(|r| r.summary).and_then(|s| s.run_totals);
            let more = |t: &Accounts| t.candidates_scanned > largest.candidates_scanned;
            if let Some(totals) = totals.filter(more) {
                largest = totals;
            }
        }
        Ok(largest)
    }
}

fn folder_of_step(step: u64) -> String {
    format!("receipts/{}/{step}", step / FOLDER_STEPS)
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
            assert_eq!(receipts.commit(&a).await.unwrap(), Committed::Ours);
            assert_eq!(receipts.commit(&a).await.unwrap(), Committed::Ours);
            assert_eq!(
                receipts.commit(&b).await.unwrap(),
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
                receipts.commit(&sample(1, 0, "")).await.is_err(),
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
                receipts.commit(&receipt).await.unwrap();
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

    #[tokio::test]
    async fn of_two_writers_at_once_exactly_one_wins() {
        on_each_store(|receipts, _| async move {
            for step in 0..20 {
                let (a, b) = (sample(step, 0, "a"), sample(step, 0, "b"));
                let (first, second) = (receipts.clone(), receipts.clone());
                let (a2, b2) = (a.clone(), b.clone());
                let race = (
                    tokio::spawn(async move { first.commit(&a2).await.unwrap() }),
                    tokio::spawn(async move { second.commit(&b2).await.unwrap() }),
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
                    .commit(&sample(step, generation, "n"))
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
