//! Admits ranks to their step. Starts the step's task and the tasks of the steps ahead.
//!
//! Here the starts of one trainer meet: ranks of the start before may still ask while those of the
//! next one arrive. If the newer one were only noted in memory, a restart of the coordinator would
//! forget the order of the two, and the stragglers would take the run back. So a new start is
//! written down before its first rank is served, and everything is checked a second time after the
//! write: no lock is held over it, and the run may have been rewound, closed or taken by a start
//! that is newer still. Steps ahead are started from here as well and not by a clock, because only
//! a request tells how far the trainer is; a task that runs ahead on its own would score steps that
//! the trainer, once it resumes elsewhere, never asks for.
use super::decide::decide;
use crate::{
    coordinator::{
        released,
        runs::{
            lease::Lease,
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
    traces,
};
use futures::FutureExt;
use std::{panic::AssertUnwindSafe, pin::pin, sync::Arc};
use superbatch_proto::v1::{Reason, RunSpec, SelectBatchRequest};
use tokio::time::Instant;
use tracing::Instrument;

impl Lease {
    /// Returns the step's sub-batch, decided now or before. Starts steps ahead too.
    pub async fn select(&self, request: &SelectBatchRequest, need: bool) -> Result<Arc<Ready>> {
        self.after(self.run().select(request, need).await)
    }
}

impl Run {
    async fn select(&self, request: &SelectBatchRequest, need: bool) -> Result<Arc<Ready>> {
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
                // The refusal rests on this process's memory of the run. If another coordinator has
                // taken the run over, that memory is stale and the rank must go to the new owner,
                // whose address NOT_OWNER holds. The check reads storage, so it is made for
                // refusals only and not for each request.
                self.owner.check().await?;
                if !self.learns_of(asking.claims_consumed()).await? {
                    return Err(refusal);
                }
                let waiting = self.admit(&asking, request).await?;
                self.wait_and_log(&asking, waiting).await
            }
        }
    }

    /// Looks in storage for a step that a rank has consumed, if this process does not know that it
    /// is committed. The answer to its own create may have been lost, and a former owner, who found
    /// the receipt before it knew that the run was taken over, may have served it. Returns whether
    /// the step is committed.
    async fn learns_of(&self, consumed: Option<u64>) -> Result<bool> {
        let Some(step) = consumed else {
            return Ok(false);
        };
        let generation = {
            let state = self.state();
            if state.committed.contains(step) {
                return Ok(false);
            }
            state.chain.current()
        };
        let Some(receipt) = self.find_decided(step, generation).await? else {
            return Ok(false);
        };
        self.found_committed(generation, &receipt);
        Ok(true)
    }

    async fn admit(&self, asking: &Asking, request: &SelectBatchRequest) -> Result<Waiting> {
        if self.is_new(asking, request)? {
            // The new incarnation is durable before it is admitted, so that late ranks of the old
            // one are refused after a restart of the coordinator too. The write waits for storage,
            // so no lock is held. `admitted` checks everything again: in the meantime another rank
            // may have brought the same incarnation, or a newer one, and a rewind may have come.
            self.incarnations.add(&asking.incarnation).await?;
        }
        self.admitted(asking, request)
    }

    /// Waits for the step, and logs the wait now and then: training must not stall in silence.
    async fn wait_and_log(&self, asking: &Asking, waiting: Waiting) -> Result<Arc<Ready>> {
        let begun = Instant::now();
        let (sizing, is_first) = (&self.deps.sizing, asking.rank == 0);
        // All ranks go at the same pace, so rank 0 stands for the trainer.
        if let Some(step) = asking.claims_consumed().filter(|_| is_first) {
            sizing.consumed(&self.id, step, begun);
        }
        let _waits = sizing.begin_wait(&self.id, is_first, asking.need, begun);
        self.wait_until_ready(asking, waiting, begun).await
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

    /// Returns whether the rank belongs to a start of the trainer that is not known yet and may be
    /// admitted.
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
            // Calls of the old trainer may still wait in the cells. They end now. If they stayed,
            // their needs would count towards a stall of the new trainer, and its deadlines would
            // have begun in the past.
            let error = state.members.taken_over();
            state.cells.values().for_each(|cell| cell.take_over(&error));
        }
        self.prepare(&mut state, &spec, asking.step);
        let cell = state.cells.get(&asking.step).ok_or_else(released)?;
        Ok(cell.wait(asking, request.pushing_through))
    }

    /// Starts `step` and the steps that may be prepared after it. Drops the cells of consumed
    /// steps.
    fn prepare(&self, state: &mut State, spec: &RunSpec, step: u64) {
        // A cell whose step all ranks have consumed is dropped, except the requested one (a rank
        // may ask for an old step) and those at which a call still waits: dropping a cell ends its
        // calls.
        let consumed = state.members.consumed_by_all();
        state.cells.retain(|at, cell| {
            consumed.is_none_or(|done| *at > done) || *at == step || cell.is_wanted()
        });
        if state.cells.get(&step).is_none_or(Cell::is_failed) {
            self.start(state, step);
        }
        // Only a request at the frontier starts steps ahead. A late rank that asks for an old step
        // is served, but must not make the service prepare the steps after it a second time.
        let frontier = state.members.frontier();
        if frontier.is_none_or(|done| step > done) {
            let last = last_allowed(frontier, spec.max_ahead).max(step);
            let end = self
                .plan
                .steps_total(&spec.phases)
                .map_or(last, |total| last.min(total.saturating_sub(1)));
            for ahead in step + 1..=end {
                // A step ahead that failed keeps its cell: it is started again when a rank asks for
                // it, and not at each request. A committed step is not read ahead while the memory
                // is full: `make_room` would drop it at once, and each request would read it again.
                let no_room = self.deps.ready.is_exceeded() && state.committed.contains(ahead);
                if !state.cells.contains_key(&ahead) && !no_room {
                    self.start(state, ahead);
                }
            }
        }
        self.make_room(state, step);
    }

    /// Drops ready batches while they exceed the memory budget: first those that some rank is past,
    /// then those furthest ahead, which are needed last. A dropped batch is read again when a rank
    /// asks for it: its receipt is durable. The requested step and batches with waiting ranks stay,
    /// even over the budget, since those ranks could not go on. So do batches whose rows are on
    /// workers: dropping them gives nothing back, and workers would let go of the rows.
    fn make_room(&self, state: &mut State, step: u64) {
        let past = state.members.frontier();
        while self.deps.ready.is_exceeded() {
            let spare =
                |(at, cell): &(&u64, &Cell)| **at != step && cell.is_ready() && !cell.is_wanted();
            let spares = state.cells.iter().filter(spare);
            let Some(at) = dropped_first(spares.map(|(at, cell)| (*at, cell.bytes())), past) else {
                return;
            };
            state.cells.remove(&at);
        }
    }

    fn start(&self, state: &mut State, step: u64) {
        // While phases are being written, steps from the first new phase on must not begin: they
        // would be decided by the old phases and be committed under a spec that says otherwise.
        if state.appending_from.is_some_and(|from| step >= from) {
            return;
        }
        let (me, generation) = (self.me.clone(), state.chain.current());
        let cell = Cell::start(move |reporter| async move {
            // A weak reference: the run owns its cells, so a strong one in their tasks would keep a
            // closed run alive for ever.
            let Some(run) = me.upgrade() else { return };
            // A panic must fail its step. Otherwise the cell would stay "working" and its ranks
            // would wait for ever.
            let span = traces::step(&run.id, generation, step);
            let result = AssertUnwindSafe(decide(&run, generation, step, &reporter))
                .catch_unwind()
                .instrument(span.clone())
                .await;
            let result = result.unwrap_or_else(|_| {
                Err(Error::internal("deciding the step panicked; see the log"))
            });
            match &result {
                // Every run with epochs ends this way, so it is no warning.
                Err(error) if error.reason() == Reason::EndOfData => {
                    tracing::debug!(
                        run = run.id,
                        step,
                        error = error.chain(),
                        "the data ends before this step"
                    );
                }
                Err(error) => {
                    traces::failed(&span, error);
                    tracing::warn!(run = run.id, step, error = error.chain(), "step failed")
                }
                Ok(_) => {}
            }
            drop(span);
            reporter.finish(result);
            // After the ranks have their batch: deleting waits for storage.
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

/// Returns the step that is dropped first, of steps by rising number with the bytes that they give
/// back: one that some rank is past, else the one furthest ahead. Steps that give nothing back
/// stay.
fn dropped_first(
    spares: impl DoubleEndedIterator<Item = (u64, u64)>,
    past: Option<u64>,
) -> Option<u64> {
    let mut steps = spares.filter(|(_, bytes)| *bytes > 0).map(|(step, _)| step);
    let first = steps.next();
    first
        .filter(|step| past.is_some_and(|past| *step <= past))
        .or(steps.next_back())
        .or(first)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn room_is_made_by_steps_that_hold_some() {
        let dropped = |spares: &[(u64, u64)], past| dropped_first(spares.iter().copied(), past);
        assert_eq!(dropped(&[(3, 9), (4, 9), (5, 9)], Some(3)), Some(3));
        assert_eq!(dropped(&[(3, 9), (4, 9), (5, 9)], Some(2)), Some(5));
        assert_eq!(dropped(&[(3, 9)], None), Some(3));
        assert_eq!(dropped(&[(3, 0), (4, 9), (5, 0)], Some(3)), Some(4));
        assert_eq!(dropped(&[(3, 0), (4, 9), (5, 9), (6, 0)], Some(3)), Some(5));
        assert_eq!(dropped(&[(3, 0), (4, 0)], Some(3)), None, "rows on workers");
    }
}
