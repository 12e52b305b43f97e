//! The list of all runs of the state, and one run.
use super::{
    Known, Page,
    answer::{Answer, Json, text},
    shown::lag,
};
use crate::{
    access::Caller,
    coordinator::{
        facts::chain::Began,
        plan::planner::Plan,
        receipts::{
            accounts::{largest, of_selection},
            json::accounts,
        },
        runs::registry::stored_state,
    },
    dataset::Manifest,
    error::{Error, Result},
};
use axum::{
    Extension,
    extract::{Path, RawQuery, State},
};
use futures::{StreamExt, stream};
use serde_json::{Value, json};
use std::{
    sync::Arc,
    time::{SystemTime, UNIX_EPOCH},
};
use superbatch_proto::{
    reflect::Word,
    v1::{Accounts, Phase, Reason},
};

/// Most runs of one answer. Each costs a few reads of storage.
const LISTED: usize = 200;
const AT_ONCE: usize = 8;

/// Answers `GET /api/about`.
pub(super) async fn about(State(page): State<Arc<Page>>) -> Answer {
    let about = json!({
        "state": page.state.uri(),
        "version": env!("CARGO_PKG_VERSION"),
        "replays": page.replays.is_some(),
    });
    Ok(about.into())
}

/// Answers `GET /api/runs`, with `?before=NAME`: the runs by name from the last, or from the one
/// before `NAME`, and the `next` name to ask with. Those of an answer are sorted, the newest commit
/// first.
///
/// Only those that the caller's token is for.
pub(super) async fn list(
    State(page): State<Arc<Page>>,
    Extension(caller): Extension<Caller>,
    RawQuery(query): RawQuery,
) -> Answer {
    let before = text(query.as_deref(), "before");
    let read = page.reads.take().await?;
    let mut names = page.state.folders("runs").await?;
    drop(read);
    names.retain(|id| caller.may_see(id) && before.as_ref().is_none_or(|before| id < before));
    names.reverse();
    let more = names.split_off(names.len().min(LISTED));
    let looks: Vec<_> = names.iter().map(|id| look(&page, id)).collect();
    let found: Vec<_> = stream::iter(looks).buffered(AT_ONCE).collect().await;
    let mut runs: Vec<Value> = found.into_iter().flatten().collect();
    runs.sort_by_key(|run| std::cmp::Reverse(run["committed_unix_ms"].as_i64()));
    let next = names.last().filter(|_| !more.is_empty());
    let list = json!({ "runs": runs, "more": more.len(), "next": next });
    Ok(list.into())
}

/// Reads one run for the list. One that cannot be read is listed with the reason: it must not keep
/// others from being seen.
async fn look(page: &Page, id: &str) -> Option<Value> {
    let unreadable = |error: Error| {
        let reason = error.reason().word();
        json!({ "run": id, "state": "unreadable", "error": error.chain(), "reason": reason })
    };
    let described = describe_run(page, id).await;
    described.unwrap_or_else(|error| Some(unreadable(error)))
}

/// Returns what the list shows of a run; `None` for a folder that holds no run.
async fn describe_run(page: &Page, id: &str) -> Result<Option<Value>> {
    let known = page.find_or_load(id).await;
    let is_missing = |error: &Error| error.reason() == Reason::RunNotFound;
    if known.as_ref().is_err_and(is_missing) && is_none(page, id).await? {
        return Ok(None);
    }
    let known = known?;
    let summary = match known.newest {
        Some(step) => page.summary(&known, step).await?,
        None => None,
    };
    let phase = known.phase();
    Ok(Some(json!({
        "run": id,
        "data": known.data(),
        "state": state(&known),
        "newest": known.newest,
        "policy": phase.map(|phase| phase.policy().word()),
        "super_batch_size": phase.map(|phase| phase.super_batch_size),
        "sub_batch_size": phase.map(|phase| phase.sub_batch_size),
        "committed_unix_ms": summary.map(|summary| summary.committed_unix_ms),
    })))
}

/// Returns whether a folder holds no run. A fork whose run is gone is not found either, and holds
/// one.
async fn is_none(page: &Page, id: &str) -> Result<bool> {
    let _read = page.reads.take().await?;
    let found = page.state.head(&format!("runs/{id}/run.json")).await?;
    Ok(found.is_none())
}

/// Answers `GET /api/runs/{run}`.
pub(super) async fn one(State(page): State<Arc<Page>>, Path(id): Path<String>) -> Answer {
    let known = page.find_or_load(&id).await?;
    let manifest = page.manifest(&known.facts.run.manifest).await?;
    let (newest, totals) = page.newest_and_totals(&known).await?;
    let summary = match newest {
        Some(step) => page.summary(&known, step).await?,
        None => None,
    };
    let committed = summary.map(|summary| summary.committed_unix_ms);
    let describe = move || {
        let mut run = described(&known, manifest)?;
        run["newest"] = json!(newest);
        run["totals"] = json!(totals.as_ref().map(accounts));
        run["selection_flops"] = json!(totals.as_ref().map(of_selection));
        run["committed_unix_ms"] = json!(committed);
        run["ms_since_commit"] = json!(committed.and_then(|at| now_ms()?.checked_sub(at)));
        Ok(Json::from(run))
    };
    Ok(page.work("describing a run", describe).await?)
}

/// Returns what a run is, without how far it has come. Takes a while if the manifest is large.
fn described(known: &Known, manifest: Arc<Manifest>) -> Result<Value> {
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
    Ok(json!({
        "run": known.id,
        "data": known.data(),
        "state": state(known),
        "failure": facts.failure,
        "steps_total": plan.steps_total(&spec.phases),
        "seed": spec.seed.to_string(),
        "loss": spec.loss().word(),
        "lag": lag(spec),
        "phases": spec.phases.iter().map(phase).collect::<Vec<_>>(),
        "sources": sources.collect::<Vec<_>>(),
        "rewinds": rewinds.map(rewind).collect::<Vec<_>>(),
    }))
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
        access::{Access, Peer, audit::Audit, scope::Need},
        coordinator::{
            facts::run::{ForkFact, RunFact, create_run},
            receipts::{accounts::add, parquet::tests::sample},
        },
        dataset::Manifest,
        page::Blocks,
        storage::{Budget, StorageConfig, Stores},
    };
    use arrow::record_batch::RecordBatch;
    use axum::response::IntoResponse;
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

    async fn listed(page: &Arc<Page>, query: Option<&str>) -> Value {
        let query = RawQuery(query.map(str::to_owned));
        let everybody = Access::allow_everybody(Audit::default());
        let caller = everybody.admit(Need::Token, None, Peer::default());
        let answer = list(State(page.clone()), Extension(caller.unwrap()), query).await;
        let body = answer.into_response().into_body();
        let text = axum::body::to_bytes(body, usize::MAX).await.unwrap();
        serde_json::from_slice(&text).unwrap()
    }

    fn names(listed: &Value) -> Vec<&str> {
        let runs = listed["runs"].as_array().unwrap();
        let mut names: Vec<_> = runs
            .iter()
            .map(|run| run["run"].as_str().unwrap())
            .collect();
        names.sort_unstable();
        names
    }

    #[tokio::test]
    async fn one_run_that_cannot_be_read_is_told_among_the_others() {
        let stores = Stores::new(StorageConfig::default());
        let state = stores.open("memory:///state").unwrap();
        let fact = |fork| RunFact::new(&RunSpec::default(), "manifest".into(), None, None, fork);
        let gone = ForkFact {
            run_id: "gone".into(),
            step: 3,
            chain: Default::default(),
            weights: Value::Null,
        };
        for (id, fork) in [("fork", Some(gone)), ("good", None)] {
            let at = state.below(&format!("runs/{id}"));
            create_run(&at, fact(fork)).await.unwrap();
        }
        let newer = "{\"format\": 4000000000}";
        state
            .put("runs/newer/run.json", newer.into())
            .await
            .unwrap();
        state.put("runs/none/other", "".into()).await.unwrap();
        let page = Arc::new(Page::new(state, Box::new(NoBlocks), None));
        let found = listed(&page, None).await;
        assert_eq!(names(&found), ["fork", "good", "newer"]);
        for run in found["runs"].as_array().unwrap() {
            let error = run["error"].as_str().unwrap_or_default();
            match run["run"].as_str().unwrap() {
                "good" => assert_eq!((&run["state"], error), (&json!("open"), "")),
                "fork" => assert!(error.contains("'gone'"), "{error}"),
                _ => assert!(error.contains("runs/newer"), "{error}"),
            }
        }
    }

    #[tokio::test]
    async fn many_runs_are_listed_in_parts() {
        let stores = Stores::new(StorageConfig::default());
        let state = stores.open("memory:///state").unwrap();
        for number in 0..LISTED + 3 {
            let fact = RunFact::new(&RunSpec::default(), "manifest".into(), None, None, None);
            let at = state.below(&format!("runs/r{number:04}"));
            create_run(&at, fact).await.unwrap();
        }
        let page = Arc::new(Page::new(state, Box::new(NoBlocks), None));
        let first = listed(&page, None).await;
        assert_eq!((names(&first).len(), &first["more"]), (LISTED, &json!(3)));
        let next = first["next"].as_str().unwrap();
        let rest = listed(&page, Some(&format!("before={next}"))).await;
        assert_eq!(names(&rest), ["r0000", "r0001", "r0002"]);
        assert_eq!((&rest["more"], &rest["next"]), (&json!(0), &Value::Null));
    }
}
