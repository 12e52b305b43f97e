//! The shares of sources and shards, and in what the chosen rows differ, as JSON.
use super::step::{Both, Content, Counts, OfStep};
use crate::dataset::Manifest;
use serde_json::{Value, json};
use std::{collections::BTreeMap, sync::Arc};

/// Most shards that are listed: half of the highest lift, half of the lowest.
const SHARDS: usize = 120;
/// Most shards without a chosen row that are named.
const NEVER: usize = 60;
/// Parts of the run in which lifts of shards are given: a step scans few shards.
const PARTS: usize = 8;
/// Shards whose lift is given by part: half of the highest lift, half of the lowest.
const DRIFTING: usize = 6;

type Steps<'a> = &'a [Arc<OfStep>];

/// Returns the shares in `steps`, each of which stands for `stride` steps.
pub(super) fn shares(manifest: &Manifest, stride: u64, steps: Steps) -> Value {
    let all = summed(steps);
    let total = sum(all.values());
    let pool = Pool {
        manifest,
        rows: manifest.rows(),
        total,
    };
    let ordered = by_lift(manifest, &all, total);
    let of_sources = by_source(&all, manifest.sources.len()).into_iter();
    let sources = of_sources.zip(&manifest.sources);
    let sources = sources.map(|(counts, s)| pool.share(&s.uri, s.rows(), counts));
    let shards = ends(&ordered, SHARDS);
    let shards = shards.map(|(name, at)| pool.share(name, pool.shard_rows(*at), all[at]));
    let never = never_chosen(&ordered, &all);
    let named = never.iter().take(NEVER);
    let named = named.map(|(name, scanned)| json!({ "name": name, "scanned": scanned }));
    let shards_pool: usize = manifest.sources.iter().map(|s| s.shards.len()).sum();
    json!({
        "steps": steps.iter().map(|step| step.step).collect::<Vec<_>>(),
        "stride": stride,
        "scanned": total[0],
        "chosen": total[1],
        "pool": pool.rows,
        "sources": sources.collect::<Vec<_>>(),
        "lift": lift_of_sources(steps, manifest.sources.len()),
        "shards": shards.collect::<Vec<_>>(),
        "shards_pool": shards_pool,
        "shards_scanned": all.len(),
        "shards_never": never.len(),
        "never": named.collect::<Vec<_>>(),
        "parts": parts(steps, &ordered),
        "losses": losses(steps),
        "columns": columns(steps),
        "left_out": left_out(steps),
        "contents": contents(steps),
    })
}

/// What shares are shares of.
struct Pool<'a> {
    manifest: &'a Manifest,
    rows: u64,
    /// Rows scanned and chosen.
    total: [u64; 2],
}

impl Pool<'_> {
    fn shard_rows(&self, (source, shard): (u32, u32)) -> u64 {
        let source = self.manifest.sources.get(source as usize);
        let shard = source.and_then(|source| source.shards.get(shard as usize));
        let blocks = shard.into_iter().flat_map(|shard| &shard.blocks);
        blocks.map(|block| u64::from(block.rows)).sum()
    }

    fn share(&self, name: &str, rows: u64, [scanned, chosen]: [u64; 2]) -> Value {
        let share = |part: u64, whole: u64| part as f64 / whole.max(1) as f64;
        json!({
            "name": name,
            "rows": rows,
            "scanned": scanned,
            "chosen": chosen,
            "pool_share": share(rows, self.rows),
            "scanned_share": share(scanned, self.total[0]),
            "chosen_share": share(chosen, self.total[1]),
            "lift": lift_of([scanned, chosen], self.total),
        })
    }
}

fn summed(steps: Steps) -> Counts {
    let mut all = Counts::new();
    for (place, [scanned, chosen]) in steps.iter().flat_map(|step| &step.shards) {
        let entry = all.entry(*place).or_default();
        *entry = [entry[0] + scanned, entry[1] + chosen];
    }
    all
}

pub(super) fn by_source(counts: &Counts, sources: usize) -> Vec<[u64; 2]> {
    let mut found = vec![[0; 2]; sources];
    for ((source, _), [scanned, chosen]) in counts {
        if let Some(entry) = found.get_mut(*source as usize) {
            *entry = [entry[0] + scanned, entry[1] + chosen];
        }
    }
    found
}

pub(super) fn sum<'a>(counts: impl Iterator<Item = &'a [u64; 2]>) -> [u64; 2] {
    counts.fold([0; 2], |[a, b], [x, y]| [a + x, b + y])
}

/// Returns the share among the chosen divided by the share among the scanned; `None` if nothing was
/// scanned.
pub(super) fn lift(
    [scanned, chosen]: [u64; 2],
    [all_scanned, all_chosen]: [u64; 2],
) -> Option<f64> {
    (scanned > 0 && all_chosen > 0)
        .then(|| chosen as f64 / all_chosen as f64 * all_scanned as f64 / scanned as f64)
}

pub(super) fn lift_of(counts: [u64; 2], total: [u64; 2]) -> f64 {
    lift(counts, total).unwrap_or(0.0)
}

/// A shard's name and place.
type Named = (String, (u32, u32));

/// Returns the scanned shards, the highest lift first.
fn by_lift(manifest: &Manifest, all: &Counts, total: [u64; 2]) -> Vec<Named> {
    let mut named: Vec<Named> = all.keys().map(|at| (name(manifest, *at), *at)).collect();
    named.sort_by(|a, b| {
        lift_of(all[&b.1], total)
            .total_cmp(&lift_of(all[&a.1], total))
            .then_with(|| a.0.cmp(&b.0))
    });
    named
}

/// Returns the first and the last of `all`, at most `most` together.
fn ends<T>(all: &[T], most: usize) -> impl Iterator<Item = &T> {
    let first = most.min(all.len()).div_ceil(2);
    let last = all.len().saturating_sub(most / 2).max(first);
    all[..first].iter().chain(&all[last..])
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

/// Returns the shards of which no row was chosen, with the rows scanned, most first.
fn never_chosen<'a>(ordered: &'a [Named], all: &Counts) -> Vec<(&'a str, u64)> {
    let counted = ordered.iter().map(|(name, at)| (name.as_str(), all[at]));
    let never = counted.filter(|(_, [_, chosen])| *chosen == 0);
    let mut never: Vec<(&str, u64)> = never.map(|(name, [scanned, _])| (name, scanned)).collect();
    never.sort_by_key(|(_, scanned)| std::cmp::Reverse(*scanned));
    never
}

/// Returns the lift of each source, step by step.
fn lift_of_sources(steps: Steps, sources: usize) -> Vec<Vec<Option<f64>>> {
    let mut lifts = vec![Vec::with_capacity(steps.len()); sources];
    for step in steps {
        let counts = by_source(&step.shards, sources);
        let total = sum(counts.iter());
        let each = lifts.iter_mut().zip(&counts);
        each.for_each(|(lifts, counts)| lifts.push(lift(*counts, total)));
    }
    lifts
}

/// Returns the lift of the shards of the highest and of the lowest lift, in parts of the run.
fn parts(steps: Steps, ordered: &[Named]) -> Value {
    let parts: Vec<Steps> = steps.chunks(steps.len().div_ceil(PARTS).max(1)).collect();
    let counted: Vec<(Counts, [u64; 2])> = parts
        .iter()
        .map(|part| {
            let counts = summed(part);
            let total = sum(counts.values());
            (counts, total)
        })
        .collect();
    let shards = ends(ordered, DRIFTING).map(|(name, at)| {
        let of_part = |(counts, total): &(Counts, [u64; 2])| lift(*counts.get(at)?, *total);
        json!({ "name": name, "lift": counted.iter().map(of_part).collect::<Vec<_>>() })
    });
    let begins = parts.iter().filter_map(|part| Some(part.first()?.step));
    json!({
        "step": begins.collect::<Vec<_>>(),
        "shards": shards.collect::<Vec<_>>(),
    })
}

/// Returns the mean losses of the chosen, and of the sample of those passed over, step by step.
fn losses(steps: Steps) -> Value {
    let column = |of: fn(&OfStep) -> &Both, which: usize| -> Vec<Option<f64>> {
        let means = steps.iter().map(|step| of(step)[which].value());
        means.collect()
    };
    json!({
        "learner_chosen": column(|step| &step.learner_loss, 0),
        "learner_passed": column(|step| &step.learner_loss, 1),
        "reference_chosen": column(|step| &step.reference_loss, 0),
        "reference_passed": column(|step| &step.reference_loss, 1),
    })
}

/// Returns the mean value of each score column.
fn columns(steps: Steps) -> Vec<Value> {
    let mut all: BTreeMap<&str, Both> = BTreeMap::new();
    for (name, [chosen, passed]) in steps.iter().flat_map(|step| &step.columns) {
        let both = all.entry(name).or_default();
        both[0].add(*chosen);
        both[1].add(*passed);
    }
    let shown = all.into_iter().map(|(name, [chosen, passed])| {
        json!({ "name": name, "chosen": chosen.value(), "passed": passed.value() })
    });
    shown.collect()
}

/// Returns how many candidates each rule left out; null if no step had one.
fn left_out(steps: Steps) -> Value {
    let found: Vec<_> = steps.iter().filter_map(|step| step.left_out).collect();
    if found.is_empty() {
        return Value::Null;
    }
    let [mut low_score, mut low_gain, mut duplicates, mut columns] = [0; 4];
    for rule in found {
        low_score += u64::from(rule.clip_score_at_least);
        low_gain += u64::from(rule.neg_clip_loss_keep);
        duplicates += u64::from(rule.duplicates_above);
        columns += u64::from(rule.score_columns);
    }
    json!({
        "clip_score_at_least": low_score,
        "neg_clip_loss_keep": low_gain,
        "duplicates_above": duplicates,
        "score_columns": columns,
        "duplicates_rule": steps.iter().rev().find_map(|step| step.duplicates_above),
    })
}

/// Returns how many of the chosen rows were chosen before, and how many other rows have the content
/// of one that was, in these steps; null if receipts have no content hashes.
fn contents(steps: Steps) -> Value {
    // Steps of later phases may keep a smaller share of theirs.
    let to = steps.iter().map(|step| step.contents_to).min();
    let to = to.unwrap_or(u64::MAX);
    let found = steps.iter().flat_map(|step| &step.contents);
    let mut found: Vec<Content> = found.filter(|content| content.0 <= to).copied().collect();
    let chosen = found.len();
    found.sort_unstable();
    found.dedup();
    let rows = found.len();
    found.dedup_by_key(|content| content.0);
    if chosen == 0 {
        return Value::Null;
    }
    json!({ "chosen": chosen, "again": chosen - rows, "copies": rows - found.len() })
}
