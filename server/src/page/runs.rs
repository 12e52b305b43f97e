//! The list of all runs of the state, and one run.
use super::{
    Known, Page,
    answer::{Answer, Json},
    shown::lag,
};
use crate::{
    access::Caller,
    coordinator::{
        facts::chain::Began,
        plan::planner::Plan,
        receipts::{accounts::largest, json::accounts},
        runs::registry::stored_state,
    },
    error::{Error, Result},
};
use axum::{
    Extension,
    extract::{Path, State},
};
use futures::{StreamExt, TryStreamExt, stream};
use serde_json::{Value, json};
use std::{
    sync::Arc,
    time::{SystemTime, UNIX_EPOCH},
};
use superbatch_proto::{
    reflect::Word,
    v1::{Accounts, Phase, Reason},
};

/// Most runs that are listed, by name from the last. Each costs a few reads of storage.
const LISTED: usize = 200;
const AT_ONCE: usize = 8;

/// Answers `GET /api/about`.
pub(super) async fn about(State(page): State<Arc<Page>>) -> Answer {
    Ok(Json(json!({
        "state": page.state.uri(),
        "version": env!("CARGO_PKG_VERSION"),
        "replays": page.replays.is_some(),
    })))
}

/// Answers `GET /api/runs`: the newest commit first.
///
/// Only those that the caller's token is for.
pub(super) async fn list(
    State(page): State<Arc<Page>>,
    Extension(caller): Extension<Caller>,
) -> Answer {
    let mut names = page.state.folders("runs").await?;
    names.retain(|id| caller.may_see(id));
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
        "policy": phase.map(|phase| phase.policy().word()),
        "super_batch_size": phase.map(|phase| phase.super_batch_size),
        "sub_batch_size": phase.map(|phase| phase.sub_batch_size),
        "committed_unix_ms": summary.map(|summary| summary.committed_unix_ms),
    })))
}

/// Answers `GET /api/runs/{run}`.
pub(super) async fn one(State(page): State<Arc<Page>>, Path(id): Path<String>) -> Answer {
    let known = page.find_or_load(&id).await?;
    let manifest = page.manifest(&known.facts.run.manifest).await?;
    let facts = &known.facts;
    let spec = &facts.spec;
    let (newest, totals) = page.newest_and_totals(&known).await?;
    let summary = match newest {
        Some(step) => page.summary(&known, step).await?,
        None => None,
    };
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
        "newest": newest,
        "steps_total": plan.steps_total(&spec.phases),
        "seed": spec.seed.to_string(),
        "loss": spec.loss().word(),
        "lag": lag(spec),
        "phases": spec.phases.iter().map(phase).collect::<Vec<_>>(),
        "sources": sources.collect::<Vec<_>>(),
        "rewinds": rewinds.map(rewind).collect::<Vec<_>>(),
        "totals": totals.as_ref().map(accounts),
        "committed_unix_ms": committed,
        "ms_since_commit": committed.and_then(|at| now_ms()?.checked_sub(at)),
    })))
}

fn phase(phase: &Phase) -> Value {
    json!({
        "from_step": phase.from_step,
        "policy": phase.policy().word(),
        "criterion": phase.criterion().word(),
        "super_batch_size": phase.super_batch_size,
        "sub_batch_size": phase.sub_batch_size,
        "n_chunks": phase.n_chunks,
    })
}

fn state(known: &Known) -> String {
    stored_state(&known.facts).word()
}

fn now_ms() -> Option<i64> {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .ok()?
        .as_millis()
        .try_into()
        .ok()
}

impl Page {
    /// Returns the newest step and the run's totals, both of one list of receipts. The totals are
    /// those of the last commit, which need not be of the newest step: steps that are decided ahead
    /// may be committed out of order, and the newest step's receipt then lacks what those before it
    /// cost that came later.
    async fn newest_and_totals(&self, known: &Known) -> Result<(Option<u64>, Option<Accounts>)> {
        let (chain, ahead) = (&known.facts.chain, known.facts.spec.max_ahead as usize);
        let (newest, commits) = known.receipts.newest_commits(chain, ahead).await?;
        let mut totals = Vec::new();
        for (step, generation) in commits {
            let found = self.summary_of(known, step, vec![generation]).await?;
            totals.extend(found.and_then(|(_, summary)| summary.run_totals));
        }
        let mut largest = largest(totals);
        if let (None, Some(step)) = (&largest, newest) {
            // A fork without a step of its own: what the other run cost up to there.
            let summary = self.summary(known, step).await?;
            largest = summary.and_then(|summary| summary.run_totals);
        }
        Ok((newest, largest))
    }
}

impl Known {
    /// Returns the phase of the newest step.
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        coordinator::{
            facts::run::{RunFact, create_run},
            receipts::{accounts::add, parquet::tests::sample},
        },
        dataset::Manifest,
        page::Blocks,
        storage::{Budget, StorageConfig, Stores},
    };
    use arrow::record_batch::RecordBatch;
    use superbatch_proto::v1::RunSpec;

    /// The numbers of a run need no rows.
    struct NoBlocks;

    #[async_trait::async_trait]
    impl Blocks for NoBlocks {
        async fn block(
            &self,
            _: &Manifest,
            _: u32,
            _: u32,
            _: u32,
            _: Option<u32>,
        ) -> Result<Arc<RecordBatch>> {
            Err(Error::internal("the numbers of a run need no rows"))
        }
    }

    #[tokio::test]
    async fn totals_are_those_of_all_steps_up_to_the_newest() {
        let stores = Stores::new(StorageConfig::default());
        let state = stores.open("memory:///state").unwrap();
        let spec = RunSpec {
            max_ahead: 3,
            ..RunSpec::default()
        };
        let fact = RunFact::new(&spec, "manifest".into(), None, None, None);
        create_run(&state.below("runs/r"), fact).await.unwrap();
        let page = Page::new(state, Box::new(NoBlocks), None);
        let known = page.find_or_load("r").await.unwrap();
        let (newest, totals) = page.newest_and_totals(&known).await.unwrap();
        assert_eq!((newest, totals), (None, None));
        let cost = Accounts {
            candidates_scanned: 64,
            ..Accounts::default()
        };
        let mut totals = Accounts::default();
        // Step 2 is committed before step 1: its receipt holds the cost of two steps only.
        for (commits, (step, newest)) in (1..).zip([(0, 0), (2, 2), (1, 2), (3, 3)]) {
            let mut receipt = sample(step, 0, "a");
            totals = add(&totals, &cost);
            let summary = receipt.summary.get_or_insert_default();
            (summary.cost, summary.run_totals) = (Some(cost), Some(totals));
            let budget = Budget::default();
            known.receipts.commit(&receipt, &budget).await.unwrap();
            let (found, totals) = page.newest_and_totals(&known).await.unwrap();
            assert_eq!(found, Some(newest));
            assert_eq!(totals.unwrap().candidates_scanned, 64 * commits);
        }
    }
}
