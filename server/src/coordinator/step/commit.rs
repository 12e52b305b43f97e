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
    error::Result,
    storage::{Budget, is_passing},
};
use superbatch_proto::v1::{Accounts, BadRow, BadRowReason, Receipt};
use tokio::time::Instant;

/// The share of bad rows is computed of at least so many candidates: two bad rows among the first
/// ten say nothing about the data.
const JUDGED_FROM: u64 = 1_000;

impl Run {
    /// Makes a decision durable, unless another one is already. Returns the receipt in force, and
    /// whether it is ours.
    ///
    /// A store that fails is asked again within one [`Budget`]. The lock on commits is let go
    /// between attempts: other steps of the run do not wait for this one. Writing again is safe:
    /// the receipt has its writer's nonce, so an earlier attempt that did succeed is recognised as
    /// ours.
    ///
    /// # Errors
    /// `NotOwner`; `RunFailed` if the run fails by this step's bad rows; `RunClosed` and
    /// `GenerationStale` if the run was closed or rewound in the meantime; `StorageUnreachable`.
    pub async fn commit(&self, mut receipt: Receipt) -> Result<(Receipt, bool)> {
        let begun = Instant::now();
        // FLOPs of decisions that were thrown away are charged to the next committed step. `wasted`
        // is a guard: unless it is settled below, dropping it puts the FLOPs back, so a commit that
        // fails does not lose them.
        let mut wasted = self.wasted.take();
        let cost = receipt
            .summary
            .get_or_insert_default()
            .cost
            .get_or_insert_default();
        cost.discarded_flops += wasted.flops();
        let mut budget = Budget::default();
        let (receipt, ours) = loop {
            match self.try_commit(&mut receipt, begun, &budget).await {
                Err(error) if is_passing(&error) && budget.pause().await => {
                    tracing::warn!(
                        run = self.id,
                        error = error.chain(),
                        "the receipt is written again"
                    );
                }
                Err(error) => return Err(error),
                Ok(Some(theirs)) => break (theirs, false),
                Ok(None) => break (receipt, true),
            }
        };
        if ours {
            wasted.settle();
            self.tell_committed(&receipt, begun);
        }
        Ok((receipt, ours))
    }

    /// Makes one attempt to commit. Returns the receipt of another writer that was first. Totals
    /// are in the order of commits, so each attempt adds to those that it finds.
    async fn try_commit(
        &self,
        receipt: &mut Receipt,
        begun: Instant,
        budget: &Budget,
    ) -> Result<Option<Receipt>> {
        // One commit at a time. Each receipt holds the run's totals up to and including itself, so
        // it must know the totals of the one before. Two commits at once would start from the same
        // totals, and the cost of one of them would be lost from the accounts. The lock also keeps
        // out a rewind, which changes the generation.
        let _alone = self.committing.lock().await;
        let summary = receipt.summary.get_or_insert_default();
        let (step, generation) = (summary.step, summary.generation);
        self.check_current(generation)?;
        self.owner.check().await?;
        let cost = summary.cost.get_or_insert_default();
        let mut totals = accounts::add(&self.state().totals, cost);
        self.judge(step, &totals, &receipt.bad_rows).await?;
        receipt.summary.get_or_insert_default().run_totals = Some(totals);
        let committed = self.receipts.commit(receipt, budget).await?;
        // This receipt cannot contain the time of its own creation. The sum is part of the next
        // receipt's totals.
        totals.seconds.get_or_insert_default().commit += begun.elapsed().as_secs_f64();
        let mut state = self.state();
        // A rewind takes the same lock, but another coordinator's does not: the run may have been
        // taken over and rewound while the receipt was written. The receipt then exists under the
        // old generation, where `Chain` decides whether it is in force.
        if state.chain.current() != generation {
            return Err(stale(generation, state.chain.current()));
        }
        let before = state.committed.next();
        state.committed.insert(step);
        self.receipts
            .summarise_after(before, state.committed.next(), generation);
        match committed {
            Committed::Theirs(theirs) => {
                drop(state);
                self.found_committed(generation, &theirs);
                Ok(Some(*theirs))
            }
            Committed::Ours => {
                state.totals = totals;
                Ok(None)
            }
        }
    }

    fn tell_committed(&self, receipt: &Receipt, begun: Instant) {
        accounts::count(receipt, begun);
        let summary = receipt.summary.as_ref();
        let (step, generation) = summary.map_or((0, 0), |s| (s.step, s.generation));
        let (mode, seconds) = (accounts::mode(receipt), begun.elapsed().as_secs_f64());
        tracing::debug!(
            run = self.id,
            step,
            generation,
            mode,
            commit_seconds = seconds,
            "step committed"
        );
    }

    /// Notes a step that is committed already: before this process loaded the run, by another
    /// coordinator, or by an attempt whose outcome was unknown.
    pub fn found_committed(&self, generation: u32, receipt: &Receipt) {
        let Some(summary) = &receipt.summary else {
            return;
        };
        let mut state = self.state();
        if state.chain.current() != generation {
            return;
        }
        state.committed.insert(summary.step);
        // Receipts are found in any order, and each holds the totals at its own commit. The one
        // that has scanned most is the latest commit.
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

    /// Fails the run if too large a share of the scanned candidates is bad.
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
        // This code runs in the task of the judged step. Ending its own cell here would abort the
        // task before it could report the cause, so the cell is taken out first and put back.
        let own = state.cells.remove(&step);
        let failed = failed(&why);
        state.end_all(&failed);
        state.cells.extend(own.map(|cell| (step, cell)));
        drop(state);
        Err(failed)
    }
}
