//! One open run: its steps, ranks, weights and cursors.

pub use super::state::{State, run_state};
use super::{calls::Calls, deps::Deps, reported::Reported, rotten::Rotten};
use crate::{
    coordinator::{
        facts::{
            chain::Began, incarnations::Incarnations, owner::Ownership, run::ModelFact,
            trail::Trail,
        },
        losses::Losses,
        plan::planner::Plan,
        receipts::{store::Receipts, wasted::Wasted},
        score::claims::Claims,
        spec::{Asked, delivered, phase_at},
        trainer::{cell::Cell, waits::Waits},
        weights::{Book, Weights, missing},
    },
    dataset::{Manifest, Scores},
    error::Result,
    metrics,
    storage::Location,
};
use arrow::datatypes::SchemaRef;
use std::{
    sync::{Arc, Mutex, MutexGuard, RwLock, Weak},
    time::Duration,
};
use superbatch_proto::v1::{Receipt, RunInfo, RunSpec, RunSummary};
use tokio::time::Instant;

/// A batch for which no rank has asked in this time is dropped; its rows can be read again.
pub const IDLE_MAX: Duration = Duration::from_secs(30 * 60);
/// How often the log says that a rank still waits.
pub const TOLD_EVERY: Duration = Duration::from_secs(30);

/// A run that this coordinator owns.
pub struct Run {
    pub id: String,
    pub deps: Deps,
    pub location: Location,
    pub manifest: Arc<Manifest>,
    pub manifest_digest: String,
    pub output_schema: SchemaRef,
    pub plan: Plan,
    pub reference: Option<ModelFact>,
    pub learner: Option<ModelFact>,
    pub weights: Weights,
    pub receipts: Receipts,
    pub owner: Ownership,
    pub incarnations: Incarnations,
    /// Score columns of the data.
    pub scores: Scores,
    /// Shards of which most rows cannot be used.
    pub rotten: Rotten,
    /// Losses that the trainer reported.
    pub losses: Losses,
    /// The steps of which they came last.
    pub(super) reported: Reported,
    /// Phases that the run was opened with; the others were appended.
    pub opened_phases: usize,
    pub spec: RwLock<Arc<RunSpec>>,
    pub(super) state: Mutex<State>,
    /// Held by commits, one at a time, since totals are in the order of commits; and by changes of
    /// the run.
    pub committing: tokio::sync::Mutex<()>,
    /// FLOPs of decisions that came to nothing.
    pub wasted: Wasted,
    /// Blocks whose reference embeddings are stored or being computed.
    pub claims: Claims,
    pub calls: Calls,
    pub waits: Waits,
    pub me: Weak<Run>,
}

impl Run {
    pub fn spec(&self) -> Arc<RunSpec> {
        self.spec.read().expect("no panic while held").clone()
    }

    pub fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("no panic while held")
    }

    pub fn generation(&self) -> u32 {
        self.state().chain.current()
    }

    /// Returns where the generations began, and the newest one.
    pub fn began(&self) -> (Vec<Began>, u32) {
        let state = self.state();
        (state.chain.began(), state.chain.current())
    }

    /// Returns the newest generation, and the starts of the trainer that have asked for a step, in
    /// their order.
    pub(super) fn trainers(&self) -> (u32, Vec<String>) {
        let state = self.state();
        (state.chain.current(), state.members.known().to_vec())
    }

    /// Returns the first step that is not committed.
    pub fn next_step(&self) -> u64 {
        self.state().committed.next()
    }

    pub fn is_open(&self) -> bool {
        self.state().check_open().is_ok()
    }

    /// Returns since when the run could be put to sleep; `None` while a call, a push or work on a
    /// step is under way.
    pub fn idle_since(&self) -> Option<Instant> {
        let since = self.calls.idle_since()?;
        let works =
            self.state().cells.values().any(Cell::is_at_work) || self.weights.is_receiving();
        (!works).then_some(since)
    }

    /// Returns the receipt in force for `step` in the trajectory of `generation`, or of the newest
    /// generation if it is `None`.
    pub async fn find_receipt(
        &self,
        step: u64,
        generation: Option<u32>,
    ) -> Result<Option<Receipt>> {
        let chain = self.state().chain.clone();
        let generation = generation.unwrap_or(chain.current());
        self.receipts.find_of(&chain, step, generation).await
    }

    /// As [`Self::find_receipt`], of a step that is decided next in the newest generation, unless
    /// it is decided.
    ///
    /// # Errors
    /// `NotOwner` if there is a receipt and the run is another coordinator's by now. What a former
    /// owner finds need not be the decision: see `check_still_ours` in `step/decide.rs`.
    pub async fn find_decided(&self, step: u64, generation: u32) -> Result<Option<Receipt>> {
        let (chain, is_known) = {
            let state = self.state();
            (state.chain.clone(), state.committed.contains(step))
        };
        let found = if is_known {
            self.receipts.find_of(&chain, step, generation).await?
        } else {
            self.receipts.find_new(&chain, step, generation).await?
        };
        if found.is_some() {
            self.owner.check().await?;
        }
        Ok(found)
    }

    /// Notes that a rank stood still for its batch of `step`.
    pub fn note_wait(&self, step: u64, waited: Duration) {
        let consumed = self.state().members.consumed_by_all();
        self.waits.record(step, waited);
        self.show_waits(consumed);
    }

    /// Notes that a batch was served ahead. Without it, steps that nobody waited for would be
    /// missing among the waits.
    pub fn note_served_ahead(&self, step: u64) {
        let consumed = self.state().members.consumed_by_all();
        self.waits.record_served(step);
        self.show_waits(consumed);
    }

    /// Shows how long the trainer stood still for each step through `consumed`.
    fn show_waits(&self, consumed: Option<u64>) {
        for waited in self.waits.end_through(consumed) {
            metrics::step_wait().record(waited.as_secs_f64());
        }
    }

    pub fn summary(&self) -> RunSummary {
        self.summary_of(&self.state())
    }

    fn summary_of(&self, state: &State) -> RunSummary {
        RunSummary {
            run_id: self.id.clone(),
            state: state.run_state() as i32,
            generation: state.chain.current(),
            last_committed_step: state.committed.newest(),
        }
    }

    /// Describes the run. `resume` is the step at which a trainer goes on; if absent, the run's
    /// next step.
    pub fn info(&self, resume: Option<u64>) -> RunInfo {
        let spec = self.spec();
        let (book, began) = (self.weights.book(), self.began().0);
        let committed = self.state().committed.clone();
        let missing_pushes = missing_pushes(&spec, &committed, &began, &book.borrow(), resume);
        let learner = book.borrow().newest().map(|published| published.version);
        let state = self.state();
        RunInfo {
            // Read under the same lock as the accounts. Otherwise a commit between the two would
            // show the accounts of one step more than the last step.
            summary: Some(self.summary_of(&state)),
            dataset_manifest: self.manifest_digest.clone(),
            candidates_scanned: state.totals.candidates_scanned,
            examples_delivered: delivered(&spec, state.members.consumed_by_all()),
            consumed_through: state.members.consumed_by_all(),
            accounts: Some(state.totals),
            learner,
            failure: state.failure.clone().unwrap_or_default(),
            tail_rows_per_epoch: self.plan.tail_rows(&spec.phases),
            spec: Some((*spec).clone()),
            missing_pushes,
        }
    }
}

/// Returns the pushes that a trainer which goes on at `resume` must repeat; at the first step that
/// is not committed, if `resume` is absent.
pub(super) fn missing_pushes(
    spec: &RunSpec,
    committed: &Trail,
    began: &[Began],
    book: &Book,
    resume: Option<u64>,
) -> Vec<i64> {
    let is_scored =
        |step| Asked::by(phase_at(&spec.phases, step)).learner && !committed.contains(step);
    missing(
        resume.unwrap_or(committed.next()),
        &spec.lag.unwrap_or_default(),
        spec.push_every_steps,
        is_scored,
        |due| book.find(due, began).is_some(),
    )
}

impl Drop for Run {
    fn drop(&mut self) {
        self.deps.sizing.forget(&self.id);
        // Nobody will say that the last step is consumed.
        self.show_waits(Some(u64::MAX));
    }
}
