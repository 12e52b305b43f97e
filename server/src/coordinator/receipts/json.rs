//! Receipts as JSON for people: the protocol's field names, enums by their names in lower case.
use serde_json::{Map, Value, json};
use superbatch_proto::v1::{
    Accounts, Approximation, BadRow, BadRowReason, ChosenRow, ComputeDtype, Criterion,
    EmbeddingDtype, Fidelity, LeftOut, Loss, Mode, MultiResolution, PassedRow, Policy, ProbeResult,
    Receipt, ReceiptSummary, ScoreColumn, SourceSpan, StageSeconds, TowerFlops, Tuning,
    WeightsVersion, approximation::By,
};

/// Destructures the message with all its fields, so that the compiler reports a forgotten new
/// field.
macro_rules! object {
    ($type:ident, $value:expr, { $($field:ident: $json:expr),* $(,)? }) => {{
        let $type { $($field),* } = $value;
        Value::Object(Map::from_iter([$((stringify!($field).to_owned(), $json)),*]))
    }};
    ($type:ident, $value:expr, [$($field:ident),* $(,)?]) => {
        object!($type, $value, { $($field: json!($field)),* })
    };
}

/// Returns a name such as `POLICY_JOINT` without its prefix, in lower case.
pub(super) fn word(name: &str, prefix: &str) -> String {
    name.trim_start_matches(prefix).to_lowercase()
}

macro_rules! name {
    ($type:ident, $prefix:literal, $value:expr) => {
        $type::try_from(*$value).map_or_else(
            |_| json!($value),
            |known| json!(word(known.as_str_name(), $prefix)),
        )
    };
}

pub fn summary(summary: &ReceiptSummary) -> Value {
    object!(ReceiptSummary, summary, {
        run_id: json!(run_id),
        generation: json!(generation),
        chosen_in_generation: json!(chosen_in_generation),
        step: json!(step),
        policy: name!(Policy, "POLICY_", policy),
        criterion: name!(Criterion, "CRITERION_", criterion),
        loss: name!(Loss, "LOSS_", loss),
        mode: name!(Mode, "MODE_", mode),
        fidelity: json!(super::json::fidelity_name(*fidelity)),
        super_batch_size: json!(super_batch_size),
        sub_batch_size: json!(sub_batch_size),
        n_chunks: json!(n_chunks),
        gain: json!(gain),
        seed: json!(seed),
        learner: json!(learner.as_ref().map(version)),
        reference_digest: json!(reference_digest),
        lag_steps: json!(lag_steps),
        learner_scale: json!(learner_scale),
        learner_bias: json!(learner_bias),
        reference_scale: json!(reference_scale),
        reference_bias: json!(reference_bias),
        device: json!(device),
        build: json!(build),
        plan_version: json!(plan_version),
        dataset_manifest: json!(dataset_manifest),
        scanned: scanned.iter().map(|span| object!(SourceSpan, span, [source, epoch, start,
            count])).collect(),
        holes: json!(holes),
        batch_score: json!(batch_score),
        mean_score_chosen: json!(mean_score_chosen),
        mean_score_candidates: json!(mean_score_candidates),
        cost: json!(cost.as_ref().map(accounts)),
        committed_unix_ms: json!(committed_unix_ms),
        selector_threads: json!(selector_threads),
        writer_nonce: json!(writer_nonce),
        embedding_dtype: name!(EmbeddingDtype, "EMBEDDING_DTYPE_", embedding_dtype),
        compute_dtype: name!(ComputeDtype, "COMPUTE_DTYPE_", compute_dtype),
        run_totals: json!(run_totals.as_ref().map(accounts)),
        tuning: json!(tuning.as_ref().map(self::tuning)),
        left_out: json!(left_out.as_ref().map(|left_out| {
            object!(LeftOut, left_out, [
                clip_score_at_least, neg_clip_loss_keep, duplicates_above, score_columns
            ])
        })),
        approximation: json!(approximation.as_ref().map(self::approximation)),
        multi_resolution: json!(multi_resolution.as_ref().map(|asked| {
            object!(MultiResolution, asked, [share, whole_step])
        })),
        uniform_score: json!(uniform_score),
        trainer_wait_seconds: json!(trainer_wait_seconds),
        probe: json!(probe.as_ref().map(self::probe)),
        score_columns: score_columns.iter().map(score_column).collect(),
    })
}

/// Returns a whole receipt as JSON.
pub fn receipt(receipt: &Receipt) -> Value {
    let chosen = |row: &ChosenRow| {
        object!(ChosenRow, row, {
            id: json!(id),
            source: json!(source),
            shard: json!(shard),
            row: json!(row),
            position: json!(position),
            chunk: json!(chunk),
            score: json!(score),
            weight: json!(weight),
            fidelity: json!(super::json::fidelity_name(*fidelity)),
            content_hash: json!(hex::encode(content_hash)),
            own_score: json!(own_score),
            learner_loss: json!(learner_loss),
            reference_loss: json!(reference_loss),
            column_values: json!(column_values),
        })
    };
    let passed = |row: &PassedRow| {
        object!(
            PassedRow,
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
                column_values
            ]
        )
    };
    json!({
        "summary": receipt.summary.as_ref().map(summary),
        "chosen": receipt.chosen.iter().map(chosen).collect::<Vec<_>>(),
        "bad_rows": bad_rows(&receipt.bad_rows),
        "passed_over": receipt.passed_over.iter().map(passed).collect::<Vec<_>>(),
    })
}

pub fn bad_rows(rows: &[BadRow]) -> Value {
    let one = |row: &BadRow| {
        object!(BadRow, row, {
            id: json!(id),
            position: json!(position),
            reason: name!(BadRowReason, "BAD_ROW_REASON_", reason),
            detail: json!(detail),
        })
    };
    rows.iter().map(one).collect()
}

/// Returns the numbers that are set.
pub fn tuning(tuning: &Tuning) -> Value {
    let all = object!(
        Tuning,
        tuning,
        [
            temperature,
            pressure,
            priority_exponent,
            weight_exponent,
            clip_score_at_least,
            neg_clip_loss_keep,
            duplicates_above
        ]
    );
    let Value::Object(all) = all else { return all };
    all.into_iter()
        .filter(|(_, number)| !number.is_null())
        .collect()
}

fn score_column(column: &ScoreColumn) -> Value {
    object!(
        ScoreColumn,
        column,
        [name, weight, at_least, at_most, missing]
    )
}

fn version(version: &WeightsVersion) -> Value {
    object!(WeightsVersion, version, [version, step, generation, digest])
}

pub fn accounts(accounts: &Accounts) -> Value {
    object!(Accounts, accounts, {
        candidates_scanned: json!(candidates_scanned),
        examples_selected: json!(examples_selected),
        bad_rows: json!(bad_rows),
        reference_flops: json!(reference_flops),
        learner_flops: json!(learner_flops),
        selection_flops: json!(selection_flops),
        discarded_flops: json!(discarded_flops),
        train_flops: json!(train_flops),
        seconds: json!(seconds.as_ref().map(self::seconds)),
        scoring: json!(scoring.as_ref().map(towers)),
        training: json!(training.as_ref().map(towers)),
        probe_flops: json!(probe_flops),
        uniform_flops: json!(uniform_flops),
    })
}

fn towers(flops: &TowerFlops) -> Value {
    object!(TowerFlops, flops, [image_full, image_approximate, text])
}

fn probe(found: &ProbeResult) -> Value {
    object!(
        ProbeResult,
        found,
        [
            rows,
            draw,
            rank_correlation,
            overlap,
            score_full,
            score_approximate,
            score_uniform,
            seconds
        ]
    )
}

/// Returns the meaning of `approximate` in the step.
pub fn approximation(approximation: &Approximation) -> Value {
    match approximation.by {
        Some(By::Resolution(side)) => json!({"resolution": side}),
        None => json!({}),
    }
}

fn seconds(seconds: &StageSeconds) -> Value {
    object!(
        StageSeconds,
        seconds,
        [
            plan,
            fetch,
            decode,
            embed_reference,
            embed_learner,
            select,
            commit,
            total,
            wait_weights
        ]
    )
}

/// Returns a fidelity's name in receipts and batches: `full` or `approximate`; the number if it is
/// not known.
pub fn fidelity_name(fidelity: i32) -> String {
    Fidelity::try_from(fidelity).map_or_else(
        |_| fidelity.to_string(),
        |known| word(known.as_str_name(), "FIDELITY_"),
    )
}
