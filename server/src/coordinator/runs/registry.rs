//! All runs of this coordinator: opened by OpenRun, and loaded from the state after a restart.
use super::{
    asleep::Asleep,
    deps::Deps,
    fork,
    lease::Lease,
    open::{self, Opening},
    open_runs::OpenRuns,
    run::{Run, run_state},
};
use crate::{
    coordinator::{
        facts::{
            chain::Chain,
            owner::Identity,
            run::{self, RunFacts},
        },
        receipts::{store::Receipts, wasted::WastedByRun},
        spec::{self, Difference},
    },
    error::{Error, Result},
    storage::{Location, Stores, is_passing},
};
use futures::{FutureExt, future::join_all};
use std::{
    collections::HashMap,
    sync::{Arc, Mutex},
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
    pub open: Arc<OpenRuns>,
    /// A lock for each run that is being opened or loaded. Ranks call at the same moment, and two
    /// loads of one run would each claim its ownership; a lock for all runs would make the calls of
    /// others wait for a slow one.
    opening: Mutex<HashMap<String, Arc<tokio::sync::Mutex<()>>>>,
    pub(super) wasted: WastedByRun,
    /// What is asked of runs that are not in memory.
    pub(super) asleep: Asleep,
}

impl Coordinator {
    pub fn new(deps: Deps, stores: Stores, state: Location, identity: Identity) -> Arc<Self> {
        let open = OpenRuns::new(deps.limits.runs_max, identity.clone());
        Arc::new(Self {
            deps,
            stores,
            state,
            identity,
            open,
            opening: Mutex::default(),
            wasted: WastedByRun::default(),
            asleep: Asleep::default(),
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
                self.open.check_room()?;
                let opening = Opening {
                    coordinator: self,
                    id: &request.run_id,
                };
                let run = self.open.insert(opening.open_new(&asked).boxed().await?)?;
                tracing::info!(run = run.run().id, "run opened");
                run
            }
        };
        conflict(run.run(), &asked)?;
        open::response(run.run())
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
    pub async fn run(&self, id: &str) -> Result<Lease> {
        check_id(id)?;
        if let Some(run) = self.owned(id).await? {
            return Ok(run);
        }
        let _alone = self.lock_run(id).await;
        self.find_or_load(id).await?.ok_or_else(|| not_found(id))
    }

    /// Returns the run `id` if it is in memory. Lets it go if another coordinator has taken it
    /// over: its memory is then of a trajectory that may be over.
    ///
    /// # Errors
    /// `NotOwner` with the owner's address.
    pub(super) async fn owned(&self, id: &str) -> Result<Option<Lease>> {
        let Some(run) = self.open.lease(id) else {
            return Ok(None);
        };
        run.after(run.run().owner.check_lately().await)?;
        Ok(Some(run))
    }

    /// Returns the generations of the run `id` and its receipts, read from the state if this
    /// process does not own the run.
    ///
    /// # Errors
    /// `RunNotFound`, `StorageUnreachable`.
    pub async fn history(&self, id: &str) -> Result<(Chain, Receipts)> {
        check_id(id)?;
        if let Some(run) = self.open.find(id) {
            // A former owner that still has the run in memory does not know of rewinds since, and
            // would answer with receipts of a trajectory that is over. Facts can be read by all.
            match run.owner.check().await {
                Ok(()) => {
                    let chain = run.state().chain.clone();
                    return Ok((chain, run.receipts.clone()));
                }
                Err(error) if error.reason() == Reason::NotOwner => self.open.release(&run),
                Err(error) => return Err(error),
            }
        }
        let facts = run::load(&self.location(id)).await?;
        let facts = facts.ok_or_else(|| not_found(id))?;
        let receipts = fork::receipts(&self.state, id, &facts).await?;
        Ok((facts.chain, receipts))
    }

    /// Lists the runs in the state, in the order of their ids. A run that cannot be read, such as
    /// one that a newer build wrote, is left out and logged: it must not hide all others.
    ///
    /// # Errors
    /// `StorageUnreachable`.
    pub async fn list(&self) -> Result<Vec<RunSummary>> {
        let mut summaries = Vec::new();
        for id in self.state.folders("runs").await? {
            match self.summary(id.clone()).await {
                Err(error) if !is_passing(&error) => {
                    let error = error.chain();
                    tracing::warn!(run = id, error, "a run that cannot be read is not listed");
                }
                summary => summaries.extend(summary?),
            }
        }
        Ok(summaries)
    }

    /// Stops all runs, since the process ends. No run is opened from now on.
    pub async fn stop(&self) {
        let runs = self.open.close();
        // All ranks get their answer before the first push is waited for: publishing may take
        // minutes.
        runs.iter().for_each(|run| run.stop());
        join_all(runs.iter().map(|run| run.weights.drain())).await;
    }

    async fn summary(&self, id: String) -> Result<Option<RunSummary>> {
        if let Some(run) = self.open.find(&id) {
            match run.owner.check_lately().await {
                Ok(()) => return Ok(Some(run.summary())),
                Err(_) => self.open.release(&run),
            }
        }
        let Some(facts) = run::load(&self.location(&id)).await? else {
            return Ok(None);
        };
        let receipts = fork::receipts(&self.state, &id, &facts).await?;
        let last_committed_step = receipts.newest(&facts.chain).await?;
        Ok(Some(RunSummary {
            run_id: id,
            state: stored_state(&facts) as i32,
            generation: facts.chain.current(),
            last_committed_step,
        }))
    }

    async fn find_or_load(&self, id: &str) -> Result<Option<Lease>> {
        if let Some(run) = self.owned(id).await? {
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
        let run = self.open.insert(run)?;
        tracing::info!(run = id, "run loaded");
        Ok(Some(run))
    }

    pub fn location(&self, id: &str) -> Location {
        self.state.below(&format!("runs/{id}"))
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
    // What the device decided when the run was opened.
    if asked.compute_dtype() == ComputeDtype::Unspecified {
        known.compute_dtype = asked.compute_dtype;
    }
    if asked.micro_batch_rows == 0 {
        known.micro_batch_rows = 0;
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

pub(super) fn not_found(id: &str) -> Error {
    let message = format!("there is no run '{id}'; open it first");
    Error::new(Reason::RunNotFound, message).with("run_id", id)
}

pub(super) fn check_id(id: &str) -> Result<()> {
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
