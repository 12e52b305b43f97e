//! What steps cost, added up and counted.
use super::parquet::has_scores;
use crate::metrics;
use superbatch_proto::v1::{Accounts, BadRowReason, Mode, Receipt, ReceiptSummary, StageSeconds};
use tokio::time::Instant;

/// `a` and `b` together.
pub fn add(a: &Accounts, b: &Accounts) -> Accounts {
    let (x, y) = (a.seconds.unwrap_or_default(), b.seconds.unwrap_or_default());
    Accounts {
        candidates_scanned: a.candidates_scanned + b.candidates_scanned,
        examples_selected: a.examples_selected + b.examples_selected,
        bad_rows: a.bad_rows + b.bad_rows,
        reference_flops: a.reference_flops + b.reference_flops,
        learner_flops: a.learner_flops + b.learner_flops,
        selection_flops: a.selection_flops + b.selection_flops,
        discarded_flops: a.discarded_flops + b.discarded_flops,
        train_flops: a.train_flops + b.train_flops,
        seconds: Some(StageSeconds {
            plan: x.plan + y.plan,
            fetch: x.fetch + y.fetch,
            decode: x.decode + y.decode,
            embed_reference: x.embed_reference + y.embed_reference,
            embed_learner: x.embed_learner + y.embed_learner,
            select: x.select + y.select,
            commit: x.commit + y.commit,
            total: x.total + y.total,
            wait_weights: x.wait_weights + y.wait_weights,
        }),
    }
}

/// How a step was decided.
pub fn mode(receipt: &Receipt) -> &'static str {
    match receipt.summary.as_ref().map(ReceiptSummary::mode) {
        Some(Mode::Stale) => "stale",
        Some(Mode::Uniform) => "uniform",
        Some(Mode::ReferenceOnly) => "reference_only",
        _ => "normal",
    }
}

/// Words that name the first bad row of a step.
pub fn first_bad(id: &str, reason: BadRowReason, detail: &str) -> String {
    let reason = reason.as_str_name().trim_start_matches("BAD_ROW_REASON_");
    format!(", the first of this step {id} ({reason}: {detail})")
}

/// Feeds the metrics with a receipt that was committed just now; `begun` is when its commit began.
pub fn count(receipt: &Receipt, begun: Instant) {
    let Some(summary) = &receipt.summary else {
        return;
    };
    metrics::stage_duration("commit").record(begun.elapsed().as_secs_f64());
    metrics::steps_committed(mode(receipt)).increment(1);
    metrics::selected().increment(receipt.chosen.len() as u64);
    if has_scores(summary) {
        metrics::batch_score().record(summary.batch_score);
        metrics::mean_score("chosen").record(summary.mean_score_chosen);
        metrics::mean_score("candidates").record(summary.mean_score_candidates);
    }
    if let Some(left_out) = &summary.left_out {
        metrics::left_out("clip_score_at_least").increment(left_out.clip_score_at_least.into());
        metrics::left_out("neg_clip_loss_keep").increment(left_out.neg_clip_loss_keep.into());
        metrics::left_out("duplicates_above").increment(left_out.duplicates_above.into());
    }
    if let Some(cost) = &summary.cost {
        metrics::candidates().increment(cost.candidates_scanned);
        metrics::flops("discarded").increment(cost.discarded_flops as u64);
    }
    if summary.learner.is_some() {
        metrics::learner_staleness().record(summary.lag_steps as f64);
    }
}
