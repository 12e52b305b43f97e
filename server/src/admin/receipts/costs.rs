//! What a step cost, and what its fidelity probe found, in words.
use crate::{coordinator::receipts::accounts, selection::probed::kept_gain};
use superbatch_proto::v1::{Accounts, ReceiptSummary, StageSeconds, TowerFlops};

/// Lists FLOPs by tower and fidelity.
pub(super) fn towers(flops: Option<&TowerFlops>) -> String {
    let TowerFlops {
        image_full,
        image_approximate,
        text,
    } = flops.copied().unwrap_or_default();
    format!(
        "{image_full:.3e} FLOPs image, {image_approximate:.3e} image approximate, {text:.3e} text"
    )
}

/// Lists the step's FLOPs by purpose, beside a uniform step's.
pub(super) fn price_of(cost: &Accounts) -> String {
    let Some(price) = accounts::price(cost) else {
        return "not known".to_owned();
    };
    let share = |flops: f64| flops / cost.uniform_flops;
    format!(
        "{price:.3} of a uniform step: training {:.3}, scoring {:.3}, selection {:.3}, \
         probe {:.3}, thrown away {:.3}",
        share(cost.train_flops),
        share(cost.reference_flops + cost.learner_flops),
        share(cost.selection_flops),
        share(cost.probe_flops),
        share(cost.discarded_flops)
    )
}

/// Returns where the step's time went, by stage.
pub(super) fn stages(seconds: &StageSeconds) -> String {
    format!(
        "{:.3} in all: fetch {:.3}, decode {:.3}, reference {:.3}, learner {:.3}, weights {:.3}, \
         select {:.3}",
        seconds.total,
        seconds.fetch,
        seconds.decode,
        seconds.embed_reference,
        seconds.embed_learner,
        seconds.wait_weights,
        seconds.select
    )
}

/// Shows what the other fidelity would have chosen, if the step was probed.
pub(super) fn probe(s: &ReceiptSummary) -> String {
    let Some(found) = &s.probe else {
        return "none at this step".to_owned();
    };
    let kept = kept_gain(found).map_or("none to be kept".to_owned(), |kept| format!("{kept:.2}"));
    format!(
        "of {} rows at both fidelities: rank correlation {:.3}, overlap {:.3} of draws of {} \
         ({:.3} at random), kept gain {kept} (batch scores {:.5} full, {:.5} approximate, \
         {:.5} uniform)",
        found.rows,
        found.rank_correlation,
        found.overlap,
        found.draw,
        f64::from(found.draw) / f64::from(found.rows.max(1)),
        found.score_full,
        found.score_approximate,
        found.score_uniform
    )
}
