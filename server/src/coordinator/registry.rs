//! All runs of this coordinator: opened by OpenRun, and found again in the state after a restart.
use super::{
    facts::{self, RunFacts},
    open::{self, Opening},
    owner::Identity,
    run::{Deps, Run},
    spec,
};
use crate::{
    error::{Error, Result},
    metrics,
    storage::{Location, Stores},
};
use futures::FutureExt;
use std::{
    collections::HashMap,
    sync::{Arc, Mutex},
    time::Duration,
};
use superbatch_proto::{
    ids::{RUN_ID_BYTES_MAX, is_run_id},
    v1::{OpenRunRequest, OpenRunResponse, Reason, RunSpec, RunState, RunSummary},
};

/// Bounds that the operator sets.
#[derive(Debug, Clone)]
pub struct Limits {
    pub super_batch_size_max: u32,
    pub sub_batch_size_max: u32,
    pub push_bytes_max: u64,
    pub push_deadline: Duration,
}

/// What a coordinator is made of.
pub struct Coordinator {
    pub deps: Deps,
    pub stores: Stores,
    pub state: Location,
    pub identity: Identity,
    pub limits: Limits,
    runs: Mutex<HashMap<String, Arc<Run>>>,
    /// One run is opened or loaded at a time.
    opening: tokio::sync::Mutex<()>,
}

impl Coordinator {
    pub fn new(deps: Deps, stores: Stores, state: Location, identity: Identity, limits: Limits) -> Arc<Self> {
        let (runs, opening) = (Mutex::default(), tokio::sync::Mutex::default());
        Arc::new(Self { deps, stores, state, identity, limits, runs, opening })
    }

    /// Opens a run, or joins it.
    ///
    /// # Errors
    /// `RunSpecConflict` names the field that differs from the known spec; `RunSpecImpossible` and the reasons of data, models
    /// and storage say what can never work.
    pub async fn open_run(&self, request: OpenRunRequest) -> Result<OpenRunResponse> {
        check_id(&request.run_id)?;
        let asked = request.spec.ok_or_else(|| Error::invalid("spec", "OpenRun needs a spec"))?;
        let asked = spec::complete(asked)?;
        let _alone = self.opening.lock().await;
        let run = match self.known(&request.run_id).await? {
            Some(run) => run,
            None => {
                let opening = Opening { coordinator: self, id: &request.run_id };
                let run = opening.open_new(&asked).boxed().await?;
                self.insert(run.clone());
                run
            }
        };
        conflict(&run, &asked)?;
        open::response(&run)
    }

    /// The run `id`, loaded from the state where this process does not know it yet.
    ///
    /// # Errors
    /// `RunNotFound`; `NotOwner` with the owner's address.
    pub async fn run(&self, id: &str) -> Result<Arc<Run>> {
        check_id(id)?;
        if let Some(run) = self.here(id) {
            return Ok(run);
        }
        let _alone = self.opening.lock().await;
        self.known(id).await?.ok_or_else(|| {
            Error::new(Reason::RunNotFound, format!("there is no run '{id}'; open it first")).with("run_id", id)
        })
    }

    /// Runs in the state, in the order of their ids.
    pub async fn list(&self) -> Result<Vec<RunSummary>> {
        let mut summaries = Vec::new();
        for id in self.state.folders("runs").await? {
            summaries.extend(self.summary(id).await?);
        }
        Ok(summaries)
    }

    /// Lets go of all runs: the process ends.
    pub async fn stop(&self) {
        let runs: Vec<_> = self.runs.lock().expect("no panic while held").drain().map(|(_, run)| run).collect();
        for run in runs {
            run.stop();
            run.weights.drain().await;
        }
    }

    async fn summary(&self, id: String) -> Result<Option<RunSummary>> {
        if let Some(run) = self.here(&id) {
            return Ok(run.info().summary);
        }
        let location = self.location(&id);
        let Some(facts) = facts::load(&location).await? else { return Ok(None) };
        let last_committed_step = open::last_committed(&location, &facts.chain).await?;
        Ok(Some(RunSummary {
            run_id: id,
            state: stored_state(&facts) as i32,
            generation: facts.chain.current(),
            last_committed_step,
        }))
    }

    async fn known(&self, id: &str) -> Result<Option<Arc<Run>>> {
        if let Some(run) = self.here(id) {
            return Ok(Some(run));
        }
        let Some(facts) = facts::load(&self.location(id)).await? else { return Ok(None) };
        let run = Opening { coordinator: self, id }.load(facts).boxed().await?;
        self.insert(run.clone());
        Ok(Some(run))
    }

    pub fn location(&self, id: &str) -> Location {
        self.state.below(&format!("runs/{id}"))
    }

    fn here(&self, id: &str) -> Option<Arc<Run>> {
        self.runs.lock().expect("no panic while held").get(id).cloned()
    }

    fn insert(&self, run: Arc<Run>) {
        let mut runs = self.runs.lock().expect("no panic while held");
        runs.insert(run.id.clone(), run);
        metrics::open_runs().set(runs.len() as f64);
    }
}

fn conflict(run: &Run, asked: &RunSpec) -> Result<()> {
    let mut known = (*run.spec()).clone();
    // Phases that were appended since are no difference.
    known.phases.truncate(asked.phases.len().max(1));
    let Some(field) = spec::first_difference(&known, asked) else { return Ok(()) };
    let message = format!(
        "run '{}' is known with another {field}; use the same spec to join it, or another run id for another run",
        run.id
    );
    Err(Error::new(Reason::RunSpecConflict, message).with("field", field))
}

fn check_id(id: &str) -> Result<()> {
    if is_run_id(id) {
        return Ok(());
    }
    let message = format!("'{id}' is no run id: letters, digits, '-', '_' and '.', at most {RUN_ID_BYTES_MAX}");
    Err(Error::invalid("run_id", message))
}

pub fn stored_state(facts: &RunFacts) -> RunState {
    match (&facts.failure, facts.closed) {
        (Some(_), _) => RunState::Failed,
        (None, true) => RunState::Closed,
        (None, false) => RunState::Open,
    }
}
