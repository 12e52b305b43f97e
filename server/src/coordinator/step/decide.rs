//! The life of one step: plan → score → select → commit. The caller serves it.

use super::{
    commit::Commit,
    decided::Decided,
    maker::Maker,
    recall::{in_hand, recalled},
    receipt::receipt,
};
use crate::{
    blocking::blocking,
    coordinator::{
        plan::candidate::SuperBatch,
        runs::run::Run,
        serve::ready::Ready,
        spec::{Asked, phase_at},
        trainer::cell::Reporter,
    },
    error::{Error, Result},
    traces::stage,
};
use std::{collections::HashSet, sync::Arc};
use superbatch_proto::v1::{BadRowReason, RunSpec, lag};
use tokio::time::Instant;
use tracing::Instrument;

/// Decides `step` in the run's newest generation, or recalls its earlier decision.
pub(super) async fn decide(
    run: &Run,
    generation: u32,
    step: u64,
    reporter: &Reporter,
) -> Result<Ready> {
    loop {
        if let Some(ready) = decide_once(run, generation, step, reporter).await? {
            return Ok(ready);
        }
        tracing::warn!(
            run = run.id,
            step,
            "weights were rolled back while the step was scored with them; it is decided anew"
        );
    }
}

/// Returns `None` if the weights that the step was scored with were rolled back meanwhile.
async fn decide_once(
    run: &Run,
    generation: u32,
    step: u64,
    reporter: &Reporter,
) -> Result<Option<Ready>> {
    // Storage is asked first, and not the memory of committed steps: a receipt may exist that this
    // process does not know, of another coordinator or of an attempt whose outcome was unknown.
    // Scoring the step again would cost minutes and then find the same receipt.
    if let Some(receipt) = run.find_decided(step, generation).await? {
        run.found_committed(generation, &receipt);
        return recalled(run, receipt).await.map(Some);
    }
    let begun = Instant::now();
    let spec = run.spec();
    let phase = phase_at(&spec.phases, step);
    let planning = planned(run, &spec, step).instrument(stage!("plan"));
    let super_batch = planning.await?;
    let mut decided = Decided::new(generation, step, phase.clone(), run.wasted.spend());
    decided.planned(begun.elapsed());
    let maker = Maker {
        run,
        spec: &spec,
        super_batch: &super_batch,
        reporter,
    };
    let rollbacks = run.weights.rollbacks();
    decided.columns = maker.columns(&phase.score_columns).await?;
    let rows = if Asked::by(phase).asks_no_model() {
        maker.unasked(&mut decided).await?
    } else {
        maker.scored(&mut decided).await?
    };
    let rows = in_hand(run, &super_batch, &decided.drawn.indices, rows).await?;
    decided.cost_seconds().total = begun.elapsed().as_secs_f64();
    let receipt = receipt(run, &spec, &super_batch, &decided, &rows)?;
    let committing = Instant::now();
    let committed = run.commit(receipt, rollbacks).instrument(stage!("commit"));
    let Commit::InForce(receipt, ours) = committed.await? else {
        return Ok(None);
    };
    run.deps.sizing.decided(
        &run.id,
        decided.work(committing.elapsed()),
        lag_steps(&spec),
    );
    // Another coordinator committed this step first. Its choice is in force, so its rows are read;
    // the FLOPs spent here stay unsettled and count as discarded.
    if !ours {
        return recalled(run, receipt).await.map(Some);
    }
    decided.spent.settle();
    check_still_ours(run).await?;
    tell_of_rotten_shards(run, &super_batch, &decided);
    Ok(Some(run.deps.ready.hold(receipt, rows.data)))
}

/// Checks that no other coordinator had taken the run over when the receipt was created.
///
/// If a step's receipt has an object, the create tells who decided it. But a new owner may have
/// decided the step long ago, and its receipt may lie in a pack since, without an object: a process
/// that slept through all of that creates one, and must not take it for the decision. The new owner
/// claimed the run before it decided anything, so a look after the create finds it. What was
/// created stays: packs come before it, and if there is none it is the decision, which the new
/// owner serves.
///
/// # Errors
/// `NotOwner`; `StorageUnreachable`.
async fn check_still_ours(run: &Run) -> Result<()> {
    run.owner.check().await
}

/// Logs shards of which most rows cannot be used, once each.
fn tell_of_rotten_shards(run: &Run, super_batch: &SuperBatch, decided: &Decided) {
    // A row without an image is a download that failed, which is no fault of its shard.
    let at_fault = decided.holes.iter();
    let at_fault = at_fault.filter(|hole| hole.reason() != BadRowReason::ImageNull);
    let at_fault: HashSet<u32> = at_fault.map(|hole| hole.candidate).collect();
    let candidates = &super_batch.candidates;
    let all = || (0..candidates.len() as u32).collect();
    let looked_at: Vec<u32> = decided.looked_at.clone().unwrap_or_else(all);
    let rows = looked_at.into_iter().filter_map(|number| {
        let candidate = candidates.get(number as usize)?;
        let shard = (candidate.source, candidate.shard);
        Some((shard, at_fault.contains(&number)))
    });
    for ((source, shard), seen) in run.rotten.note(rows) {
        let found = &run.manifest.sources[source as usize];
        let path = &found.shards[shard as usize].path;
        tracing::warn!(
            run = run.id,
            source = found.root_uri,
            shard = path,
            bad = seen.bad,
            of = seen.rows,
            "most rows of a shard cannot be used; receipts list them"
        );
    }
}

/// Plans the step's candidates. Ordering the rows of large blocks takes long enough to hold up
/// every call of the process.
async fn planned(run: &Run, spec: &Arc<RunSpec>, step: u64) -> Result<SuperBatch> {
    let let_go = || Error::internal("a run was let go while it planned a step");
    let (run, spec) = (run.me.upgrade().ok_or_else(let_go)?, spec.clone());
    blocking("planning a step", move || run.plan.step(&spec.phases, step)).await
}

/// Returns the number of steps that the weights may lag behind.
fn lag_steps(spec: &RunSpec) -> u32 {
    match spec.lag.and_then(|lag| lag.bound) {
        Some(lag::Bound::Exact(steps) | lag::Bound::AtMost(steps)) => steps,
        None => 1,
    }
}
