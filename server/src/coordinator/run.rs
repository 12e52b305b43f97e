//! One open run: its steps, ranks, weights and cursors.
mod change;
mod commit;
mod state;

pub use state::{State, run_state};

use super::{
    calls::Calls,
    claims::Claims,
    decide::decide,
    facts::ModelFact,
    gone,
    incarnations::Incarnations,
    limits::Limits,
    members::{Asking, last_allowed},
    owner::Ownership,
    plan::Plan,
    pool::Pool,
    ranks,
    ready::{Budget, Ready},
    receipts::Receipts,
    selector::Selector,
    sizing::Sizing,
    spec::{delivered, phase_at},
    step::{Cell, Waiting},
    wasted::Wasted,
    weights::{Began, Weights},
};
use crate::{
    dataset::Manifest,
    error::{Error, Result},
    storage::Location,
};
use arrow::datatypes::SchemaRef;
use futures::FutureExt;
use std::{
    ops::Deref,
    panic::AssertUnwindSafe,
    pin::pin,
    sync::{Arc, Mutex, MutexGuard, RwLock, Weak},
    time::Duration,
};
use superbatch_proto::v1::{Reason, Receipt, RunInfo, RunSpec, RunSummary, SelectBatchRequest};
use tokio::time::Instant;

/// A batch that nobody has asked for in so long is let go; its rows can be read again.
const IDLE_MAX: Duration = Duration::from_secs(30 * 60);
/// How often the log says that a rank still waits.
const TOLD_EVERY: Duration = Duration::from_secs(30);

/// What a run uses of its coordinator.
#[derive(Clone)]
pub struct Deps {
    pub pool: Arc<Pool>,
    pub selector: Arc<dyn Selector>,
    pub ready: Arc<Budget>,
    pub limits: Arc<Limits>,
    pub sizing: Arc<Sizing>,
}

/// The parts of a run that never change.
pub struct Parts {
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
    /// Phases that the run was opened with; the others were appended.
    pub opened_phases: usize,
}

/// A run that this coordinator owns.
pub struct Run {
    parts: Parts,
    spec: RwLock<Arc<RunSpec>>,
    state: Mutex<State>,
    /// One commit at a time: totals are in the order of commits.
    committing: tokio::sync::Mutex<()>,
    /// Spent on decisions that came to nothing.
    pub wasted: Wasted,
    /// Blocks whose reference embeddings are there or under way.
    pub claims: Claims,
    pub calls: Calls,
    me: Weak<Run>,
}

impl Deref for Run {
    type Target = Parts;

    fn deref(&self) -> &Parts {
        &self.parts
    }
}

impl Run {
    pub fn new(parts: Parts, spec: RunSpec, state: State) -> Arc<Self> {
        Arc::new_cyclic(|me| Self {
            parts,
            spec: RwLock::new(Arc::new(spec)),
            state: Mutex::new(state),
            committing: tokio::sync::Mutex::default(),
            wasted: Wasted::default(),
            claims: Claims::default(),
            calls: Calls::default(),
            me: me.clone(),
        })
    }

    pub fn spec(&self) -> Arc<RunSpec> {
        self.spec.read().expect("no panic while held").clone()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("no panic while held")
    }

    pub fn generation(&self) -> u32 {
        self.state().chain.current()
    }

    /// Where the generations began, and the newest one.
    pub fn began(&self) -> (Vec<Began>, u32) {
        let state = self.state();
        (state.chain.began(), state.chain.current())
    }

    /// The first step that is not committed.
    pub fn next_step(&self) -> u64 {
        self.state().committed.next()
    }

    pub fn is_open(&self) -> bool {
        self.state().check_open().is_ok()
    }

    /// Since when the run could be put to sleep; `None` while a call, a push or work on a step is under way.
    pub fn idle_since(&self) -> Option<Instant> {
        let since = self.calls.idle_since()?;
        let works = self.state().cells.values().any(Cell::is_at_work) || self.weights.is_receiving();
        (!works).then_some(since)
    }

    /// The step's sub-batch, decided now or before. Steps ahead are started, too.
    pub async fn select(&self, request: &SelectBatchRequest, need: bool) -> Result<Arc<Ready>> {
        let (spec, step) = (self.spec(), request.step);
        let size = phase_at(&spec.phases, step).sub_batch_size as usize;
        ranks::slice(spec.seed, step, size, request.world_size, spec.micro_batches, request.rank)?;
        let asking = Asking {
            step,
            rank: request.rank,
            world_size: request.world_size,
            incarnation: request.incarnation.clone(),
            need,
            consumed_through: request.consumed_through,
        };
        match self.admit(&asking, request).await {
            Ok(waiting) => self.told(&asking, waiting).await,
            Err(refusal) => {
                // A new owner may know better.
                self.owner.check().await?;
                Err(refusal)
            }
        }
    }

    async fn admit(&self, asking: &Asking, request: &SelectBatchRequest) -> Result<Waiting> {
        if self.is_new(asking, request)? {
            // Durable first, so that stragglers of the one before are refused after a restart, too.
            self.incarnations.add(&asking.incarnation).await?;
        }
        self.admitted(asking, request)
    }

    /// Waits for the step, and says so in the log now and then: training never stalls in silence.
    async fn told(&self, asking: &Asking, waiting: Waiting) -> Result<Arc<Ready>> {
        let begun = Instant::now();
        // Ranks go in step: one tells the trainer's pace.
        let sizing = Some(&self.deps.sizing).filter(|_| asking.rank == 0);
        if let Some((sizing, step)) = sizing.zip(asking.claims_consumed()) {
            sizing.consumed(&self.id, step, begun);
        }
        let ready = self.told_until(asking, waiting, begun).await;
        if let Some(sizing) = sizing.filter(|_| asking.need) {
            sizing.waited(&self.id, begun.elapsed());
        }
        ready
    }

    async fn told_until(&self, asking: &Asking, waiting: Waiting, begun: Instant) -> Result<Arc<Ready>> {
        let mut ready = pin!(waiting.ready());
        loop {
            match tokio::time::timeout(TOLD_EVERY, &mut ready).await {
                Ok(ready) => return ready,
                Err(_) if asking.need => {
                    let (step, rank, seconds) = (asking.step, asking.rank, begun.elapsed().as_secs());
                    tracing::warn!(run = self.id, step, rank, seconds, "a rank stands still for its batch");
                }
                Err(_) => {}
            }
        }
    }

    /// Whether the rank is of a start of the trainer that nobody knows yet, and may come.
    fn is_new(&self, asking: &Asking, request: &SelectBatchRequest) -> Result<bool> {
        let max_ahead = self.spec().max_ahead;
        let state = self.state();
        state.check_open()?;
        state.check_generation(request.generation)?;
        let new = !state.members.knows(&asking.incarnation);
        if new {
            state.members.check_new(asking, state.bounds(max_ahead))?;
        }
        Ok(new)
    }

    /// Admits a rank to its step.
    fn admitted(&self, asking: &Asking, request: &SelectBatchRequest) -> Result<Waiting> {
        let spec = self.spec();
        let mut state = self.state();
        state.check_open()?;
        state.check_generation(request.generation)?;
        let bounds = state.bounds(spec.max_ahead);
        if state.members.admit(asking, bounds)? {
            let error = state.members.taken_over();
            state.cells.values().for_each(|cell| cell.take_over(&error));
        }
        self.prepare(&mut state, &spec, asking.step);
        let cell = state.cells.get(&asking.step).ok_or_else(gone)?;
        Ok(cell.wait(asking.rank, asking.world_size, asking.need, request.pushing_through))
    }

    /// Starts `step` and what may be prepared after it; lets go of what is consumed.
    fn prepare(&self, state: &mut State, spec: &RunSpec, step: u64) {
        let consumed = state.members.consumed_by_all();
        state.cells.retain(|at, cell| consumed.is_none_or(|done| *at > done) || *at == step || cell.is_wanted());
        if state.cells.get(&step).is_none_or(Cell::is_failed) {
            self.start(state, step);
        }
        let frontier = state.members.frontier();
        if frontier.is_none_or(|done| step > done) {
            let last = last_allowed(frontier, spec.max_ahead).max(step);
            let end = self.plan.steps_total(&spec.phases).map_or(last, |total| last.min(total.saturating_sub(1)));
            for ahead in step + 1..=end {
                // One that failed is begun again when it is asked for, and one that found no room is not read again and again.
                let no_room = self.deps.ready.is_exceeded() && state.committed.contains(ahead);
                if !state.cells.contains_key(&ahead) && !no_room {
                    self.start(state, ahead);
                }
            }
        }
        self.make_room(state, step);
    }

    /// Lets go of batches in hand while there are too many bytes of them: first those that some rank is past, then those that
    /// are furthest ahead. They are read again when they are asked for.
    fn make_room(&self, state: &mut State, step: u64) {
        let past = state.members.frontier();
        while self.deps.ready.is_exceeded() {
            let spare = |(at, cell): &(&u64, &Cell)| **at != step && cell.is_ready() && !cell.is_wanted();
            let mut spares = state.cells.iter().filter(spare).map(|(at, _)| *at);
            let first = spares.next();
            let Some(at) = first.filter(|at| past.is_some_and(|past| *at <= past)).or(spares.next_back()).or(first)
            else {
                return;
            };
            state.cells.remove(&at);
        }
    }

    fn start(&self, state: &mut State, step: u64) {
        if state.appending_from.is_some_and(|from| step >= from) {
            return;
        }
        let (me, generation) = (self.me.clone(), state.chain.current());
        let cell = Cell::start(move |reporter| async move {
            let Some(run) = me.upgrade() else { return };
            // A panic must fail its step, not leave ranks waiting for ever.
            let result = AssertUnwindSafe(decide(&run, generation, step, &reporter)).catch_unwind().await;
            let result = result.unwrap_or_else(|_| Err(Error::internal("deciding the step panicked; see the log")));
            match &result {
                // How every run with epochs ends.
                Err(error) if error.reason() == Reason::EndOfData => {
                    tracing::debug!(run = run.id, step, error = error.chain(), "the data ends before this step");
                }
                Err(error) => tracing::warn!(run = run.id, step, error = error.chain(), "step failed"),
                Ok(_) => {}
            }
            reporter.finish(result);
            if let Err(error) = run.forget_weights().await {
                tracing::warn!(run = run.id, error = error.chain(), "old snapshots stay for now");
            }
        });
        state.cells.insert(step, cell);
    }

    /// The receipt that holds for `step` in the trajectory of `generation`; the newest one where absent.
    pub async fn find_receipt(&self, step: u64, generation: Option<u32>) -> Result<Option<Receipt>> {
        let generations = {
            let state = self.state();
            state.chain.candidates(step, generation.unwrap_or(state.chain.current()))
        };
        for generation in generations {
            if let Some(receipt) = self.receipts.find(step, generation).await? {
                return Ok(Some(receipt));
            }
        }
        Ok(None)
    }

    pub fn summary(&self) -> RunSummary {
        let state = self.state();
        RunSummary {
            run_id: self.id.clone(),
            state: state.run_state() as i32,
            generation: state.chain.current(),
            last_committed_step: state.committed.newest(),
        }
    }

    pub fn info(&self) -> RunInfo {
        let (summary, spec) = (self.summary(), self.spec());
        let learner = self.weights.book().borrow().newest().map(|published| published.version);
        let state = self.state();
        RunInfo {
            summary: Some(summary),
            dataset_manifest: self.manifest_digest.clone(),
            candidates_scanned: state.totals.candidates_scanned,
            examples_delivered: delivered(&spec, state.members.consumed_by_all()),
            consumed_through: state.members.consumed_by_all(),
            accounts: Some(state.totals),
            learner,
            failure: state.failure.clone().unwrap_or_default(),
            tail_rows_per_epoch: self.plan.tail_rows(&spec.phases),
            spec: Some((*spec).clone()),
        }
    }
}

impl Drop for Run {
    fn drop(&mut self) {
        self.parts.deps.sizing.forget(&self.parts.id);
    }
}
