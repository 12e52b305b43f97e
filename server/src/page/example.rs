//! One example: every step in which it was a candidate, with the outcome.
use super::{
    Known, Page,
    answer::Answer,
    pictures::{Place, place},
    steps::key,
};
use crate::{
    coordinator::{
        plan::{
            planner::Plan,
            rows::{locate, row_id},
        },
        receipts::parquet::has_scores,
    },
    dataset::Manifest,
    error::{Error, Result},
};
use axum::extract::{Path, State};
use futures::{StreamExt, TryStreamExt, stream};
use serde_json::{Value, json};
use std::sync::Arc;
use superbatch_proto::{
    reflect::Word,
    v1::{ChosenRow, Receipt, ReceiptSummary},
};

/// Most steps that are shown, the newest ones.
const TIMES: usize = 64;
const AT_ONCE: usize = 8;

/// Answers `GET /api/runs/{run}/examples/{row}`: a row by its id, or as `0.0.17`.
pub(super) async fn example(
    State(page): State<Arc<Page>>,
    Path((id, row)): Path<(String, String)>,
) -> Answer {
    let known = page.find_or_load(&id).await?;
    let manifest = page.manifest(&known.facts.run.manifest).await?;
    let Place { source, shard, row } = if row.contains('#') {
        named(&manifest, &row)?
    } else {
        place(&row)?
    };
    let wanted = ChosenRow {
        source,
        shard,
        row,
        id: key(source, shard, row),
        ..Default::default()
    };
    let missing = |_| {
        Error::invalid(
            "row",
            format!("the run's data has no row {row} in shard {shard} of source {source}"),
        )
    };
    let candidate = locate(&manifest, &wanted).map_err(missing)?;
    let (row_id, _) = row_id(&manifest, &candidate);
    let spec = known.facts.spec.clone();
    let newest = known.newest;
    let steps = page.work("planning", move || {
        let plan = Plan::new(manifest, spec.seed, spec.epochs, spec.window_blocks)?;
        let found = newest.map(|newest| plan.steps_of(&spec.phases, &candidate, newest));
        Ok(found.transpose()?.unwrap_or_default())
    });
    let (mut steps, next) = steps.await?;
    let more = steps.len().saturating_sub(TIMES);
    steps.drain(..more);
    let sought = Arc::new(Sought {
        row: wanted,
        id: row_id,
    });
    let times: Vec<_> = steps
        .into_iter()
        .map(|step| time(&page, &known, step, sought.clone()))
        .collect();
    let times: Vec<Option<Value>> = stream::iter(times).buffered(AT_ONCE).try_collect().await?;
    let answer = json!({
        "run": known.id,
        "data": known.data(),
        "id": sought.id,
        "key": sought.row.id,
        "times": times.into_iter().flatten().collect::<Vec<_>>(),
        "more": more,
        "next": next,
    });
    Ok(answer.into())
}

/// The row that is looked for: its key, and its id in receipts.
struct Sought {
    row: ChosenRow,
    id: String,
}

/// Finds a row by its id: `00000.parquet#17`, or `1:00000.parquet#17` if a run has several sources.
fn named(manifest: &Manifest, id: &str) -> Result<Place> {
    let unknown = || {
        Error::invalid(
            "row",
            format!("the run's data has no row '{id}'; give an id as receipts have it"),
        )
    };
    let (path, row) = id.rsplit_once('#').ok_or_else(unknown)?;
    let (source, path) = match path.split_once(':') {
        Some((source, rest)) if manifest.sources.len() > 1 => {
            (source.parse().map_err(|_| unknown())?, rest)
        }
        _ => (0, path),
    };
    let shards = &manifest
        .sources
        .get(source as usize)
        .ok_or_else(unknown)?
        .shards;
    let shard = shards
        .iter()
        .position(|shard| shard.path == path)
        .ok_or_else(unknown)?;
    Ok(Place {
        source,
        shard: shard as u32,
        row: row.parse().map_err(|_| unknown())?,
    })
}

/// Returns a row's outcome in a step; `None` if the step is not committed.
async fn time(
    page: &Arc<Page>,
    known: &Arc<Known>,
    step: u64,
    sought: Arc<Sought>,
) -> Result<Option<Value>> {
    let find = move |receipt: Receipt| {
        let summary = receipt.summary.as_ref();
        Ok(summary.map(|summary| outcome(&receipt, summary, &sought.row, &sought.id)))
    };
    let generations = known.generations(step);
    let found = page.with_receipt(known, step, generations, find).await?;
    Ok(found.flatten())
}

fn outcome(receipt: &Receipt, summary: &ReceiptSummary, wanted: &ChosenRow, id: &str) -> Value {
    let ChosenRow {
        source, shard, row, ..
    } = *wanted;
    let scored = has_scores(summary);
    let chosen = receipt
        .chosen
        .iter()
        .find(|r| (r.source, r.shard, r.row) == (source, shard, row));
    let passed = receipt
        .passed_over
        .iter()
        .find(|r| (r.source, r.shard, r.row) == (source, shard, row));
    let bad = receipt.bad_rows.iter().find(|r| r.id == id);
    let mut time = json!({
        "step": summary.step,
        "outcome": "passed_over",
        "mode": summary.mode().word(),
        "version": summary.learner.as_ref().map(|learner| learner.version),
        "chunk": Value::Null, "score": Value::Null, "own": Value::Null,
        "learner_loss": Value::Null, "reference_loss": Value::Null,
    });
    if let Some(row) = chosen {
        time["outcome"] = json!("chosen");
        time["chunk"] = json!(row.chunk);
        time["score"] = if scored {
            json!(row.score)
        } else {
            Value::Null
        };
        time["own"] = json!(row.own_score);
        time["learner_loss"] = json!(row.learner_loss);
        time["reference_loss"] = json!(row.reference_loss);
    } else if let Some(row) = bad {
        time["outcome"] = json!(row.reason().word());
    } else if let Some(row) = passed {
        time["own"] = json!(row.own_score);
        time["learner_loss"] = json!(row.learner_loss);
        time["reference_loss"] = json!(row.reference_loss);
    } else if !scored {
        time["outcome"] = json!("not_drawn");
    }
    time
}

#[cfg(test)]
mod tests {
    use super::*;
    use superbatch_proto::v1::{BadRow, BadRowReason, PassedRow, Policy};

    #[test]
    fn what_came_of_a_row_is_told_apart() {
        let row = |row| ChosenRow {
            row,
            score: 3.0,
            own_score: Some(1.0),
            chunk: 2,
            ..Default::default()
        };
        let bad = BadRow {
            id: "a#3".into(),
            reason: BadRowReason::ImageNull.into(),
            ..Default::default()
        };
        let receipt = Receipt {
            chosen: vec![row(1)],
            passed_over: vec![PassedRow {
                row: 2,
                own_score: 0.5,
                ..Default::default()
            }],
            bad_rows: vec![bad],
            ..Default::default()
        };
        let joint = ReceiptSummary {
            policy: Policy::Joint.into(),
            ..Default::default()
        };
        let uniform = ReceiptSummary {
            policy: Policy::Uniform.into(),
            ..Default::default()
        };
        let came_of =
            |summary: &ReceiptSummary, n, id: &str| outcome(&receipt, summary, &row(n), id);
        let chosen = came_of(&joint, 1, "a#1");
        assert_eq!(
            (&chosen["outcome"], &chosen["score"], &chosen["own"]),
            (&json!("chosen"), &json!(3.0), &json!(1.0))
        );
        let passed = came_of(&joint, 2, "a#2");
        assert_eq!(
            (&passed["outcome"], &passed["score"], &passed["own"]),
            (&json!("passed_over"), &Value::Null, &json!(0.5))
        );
        assert_eq!(came_of(&joint, 3, "a#3")["outcome"], "image_null");
        assert_eq!(came_of(&joint, 4, "a#4")["outcome"], "passed_over");
        assert_eq!(came_of(&uniform, 4, "a#4")["outcome"], "not_drawn");
        assert_eq!(came_of(&uniform, 1, "a#1")["score"], Value::Null);
    }
}
