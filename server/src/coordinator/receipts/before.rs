//! The history of a fork: the receipts of the run that it left.
use super::{
    accounts::{largest, subtract},
    store::Receipts,
};
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
    /// Returns what the history cost that the fork goes on from, and nothing of later steps.
    ///
    /// A receipt holds the totals of its commit. Steps may be committed out of order, so the last
    /// commit of the history need not be its last step, and later steps may have come before it.
    ///
    /// # Errors
    /// `StorageUnreachable`; `Internal` if a receipt cannot be read.
    pub(super) async fn totals(&self) -> Result<Accounts> {
        let ahead = u64::from(self.max_ahead);
        let known = self.summaries(self.step.saturating_sub(1 + ahead)..self.step);
        let totals = known.await?.into_iter().filter_map(|s| s.run_totals);
        let mut totals = largest(totals).unwrap_or_default();
        let last = totals.candidates_scanned;
        let came_before = |later: &ReceiptSummary| {
            let of_later = later.run_totals.unwrap_or_default();
            of_later.candidates_scanned < last
        };
        let later = self.summaries(self.step..self.step.saturating_add(ahead + 1));
        for later in later.await?.iter().filter(|later| came_before(later)) {
            totals = subtract(&totals, &later.cost.unwrap_or_default());
        }
        Ok(totals)
    }

    /// Returns the summaries of those of the steps that are committed.
    async fn summaries(&self, steps: Range<u64>) -> Result<Vec<ReceiptSummary>> {
        let found = stream::iter(steps.map(|step| self.summary(step)));
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
        let generations = self.chain.candidates(step, self.chain.current());
        let find = async move {
            for generation in generations {
                if let Some(found) = self.receipts.summary(step, generation).await? {
                    return Ok(Some(found));
                }
            }
            Ok::<_, Error>(None)
        };
        find.boxed()
    }
}
