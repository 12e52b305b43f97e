//! Which steps of a run are committed, by lists of its receipts.
use super::{FOLDER_STEPS, Receipts, folder, last, parse};
use crate::{
    coordinator::{
        facts::{chain::Chain, trail::Trail},
        receipts::{packs::Index, summaries},
    },
    error::Result,
};
use futures::{FutureExt, StreamExt, TryStreamExt, stream};
use std::collections::{BTreeMap, BTreeSet};
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
        let (known, mut objects) = (self.packs.known(), BTreeMap::new());
        let (mut numbers, mut tail) = (self.object_folders().await?, Tail::default());
        numbers.extend(known.folders(FOLDER_STEPS));
        for number in numbers.into_iter().rev() {
            let found = self.objects(number).await?;
            tail.add(chain, with_packed(found.clone(), &known, number));
            objects.insert(number, found);
            if tail.is_enough(max_ahead) {
                break;
            }
        }
        // The same again with the packs that there are by now: what is enough stays enough.
        let now = self.packs.look().await?;
        let (mut numbers, mut tail) = (now.folders(FOLDER_STEPS), Tail::default());
        numbers.extend(objects.keys());
        for number in numbers.into_iter().rev() {
            let found = objects.remove(&number).unwrap_or_default();
            tail.add(chain, with_packed(found, &now, number));
            if tail.is_enough(max_ahead) {
                break;
            }
        }
        let Tail { newest, listed } = tail;
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
        let listed = self.listed_from(from).await?;
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
        let mut numbers = self.object_folders().await?;
        let now = self.packs.look().await?;
        numbers.extend(now.folders(FOLDER_STEPS));
        Ok(numbers.into_iter().collect())
    }

    /// Returns all committed (step, generation), rising. Lists the whole run.
    pub async fn committed(&self) -> Result<Vec<(u64, u32)>> {
        self.listed_from(0).await
    }

    /// Returns the committed (step, generation) of one folder, rising.
    pub async fn committed_in(&self, number: u64) -> Result<Vec<(u64, u32)>> {
        let objects = self.objects(number).await?;
        let now = self.packs.look().await?;
        Ok(with_packed(objects, &now, number).into_iter().collect())
    }

    /// Returns the committed (step, generation) from the folder `from` on, rising.
    ///
    /// Receipts may be packed while they are listed: a pack comes, and then the objects go. So
    /// packs are looked at last: a receipt whose object was gone when its folder was listed is in
    /// one of those that are there then. In the other order, steps could be in neither of the two
    /// lists, and would be decided again.
    async fn listed_from(&self, from: u64) -> Result<Vec<(u64, u32)>> {
        let numbers = self.object_folders().await?.split_off(&from);
        let lists = numbers
            .into_iter()
            .map(|number| self.objects(number).boxed());
        let lists: Vec<_> = lists.collect();
        let lists = stream::iter(lists).buffered(LISTS_AT_ONCE);
        let mut listed: BTreeSet<(u64, u32)> = lists.try_concat().await?;
        let now = self.packs.look().await?;
        for number in now.folders(FOLDER_STEPS).split_off(&from) {
            listed.extend(now.of_folder(number, FOLDER_STEPS));
        }
        Ok(listed.into_iter().collect())
    }

    /// Returns the numbers of the folders that hold receipts in objects of their own.
    async fn object_folders(&self) -> Result<BTreeSet<u64>> {
        let folders = self.run.folders("receipts").await?;
        let numbers = folders.iter().filter_map(|name| name.parse().ok());
        Ok(numbers.collect())
    }

    /// Returns the receipts of one folder that have objects of their own.
    async fn objects(&self, number: u64) -> Result<BTreeSet<(u64, u32)>> {
        let objects = self.run.list(&folder(number)).await?;
        Ok(objects.iter().filter_map(|(key, _)| parse(key)).collect())
    }
}

/// Returns the receipts of one folder, those of `objects` and those in packs.
fn with_packed(
    mut objects: BTreeSet<(u64, u32)>,
    packs: &Index,
    number: u64,
) -> BTreeSet<(u64, u32)> {
    objects.extend(packs.of_folder(number, FOLDER_STEPS));
    objects
}

/// The newest receipts, folder by folder from the last one on.
#[derive(Default)]
struct Tail {
    newest: Option<u64>,
    listed: Vec<(u64, u32)>,
}

impl Tail {
    fn add(&mut self, chain: &Chain, found: BTreeSet<(u64, u32)>) {
        let newest = || found.iter().rev().find_map(holding(chain));
        self.newest = self.newest.or_else(newest);
        self.listed.extend(found);
    }

    fn is_enough(&self, max_ahead: usize) -> bool {
        self.newest.is_some() && self.listed.len() > max_ahead
    }
}

/// Returns the step of a receipt if it holds in the trajectory that `chain` describes.
fn holding(chain: &Chain) -> impl Fn(&(u64, u32)) -> Option<u64> {
    move |(step, generation)| {
        let holding = chain.candidates(*step, chain.current());
        holding.contains(generation).then_some(*step)
    }
}
