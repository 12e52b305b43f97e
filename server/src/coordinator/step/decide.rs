//! The life of one step: plan → score → select → commit. The caller serves it.

use super::{decided::Decided, maker::Maker, receipt::receipt};
use crate::{
    blocking::blocking,
    coordinator::{
        plan::{candidate::SuperBatch, cut, planner},
        runs::run::Run,
        score::table::Table,
        score::{fetch::fetch_rows, super_batch},
        serve::ready::Ready,
        spec::{Asked, phase_at},
        trainer::cell::Reporter,
    },
    error::{Error, Result},
};
use std::sync::Arc;
use superbatch_proto::v1::{Reason, Receipt, RunSpec, lag};
use tokio::time::Instant;

/// Decides `step` in the run's newest generation, or recalls its earlier decision.
pub async fn decide(run: &Run, generation: u32, step: u64, reporter: &Reporter) -> Result<Ready> {
    // Storage is asked first, and not the memory of committed steps: a receipt may exist that this
    // process does not know, of another coordinator or of an attempt whose outcome was unknown.
    // Scoring the step again would cost minutes and then find the same receipt.
    if let Some(receipt) = run.find_receipt(step, Some(generation)).await? {
        run.found_committed(generation, &receipt);
        return fetch_chosen_again(run, receipt).await;
    }
    let begun = Instant::now();
    let spec = run.spec();
    let phase = phase_at(&spec.phases, step);
    let super_batch = planned(run, &spec, step).await?;
    let mut decided = Decided::new(generation, step, phase.clone(), run.wasted.spend());
    decided.planned(begun.elapsed());
    let maker = Maker {
        run,
        spec: &spec,
        super_batch: &super_batch,
        reporter,
    };
    decided.columns = maker.columns(&phase.score_columns).await?;
    let rows = match Asked::by(phase).asks_no_model() {
        true => maker.unasked(&mut decided).await?,
        false => maker.scored(&mut decided).await?,
    };
    decided.cost_seconds().total = begun.elapsed().as_secs_f64();
    let receipt = receipt(run, &spec, &super_batch, &decided, &rows)?;
    let committing = Instant::now();
    let (receipt, ours) = run.commit(receipt).await?;
    run.deps.sizing.decided(
        &run.id,
        decided.work(committing.elapsed()),
        lag_steps(&spec),
    );
    // Another coordinator committed this step first. Its choice is in force, so its rows are read;
    // the FLOPs spent here stay unsettled and count as discarded.
    if !ours {
        return fetch_chosen_again(run, receipt).await;
    }
    decided.spent.settle();
    Ok(run.deps.ready.hold(receipt, rows.data))
}

/// Plans the step's candidates. Ordering the rows of large blocks takes long enough to hold up
/// every call of the process.
async fn planned(run: &Run, spec: &Arc<RunSpec>, step: u64) -> Result<SuperBatch> {
    let gone = || Error::internal("a run was let go while it planned a step");
    let (run, spec) = (run.me.upgrade().ok_or_else(gone)?, spec.clone());
    blocking("planning a step", move || run.plan.step(&spec.phases, step)).await
}

/// Reads the rows of a committed step again, and checks that they are the rows of its receipt.
///
/// # Errors
/// `RowChanged` names the first row whose content differs.
async fn fetch_chosen_again(run: &Run, receipt: Receipt) -> Result<Ready> {
    let located: Result<Vec<_>> = receipt
        .chosen
        .iter()
        .map(|row| planner::locate(&run.manifest, row))
        .collect();
    let blocks = cut::block_rows(&located?);
    let parts = fetch_rows(
        &run.deps.pool,
        &run.manifest_digest,
        blocks,
        &run.spec().columns,
    )
    .await?;
    let join = move || super_batch::hashed(Table::from_stream(parts)?);
    let rows = blocking("joining rows", join).await?;
    let changed = receipt
        .chosen
        .iter()
        .zip(&rows.hashes)
        .find(|(row, hash)| row.content_hash[..] != hash[..]);
    if let Some((row, _)) = changed {
        let message = format!(
            "row {} is not what it was when its step was chosen; restore the data, or rewind the \
            run with reselect",
            row.id
        );
        return Err(Error::new(Reason::RowChanged, message).with("id", &row.id));
    }
    Ok(run.deps.ready.hold(receipt, rows.data))
}

/// Returns the number of steps that the weights may lag behind.
fn lag_steps(spec: &RunSpec) -> u32 {
    match spec.lag.and_then(|lag| lag.bound) {
        Some(lag::Bound::Exact(steps) | lag::Bound::AtMost(steps)) => steps,
        None => 1,
    }
}
