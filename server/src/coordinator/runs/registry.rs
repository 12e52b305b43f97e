//! All runs of this coordinator: opened by OpenRun, and loaded from the state after a restart.
use super::{
    lease::{Called, longest_idle},
    open::{self, Opening},
    parts::Deps,
    run::{Run, run_state},
};
use crate::{
    coordinator::{
        facts::{
            owner::Identity,
            run::{self, RunFacts},
        },
        spec::{self, Difference},
    },
    error::{Error, Result},
    metrics,
    storage::{Location, Stores},
};
use futures::{FutureExt, future::join_all};
use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex, MutexGuard,
        atomic::{AtomicBool, Ordering},
    },
};
use superbatch_proto::{
    ids::{RUN_ID_BYTES_MAX, is_run_id},
    v1::{ComputeDtype, OpenRunRequest, OpenRunResponse, Reason, RunSpec, RunState, RunSummary},
};

/// A coordinator: its parts and its runs.
pub struct Coordinator {
    pub deps: Deps,
    pub stores: Stores,
    pub state: Location,
    pub identity: Identity,
    runs: Mutex<HashMap<String, Arc<Run>>>,
    /// A lock for each run that is being opened or loaded. Ranks call at the same moment, and two
    /// loads of one run would each claim its ownership; a lock for all runs would make the calls of
    /// others wait for a slow one.
    opening: Mutex<HashMap<String, Arc<tokio::sync::Mutex<()>>>>,
    stopping: AtomicBool,
}

impl Coordinator {
    pub fn new(deps: Deps, stores: Stores, state: Location, identity: Identity) -> Arc<Self> {
        let (runs, opening) = (Mutex::default(), Mutex::default());
        Arc::new(Self {
            deps,
            stores,
            state,
            identity,
            runs,
            opening,
            stopping: AtomicBool::new(false),
        })
    }

    /// Opens a run, or joins it.
    ///
    /// # Errors
    /// `RunSpecConflict` names the field that differs from the known spec; `RunSpecImpossible` and
    /// the reasons of data, models and storage say what can never work.
    pub async fn open_run(&self, request: OpenRunRequest) -> Result<OpenRunResponse> {
        check_id(&request.run_id)?;
        let asked = request
            .spec
            .ok_or_else(|| Error::invalid("spec", "OpenRun needs a spec"))?;
        let asked = self.complete(asked)?;
        let _alone = self.lock_run(&request.run_id).await;
        let run = match self.find_or_load(&request.run_id).await? {
            Some(run) => run,
            None => {
                self.check_room()?;
                let opening = Opening {
                    coordinator: self,
                    id: &request.run_id,
                };
                let run = self.insert(opening.open_new(&asked).boxed().await?)?;
                tracing::info!(run = run.id, "run opened");
                run
            }
        };
        conflict(&run, &asked)?;
        open::response(&run)
    }

    /// Completes a spec with its defaults. A size over the protocol's bound is over the operator's
    /// limit too; the error names the latter, which the operator can change.
    fn complete(&self, asked: RunSpec) -> Result<RunSpec> {
        let limits = &self.deps.limits;
        let over = limits.check(&asked);
        spec::complete(asked, limits.need_deadline_seconds).map_err(|error| match over {
            Err(over) if over.value("field") == error.value("field") => over,
            _ => error,
        })
    }

    /// Returns the run `id`. Loads it from the state if this process does not know it yet.
    ///
    /// # Errors
    /// `RunNotFound`; `NotOwner` with the owner's address.
    pub async fn run(&self, id: &str) -> Result<Called> {
        check_id(id)?;
        if let Some(run) = self.called(id) {
            return Ok(run);
        }
        let _alone = self.lock_run(id).await;
        self.find_or_load(id).await?.ok_or_else(|| {
            Error::new(
                Reason::RunNotFound,
                format!("there is no run '{id}'; open it first"),
            )
            .with("run_id", id)
        })
    }

    /// Lists the runs in the state, in the order of their ids.
    pub async fn list(&self) -> Result<Vec<RunSummary>> {
        let mut summaries = Vec::new();
        for id in self.state.folders("runs").await? {
            summaries.extend(self.summary(id).await?);
        }
        Ok(summaries)
    }

    /// Stops all runs, since the process ends. No run is opened from now on.
    pub async fn stop(&self) {
        self.stopping.store(true, Ordering::SeqCst);
        let runs: Vec<_> = self.lock().drain().map(|(_, run)| run).collect();
        // All ranks get their answer before the first push is waited for: publishing may take
        // minutes.
        runs.iter().for_each(|run| run.stop());
        join_all(runs.iter().map(|run| run.weights.drain())).await;
    }

    /// Passes on a run's answer. A run that another coordinator owns is removed from memory, so
    /// that the next call reads the state again.
    pub fn noted<T>(&self, run: &Run, answer: Result<T>) -> Result<T> {
        match answer {
            Err(error) if error.reason() == Reason::NotOwner => {
                self.release(run);
                // The new owner is this process, which has loaded the run again: the caller may ask
                // here again.
                let ours = error.value("owner") == Some(&self.identity.address);
                Err(if ours {
                    crate::coordinator::released()
                } else {
                    error
                })
            }
            answer => answer,
        }
    }

    /// As [`Coordinator::noted`], for a call that writes a fact. If the outcome is unknown, the run
    /// is removed from memory: its state may lack a fact that exists, and only reading the state
    /// again tells.
    pub fn written<T>(&self, run: &Run, answer: Result<T>) -> Result<T> {
        use Reason::{GenerationStale, RunSpecConflict, StorageUnreachable};
        let unknown = |e: &Error| {
            matches!(
                e.reason(),
                GenerationStale | RunSpecConflict | StorageUnreachable
            )
        };
        if answer.as_ref().is_err_and(unknown) {
            self.release(run);
        }
        self.noted(run, answer)
    }

    /// Returns the runs that are open here. Removes those that ended from memory.
    pub fn open_runs(&self) -> Vec<Arc<Run>> {
        let mut runs = self.lock();
        runs.retain(|_, run| {
            let open = run.is_open();
            if !open {
                run.stop();
            }
            open
        });
        metrics::open_runs().set(runs.len() as f64);
        runs.values().cloned().collect()
    }

    async fn summary(&self, id: String) -> Result<Option<RunSummary>> {
        if let Some(run) = self.find_in_memory(&id) {
            return Ok(Some(run.summary()));
        }
        let location = self.location(&id);
        let Some(facts) = run::load(&location).await? else {
            return Ok(None);
        };
        let last_committed_step = open::last_committed(&location, &facts.chain).await?;
        Ok(Some(RunSummary {
            run_id: id,
            state: stored_state(&facts) as i32,
            generation: facts.chain.current(),
            last_committed_step,
        }))
    }

    async fn find_or_load(&self, id: &str) -> Result<Option<Called>> {
        if let Some(run) = self.called(id) {
            return Ok(Some(run));
        }
        let Some(facts) = run::load(&self.location(id)).await? else {
            return Ok(None);
        };
        let run = Opening {
            coordinator: self,
            id,
        }
        .load(facts)
        .boxed()
        .await?;
        let run = self.insert(run)?;
        tracing::info!(run = id, "run loaded");
        Ok(Some(run))
    }

    pub fn location(&self, id: &str) -> Location {
        self.state.below(&format!("runs/{id}"))
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<String, Arc<Run>>> {
        self.runs.lock().expect("no panic while held")
    }

    fn find_in_memory(&self, id: &str) -> Option<Arc<Run>> {
        self.lock().get(id).cloned()
    }

    /// As [`Coordinator::here`], for a call to use.
    fn called(&self, id: &str) -> Option<Called> {
        // Counted under the lock; otherwise the run could be put to sleep between the two.
        self.lock().get(id).cloned().map(Called::new)
    }

    /// Keeps a run in memory. If there are too many, another one is put to sleep.
    fn insert(&self, run: Arc<Run>) -> Result<Called> {
        let mut runs = self.lock();
        let sleeps = if run.is_open() {
            self.room(&runs)?
        } else {
            None
        };
        let slept = sleeps.and_then(|id| runs.remove(&id));
        runs.insert(run.id.clone(), run.clone());
        metrics::open_runs().set(runs.len() as f64);
        let run = Called::new(run);
        drop(runs);
        if let Some(slept) = slept {
            slept.stop();
            tracing::info!(run = slept.id, "run put to sleep");
        }
        Ok(run)
    }

    fn release(&self, run: &Run) {
        let mut runs = self.lock();
        // The run may have been loaded again in the meantime. Only this very object is removed: its
        // successor is sound.
        if runs
            .get(&run.id)
            .is_some_and(|known| std::ptr::eq(known.as_ref(), run))
        {
            runs.remove(&run.id);
            metrics::open_runs().set(runs.len() as f64);
        }
        drop(runs);
        run.stop();
    }

    fn check_room(&self) -> Result<()> {
        self.room(&self.lock()).map(drop)
    }

    /// Returns the run whose place another one takes, if no place is free.
    ///
    /// # Errors
    /// `Overloaded` if all are busy; `ShuttingDown`.
    fn room(&self, runs: &HashMap<String, Arc<Run>>) -> Result<Option<String>> {
        if self.stopping.load(Ordering::SeqCst) {
            return Err(Error::new(
                Reason::ShuttingDown,
                "the service stops; ask again in a while",
            ));
        }
        let most = self.deps.limits.runs_max;
        let open = || runs.iter().filter(|(_, run)| run.is_open());
        if open().count() < most {
            return Ok(None);
        }
        longest_idle(open().map(|(id, run)| (id, run.idle_since()))).cloned().map(Some).ok_or_else(|| {
            let message = format!(
                "{most} runs are open and at work, so that none can be put to sleep; close one, \
                or raise coordinator.max_runs"
            );
            Error::new(Reason::Overloaded, message)
        })
    }

    async fn lock_run(&self, id: &str) -> tokio::sync::OwnedMutexGuard<()> {
        let lock = {
            let mut opening = self.opening.lock().expect("no panic while held");
            opening.retain(|_, lock| Arc::strong_count(lock) > 1);
            opening.entry(id.to_owned()).or_default().clone()
        };
        lock.lock_owned().await
    }
}

fn conflict(run: &Run, asked: &RunSpec) -> Result<()> {
    let mut known = (*run.spec()).clone();
    // Phases that were appended later are no difference.
    known
        .phases
        .truncate(asked.phases.len().max(run.opened_phases));
    if asked.compute_dtype() == ComputeDtype::Unspecified {
        // The device was decided when the run was opened.
        known.compute_dtype = asked.compute_dtype;
    }
    let Some(Difference {
        field,
        values: [known, given],
    }) = spec::first_difference(&known, asked)
    else {
        return Ok(());
    };
    let message = format!(
        "run '{}' is known with another {field}: it was opened with {known}, and this spec says \
        {given}; a run keeps its spec for \
         life, so open it as it was, or another run under a new id",
        run.id
    );
    let error = Error::new(Reason::RunSpecConflict, message).with("field", field);
    Err(error.with("known", known).with("given", given))
}

fn check_id(id: &str) -> Result<()> {
    if is_run_id(id) {
        return Ok(());
    }
    let message = format!(
        "'{id}' is no run id: letters, digits, '-', '_' and '.', at most {RUN_ID_BYTES_MAX}"
    );
    Err(Error::invalid("run_id", message))
}

pub fn stored_state(facts: &RunFacts) -> RunState {
    run_state(facts.failure.is_some(), facts.closed)
}
