//! Which steps of a run are committed, by lists of its receipts.
use super::{FOLDER_STEPS, Receipts, folder, last, parse};
use crate::{
    coordinator::{
        facts::{chain::Chain, trail::Trail},
        receipts::{packs::Index, summaries},
    },
    error::{Error, Result},
};
use futures::{FutureExt, StreamExt, TryStreamExt, stream};
use std::{collections::BTreeSet, sync::Arc};
use superbatch_proto::v1::Accounts;

/// Folders that are listed at the same time.
const LISTS_AT_ONCE: usize = 8;

/// Newest step, and the receipts of which one is the last commit.
type Newest = (Option<u64>, Vec<(u64, u32)>);

impl Receipts {
    /// Returns the newest committed step of the trajectory that `chain` describes. Lists only the
    /// newest folders.
    pub async fn newest(&self, chain: &Chain) -> Result<Option<u64>> {
        Ok(self.newest_commits(chain, 0).await?.0)
    }

    /// As [`Self::newest`], with the receipts of which one is the run's last commit, whose totals
    /// are the run's: they are of the same moment as the newest step. See [`Self::totals`].
    pub async fn newest_commits(&self, chain: &Chain, max_ahead: usize) -> Result<Newest> {
        let read = |index: Arc<Index>| async move {
            let (mut newest, mut listed) = (None, Vec::new());
            for number in self.folders_with(&index).await?.into_iter().rev() {
                let found = self.list(&index, number).await?;
                newest = newest.or_else(|| found.iter().rev().find_map(holding(chain)));
                listed.extend(found);
                if newest.is_some() && listed.len() > max_ahead {
                    break;
                }
            }
            Ok::<_, Error>((newest, listed))
        };
        let (newest, listed) = self.settled(read).await?;
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
        let read = |index| self.listed_from(index, from);
        let listed = self.settled(read).await?;
        let committed = listed.iter().filter_map(holding(chain));
        let trail = Trail::beyond(known, committed);
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

    /// Returns the numbers of the folders that hold receipts, rising.
    pub async fn folders(&self) -> Result<Vec<u64>> {
        let read = |index: Arc<Index>| async move { self.folders_with(&index).await };
        self.settled(read).await
    }

    /// Returns all committed (step, generation), rising. Lists the whole run.
    pub async fn committed(&self) -> Result<Vec<(u64, u32)>> {
        self.settled(|index| self.listed_from(index, 0)).await
    }

    /// Returns the committed (step, generation) of one folder, rising.
    pub async fn committed_in(&self, number: u64) -> Result<Vec<(u64, u32)>> {
        let read = |index: Arc<Index>| async move { self.list(&index, number).await };
        self.settled(read).await
    }

    /// Returns what `read` finds with the packs that there are.
    ///
    /// Receipts may be packed while they are listed: a pack comes, and then the objects go. What is
    /// listed after it came and before they went is complete, so packs are looked at last, and if
    /// they are others than those that were reckoned with, all is listed again. In the other order,
    /// steps could be in neither of the two lists, and would be decided again.
    async fn settled<T, F: Future<Output = Result<T>>>(
        &self,
        read: impl Fn(Arc<Index>) -> F,
    ) -> Result<T> {
        let mut known = self.packs.known();
        loop {
            let found = read(known.clone()).await?;
            let now = self.packs.look().await?;
            if now == known {
                return Ok(found);
            }
            known = now;
        }
    }

    async fn listed_from(&self, index: Arc<Index>, from: u64) -> Result<Vec<(u64, u32)>> {
        let numbers = self.folders_with(&index).await?;
        let numbers = numbers.into_iter().filter(|number| *number >= from);
        let index = &*index;
        let lists = numbers.map(|number| self.list(index, number).boxed());
        let lists: Vec<_> = lists.collect();
        let lists = stream::iter(lists).buffered(LISTS_AT_ONCE);
        lists.try_concat().await
    }

    async fn folders_with(&self, index: &Index) -> Result<Vec<u64>> {
        let folders = self.run.folders("receipts").await?;
        let numbers = folders.iter().filter_map(|name| name.parse().ok());
        let mut numbers: BTreeSet<u64> = numbers.collect();
        numbers.extend(index.folders(FOLDER_STEPS));
        Ok(numbers.into_iter().collect())
    }

    async fn list(&self, index: &Index, number: u64) -> Result<Vec<(u64, u32)>> {
        let objects = self.run.list(&folder(number)).await?;
        let steps = objects.iter().filter_map(|(key, _)| parse(key));
        let mut steps: BTreeSet<(u64, u32)> = steps.collect();
        steps.extend(index.of_folder(number, FOLDER_STEPS));
        Ok(steps.into_iter().collect())
    }
}

/// Returns the step of a receipt if it holds in the trajectory that `chain` describes.
fn holding(chain: &Chain) -> impl Fn(&(u64, u32)) -> Option<u64> {
    move |(step, generation)| {
        let holding = chain.candidates(*step, chain.current());
        holding.contains(generation).then_some(*step)
    }
}
