//! Makes a step's receipt from its decision.
use super::{
    decided::{BUILD, Decided},
    fidelity::fidelities,
};
use crate::{
    coordinator::{
        facts::run::ModelFact,
        plan::{
            candidate::SuperBatch,
            planner::{self, PLAN_VERSION},
        },
        runs::run::Run,
        score::scored::Rows,
        spec::leaves_out,
    },
    error::Result,
    selection::judged::{Passed, passed_over},
    storage::nonce,
    traces,
};
use std::time::{SystemTime, UNIX_EPOCH};
use superbatch_proto::v1::{
    Accounts, Approximation, BadRow, BadRowReason, ChosenRow, Fidelity, Hole, PassedRow, Receipt,
    ReceiptSummary, RunSpec, TowerFlops,
};

/// Returns the receipt of a decided step. Its totals are filled in by the commit.
pub(crate) fn receipt(
    run: &Run,
    spec: &RunSpec,
    super_batch: &SuperBatch,
    decided: &Decided,
    rows: &Rows,
) -> Result<Receipt> {
    let id = |candidate: u32| {
        planner::row_id(&run.manifest, &super_batch.candidates[candidate as usize])
    };
    let bad_row = |hole: &Hole| BadRow {
        id: id(hole.candidate).0,
        position: super_batch.candidates[hole.candidate as usize].position,
        reason: hole.reason,
        detail: hole.detail.clone(),
    };
    Ok(Receipt {
        summary: Some(summary(run, spec, super_batch, decided)),
        chosen: chosen(spec.seed, super_batch, decided, rows, id),
        bad_rows: decided.holes.iter().map(bad_row).collect(),
        passed_over: sample_passed_over(run, super_batch, decided, id),
    })
}

/// Returns some of the candidates that were not chosen, not more than the chosen ones, so that
/// receipts stay small.
fn sample_passed_over(
    run: &Run,
    super_batch: &SuperBatch,
    decided: &Decided,
    id: impl Fn(u32) -> (String, u64),
) -> Vec<PassedRow> {
    let Some(judged) = &decided.judged else {
        return Vec::new();
    };
    let drawn = &decided.drawn.indices;
    let most = drawn.len().min(run.deps.limits.passed_over_max as usize);
    let row = |passed: Passed| {
        let candidate = passed.candidate as usize;
        let c = &super_batch.candidates[candidate];
        let (id, row) = id(passed.candidate);
        let loss = |model: usize| {
            judged.losses[model]
                .as_ref()
                .map(|losses| losses[candidate] as f32)
        };
        PassedRow {
            id,
            source: c.source,
            shard: c.shard,
            row,
            position: c.position,
            own_score: judged.own[candidate] as f32,
            learner_loss: loss(0),
            reference_loss: loss(1),
            sampled: passed.sampled,
            column_values: values_of(decided, candidate),
        }
    };
    passed_over(&judged.own, drawn, most)
        .into_iter()
        .map(row)
        .collect()
}

pub(crate) fn chosen(
    seed: u64,
    super_batch: &SuperBatch,
    decided: &Decided,
    rows: &Rows,
    id: impl Fn(u32) -> (String, u64),
) -> Vec<ChosenRow> {
    let drawn = &decided.drawn;
    let chunk_of = drawn
        .chunks
        .iter()
        .enumerate()
        .flat_map(|(k, size)| std::iter::repeat_n(k as u32, *size as usize));
    let fidelities = trained_at(seed, super_batch, decided);
    let places = drawn.indices.iter().zip(chunk_of).enumerate();
    let judged = decided.judged.as_ref();
    let loss = |model: usize, candidate: u32| {
        judged.and_then(|judged| Some(judged.losses[model].as_ref()?[candidate as usize]))
    };
    let row = |(place, (candidate, chunk)): (usize, (&u32, u32))| {
        let c = &super_batch.candidates[*candidate as usize];
        let (id, row) = id(*candidate);
        ChosenRow {
            id,
            source: c.source,
            shard: c.shard,
            row,
            position: c.position,
            chunk,
            score: drawn.scores[place],
            weight: drawn.weights[place],
            fidelity: fidelities[place] as i32,
            content_hash: rows.hashes[place].clone().into(),
            own_score: judged.map(|judged| judged.own[*candidate as usize]),
            learner_loss: loss(0, *candidate),
            reference_loss: loss(1, *candidate),
            column_values: values_of(decided, *candidate as usize),
            token_mask: decided.token_masks.get(place).cloned().unwrap_or_default(),
        }
    };
    places.map(row).collect()
}

fn values_of(decided: &Decided, candidate: usize) -> Vec<f64> {
    let columns = decided.columns.values.iter();
    columns.map(|values| values[candidate]).collect()
}

/// Returns the fidelity at which each chosen row is to be trained.
fn trained_at(seed: u64, super_batch: &SuperBatch, decided: &Decided) -> Vec<Fidelity> {
    let place = |candidate: &u32| {
        let c = &super_batch.candidates[*candidate as usize];
        (c.source, c.position)
    };
    let rows: Vec<_> = decided.drawn.indices.iter().map(place).collect();
    let asked = decided.phase.multi_resolution.as_ref();
    fidelities(seed, decided.step, asked, &rows)
}

pub(crate) fn summary(
    run: &Run,
    spec: &RunSpec,
    super_batch: &SuperBatch,
    decided: &Decided,
) -> ReceiptSummary {
    let (phase, drawn, traced) = (&decided.phase, &decided.drawn, traces::ids());
    let [learner_scale, learner_bias, reference_scale, reference_bias] = decided.scales;
    let judged = decided.judged.as_ref();
    ReceiptSummary {
        run_id: run.id.clone(),
        generation: decided.generation,
        chosen_in_generation: decided.generation,
        step: decided.step,
        policy: phase.policy,
        criterion: phase.criterion,
        loss: spec.loss,
        mode: decided.mode as i32,
        fidelity: phase.fidelity,
        super_batch_size: phase.super_batch_size,
        sub_batch_size: phase.sub_batch_size,
        n_chunks: drawn.chunks.len() as u32,
        gain: phase.gain,
        seed: spec.seed,
        lag_steps: decided
            .learner
            .as_ref()
            .map_or(0, |v| decided.step as i64 - 1 - v.step),
        learner: decided.learner.clone(),
        reference_digest: decided.reference_digest.clone(),
        learner_scale,
        learner_bias,
        reference_scale,
        reference_bias,
        device: if decided.device.is_empty() {
            drawn.device.clone()
        } else {
            decided.device.clone()
        },
        build: BUILD.to_owned(),
        plan_version: PLAN_VERSION,
        dataset_manifest: run.manifest_digest.clone(),
        scanned: super_batch.spans.clone(),
        holes: decided.holes.len() as u32,
        batch_score: drawn.batch_score,
        mean_score_chosen: drawn.mean_score_chosen,
        mean_score_candidates: drawn.mean_score_candidates,
        cost: Some(cost(run, spec, super_batch, decided)),
        committed_unix_ms: unix_ms(),
        selector_threads: drawn.threads,
        writer_nonce: nonce(),
        embedding_dtype: spec.embedding_dtype,
        compute_dtype: spec.compute_dtype,
        run_totals: None,
        tuning: phase.tuning,
        left_out: drawn
            .left_out
            .filter(|_| leaves_out(phase.tuning.as_ref()) || !phase.score_columns.is_empty()),
        approximation: phase.approximation,
        multi_resolution: phase.multi_resolution,
        uniform_score: judged.and_then(|judged| judged.uniform_score),
        trainer_wait_seconds: run.waits.take(),
        probe: decided.probe,
        score_columns: phase.score_columns.clone(),
        token_share: phase.token_share,
        trace_id: traced.0,
        span_id: traced.1,
    }
}

pub(crate) fn cost(
    run: &Run,
    spec: &RunSpec,
    super_batch: &SuperBatch,
    decided: &Decided,
) -> Accounts {
    let drawn = &decided.drawn;
    let fidelities = trained_at(spec.seed, super_batch, decided);
    let is_low = |fidelity: &&Fidelity| **fidelity == Fidelity::Approximate;
    let low = fidelities.iter().filter(is_low).count();
    let approximation = decided.phase.approximation.as_ref();
    let price = |rows: [usize; 2]| {
        let given = spec.train_flops_per_example;
        training(given, run.learner.as_ref(), approximation, rows)
    };
    let training = price([fidelities.len() - low, low]);
    let mut cost = decided.cost;
    cost.candidates_scanned = decided.candidates_scanned as u64;
    cost.examples_selected = drawn.indices.len() as u64;
    // A failed download leaves a row without an image. That is normal in web data, so it does not
    // count towards `max_bad_row_share`.
    let bad = |hole: &&Hole| hole.reason() != BadRowReason::ImageNull;
    cost.bad_rows = decided.holes.iter().filter(bad).count() as u64;
    cost.selection_flops += drawn.flops;
    cost.train_flops = total(&training);
    cost.uniform_flops = total(&price([fidelities.len(), 0]));
    cost.training = Some(training);
    cost.seconds.get_or_insert_default().select = drawn.seconds;
    cost
}

fn total(flops: &TowerFlops) -> f64 {
    flops.image_full + flops.image_approximate + flops.text
}

/// Three forward passes an example, by tower and fidelity. Where the trainer says what an example
/// costs at full fidelity (`given` above 0), all is scaled to it.
fn training(
    given: f64,
    learner: Option<&ModelFact>,
    approximation: Option<&Approximation>,
    [full, low]: [usize; 2],
) -> TowerFlops {
    let (full, low) = (full as f64, low as f64);
    let pair = learner.map_or(0.0, |learner| learner.pair_flops);
    let Some(learner) = learner.filter(|_| pair > 0.0) else {
        return TowerFlops {
            image_full: given.max(0.0) * (full + low),
            ..Default::default()
        };
    };
    let passes = if given > 0.0 { given / pair } else { 3.0 };
    TowerFlops {
        image_full: passes * full * learner.image_flops(None),
        image_approximate: passes * low * learner.image_flops(approximation),
        text: passes * (full + low) * learner.text_flops,
    }
}

fn unix_ms() -> i64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |d| d.as_millis() as i64)
}
