//! Sums of steps' costs, and the metrics of commits.
//!
//! The totals of a run are in its receipts: each holds the sum up to and including itself. A
//! counter in memory would begin anew with each process, and a counter in storage, updated beside
//! the receipt, would be one too many or one too few after each crash between the two writes. The
//! price is that commits of a run must go one by one, since two that start from the same sum would
//! lose the cost of one of them.
use super::parquet::has_scores;
use crate::{metrics, selection::probed::kept_gain};
use std::collections::HashMap;
use superbatch_proto::v1::{
    Accounts, BadRowReason, ChosenRow, Fidelity, Mode, Receipt, ReceiptSummary, StageSeconds,
    TowerFlops,
};
use tokio::time::Instant;

/// Returns the totals of the last commit: they only grow.
pub fn largest(totals: impl IntoIterator<Item = Accounts>) -> Option<Accounts> {
    let more = |a: &Accounts, b: &Accounts| b.candidates_scanned > a.candidates_scanned;
    let later = |a, b| if more(&a, &b) { b } else { a };
    totals.into_iter().reduce(later)
}

/// Returns the sum of `a` and `b`.
pub fn add(a: &Accounts, b: &Accounts) -> Accounts {
    combine(a, b, |x, y| x + y, |x, y| x + y)
}

/// Returns `a` without `b`, which is a part of it.
pub fn subtract(a: &Accounts, b: &Accounts) -> Accounts {
    combine(a, b, u64::saturating_sub, |x, y| (x - y).max(0.0))
}

/// Combines each number of `a` with that of `b`.
fn combine(
    a: &Accounts,
    b: &Accounts,
    count: fn(u64, u64) -> u64,
    amount: fn(f64, f64) -> f64,
) -> Accounts {
    let (x, y) = (a.seconds.unwrap_or_default(), b.seconds.unwrap_or_default());
    Accounts {
        candidates_scanned: count(a.candidates_scanned, b.candidates_scanned),
        examples_selected: count(a.examples_selected, b.examples_selected),
        bad_rows: count(a.bad_rows, b.bad_rows),
        reference_flops: amount(a.reference_flops, b.reference_flops),
        learner_flops: amount(a.learner_flops, b.learner_flops),
        selection_flops: amount(a.selection_flops, b.selection_flops),
        discarded_flops: amount(a.discarded_flops, b.discarded_flops),
        train_flops: amount(a.train_flops, b.train_flops),
        seconds: Some(StageSeconds {
            plan: amount(x.plan, y.plan),
            fetch: amount(x.fetch, y.fetch),
            decode: amount(x.decode, y.decode),
            embed_reference: amount(x.embed_reference, y.embed_reference),
            embed_learner: amount(x.embed_learner, y.embed_learner),
            select: amount(x.select, y.select),
            commit: amount(x.commit, y.commit),
            total: amount(x.total, y.total),
            wait_weights: amount(x.wait_weights, y.wait_weights),
        }),
        scoring: towers(a.scoring, b.scoring, amount),
        training: towers(a.training, b.training, amount),
        probe_flops: amount(a.probe_flops, b.probe_flops),
        uniform_flops: amount(a.uniform_flops, b.uniform_flops),
    }
}

/// Returns the FLOPs spent, as a multiple of a uniform step's on as many examples. `None` if the
/// latter are not known: in receipts of earlier versions, and without a learner.
pub fn price(cost: &Accounts) -> Option<f64> {
    let all = of_selection(cost) + cost.train_flops;
    (cost.uniform_flops > 0.0).then(|| all / cost.uniform_flops)
}

/// Returns all FLOPs of selection, with probes and with scoring that was thrown away.
pub fn of_selection(cost: &Accounts) -> f64 {
    let scoring = cost.reference_flops + cost.learner_flops + cost.selection_flops;
    scoring + cost.discarded_flops + cost.probe_flops
}

fn towers(
    a: Option<TowerFlops>,
    b: Option<TowerFlops>,
    amount: fn(f64, f64) -> f64,
) -> Option<TowerFlops> {
    // Totals of older builds have none.
    let (a, b) = (
        a.or(b.map(|_| TowerFlops::default()))?,
        b.unwrap_or_default(),
    );
    Some(TowerFlops {
        image_full: amount(a.image_full, b.image_full),
        image_approximate: amount(a.image_approximate, b.image_approximate),
        text: amount(a.text, b.text),
    })
}

/// Returns the mode in which a step was decided.
pub fn mode(receipt: &Receipt) -> &'static str {
    match receipt.summary.as_ref().map(ReceiptSummary::mode) {
        Some(Mode::Stale) => "stale",
        Some(Mode::Uniform) => "uniform",
        Some(Mode::ReferenceOnly) => "reference_only",
        _ => "normal",
    }
}

/// Returns a text that names the first bad row of a step.
pub fn first_bad(id: &str, reason: BadRowReason, detail: &str) -> String {
    let reason = reason.as_str_name().trim_start_matches("BAD_ROW_REASON_");
    format!(", the first of this step {id} ({reason}: {detail})")
}

/// Updates the metrics by a receipt that was committed just now. `begun` is when its commit began.
pub fn count(receipt: &Receipt, begun: Instant) {
    let Some(summary) = &receipt.summary else {
        return;
    };
    metrics::stage_duration("commit").record(begun.elapsed().as_secs_f64());
    metrics::steps_committed(mode(receipt)).increment(1);
    metrics::selected().increment(receipt.chosen.len() as u64);
    let is_low = |row: &&ChosenRow| row.fidelity() == Fidelity::Approximate;
    let low = receipt.chosen.iter().filter(is_low).count();
    metrics::selected_approximate().increment(low as u64);
    for (source, scanned, chosen) in by_source(receipt, summary) {
        metrics::source_candidates(source).increment(scanned);
        metrics::source_selected(source).increment(chosen);
    }
    if has_scores(summary) {
        metrics::batch_score().record(summary.batch_score);
        metrics::mean_score("chosen").record(summary.mean_score_chosen);
        metrics::mean_score("candidates").record(summary.mean_score_candidates);
    }
    if let Some(found) = &summary.probe {
        metrics::probes("ok").increment(1);
        metrics::probe_rank_correlation().set(found.rank_correlation);
        metrics::probe_overlap().set(found.overlap);
        if let Some(kept) = kept_gain(found) {
            metrics::probe_kept_gain().set(kept);
        }
    }
    if let Some(left_out) = &summary.left_out {
        metrics::left_out("clip_score_at_least").increment(left_out.clip_score_at_least.into());
        metrics::left_out("neg_clip_loss_keep").increment(left_out.neg_clip_loss_keep.into());
        metrics::left_out("duplicates_above").increment(left_out.duplicates_above.into());
        metrics::left_out("score_columns").increment(left_out.score_columns.into());
    }
    if let Some(cost) = &summary.cost {
        metrics::candidates().increment(cost.candidates_scanned);
        metrics::flops("discarded").increment(cost.discarded_flops as u64);
    }
    if summary.learner.is_some() {
        metrics::learner_staleness().record(summary.lag_steps as f64);
    }
}

/// Labels of sources. The set is fixed, since every label value is a time series that lives as long
/// as the process.
const SOURCES: [&str; 32] = [
    "0", "1", "2", "3", "4", "5", "6", "7", "8", "9", "10", "11", "12", "13", "14", "15", "16",
    "17", "18", "19", "20", "21", "22", "23", "24", "25", "26", "27", "28", "29", "30", "31",
];

/// Returns the scanned and chosen rows of each scanned source, with its label.
fn by_source(receipt: &Receipt, summary: &ReceiptSummary) -> Vec<(&'static str, u64, u64)> {
    let mut chosen = HashMap::new();
    for row in &receipt.chosen {
        *chosen.entry(row.source).or_insert(0) += 1;
    }
    let counted = summary.scanned.iter().map(|span| {
        let label = SOURCES.get(span.source as usize).copied().unwrap_or("more");
        (
            label,
            span.count,
            chosen.get(&span.source).copied().unwrap_or(0),
        )
    });
    counted.collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use superbatch_proto::v1::{ChosenRow, SourceSpan};

    #[test]
    fn a_steps_price_counts_all_that_was_spent() {
        let cost = Accounts {
            reference_flops: 1.0,
            learner_flops: 2.0,
            selection_flops: 0.5,
            discarded_flops: 0.25,
            probe_flops: 0.25,
            train_flops: 2.0,
            uniform_flops: 4.0,
            ..Accounts::default()
        };
        assert_eq!(of_selection(&cost), 4.0);
        assert_eq!(price(&cost), Some(1.5));
        assert_eq!(price(&add(&cost, &cost)), Some(1.5));
        assert_eq!(price(&Accounts::default()), None);
    }

    #[test]
    fn rows_are_counted_by_source_with_bounded_labels() {
        let span = |source, count| SourceSpan {
            source,
            count,
            ..SourceSpan::default()
        };
        let summary = ReceiptSummary {
            scanned: vec![span(0, 60), span(31, 30), span(32, 6)],
            ..ReceiptSummary::default()
        };
        let row = |source| ChosenRow {
            source,
            ..ChosenRow::default()
        };
        let receipt = Receipt {
            summary: None,
            chosen: vec![row(0), row(32), row(0)],
            ..Receipt::default()
        };
        let counted = by_source(&receipt, &summary);
        assert_eq!(counted, [("0", 60, 2), ("31", 30, 0), ("more", 6, 1)]);
        assert!(
            SOURCES
                .iter()
                .enumerate()
                .all(|(n, label)| *label == n.to_string())
        );
    }
}
