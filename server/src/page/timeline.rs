//! A run over its steps, sampled: a hundred thousand steps become a few hundred points.
use super::{
    Known, Page,
    answer::{Answer, Json, number},
    shown::scored,
};
use crate::{coordinator::receipts::accounts::of_selection, error::Result};
use axum::extract::{Path, RawQuery, State};
use futures::{StreamExt, TryStreamExt, stream};
use serde_json::{Map, Value, json};
use std::sync::Arc;
use superbatch_proto::{reflect::Word, v1::ReceiptSummary};

/// Most steps of a timeline.
const POINTS: u64 = 512;
/// Receipts that one timeline reads at the same time.
const AT_ONCE: usize = 8;

/// Answers `GET /api/runs/{run}/timeline?from=N&to=N`.
pub(super) async fn timeline(
    State(page): State<Arc<Page>>,
    Path(id): Path<String>,
    RawQuery(query): RawQuery,
) -> Answer {
    let known = page.find_or_load(&id).await?;
    let from = number(query.as_deref(), "from")?.unwrap_or(0);
    let newest = known.newest.unwrap_or(0);
    let to = number(query.as_deref(), "to")?.map_or(newest, |to| to.min(newest));
    let (stride, steps) = if known.newest.is_some() {
        sampled(from, to)
    } else {
        (1, Vec::new())
    };
    let found = read(&page, &known, &steps).await?;
    let newest = known.newest;
    let show = move || Ok(Json::from(columns(&found, stride, newest)));
    Ok(page.work("showing a timeline", show).await?)
}

/// Returns every stride-th step of `from..=to`, and `to` itself. The stride is a power of two and
/// the steps are its multiples. So while a run grows, most steps that are shown next time have been
/// read already, and points do not move.
fn sampled(from: u64, to: u64) -> (u64, Vec<u64>) {
    if from > to {
        return (1, Vec::new());
    }
    let stride = (to - from).div_ceil(POINTS).next_power_of_two();
    let first = from.next_multiple_of(stride);
    let mut steps: Vec<u64> = (first..=to).step_by(stride as usize).collect();
    if steps.last() != Some(&to) {
        steps.push(to);
    }
    (stride, steps)
}

/// Returns the summaries of the committed ones of `steps`.
pub(super) async fn read(
    page: &Page,
    known: &Known,
    steps: &[u64],
) -> Result<Vec<Arc<ReceiptSummary>>> {
    let reads: Vec<_> = steps
        .iter()
        .map(|step| page.summary(known, *step))
        .collect();
    let found: Vec<_> = stream::iter(reads).buffered(AT_ONCE).try_collect().await?;
    Ok(found.into_iter().flatten().collect())
}

fn columns(found: &[Arc<ReceiptSummary>], stride: u64, newest: Option<u64>) -> Value {
    let column = |of: &dyn Fn(&ReceiptSummary) -> Value| {
        Value::Array(found.iter().map(|summary| of(summary)).collect())
    };
    let seconds = |of: fn(&superbatch_proto::v1::StageSeconds) -> f64| {
        column(&|s| {
            json!(of(&s
                .cost
                .and_then(|cost| cost.seconds)
                .unwrap_or_default()))
        })
    };
    let stages: Map<String, Value> = [
        ("plan", seconds(|s| s.plan)),
        ("fetch", seconds(|s| s.fetch)),
        ("decode", seconds(|s| s.decode)),
        ("embed_reference", seconds(|s| s.embed_reference)),
        ("embed_learner", seconds(|s| s.embed_learner)),
        ("wait_weights", seconds(|s| s.wait_weights)),
        ("select", seconds(|s| s.select)),
        ("commit", seconds(|s| s.commit)),
        ("total", seconds(|s| s.total)),
    ]
    .into_iter()
    .map(|(name, values)| (name.to_owned(), values))
    .collect();
    json!({
        "stride": stride,
        "newest": newest,
        "step": column(&|s| json!(s.step)),
        "generation": column(&|s| json!(s.generation)),
        "policy": column(&|s| json!(s.policy().word())),
        "mode": column(&|s| json!(s.mode().word())),
        "version": column(&|s| json!(s.learner.as_ref().map(|learner| learner.version))),
        "lag": column(&|s| json!(s.lag_steps)),
        "scanned": column(&|s| json!(s.cost.unwrap_or_default().candidates_scanned)),
        "holes": column(&|s| json!(s.holes)),
        "batch_score": column(&|s| scored(s, s.batch_score)),
        "uniform_score": column(&|s| json!(s.uniform_score)),
        "own_chosen": column(&|s| scored(s, s.mean_score_chosen)),
        "own_candidates": column(&|s| scored(s, s.mean_score_candidates)),
        "trainer_wait": column(&|s| json!(s.trainer_wait_seconds)),
        "seconds": stages,
        "selection_so_far": column(&|s| json!(s.run_totals.as_ref().map(of_selection))),
        "training_so_far": column(&|s| json!(s.run_totals.map(|totals| totals.train_flops))),
        "committed_unix_ms": column(&|s| json!(s.committed_unix_ms)),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_run_is_a_few_hundred_steps_and_its_newest() {
        assert_eq!(sampled(0, 4), (1, vec![0, 1, 2, 3, 4]));
        assert_eq!(sampled(0, 0), (1, vec![0]));
        assert_eq!(sampled(5, 4), (1, vec![]));
        let (stride, steps) = sampled(0, 99_999);
        assert_eq!(
            (stride, steps.first(), steps.last()),
            (256, Some(&0), Some(&99_999))
        );
        assert!(steps.len() as u64 <= POINTS + 1);
        let longer = sampled(0, 100_300).1;
        assert_eq!(
            longer[..390],
            steps[..390],
            "as it was, but for what is new"
        );
        let (stride, steps) = sampled(99_000, 99_999);
        assert_eq!((stride, steps[0], steps.len()), (2, 99_000, 501));
    }
}
