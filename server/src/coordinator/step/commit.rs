//! Makes decisions durable, one at a time.
use crate::{
    coordinator::{
        facts::run,
        receipts::{accounts, store::Committed},
        runs::{
            run::Run,
            state::{failed, stale},
        },
    },
    error::{Error, Result},
};
use std::time::Duration;
use superbatch_proto::v1::{Accounts, BadRow, BadRowReason, Reason, Receipt};
use tokio::time::Instant;

/// Bad rows are not judged before so many candidates were scanned.
const JUDGED_FROM: u64 = 1_000;
/// Pauses before a receipt is written again to a store that could not be reached: a scored step is
/// worth some patience.
const PAUSES: [Duration; 3] = [
    Duration::from_secs(1),
    Duration::from_secs(4),
    Duration::from_secs(16),
];

impl Run {
    /// Makes a decision durable, unless another one already is. Returns the receipt that holds, and
    /// whether it is ours.
    ///
    /// # Errors
    /// `NotOwner`; `RunFailed` where the run fails by it; `RunClosed` and `GenerationStale` where
    /// it ended meanwhile; `StorageUnreachable`.
    pub async fn commit(&self, mut receipt: Receipt) -> Result<(Receipt, bool)> {
        let _alone = self.committing.lock().await;
        let begun = Instant::now();
        let summary = receipt
            .summary
            .as_mut()
            .ok_or_else(|| Error::internal("a receipt has no summary"))?;
        let (step, generation) = (summary.step, summary.generation);
        self.check_current(generation)?;
        self.owner.check().await?;
        let cost = summary.cost.get_or_insert_default();
        // What steps that came to nothing have spent is charged to the next one that is committed.
        let mut wasted = self.wasted.take();
        cost.discarded_flops += wasted.flops();
        let mut totals = accounts::add(&self.state().totals, cost);
        self.judge(step, &totals, &receipt.bad_rows).await?;
        summary.run_totals = Some(totals);
        let committed = self.create_receipt(&receipt).await?;
        // In time for the next receipt: this one's own creation is not in it.
        totals.seconds.get_or_insert_default().commit += begun.elapsed().as_secs_f64();
        let mut state = self.state();
        if state.chain.current() != generation {
            return Err(stale(generation, state.chain.current()));
        }
        state.committed.insert(step);
        match committed {
            Committed::Theirs(theirs) => {
                drop(state);
                self.found_committed(generation, &theirs);
                Ok((*theirs, false))
            }
            Committed::Ours => {
                state.totals = totals;
                drop(state);
                wasted.settle();
                accounts::count(&receipt, begun);
                let (mode, seconds) = (accounts::mode(&receipt), begun.elapsed().as_secs_f64());
                tracing::debug!(
                    run = self.id,
                    step,
                    generation,
                    mode,
                    commit_seconds = seconds,
                    "step committed"
                );
                Ok((receipt, true))
            }
        }
    }

    /// Notes a step that is committed already: before this process knew the run, by another
    /// coordinator, or by an attempt whose outcome was not known.
    pub fn found_committed(&self, generation: u32, receipt: &Receipt) {
        let Some(summary) = &receipt.summary else {
            return;
        };
        let mut state = self.state();
        if state.chain.current() != generation {
            return;
        }
        state.committed.insert(summary.step);
        let newer =
            |totals: &&Accounts| totals.candidates_scanned > state.totals.candidates_scanned;
        if let Some(totals) = summary.run_totals.as_ref().filter(newer) {
            state.totals = *totals;
        }
    }

    fn check_current(&self, generation: u32) -> Result<()> {
        let state = self.state();
        state.check_open()?;
        let current = state.chain.current();
        if current == generation {
            Ok(())
        } else {
            Err(stale(generation, current))
        }
    }

    async fn create_receipt(&self, receipt: &Receipt) -> Result<Committed> {
        for pause in PAUSES {
            match self.receipts.commit(receipt).await {
                Err(error) if error.reason() == Reason::StorageUnreachable => {
                    tracing::warn!(
                        run = self.id,
                        error = error.chain(),
                        "the receipt is written again"
                    );
                    tokio::time::sleep(pause).await;
                }
                done => return done,
            }
        }
        self.receipts.commit(receipt).await
    }

    /// Fails the run when too large a share of what was scanned is bad.
    async fn judge(&self, step: u64, totals: &Accounts, bad_rows: &[BadRow]) -> Result<()> {
        let share = self.spec().max_bad_row_share;
        if totals.bad_rows as f64 <= share * totals.candidates_scanned.max(JUDGED_FROM) as f64 {
            return Ok(());
        }
        let mut rotten = bad_rows.iter();
        let first = rotten.find(|row| row.reason() != BadRowReason::ImageNull);
        let why = format!(
            "{} of {} candidates scanned cannot be used, more than max_bad_row_share = {share}{}; \
            mend the data or open a run \
             that allows more",
            totals.bad_rows,
            totals.candidates_scanned,
            first.map_or_else(String::new, |row| accounts::first_bad(
                &row.id,
                row.reason(),
                &row.detail
            ))
        );
        run::fail(&self.location, &why).await?;
        tracing::warn!(run = self.id, step, why, "run failed");
        let mut state = self.state();
        state.failure = Some(why.clone());
        // The step that is judged ends itself, with the cause.
        let own = state.cells.remove(&step);
        let failed = failed(&why);
        state.end_all(&failed);
        state.cells.extend(own.map(|cell| (step, cell)));
        drop(state);
        Err(failed)
    }
}
