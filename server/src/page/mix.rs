//! The shares of sources and shards among the scanned and among the chosen rows.
use super::{
    Known, Page,
    answer::{Answer, Json},
    steps::at,
};
use crate::{
    coordinator::{plan::planner::Plan, receipts::parquet::has_scores},
    dataset::Manifest,
    error::{Error, Result},
};
use axum::extract::{Path, State};
use futures::{StreamExt, TryStreamExt, stream};
use serde_json::{Value, json};
use std::{collections::BTreeMap, sync::Arc};
use superbatch_proto::v1::{Phase, Receipt};

/// Most steps whose receipts are read, spread evenly over the run.
const STEPS: u64 = 48;
const AT_ONCE: usize = 4;
/// Most shards that are listed: half of the highest lift, half of the lowest.
const SHARDS: usize = 120;

/// Rows scanned and rows chosen.
type Counts = BTreeMap<(u32, u32), [u64; 2]>;

/// Answers `GET /api/runs/{run}/mix`.
pub(super) async fn mix(State(page): State<Arc<Page>>, Path(id): Path<String>) -> Answer {
    let known = page.find_or_load(&id).await?;
    let manifest = page.manifest(&known.facts.run.manifest).await?;
    let newest = known.newest.map_or(0, |newest| newest + 1);
    let stride = newest.div_ceil(STEPS).max(1);
    let steps: Vec<u64> = (0..newest).step_by(stride as usize).collect();
    let reads: Vec<_> = steps
        .iter()
        .map(|step| at(&page, &known, *step, known.generations(*step)))
        .collect();
    let receipts: Vec<Option<Receipt>> =
        stream::iter(reads).buffered(AT_ONCE).try_collect().await?;
    let scored = receipts
        .into_iter()
        .flatten()
        .filter(|r| r.summary.as_ref().is_some_and(has_scores))
        .collect();
    let known_too = known.clone();
    let count = tokio::task::spawn_blocking(move || counted(&known_too, &manifest, scored, stride));
    Ok(Json(count.await.map_err(|e| {
        Error::internal("counting the mix panicked").because(e)
    })??))
}

fn counted(
    known: &Known,
    manifest: &Arc<Manifest>,
    receipts: Vec<Receipt>,
    stride: u64,
) -> Result<Value> {
    let spec = &known.facts.spec;
    let plan = Plan::new(manifest.clone(), spec.seed, spec.epochs, spec.window_blocks)?;
    let sources = manifest.sources.len();
    let (mut all, mut steps, mut lift) = (Counts::new(), Vec::new(), vec![Vec::new(); sources]);
    for receipt in &receipts {
        let step = receipt.summary.as_ref().map_or(0, |summary| summary.step);
        let of_step = count_step(&plan, &spec.phases, step, receipt)?;
        let by_source = by_source(&of_step, sources);
        let total = sum(by_source.iter());
        steps.push(step);
        lift.iter_mut()
            .zip(&by_source)
            .for_each(|(lift, counts)| lift.push(json!(self::lift(*counts, total))));
        for (shard, [scanned, chosen]) in of_step {
            let entry = all.entry(shard).or_default();
            *entry = [entry[0] + scanned, entry[1] + chosen];
        }
    }
    let total = sum(all.values());
    let mut shards: Vec<(String, [u64; 2])> = all
        .iter()
        .map(|(shard, counts)| (name(manifest, *shard), *counts))
        .collect();
    shards.sort_by(|a, b| {
        lift_of(b.1, total)
            .total_cmp(&lift_of(a.1, total))
            .then_with(|| a.0.cmp(&b.0))
    });
    if shards.len() > SHARDS {
        let lowest = shards.split_off(shards.len() - SHARDS / 2);
        shards.truncate(SHARDS / 2);
        shards.extend(lowest);
    }
    let named = by_source(&all, sources).into_iter().zip(&manifest.sources);
    let sources: Vec<Value> = named
        .map(|(counts, source)| show_share(&source.uri, counts, total))
        .collect();
    let shards: Vec<Value> = shards
        .iter()
        .map(|(name, counts)| show_share(name, *counts, total))
        .collect();
    let never = all.values().filter(|[_, chosen]| *chosen == 0).count();
    Ok(json!({
        "steps": steps,
        "stride": stride,
        "scanned": total[0],
        "chosen": total[1],
        "sources": sources,
        "lift": lift,
        "shards": shards,
        "shards_scanned": all.len(),
        "shards_never": never,
    }))
}

/// Counts the rows of each shard that a step scanned and chose.
fn count_step(plan: &Plan, phases: &[Phase], step: u64, receipt: &Receipt) -> Result<Counts> {
    let mut counts = Counts::new();
    for candidate in plan.step(phases, step)?.candidates {
        counts
            .entry((candidate.source, candidate.shard))
            .or_default()[0] += 1;
    }
    for row in &receipt.chosen {
        counts.entry((row.source, row.shard)).or_default()[1] += 1;
    }
    Ok(counts)
}

fn by_source(counts: &Counts, sources: usize) -> Vec<[u64; 2]> {
    let mut found = vec![[0; 2]; sources];
    for ((source, _), [scanned, chosen]) in counts {
        if let Some(entry) = found.get_mut(*source as usize) {
            *entry = [entry[0] + scanned, entry[1] + chosen];
        }
    }
    found
}

fn sum<'a>(counts: impl Iterator<Item = &'a [u64; 2]>) -> [u64; 2] {
    counts.fold([0; 2], |[a, b], [x, y]| [a + x, b + y])
}

/// Returns the share among the chosen divided by the share among the scanned; `None` if nothing was
/// scanned.
fn lift([scanned, chosen]: [u64; 2], [all_scanned, all_chosen]: [u64; 2]) -> Option<f64> {
    (scanned > 0 && all_chosen > 0)
        .then(|| chosen as f64 / all_chosen as f64 * all_scanned as f64 / scanned as f64)
}

fn lift_of(counts: [u64; 2], total: [u64; 2]) -> f64 {
    lift(counts, total).unwrap_or(0.0)
}

fn name(manifest: &Manifest, (source, shard): (u32, u32)) -> String {
    let path = manifest
        .sources
        .get(source as usize)
        .and_then(|s| s.shards.get(shard as usize))
        .map(|s| s.path.as_str());
    let path = path.unwrap_or_default();
    if manifest.sources.len() > 1 {
        format!("{source}:{path}")
    } else {
        path.to_owned()
    }
}

fn show_share(name: &str, counts: [u64; 2], total: [u64; 2]) -> Value {
    let share = |n: usize| counts[n] as f64 / total[n].max(1) as f64;
    json!({
        "name": name,
        "scanned": counts[0],
        "chosen": counts[1],
        "scanned_share": share(0),
        "chosen_share": share(1),
        "lift": lift_of(counts, total),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lift_is_a_share_over_a_share() {
        assert_eq!(lift([50, 20], [100, 40]), Some(1.0));
        assert_eq!(lift([50, 40], [100, 40]), Some(2.0));
        assert_eq!(lift([50, 0], [100, 40]), Some(0.0));
        assert_eq!(lift([0, 0], [100, 40]), None);
        let counts = Counts::from([((0, 0), [3, 1]), ((0, 1), [4, 0]), ((1, 0), [5, 2])]);
        assert_eq!(by_source(&counts, 3), [[7, 1], [5, 2], [0, 0]]);
        assert_eq!(sum(counts.values()), [12, 3]);
    }
}
