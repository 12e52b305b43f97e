//! The list of all runs of the state, and one run.
use super::{
    Known, Page,
    answer::{Answer, Json},
    shown::{lag, word},
};
use crate::{
    coordinator::{
        facts::chain::Began, plan::planner::Plan, receipts::json::accounts,
        runs::registry::stored_state,
    },
    error::{Error, Result},
};
use axum::extract::{Path, State};
use futures::{StreamExt, TryStreamExt, stream};
use serde_json::{Value, json};
use std::{
    sync::Arc,
    time::{SystemTime, UNIX_EPOCH},
};
use superbatch_proto::v1::{Phase, Reason};

/// Most runs that are listed, by name from the last. Each costs a few reads of storage.
const LISTED: usize = 200;
const AT_ONCE: usize = 8;

/// `GET /api/about`.
pub(super) async fn about(State(page): State<Arc<Page>>) -> Answer {
    Ok(Json(
        json!({ "state": page.state.uri(), "version": env!("CARGO_PKG_VERSION") }),
    ))
}

/// `GET /api/runs`: the newest commit first.
pub(super) async fn list(State(page): State<Arc<Page>>) -> Answer {
    let names = page.state.folders("runs").await?;
    let more = names.len().saturating_sub(LISTED);
    let looks: Vec<_> = names
        .iter()
        .rev()
        .take(LISTED)
        .map(|id| describe_run(&page, id))
        .collect();
    let found: Vec<_> = stream::iter(looks).buffered(AT_ONCE).try_collect().await?;
    let mut runs: Vec<Value> = found.into_iter().flatten().collect();
    runs.sort_by_key(|run| std::cmp::Reverse(run["committed_unix_ms"].as_i64()));
    Ok(Json(json!({ "runs": runs, "more": more })))
}

/// Reads one run for the list; `None` for a folder that holds no run.
async fn describe_run(page: &Page, id: &str) -> Result<Option<Value>> {
    let known = match page.find_or_load(id).await {
        Err(error) if error.reason() == Reason::RunNotFound => return Ok(None),
        known => known?,
    };
    let summary = match known.newest {
        Some(step) => page.summary(&known, step).await?,
        None => None,
    };
    let phase = known.phase();
    Ok(Some(json!({
        "run": id,
        "state": state(&known),
        "newest": known.newest,
        "policy": phase.map(|phase| word(phase.policy().as_str_name(), "POLICY_")),
        "super_batch_size": phase.map(|phase| phase.super_batch_size),
        "sub_batch_size": phase.map(|phase| phase.sub_batch_size),
        "committed_unix_ms": summary.map(|summary| summary.committed_unix_ms),
    })))
}

/// `GET /api/runs/{run}`.
pub(super) async fn one(State(page): State<Arc<Page>>, Path(id): Path<String>) -> Answer {
    let known = page.find_or_load(&id).await?;
    let manifest = page.manifest(&known.facts.run.manifest).await?;
    let summary = match known.newest {
        Some(step) => page.summary(&known, step).await?,
        None => None,
    };
    let facts = &known.facts;
    let spec = &facts.spec;
    let plan = Plan::new(manifest.clone(), spec.seed, spec.epochs, spec.window_blocks)?;
    let sources = manifest.sources.iter().map(|source| {
        let shards = source.shards.len();
        json!({
            "uri": source.uri, "rows": source.rows(), "shards": shards, "weight": source.weight,
        })
    });
    let rewind = |began: Began| json!({ "generation": began.generation, "to_step": began.step });
    let rewinds = facts
        .chain
        .began()
        .into_iter()
        .filter(|began| began.generation > 0);
    let committed = summary.as_ref().map(|summary| summary.committed_unix_ms);
    Ok(Json(json!({
        "run": known.id,
        "state": state(&known),
        "failure": facts.failure,
        "newest": known.newest,
        "steps_total": plan.steps_total(&spec.phases),
        "seed": spec.seed.to_string(),
        "loss": word(spec.loss().as_str_name(), "LOSS_"),
        "lag": lag(spec),
        "phases": spec.phases.iter().map(phase).collect::<Vec<_>>(),
        "sources": sources.collect::<Vec<_>>(),
        "rewinds": rewinds.map(rewind).collect::<Vec<_>>(),
        "totals": summary.as_ref().and_then(|summary| summary.run_totals.as_ref().map(accounts)),
        "committed_unix_ms": committed,
        "ms_since_commit": committed.and_then(|at| now_ms()?.checked_sub(at)),
    })))
}

fn phase(phase: &Phase) -> Value {
    json!({
        "from_step": phase.from_step,
        "policy": word(phase.policy().as_str_name(), "POLICY_"),
        "criterion": word(phase.criterion().as_str_name(), "CRITERION_"),
        "super_batch_size": phase.super_batch_size,
        "sub_batch_size": phase.sub_batch_size,
        "n_chunks": phase.n_chunks,
    })
}

fn state(known: &Known) -> String {
    word(stored_state(&known.facts).as_str_name(), "RUN_STATE_")
}

fn now_ms() -> Option<i64> {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .ok()?
        .as_millis()
        .try_into()
        .ok()
}

impl Known {
    /// The phase of the newest step.
    fn phase(&self) -> Option<&Phase> {
        let step = self.newest.unwrap_or(0);
        self.facts
            .spec
            .phases
            .iter()
            .rev()
            .find(|phase| phase.from_step <= step)
    }

    /// # Errors
    /// `StepNotCommitted`.
    pub(super) fn not_committed(&self, step: u64) -> Error {
        let newest = self.newest.map_or("none is".to_owned(), |newest| {
            format!("the newest is {newest}")
        });
        let message = format!(
            "step {step} of run '{}' is not committed; {newest}",
            self.id
        );
        Error::new(Reason::StepNotCommitted, message)
    }
}
