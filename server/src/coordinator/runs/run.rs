//! One open run: its steps, ranks, weights and cursors.

pub use super::state::{State, run_state};
use super::{calls::Calls, deps::Deps};
use crate::{
    coordinator::{
        facts::{chain::Began, incarnations::Incarnations, owner::Ownership, run::ModelFact},
        plan::planner::Plan,
        receipts::{store::Receipts, wasted::Wasted},
        score::claims::Claims,
        spec::{Asked, delivered, phase_at},
        trainer::{cell::Cell, waits::Waits},
        weights::{Weights, missing},
    },
    dataset::{Manifest, Scores},
    error::Result,
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

    /// Returns the pushes that a trainer which goes on at `resume` must repeat.
    fn missing_pushes(&self, resume: u64, spec: &RunSpec) -> Vec<i64> {
        let (began, book) = (self.began().0, self.weights.book());
        let committed = self.state().committed.clone();
        let is_scored =
            |step| Asked::by(phase_at(&spec.phases, step)).learner && !committed.contains(step);
        missing(
            resume,
            &spec.lag.unwrap_or_default(),
            spec.push_every_steps,
            is_scored,
            |due| book.borrow().find(due, &began).is_some(),
        )
    }

    /// Describes the run. `resume` is the step at which a trainer goes on; if absent, the run's
    /// next step.
    pub fn info(&self, resume: Option<u64>) -> RunInfo {
        let spec = self.spec();
        let missing_pushes = self.missing_pushes(resume.unwrap_or(self.next_step()), &spec);
        let learner = self
            .weights
            .book()
            .borrow()
            .newest()
            .map(|published| published.version);
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

impl Drop for Run {
    fn drop(&mut self) {
        self.deps.sizing.forget(&self.id);
    }
}
