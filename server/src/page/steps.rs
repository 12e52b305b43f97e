//! One step's receipt, as columns for the page or as a whole.
use super::{
    Page,
    answer::{Answer, Json, number},
};
use crate::{
    coordinator::receipts::{
        json::{self, receipt as to_json},
        parquet::has_scores,
    },
    error::{Error, Result},
};
use axum::extract::{Path, RawQuery, State};
use serde_json::{Value, json};
use std::sync::Arc;
use superbatch_proto::v1::{ChosenRow, PassedRow, Receipt};

/// Most chosen rows of one answer. The receipt has all of them.
const ROWS: usize = 4_096;

/// Answers `GET /api/runs/{run}/steps/{step}`, with `?generation=N` for a generation that is not
/// the newest.
pub(super) async fn step(
    State(page): State<Arc<Page>>,
    Path((id, step)): Path<(String, String)>,
    RawQuery(query): RawQuery,
) -> Answer {
    Ok(shown(&page, (&id, &step), query.as_deref(), columns).await?)
}

/// Answers `GET /api/runs/{run}/steps/{step}/receipt`: what `superbatch receipts --json` prints.
pub(super) async fn receipt(
    State(page): State<Arc<Page>>,
    Path((id, step)): Path<(String, String)>,
    RawQuery(query): RawQuery,
) -> Answer {
    Ok(shown(&page, (&id, &step), query.as_deref(), to_json).await?)
}

/// Finds a step's receipt, and has `of` make the answer of it.
async fn shown(
    page: &Arc<Page>,
    (id, step): (&str, &str),
    query: Option<&str>,
    of: fn(&Receipt) -> Value,
) -> Result<Json> {
    let step: u64 = step
        .parse()
        .map_err(|_| Error::invalid("step", format!("'{step}' is no step")))?;
    let known = page.find_or_load(id).await?;
    let generations = known.generations_of(step, number(query, "generation")?);
    let show = move |receipt: Receipt| Ok(Json::from(of(&receipt)));
    let shown = page.with_receipt(&known, step, generations, show).await?;
    shown.ok_or_else(|| known.not_committed(step))
}

fn columns(receipt: &Receipt) -> Value {
    let summary = receipt.summary.clone().unwrap_or_default();
    let (scanned, bad) = (
        summary.cost.unwrap_or_default().candidates_scanned,
        receipt.bad_rows.len() as u64,
    );
    let scored = has_scores(&summary);
    json!({
        "summary": json::summary(&summary),
        "has_scores": scored,
        "chosen_total": receipt.chosen.len(),
        "chosen": chosen(&receipt.chosen[..receipt.chosen.len().min(ROWS)], scored),
        "passed_over_total": scanned.saturating_sub(receipt.chosen.len() as u64 + bad),
        "passed_over": passed_over(&receipt.passed_over),
        "bad_rows": json::bad_rows(&receipt.bad_rows),
    })
}

/// Returns a row's name in the page's addresses: source, shard and row.
pub(super) fn key(source: u32, shard: u32, row: u64) -> String {
    format!("{source}.{shard}.{row}")
}

fn chosen(rows: &[ChosenRow], scored: bool) -> Value {
    let column = |of: &dyn Fn(&ChosenRow) -> Value| Value::Array(rows.iter().map(of).collect());
    json!({
        "key": column(&|row| json!(key(row.source, row.shard, row.row))),
        "id": column(&|row| json!(row.id)),
        "position": column(&|row| json!(row.position)),
        "chunk": column(&|row| json!(row.chunk)),
        "score": column(&|row| if scored { json!(row.score) } else { Value::Null }),
        "own": column(&|row| json!(row.own_score)),
        "learner_loss": column(&|row| json!(row.learner_loss)),
        "reference_loss": column(&|row| json!(row.reference_loss)),
        "weight": column(&|row| json!(row.weight)),
    })
}

fn passed_over(rows: &[PassedRow]) -> Value {
    let column = |of: &dyn Fn(&PassedRow) -> Value| Value::Array(rows.iter().map(of).collect());
    json!({
        "key": column(&|row| json!(key(row.source, row.shard, row.row))),
        "id": column(&|row| json!(row.id)),
        "position": column(&|row| json!(row.position)),
        "own": column(&|row| json!(row.own_score)),
        "learner_loss": column(&|row| json!(row.learner_loss)),
        "reference_loss": column(&|row| json!(row.reference_loss)),
        "sampled": column(&|row| json!(row.sampled)),
    })
}
