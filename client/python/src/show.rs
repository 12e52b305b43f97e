//! Messages of the protocol as Python dicts, with the protocol's field names. Enums are lower case,
//! without prefix.
use arrow::pyarrow::ToPyArrow;
use pyo3::{
    prelude::*,
    types::{PyBytes, PyDict, PyList},
};
use superbatch_client::{Batch, v1};

type Shown = PyResult<Py<PyAny>>;

/// A dict with a message's fields: plain ones by name, then those that are shown by an expression.
macro_rules! dict {
    ($py:expr, $message:expr, [$($plain:ident),* $(,)?],
        { $($key:ident: $value:expr),* $(,)? }) => {{
        let dict = PyDict::new($py);
        $(dict.set_item(stringify!($plain), &$message.$plain)?;)*
        $(dict.set_item(stringify!($key), $value)?;)*
        Ok(dict.into_any().unbind())
    }};
}

fn short(name: &str, prefix: &str) -> String {
    name.trim_start_matches(prefix).to_lowercase()
}

pub fn list(py: Python<'_>, items: impl Iterator<Item = Shown>) -> Shown {
    Ok(PyList::new(py, items.collect::<PyResult<Vec<_>>>()?)?
        .into_any()
        .unbind())
}

fn show_if_given<T>(
    py: Python<'_>,
    message: Option<&T>,
    show: impl Fn(Python<'_>, &T) -> Shown,
) -> Shown {
    message.map_or_else(|| Ok(py.None()), |message| show(py, message))
}

pub fn batch(py: Python<'_>, batch: &Batch) -> Shown {
    let record_batch = batch.record_batch.to_pyarrow(py)?;
    let receipt = receipt_summary(py, &batch.receipt)?;
    Ok((
        record_batch,
        receipt,
        batch.step,
        batch.rank,
        batch.world_size,
    )
        .into_pyobject(py)?
        .into_any()
        .unbind())
}

pub fn dataset(py: Python<'_>, opened: &v1::OpenRunResponse) -> Shown {
    dict!(py, opened, [dataset_rows, steps_total, dataset_manifest], {
    })
}

pub fn weights_version(py: Python<'_>, version: &v1::WeightsVersion) -> Shown {
    dict!(py, version, [version, step, generation, digest], {})
}

pub fn run_summary(py: Python<'_>, run: &v1::RunSummary) -> Shown {
    dict!(py, run, [run_id, generation, last_committed_step], {
        state: short(run.state().as_str_name(), "RUN_STATE_"),
    })
}

pub fn run_info(py: Python<'_>, run: &v1::RunInfo) -> Shown {
    dict!(py, run, [
        dataset_manifest, candidates_scanned, examples_delivered, consumed_through, failure,
            tail_rows_per_epoch,
        missing_pushes,
    ], {
        summary: show_if_given(py, run.summary.as_ref(), run_summary)?,
        spec: show_if_given(py, run.spec.as_ref(), run_spec)?,
        accounts: show_if_given(py, run.accounts.as_ref(), accounts)?,
        learner: show_if_given(py, run.learner.as_ref(), weights_version)?,
    })
}

fn accounts(py: Python<'_>, spent: &v1::Accounts) -> Shown {
    dict!(py, spent, [
        candidates_scanned, examples_selected, bad_rows, reference_flops, learner_flops,
            selection_flops,
        discarded_flops, train_flops, probe_flops, uniform_flops,
    ], {
        seconds: show_if_given(py, spent.seconds.as_ref(), seconds)?,
        scoring: show_if_given(py, spent.scoring.as_ref(), tower_flops)?,
        training: show_if_given(py, spent.training.as_ref(), tower_flops)?,
    })
}

fn tower_flops(py: Python<'_>, flops: &v1::TowerFlops) -> Shown {
    dict!(py, flops, [image_full, image_approximate, text], {})
}

fn approximation(py: Python<'_>, approximation: &v1::Approximation) -> Shown {
    use v1::approximation::By;
    let dict = PyDict::new(py);
    match approximation.by {
        Some(By::Resolution(side)) => dict.set_item("resolution", side)?,
        None => {}
    }
    Ok(dict.into_any().unbind())
}

fn multi_resolution(py: Python<'_>, asked: &v1::MultiResolution) -> Shown {
    dict!(py, asked, [share, whole_step], {})
}

fn probe(py: Python<'_>, asked: &v1::FidelityProbe) -> Shown {
    dict!(py, asked, [every_steps, rows], {})
}

fn probe_result(py: Python<'_>, found: &v1::ProbeResult) -> Shown {
    dict!(
        py,
        found,
        [
            rows,
            draw,
            rank_correlation,
            overlap,
            score_full,
            score_approximate,
            score_uniform,
            seconds,
        ],
        {}
    )
}

fn seconds(py: Python<'_>, stages: &v1::StageSeconds) -> Shown {
    dict!(
        py,
        stages,
        [
            plan,
            fetch,
            decode,
            embed_reference,
            embed_learner,
            select,
            commit,
            total,
            wait_weights,
        ],
        {}
    )
}

/// Whether the step was drawn by scores; if not, the protocol's zeros stand for none.
fn has_scores(summary: &v1::ReceiptSummary) -> bool {
    let reads_no_loss = matches!(summary.policy(), v1::Policy::Uniform | v1::Policy::KCenter);
    !reads_no_loss && summary.mode() != v1::Mode::Uniform
}

fn receipt_summary(py: Python<'_>, summary: &v1::ReceiptSummary) -> Shown {
    let scored = has_scores(summary);
    dict!(py, summary, [
        run_id, generation, chosen_in_generation, step, super_batch_size, sub_batch_size,
            n_chunks, gain, seed,
        reference_digest, lag_steps, learner_scale, learner_bias, reference_scale, reference_bias,
            device, build,
        plan_version, dataset_manifest, holes, committed_unix_ms, selector_threads, writer_nonce,
    ], {
        batch_score: scored.then_some(summary.batch_score),
        mean_score_chosen: scored.then_some(summary.mean_score_chosen),
        mean_score_candidates: scored.then_some(summary.mean_score_candidates),
        policy: short(summary.policy().as_str_name(), "POLICY_"),
        criterion: short(summary.criterion().as_str_name(), "CRITERION_"),
        loss: short(summary.loss().as_str_name(), "LOSS_"),
        mode: short(summary.mode().as_str_name(), "MODE_"),
        fidelity: short(summary.fidelity().as_str_name(), "FIDELITY_"),
        embedding_dtype: short(summary.embedding_dtype().as_str_name(), "EMBEDDING_DTYPE_"),
        compute_dtype: short(summary.compute_dtype().as_str_name(), "COMPUTE_DTYPE_"),
        learner: show_if_given(py, summary.learner.as_ref(), weights_version)?,
        scanned: list(py, summary.scanned.iter().map(|span| dict!(py, span, [source, epoch, start,
            count], {})))?,
        cost: show_if_given(py, summary.cost.as_ref(), accounts)?,
        tuning: show_if_given(py, summary.tuning.as_ref(), tuning)?,
        left_out: show_if_given(py, summary.left_out.as_ref(), left_out)?,
        approximation: show_if_given(py, summary.approximation.as_ref(), approximation)?,
        multi_resolution: show_if_given(py, summary.multi_resolution.as_ref(), multi_resolution)?,
        uniform_score: summary.uniform_score,
        trainer_wait_seconds: summary.trainer_wait_seconds,
        probe: show_if_given(py, summary.probe.as_ref(), probe_result)?,
        score_columns: list(py, summary.score_columns.iter().map(|c| score_column(py, c)))?,
    })
}

fn tuning(py: Python<'_>, numbers: &v1::Tuning) -> Shown {
    dict!(
        py,
        numbers,
        [
            temperature,
            pressure,
            priority_exponent,
            weight_exponent,
            clip_score_at_least,
            neg_clip_loss_keep,
            duplicates_above,
        ],
        {}
    )
}

fn left_out(py: Python<'_>, counts: &v1::LeftOut) -> Shown {
    dict!(
        py,
        counts,
        [
            clip_score_at_least,
            neg_clip_loss_keep,
            duplicates_above,
            score_columns
        ],
        {}
    )
}

pub fn receipt(py: Python<'_>, receipt: &v1::Receipt) -> Shown {
    let chosen = |row: &v1::ChosenRow| {
        dict!(py, row, [
            id, source, shard, row, position, chunk, score, weight, own_score, learner_loss,
                reference_loss, column_values,
        ], {
            fidelity: short(row.fidelity().as_str_name(), "FIDELITY_"),
            content_hash: PyBytes::new(py, &row.content_hash),
        })
    };
    let bad_row = |row: &v1::BadRow| {
        let reason = short(row.reason().as_str_name(), "BAD_ROW_REASON_");
        dict!(py, row, [id, position, detail], { reason: reason })
    };
    let passed = |row: &v1::PassedRow| {
        dict!(
            py,
            row,
            [
                id,
                source,
                shard,
                row,
                position,
                own_score,
                learner_loss,
                reference_loss,
                sampled,
                column_values,
            ],
            {}
        )
    };
    dict!(py, receipt, [], {
        summary: show_if_given(py, receipt.summary.as_ref(), receipt_summary)?,
        chosen: list(py, receipt.chosen.iter().map(chosen))?,
        bad_rows: list(py, receipt.bad_rows.iter().map(bad_row))?,
        passed_over: list(py, receipt.passed_over.iter().map(passed))?,
    })
}

fn phase(py: Python<'_>, phase: &v1::Phase) -> Shown {
    dict!(py, phase, [
        from_step, super_batch_size, sub_batch_size, n_chunks, gain, allow_untrained_fidelity,
    ], {
        policy: short(phase.policy().as_str_name(), "POLICY_"),
        criterion: short(phase.criterion().as_str_name(), "CRITERION_"),
        fidelity: short(phase.fidelity().as_str_name(), "FIDELITY_"),
        tuning: show_if_given(py, phase.tuning.as_ref(), tuning)?,
        approximation: show_if_given(py, phase.approximation.as_ref(), approximation)?,
        multi_resolution: show_if_given(py, phase.multi_resolution.as_ref(), multi_resolution)?,
        probe: show_if_given(py, phase.probe.as_ref(), probe)?,
        score_columns: list(py, phase.score_columns.iter().map(|c| score_column(py, c)))?,
    })
}

fn score_column(py: Python<'_>, column: &v1::ScoreColumn) -> Shown {
    dict!(py, column, [name, weight, at_least, at_most, missing], {})
}

fn learner(py: Python<'_>, learner: &v1::LearnerSpec) -> Shown {
    use v1::learner_spec::Initial;
    let dict = PyDict::new(py);
    dict.set_item("model_uri", &learner.model_uri)?;
    dict.set_item("logit_bias", learner.logit_bias)?;
    let trained = learner.trained_fidelities.iter();
    dict.set_item(
        "trained_fidelities",
        list(py, trained.map(|known| approximation(py, known)))?,
    )?;
    match &learner.initial {
        Some(Initial::RandomSeed(seed)) => dict.set_item("random_seed", seed)?,
        Some(Initial::SnapshotUri(uri)) => dict.set_item("snapshot_uri", uri)?,
        Some(Initial::FirstPush(on)) => dict.set_item("first_push", on)?,
        None => {}
    }
    Ok(dict.into_any().unbind())
}

fn lag(py: Python<'_>, lag: &v1::Lag) -> Shown {
    let dict = PyDict::new(py);
    match lag.bound {
        Some(v1::lag::Bound::Exact(steps)) => dict.set_item("exact", steps)?,
        Some(v1::lag::Bound::AtMost(steps)) => dict.set_item("at_most", steps)?,
        None => {}
    }
    Ok(dict.into_any().unbind())
}

pub fn run_spec(py: Python<'_>, spec: &v1::RunSpec) -> Shown {
    let source = |source: &v1::Source| {
        dict!(py, source, [uri, weight, image_column, caption_column, allow, id_column, scores], {
            where: &source.r#where,
        })
    };
    let reference =
        |_: Python<'_>, model: &v1::ReferenceSpec| dict!(py, model, [model_uri, logit_bias], {});
    let fork = |_: Python<'_>, fork: &v1::Fork| dict!(py, fork, [run_id, step], {});
    dict!(py, spec, [
        push_every_steps, micro_batches, columns, seed, max_ahead, epochs, window_blocks,
            micro_batch_rows,
        max_bad_row_share, train_flops_per_example, need_deadline_seconds, stall_grace_seconds,
    ], {
        sources: list(py, spec.sources.iter().map(source))?,
        learner: show_if_given(py, spec.learner.as_ref(), learner)?,
        reference: show_if_given(py, spec.reference.as_ref(), reference)?,
        phases: list(py, spec.phases.iter().map(|item| phase(py, item)))?,
        loss: short(spec.loss().as_str_name(), "LOSS_"),
        lag: show_if_given(py, spec.lag.as_ref(), lag)?,
        fallback: short(spec.fallback().as_str_name(), "FALLBACK_"),
        embedding_dtype: short(spec.embedding_dtype().as_str_name(), "EMBEDDING_DTYPE_"),
        compute_dtype: short(spec.compute_dtype().as_str_name(), "COMPUTE_DTYPE_"),
        fork_of: show_if_given(py, spec.fork_of.as_ref(), fork)?,
    })
}
