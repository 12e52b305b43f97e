//! One open run: its steps, ranks, weights and cursors.
use super::{
    chain::{Chain, Rewound},
    decide::decide,
    facts::{self, ModelFact},
    gone,
    members::{Asking, Members, check_ahead, last_allowed},
    owner::Ownership,
    plan::Plan,
    pool::Pool,
    ranks,
    receipts::{Committed, Receipts},
    record,
    selector::Selector,
    spec::{append_phases, delivered, phase_at},
    step::{Cell, Ready},
    weights::{Began, Weights},
};
use crate::{
    dataset::Manifest,
    error::{Error, Result},
    metrics,
    storage::Location,
};
use arrow::datatypes::SchemaRef;
use futures::FutureExt;
use std::{
    collections::BTreeMap,
    panic::AssertUnwindSafe,
    sync::{Arc, Mutex, MutexGuard, RwLock, Weak},
};
use superbatch_proto::v1::{
    Accounts, Phase, Reason, Receipt, RewindMode, RunInfo, RunSpec, RunState, RunSummary, SelectBatchRequest,
};
use tokio::time::Instant;

/// Bad rows are not judged before so many candidates were scanned.
const JUDGED_FROM: u64 = 1_000;

/// What a run uses of its coordinator.
#[derive(Clone)]
pub struct Deps {
    pub pool: Arc<Pool>,
    pub selector: Arc<dyn Selector>,
}

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
    spec: RwLock<Arc<RunSpec>>,
    state: Mutex<State>,
    /// One commit at a time: totals are in the order of commits.
    committing: tokio::sync::Mutex<()>,
    me: Weak<Run>,
}

/// What changes while a run is open.
pub struct State {
    pub chain: Chain,
    pub appended: u32,
    pub closed: bool,
    pub failure: Option<String>,
    pub totals: Accounts,
    /// The newest committed step of the current trajectory.
    pub committed: Option<u64>,
    pub members: Members,
    pub cells: BTreeMap<u64, Cell>,
}

/// The parts of a run that never change, before it lives.
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
}

impl Run {
    pub fn new(parts: Parts, spec: RunSpec, state: State) -> Arc<Self> {
        Arc::new_cyclic(|me| Self {
            id: parts.id,
            deps: parts.deps,
            location: parts.location,
            manifest: parts.manifest,
            manifest_digest: parts.manifest_digest,
            output_schema: parts.output_schema,
            plan: parts.plan,
            reference: parts.reference,
            learner: parts.learner,
            weights: parts.weights,
            receipts: parts.receipts,
            owner: parts.owner,
            spec: RwLock::new(Arc::new(spec)),
            state: Mutex::new(state),
            committing: tokio::sync::Mutex::default(),
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

    pub fn next_step(&self) -> u64 {
        self.state().committed.map_or(0, |step| step + 1)
    }

    /// The step's sub-batch, decided now or before. Steps ahead are started, too.
    pub async fn select(&self, request: &SelectBatchRequest, need: bool) -> Result<Arc<Ready>> {
        let spec = self.spec();
        let step = request.step;
        let phase = phase_at(&spec.phases, step);
        ranks::slice(
            spec.seed,
            step,
            phase.sub_batch_size as usize,
            request.world_size,
            spec.micro_batches,
            request.rank,
        )?;
        let waiting = {
            let mut state = self.state();
            state.check_open()?;
            state.check_generation(request.generation)?;
            let asking = Asking {
                step,
                rank: request.rank,
                world_size: request.world_size,
                incarnation: request.incarnation.clone(),
                need,
                consumed_through: request.consumed_through,
            };
            check_ahead(step, state.members.frontier(), state.committed, spec.max_ahead)?;
            state.members.admit(&asking)?;
            self.prepare(&mut state, &spec, step);
            let cell = state.cells.get(&step).ok_or_else(gone)?;
            cell.wait(request.rank, request.world_size, need, request.pushing_through)
        };
        waiting.ready().await
    }

    /// Starts `step` and what may be prepared after it; lets go of what is consumed.
    fn prepare(&self, state: &mut State, spec: &RunSpec, step: u64) {
        let consumed = state.members.consumed_by_all();
        state.cells.retain(|at, cell| consumed.is_none_or(|done| *at > done) || *at == step || cell.is_wanted());
        self.start(state, step);
        let frontier = state.members.frontier();
        if frontier.is_none_or(|done| step > done) {
            let last = last_allowed(frontier, None, spec.max_ahead).max(step);
            let end = self.plan.steps_total(&spec.phases).map_or(last, |total| last.min(total.saturating_sub(1)));
            for ahead in step + 1..=end {
                self.start(state, ahead);
            }
        }
        let ready = state.cells.values().filter(|cell| cell.is_ready()).count();
        metrics::ready_batches().set(ready as f64);
    }

    fn start(&self, state: &mut State, step: u64) {
        if state.cells.get(&step).is_some_and(|cell| !cell.is_failed()) {
            return;
        }
        let (me, generation) = (self.me.clone(), state.chain.current());
        let cell = Cell::start(move |reporter| async move {
            let Some(run) = me.upgrade() else { return };
            // A panic must fail its step, not leave ranks waiting for ever.
            let result = AssertUnwindSafe(decide(&run, generation, step, &reporter)).catch_unwind().await;
            let result = result.unwrap_or_else(|_| Err(Error::internal("deciding the step panicked; see the log")));
            if let Err(error) = &result {
                tracing::warn!(run = run.id, step, error = error.chain(), "step failed");
            }
            reporter.finish(result);
        });
        state.cells.insert(step, cell);
    }

    /// The receipt that holds for `step` in the current trajectory.
    pub async fn find_receipt(&self, step: u64) -> Result<Option<Receipt>> {
        let generations = self.state().chain.candidates(step);
        for generation in generations {
            if let Some(receipt) = self.receipts.find(step, generation).await? {
                return Ok(Some(receipt));
            }
        }
        Ok(None)
    }

    /// Makes a decision durable, unless another one already is. Returns the receipt that holds, and whether it is ours.
    ///
    /// # Errors
    /// `NotOwner`; `TooManyBadRows` where the run fails by it; `StorageUnreachable`.
    pub async fn commit(&self, mut receipt: Receipt) -> Result<(Receipt, bool)> {
        let _alone = self.committing.lock().await;
        let begun = Instant::now();
        self.owner.check().await?;
        let summary = receipt.summary.as_mut().ok_or_else(|| Error::internal("a receipt has no summary"))?;
        let cost = summary.cost.clone().unwrap_or_default();
        let mut totals = record::add(&self.state().totals, &cost);
        self.judge(&totals).await?;
        totals.seconds.get_or_insert_default().commit += begun.elapsed().as_secs_f64();
        summary.run_totals = Some(totals.clone());
        let (step, generation) = (summary.step, summary.generation);
        let committed = self.receipts.commit(&receipt).await?;
        let mut state = self.state();
        if state.chain.current() != generation {
            return Err(gone());
        }
        state.committed = state.committed.max(Some(step));
        match committed {
            Committed::Theirs(theirs) => Ok((*theirs, false)),
            Committed::Ours => {
                state.totals = totals;
                drop(state);
                record::count(&receipt, begun);
                Ok((receipt, true))
            }
        }
    }

    /// Fails the run when too large a share of what was scanned is bad.
    async fn judge(&self, totals: &Accounts) -> Result<()> {
        let share = self.spec().max_bad_row_share;
        if totals.bad_rows as f64 <= share * totals.candidates_scanned.max(JUDGED_FROM) as f64 {
            return Ok(());
        }
        let why = format!(
            "{} of {} candidates scanned cannot be used, more than max_bad_row_share = {share}; mend the data or open a run \
             that allows more",
            totals.bad_rows, totals.candidates_scanned
        );
        facts::fail(&self.location, &why).await?;
        self.state().failure = Some(why.clone());
        Err(Error::new(Reason::TooManyBadRows, why))
    }

    /// Goes back: opens the next generation.
    pub async fn rewind(&self, to_step: u64, mode: RewindMode) -> Result<u32> {
        let _alone = self.committing.lock().await;
        let (generation, committed) = {
            let state = self.state();
            state.check_open()?;
            (state.chain.current() + 1, state.committed)
        };
        if to_step > committed.map_or(0, |step| step + 1) {
            let message =
                format!("cannot rewind to step {to_step}: the next step is {}", committed.map_or(0, |s| s + 1));
            return Err(Error::invalid("to_step", message));
        }
        let rewound = Rewound { generation, to_step, replay: mode == RewindMode::Replay };
        facts::create_generation(&self.location, &rewound).await?;
        let mut state = self.state();
        if !rewound.replay {
            state.committed = to_step.checked_sub(1);
        }
        state.chain.push(rewound);
        state.members.rewound();
        state.cells.clear();
        Ok(generation)
    }

    /// Adds phases for steps that have not begun.
    pub async fn append_phases(&self, phases: Vec<Phase>) -> Result<Arc<RunSpec>> {
        let _alone = self.committing.lock().await;
        let (number, begun) = {
            let state = self.state();
            state.check_open()?;
            (state.appended, state.cells.keys().next_back().copied().max(state.committed))
        };
        let mut spec = (*self.spec()).clone();
        let known = spec.phases.len();
        spec = append_phases(spec, phases, begun)?;
        self.plan.check(&spec.phases)?;
        facts::append_phases(&self.location, number, &spec.phases[known..]).await?;
        self.state().appended += 1;
        let spec = Arc::new(spec);
        *self.spec.write().expect("no panic while held") = spec.clone();
        Ok(spec)
    }

    pub async fn close(&self) -> Result<()> {
        facts::close(&self.location).await?;
        let mut state = self.state();
        state.closed = true;
        state.cells.clear();
        Ok(())
    }

    /// Lets go of everything that waits: the process ends.
    pub fn stop(&self) {
        self.state().cells.clear();
    }

    pub fn check_push(&self, generation: u32) -> Result<()> {
        let state = self.state();
        state.check_open()?;
        state.check_generation(generation)
    }

    pub fn info(&self) -> RunInfo {
        let spec = self.spec();
        let state = self.state();
        RunInfo {
            summary: Some(RunSummary {
                run_id: self.id.clone(),
                state: state.run_state() as i32,
                generation: state.chain.current(),
                last_committed_step: state.committed,
            }),
            dataset_manifest: self.manifest_digest.clone(),
            candidates_scanned: state.totals.candidates_scanned,
            examples_delivered: delivered(&spec, state.members.consumed_by_all()),
            consumed_through: state.members.consumed_by_all(),
            accounts: Some(state.totals.clone()),
            learner: self.weights.book().borrow().newest().map(|published| published.version),
            failure: state.failure.clone().unwrap_or_default(),
            tail_rows_per_epoch: self.plan.tail_rows(&spec.phases),
            spec: Some((*spec).clone()),
        }
    }
}

impl State {
    pub fn run_state(&self) -> RunState {
        match (&self.failure, self.closed) {
            (Some(_), _) => RunState::Failed,
            (None, true) => RunState::Closed,
            (None, false) => RunState::Open,
        }
    }

    fn check_open(&self) -> Result<()> {
        if let Some(why) = &self.failure {
            return Err(Error::new(Reason::RunFailed, format!("the run failed: {why}")));
        }
        if self.closed {
            return Err(Error::new(Reason::RunClosed, "the run is closed; open another one"));
        }
        Ok(())
    }

    fn check_generation(&self, asked: u32) -> Result<()> {
        let current = self.chain.current();
        if asked == current {
            return Ok(());
        }
        if asked > current {
            return Err(Error::invalid("generation", format!("the run's newest generation is {current}, not {asked}")));
        }
        let message = format!("the run was rewound: generation {asked} is over, {current} goes on; open the run again");
        Err(Error::new(Reason::GenerationStale, message).with("generation", current))
    }
}
