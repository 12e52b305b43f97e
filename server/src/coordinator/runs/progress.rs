//! How far a run has come, by its receipts alone.
use crate::{
    coordinator::{facts::chain::Chain, receipts::store::Receipts},
    error::Result,
};

/// The last step, and what was done up to there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Progress {
    /// The last step up to which all are committed.
    pub last_step: Option<u64>,
    pub candidates_scanned: u64,
    pub examples_selected: u64,
}

/// Returns the progress of a run. Later steps, committed out of order, are not counted: the numbers
/// would be those of more steps than the last step says.
///
/// # Errors
/// `StorageUnreachable`; `Internal` if a receipt cannot be read.
pub async fn progress(receipts: &Receipts, chain: &Chain, max_ahead: u32) -> Result<Progress> {
    let (trail, totals) = receipts.opened(chain, max_ahead).await?;
    let mut progress = Progress {
        last_step: trail.next().checked_sub(1),
        candidates_scanned: totals.candidates_scanned,
        examples_selected: totals.examples_selected,
    };
    for step in (trail.next()..=trail.newest().unwrap_or(0)).filter(|step| trail.contains(*step)) {
        let generations = chain.candidates(step, chain.current());
        let found = receipts.summary_first(step, &generations).await?;
        let Some((_, summary)) = found else {
            continue;
        };
        let cost = summary.cost.unwrap_or_default();
        let less = |all: u64, of_step| all.saturating_sub(of_step);
        progress.candidates_scanned = less(progress.candidates_scanned, cost.candidates_scanned);
        progress.examples_selected = less(progress.examples_selected, cost.examples_selected);
    }
    Ok(progress)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        coordinator::receipts::{accounts::add, parquet::tests::sample},
        storage::{Budget, StorageConfig, Stores},
    };
    use superbatch_proto::v1::Accounts;

    const AHEAD: u32 = 3;

    fn found(last_step: Option<u64>, steps: u64) -> Progress {
        Progress {
            last_step,
            candidates_scanned: 64 * steps,
            examples_selected: 16 * steps,
        }
    }

    #[tokio::test]
    async fn steps_beyond_a_gap_are_not_counted() {
        let stores = Stores::new(StorageConfig::default());
        let run = stores.open("memory:///state/runs/r").unwrap();
        let (receipts, chain) = (Receipts::new(run), Chain::default());
        let of = async || progress(&receipts, &chain, AHEAD).await.unwrap();
        assert_eq!(of().await, found(None, 0));
        let cost = Accounts {
            candidates_scanned: 64,
            examples_selected: 16,
            ..Accounts::default()
        };
        let mut totals = Accounts::default();
        // By the order of commits: what is known after each.
        for (step, expected) in [
            (1, found(None, 0)),
            (0, found(Some(1), 2)),
            (4, found(Some(1), 2)),
            (3, found(Some(1), 2)),
            (2, found(Some(4), 5)),
            (5, found(Some(5), 6)),
        ] {
            let mut receipt = sample(step, 0, "a");
            let summary = receipt.summary.get_or_insert_default();
            totals = add(&totals, &cost);
            (summary.cost, summary.run_totals) = (Some(cost), Some(totals));
            receipts.commit(&receipt, &Budget::default()).await.unwrap();
            assert_eq!(of().await, expected, "after step {step}");
        }
    }
}
