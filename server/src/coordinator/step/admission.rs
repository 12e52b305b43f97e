//! Admits ranks to their step, starts its task and those of the steps ahead.
use super::decide::decide;
use crate::{
    coordinator::{
        released,
        runs::{
            run::{Run, TOLD_EVERY},
            state::State,
        },
        serve::{ready::Ready, share},
        spec::{low_rows, phase_at},
        trainer::{
            cell::{Cell, Waiting},
            ranks::{Asking, check_incarnation, last_allowed},
        },
    },
    error::{Error, Result},
};
use futures::FutureExt;
use std::{panic::AssertUnwindSafe, pin::pin, sync::Arc};
use superbatch_proto::v1::{Reason, RunSpec, SelectBatchRequest};
use tokio::time::Instant;

impl Run {
    /// The step's sub-batch, decided now or before. Steps ahead are started, too.
    pub async fn select(&self, request: &SelectBatchRequest, need: bool) -> Result<Arc<Ready>> {
        check_incarnation(&request.incarnation)?;
        let (spec, step) = (self.spec(), request.step);
        let phase = phase_at(&spec.phases, step);
        let rows = phase.sub_batch_size as usize;
        let sizes = match low_rows(phase.multi_resolution.as_ref(), rows) {
            0 => vec![rows],
            low => vec![rows - low, low],
        };
        share::check(&sizes, request.world_size, spec.micro_batches, request.rank)?;
        let asking = Asking {
            step,
            rank: request.rank,
            world_size: request.world_size,
            incarnation: request.incarnation.clone(),
            need,
            consumed_through: request.consumed_through,
            held: request.held_steps,
        };
        match self.admit(&asking, request).await {
            Ok(waiting) => self.wait_and_log(&asking, waiting).await,
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
    async fn wait_and_log(&self, asking: &Asking, waiting: Waiting) -> Result<Arc<Ready>> {
        let begun = Instant::now();
        // Ranks go in step: one tells the trainer's pace.
        let sizing = Some(&self.deps.sizing).filter(|_| asking.rank == 0);
        if let Some((sizing, step)) = sizing.zip(asking.claims_consumed()) {
            sizing.consumed(&self.id, step, begun);
        }
        let ready = self.wait_until_ready(asking, waiting, begun).await;
        if let Some(sizing) = sizing.filter(|_| asking.need) {
            sizing.record_wait(&self.id, begun.elapsed());
        }
        ready
    }

    async fn wait_until_ready(
        &self,
        asking: &Asking,
        waiting: Waiting,
        begun: Instant,
    ) -> Result<Arc<Ready>> {
        let mut ready = pin!(waiting.ready());
        loop {
            match tokio::time::timeout(TOLD_EVERY, &mut ready).await {
                Ok(ready) => return ready,
                Err(_) if asking.need => {
                    let (step, rank, seconds) =
                        (asking.step, asking.rank, begun.elapsed().as_secs());
                    tracing::warn!(
                        run = self.id,
                        step,
                        rank,
                        seconds,
                        "a rank stands still for its batch"
                    );
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
            self.weights
                .forget_announced_by_earlier(&asking.incarnation, |other| {
                    state.members.knows(other)
                });
            let error = state.members.taken_over();
            state.cells.values().for_each(|cell| cell.take_over(&error));
        }
        self.prepare(&mut state, &spec, asking.step);
        let cell = state.cells.get(&asking.step).ok_or_else(released)?;
        Ok(cell.wait(asking, request.pushing_through))
    }

    /// Starts `step` and what may be prepared after it; lets go of what is consumed.
    fn prepare(&self, state: &mut State, spec: &RunSpec, step: u64) {
        let consumed = state.members.consumed_by_all();
        state.cells.retain(|at, cell| {
            consumed.is_none_or(|done| *at > done) || *at == step || cell.is_wanted()
        });
        if state.cells.get(&step).is_none_or(Cell::is_failed) {
            self.start(state, step);
        }
        let frontier = state.members.frontier();
        if frontier.is_none_or(|done| step > done) {
            let last = last_allowed(frontier, spec.max_ahead).max(step);
            let end = self
                .plan
                .steps_total(&spec.phases)
                .map_or(last, |total| last.min(total.saturating_sub(1)));
            for ahead in step + 1..=end {
                // One that failed is begun again when it is asked for, and one that found no room
                // is not read again and again.
                let no_room = self.deps.ready.is_exceeded() && state.committed.contains(ahead);
                if !state.cells.contains_key(&ahead) && !no_room {
                    self.start(state, ahead);
                }
            }
        }
        self.make_room(state, step);
    }

    /// Lets go of batches in hand while there are too many bytes of them: first those that some
    /// rank is past, then those that are furthest ahead. They are read again when they are asked
    /// for.
    fn make_room(&self, state: &mut State, step: u64) {
        let past = state.members.frontier();
        while self.deps.ready.is_exceeded() {
            let spare =
                |(at, cell): &(&u64, &Cell)| **at != step && cell.is_ready() && !cell.is_wanted();
            let mut spares = state.cells.iter().filter(spare).map(|(at, _)| *at);
            let first = spares.next();
            let Some(at) = first
                .filter(|at| past.is_some_and(|past| *at <= past))
                .or(spares.next_back())
                .or(first)
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
            let result = AssertUnwindSafe(decide(&run, generation, step, &reporter))
                .catch_unwind()
                .await;
            let result = result.unwrap_or_else(|_| {
                Err(Error::internal("deciding the step panicked; see the log"))
            });
            match &result {
                // How every run with epochs ends.
                Err(error) if error.reason() == Reason::EndOfData => {
                    tracing::debug!(
                        run = run.id,
                        step,
                        error = error.chain(),
                        "the data ends before this step"
                    );
                }
                Err(error) => {
                    tracing::warn!(run = run.id, step, error = error.chain(), "step failed")
                }
                Ok(_) => {}
            }
            reporter.finish(result);
            if let Err(error) = run.forget_weights().await {
                tracing::warn!(
                    run = run.id,
                    error = error.chain(),
                    "old snapshots stay for now"
                );
            }
        });
        state.cells.insert(step, cell);
    }
}
