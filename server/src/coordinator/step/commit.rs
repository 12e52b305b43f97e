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
    storage::{Budget, is_passing},
};
use superbatch_proto::v1::{Accounts, BadRow, BadRowReason, Receipt};
use tokio::time::Instant;

/// The share of bad rows is computed of at least so many candidates: two bad rows among the first
/// ten say nothing about the data.
const JUDGED_FROM: u64 = 1_000;

/// The result of a commit.
#[expect(
    clippy::large_enum_variant,
    reason = "made once a step and taken apart at once"
)]
pub enum Commit {
    /// The receipt in force, as it is stored, and whether it is ours.
    InForce(Receipt, bool),
    /// Weights that the step was scored with were rolled back since: it is decided anew.
    TakenBack,
}

impl Run {
    /// Makes a decision durable, unless another one is already. The step was scored after the first
    /// `rollbacks` roll-backs of weights.
    ///
    /// A store that fails is asked again within one [`Budget`]. The lock on commits is released
    /// between attempts: other steps of the run do not wait for this one. Writing again is safe:
    /// the receipt has its writer's nonce, so an earlier attempt that did succeed is recognised as
    /// ours.
    ///
    /// # Errors
    /// `NotOwner`; `RunFailed` if the run fails by this step's bad rows; `RunClosed` and
    /// `GenerationStale` if the run was closed or rewound in the meantime; `StorageUnreachable`.
    pub async fn commit(&self, mut receipt: Receipt, rollbacks: usize) -> Result<Commit> {
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
        let nonce = receipt.summary.get_or_insert_default().writer_nonce.clone();
        let mut budget = Budget::default();
        let (receipt, ours) = loop {
            let tried = self.try_commit(&mut receipt, rollbacks, begun, &mut budget);
            match tried.await {
                Err(error) if is_passing(&error) && budget.pause().await => {
                    tracing::warn!(
                        run = self.id,
                        error = error.chain(),
                        "the receipt is written again"
                    );
                }
                Err(error) => {
                    self.state().in_doubt.end(&nonce, false);
                    return Err(if is_passing(&error) {
                        budget.spent(error)
                    } else {
                        error
                    });
                }
                Ok(None) => {
                    self.state().in_doubt.end(&nonce, false);
                    return Ok(Commit::TakenBack);
                }
                Ok(Some(Committed::Theirs(theirs))) => break (*theirs, false),
                Ok(Some(Committed::OursEarlier(stored))) => break (*stored, true),
                Ok(Some(Committed::Ours)) => break (receipt, true),
            }
        };
        self.state().in_doubt.end(&nonce, true);
        if ours {
            wasted.settle();
            self.log_committed(&receipt, begun);
        }
        Ok(Commit::InForce(receipt, ours))
    }

    /// Makes one attempt to commit. Totals are in the order of commits, so each attempt adds to
    /// those that it finds. `None` if the step must be decided anew.
    async fn try_commit(
        &self,
        receipt: &mut Receipt,
        rollbacks: usize,
        begun: Instant,
        budget: &mut Budget,
    ) -> Result<Option<Committed>> {
        // One commit at a time. Each receipt holds the run's totals up to and including itself, so
        // it must know the totals of the one before. Two commits at once would start from the same
        // totals, and the cost of one of them would be lost from the accounts. The lock also keeps
        // out a rewind, which changes the generation, and a roll-back of weights.
        let _alone = budget.uncounted(self.committing.lock()).await;
        let summary = receipt.summary.get_or_insert_default();
        let (step, generation) = (summary.step, summary.generation);
        let nonce = summary.writer_nonce.clone();
        let scored_with = summary
            .learner
            .as_ref()
            .map_or(0, |learner| learner.version);
        self.check_current(generation)?;
        budget.look(self.owner.check()).await?;
        if self.weights.is_taken_back_since(rollbacks, scored_with) {
            return Ok(None);
        }
        self.settle_doubts(&nonce, budget).await?;
        let mut totals = {
            let state = self.state();
            if state.in_doubt.is_counted(&nonce) {
                state.totals
            } else {
                accounts::add(&state.totals, &summary.cost.unwrap_or_default())
            }
        };
        // The fact that ends a run is created once; an attempt that is cut short is made again.
        let judged = self.judge(step, &totals, &receipt.bad_rows);
        budget.look(judged).await?;
        receipt.summary.get_or_insert_default().run_totals = Some(totals);
        let committed = self.receipts.commit(receipt, budget).await;
        let unknown = |error: &Error| {
            if is_passing(error) {
                self.state().in_doubt.add_doubt(receipt);
            }
        };
        let committed = committed.inspect_err(unknown)?;
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
        match &committed {
            Committed::Theirs(theirs) => {
                drop(state);
                self.found_committed(generation, theirs);
            }
            Committed::Ours | Committed::OursEarlier(_) => state.totals = totals,
        }
        Ok(Some(committed))
    }

    /// Finds out whether receipts of other commits, whose outcome is not known, were written, and
    /// adds their cost to the totals. A store that does not answer leaves them in doubt, and this
    /// commit is tried again as well.
    async fn settle_doubts(&self, nonce: &str, budget: &Budget) -> Result<()> {
        let doubts = self.state().in_doubt.of_others(nonce);
        for doubt in doubts {
            let (step, generation) = (doubt.step, doubt.generation);
            let found = budget.look(self.receipts.summary(step, generation));
            let found = found.await?;
            let found = found.as_ref().map(|found| found.writer_nonce.as_str());
            let state = &mut *self.state();
            if state.in_doubt.settle(&doubt, found, &mut state.totals)
                && state.chain.current() == generation
            {
                state.committed.insert(step);
            }
        }
        Ok(())
    }

    fn log_committed(&self, receipt: &Receipt, begun: Instant) {
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
        let state = &mut *state;
        // An attempt of this process, whose outcome was not known.
        if state
            .in_doubt
            .settle_found(&summary.writer_nonce, &mut state.totals)
        {
            return;
        }
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
