//! The history of a fork: the receipts of the run that it left.
use super::{accounts::subtract, store::Receipts};
use crate::{
    coordinator::facts::chain::Chain,
    error::{Error, Result},
};
use futures::{FutureExt, StreamExt, TryStreamExt, future::BoxFuture, stream};
use std::ops::Range;
use superbatch_proto::v1::{Accounts, Receipt, ReceiptSummary};

/// Summaries that are read at the same time.
const READS_AT_ONCE: usize = 8;

/// The run that a fork left.
#[derive(Debug)]
pub struct Before {
    pub receipts: Receipts,
    /// Its trajectory when it was left.
    pub chain: Chain,
    /// The fork's first step of its own.
    pub step: u64,
    /// The steps that the run may have decided out of order.
    pub max_ahead: u32,
}

impl Before {
    /// Returns the cost of the steps before `step`, which the fork has of this run, with what
    /// rewinds before it discarded, and without later steps.
    ///
    /// A receipt holds the totals of its commit. Steps may be committed out of order, so the last
    /// commit need not be of the last step, and later steps may have come before it.
    ///
    /// # Errors
    /// `StorageUnreachable`; `Internal` if a receipt cannot be read.
    pub(super) fn totals(&self, step: u64) -> BoxFuture<'_, Result<Accounts>> {
        let own = self.receipts.forked_at(&self.chain);
        match self.receipts.before() {
            // All of them are of the run that this one left in its turn. Its totals are no part of
            // this one's, so the two are never compared.
            Some(before) if step <= own => before.totals(step),
            _ => self.own_totals(own, step).boxed(),
        }
    }

    async fn own_totals(&self, own: u64, step: u64) -> Result<Accounts> {
        let ahead = u64::from(self.max_ahead).max(1);
        let newest = self.chain.current();
        let known = self.summaries(own.max(step.saturating_sub(ahead))..step, newest);
        let scanned = |summary: &ReceiptSummary| {
            let totals = summary.run_totals.unwrap_or_default();
            totals.candidates_scanned
        };
        let Some(last) = known.await?.into_iter().max_by_key(scanned) else {
            return Ok(Accounts::default());
        };
        let mut totals = last.run_totals.unwrap_or_default();
        // A rewind since may have discarded them, but not what they cost.
        let later = self.summaries(step..step.saturating_add(ahead), last.generation);
        for later in later.await? {
            if scanned(&later) < scanned(&last) {
                totals = subtract(&totals, &later.cost.unwrap_or_default());
            }
        }
        Ok(totals)
    }

    /// Returns the summaries of those of the steps that are committed, as they were in force in
    /// `generation`.
    async fn summaries(&self, steps: Range<u64>, generation: u32) -> Result<Vec<ReceiptSummary>> {
        let found = stream::iter(steps.map(|step| self.summary_of(step, generation)));
        let found: Vec<_> = found.buffered(READS_AT_ONCE).try_collect().await?;
        Ok(found.into_iter().flatten().collect())
    }

    /// Finds a receipt. Boxed, since the other run may be a fork too.
    pub(super) fn find(&self, step: u64) -> BoxFuture<'_, Result<Option<Receipt>>> {
        let newest = self.chain.current();
        self.receipts.find_of(&self.chain, step, newest).boxed()
    }

    /// As [`Before::find`], without the rows.
    pub(super) fn summary(&self, step: u64) -> BoxFuture<'_, Result<Option<ReceiptSummary>>> {
        self.summary_of(step, self.chain.current())
    }

    fn summary_of(
        &self,
        step: u64,
        generation: u32,
    ) -> BoxFuture<'_, Result<Option<ReceiptSummary>>> {
        let generations = self.chain.candidates(step, generation);
        let find = async move {
            let found = self.receipts.summary_first(step, &generations).await?;
            Ok::<_, Error>(found.map(|(_, summary)| summary))
        };
        find.boxed()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        coordinator::{
            facts::chain::Rewound,
            receipts::{accounts::add, parquet::tests::sample},
        },
        storage::{Budget, Location, StorageConfig, Stores},
    };

    fn state() -> Location {
        let stores = Stores::new(StorageConfig::default());
        stores.open("memory:///state/runs").unwrap()
    }

    /// Commits (step, generation) in this order, from `totals` on. A step costs a power of ten.
    async fn commit(receipts: &Receipts, mut totals: Accounts, order: &[(u64, u32)]) {
        for &(step, generation) in order {
            let mut receipt = sample(step, generation, "a");
            let summary = receipt.summary.get_or_insert_default();
            let cost = Accounts {
                candidates_scanned: 10_u64.pow(step as u32),
                selection_flops: 10_f64.powi(step as i32),
                ..Accounts::default()
            };
            totals = add(&totals, &cost);
            (summary.cost, summary.run_totals) = (Some(cost), Some(totals));
            receipts.commit(&receipt, &Budget::default()).await.unwrap();
        }
    }

    fn first(steps: &[u64]) -> Vec<(u64, u32)> {
        steps.iter().map(|step| (*step, 0)).collect()
    }

    fn left(receipts: Receipts, chain: Chain, step: u64) -> Before {
        Before {
            receipts,
            chain,
            step,
            max_ahead: 3,
        }
    }

    async fn cost(before: &Before) -> (u64, f64) {
        let totals = before.totals(before.step).await.unwrap();
        (totals.candidates_scanned, totals.selection_flops)
    }

    #[tokio::test]
    async fn a_fork_takes_over_the_cost_of_its_steps_in_whatever_order_they_were_committed() {
        for order in [
            [0, 1, 2, 3, 4],
            [0, 1, 3, 2, 4],
            [0, 1, 2, 4, 3],
            [1, 0, 4, 3, 2],
        ] {
            let receipts = Receipts::new(state());
            commit(&receipts, Accounts::default(), &first(&order)).await;
            let before = left(receipts, Chain::default(), 3);
            assert_eq!(cost(&before).await, (111, 111.0), "{order:?}");
            let fork = Receipts::forked(state(), Some(before));
            let (_, totals) = fork.opened(&Chain::default(), 1).await.unwrap();
            assert_eq!(totals.candidates_scanned, 111, "by opening the fork");
        }
    }

    #[tokio::test]
    async fn a_fork_at_the_first_step_takes_over_nothing() {
        let receipts = Receipts::new(state());
        commit(&receipts, Accounts::default(), &first(&[1, 0])).await;
        assert_eq!(cost(&left(receipts, Chain::default(), 0)).await, (0, 0.0));
    }

    /// Run a commits 3 before 2. Run b leaves it before step 3, and has a step 3 of its own.
    #[tokio::test]
    async fn a_fork_of_a_fork_takes_over_what_each_of_them_paid_for_its_own_steps() {
        let a = Receipts::new(state());
        commit(&a, Accounts::default(), &first(&[0, 1, 3, 2])).await;
        let history = left(a, Chain::default(), 3);
        let of_a = history.totals(3).await.unwrap();
        let b = Receipts::forked(state(), Some(history));
        commit(&b, of_a, &first(&[4, 3])).await;
        for (step, expected) in [(2, 11), (3, 111), (4, 1_111), (5, 11_111)] {
            let before = left(b.clone(), Chain::default(), step);
            assert_eq!(cost(&before).await, (expected, expected as f64), "{step}");
        }
    }

    #[tokio::test]
    async fn what_a_rewind_discarded_does_not_count_where_a_fork_leaves_before_it() {
        for order in [first(&[0, 1, 2, 3]), first(&[0, 1, 3, 2])] {
            let receipts = Receipts::new(state());
            commit(&receipts, Accounts::default(), &order).await;
            let chain = Chain::new(vec![Rewound {
                generation: 1,
                to_step: 3,
                replay: false,
            }]);
            assert_eq!(cost(&left(receipts, chain, 3)).await, (111, 111.0));
        }
    }
}
