//! The output's form, pinned: programs read it.
use super::*;
use serde_json::json;
use superbatch_proto::v1::{
    Accounts, Approximation, BadRow, BadRowReason, ChosenRow, ComputeDtype, Criterion,
    EmbeddingDtype, Fidelity, LeftOut, Loss, Mode, MultiResolution, PassedRow, Policy, ProbeResult,
    Receipt, ReceiptSummary, ScoreColumn, SourceSpan, StageSeconds, TowerFlops, Tuning,
    WeightsVersion, approximation::By,
};

fn spent() -> Accounts {
    Accounts {
        candidates_scanned: u64::MAX,
        learner_flops: 1.5e12,
        seconds: Some(StageSeconds {
            plan: 0.25,
            wait_weights: 2.0,
            ..Default::default()
        }),
        scoring: Some(TowerFlops {
            image_full: 1.0,
            image_approximate: 0.5,
            text: 0.25,
        }),
        ..Default::default()
    }
}

fn full_summary() -> ReceiptSummary {
    ReceiptSummary {
        run_id: "a-run".into(),
        generation: 1,
        step: 7,
        policy: Policy::JointTopK.into(),
        criterion: Criterion::Learnability.into(),
        loss: Loss::Sigmoid.into(),
        mode: Mode::ReferenceOnly.into(),
        fidelity: Fidelity::Approximate.into(),
        gain: 0.1 + 0.2,
        learner: Some(WeightsVersion {
            version: 3,
            step: -1,
            generation: 0,
            digest: "ab".into(),
        }),
        lag_steps: -1,
        scanned: vec![SourceSpan {
            source: 1,
            epoch: 2,
            start: 3,
            count: 4,
        }],
        mean_score_chosen: f64::NAN,
        cost: Some(spent()),
        embedding_dtype: EmbeddingDtype::F16.into(),
        compute_dtype: ComputeDtype::Bf16.into(),
        tuning: Some(Tuning {
            temperature: Some(0.5),
            ..Default::default()
        }),
        left_out: Some(LeftOut {
            clip_score_at_least: 1,
            neg_clip_loss_keep: 2,
            duplicates_above: 3,
            score_columns: 4,
        }),
        approximation: Some(Approximation {
            by: Some(By::Resolution(112)),
        }),
        multi_resolution: Some(MultiResolution {
            share: 0.5,
            whole_step: true,
        }),
        uniform_score: Some(-0.5),
        probe: Some(ProbeResult {
            rows: 8,
            draw: 4,
            rank_correlation: 0.75,
            ..Default::default()
        }),
        score_columns: vec![ScoreColumn {
            name: "clip".into(),
            weight: Some(1.0),
            ..Default::default()
        }],
        trace_id: "4bf92f3577b34da6a3ce929d0e0e4736".into(),
        ..Default::default()
    }
}

const SUMMARY: &str = r#"{
    "run_id": "a-run", "generation": 1, "chosen_in_generation": 0, "step": 7,
    "policy": "joint_top_k", "criterion": "learnability", "loss": "sigmoid",
    "mode": "reference_only", "fidelity": "approximate",
    "super_batch_size": 0, "sub_batch_size": 0, "n_chunks": 0,
    "gain": 0.30000000000000004, "seed": 0,
    "learner": {"version": 3, "step": -1, "generation": 0, "digest": "ab"},
    "reference_digest": "", "lag_steps": -1,
    "learner_scale": 0.0, "learner_bias": 0.0, "reference_scale": 0.0, "reference_bias": 0.0,
    "device": "", "build": "", "plan_version": 0, "dataset_manifest": "",
    "scanned": [{"source": 1, "epoch": 2, "start": 3, "count": 4}],
    "holes": 0, "batch_score": 0.0, "mean_score_chosen": null, "mean_score_candidates": 0.0,
    "cost": {
        "candidates_scanned": 18446744073709551615, "examples_selected": 0, "bad_rows": 0,
        "reference_flops": 0.0, "learner_flops": 1.5e12, "selection_flops": 0.0,
        "discarded_flops": 0.0, "train_flops": 0.0,
        "seconds": {
            "plan": 0.25, "fetch": 0.0, "decode": 0.0, "embed_reference": 0.0,
            "embed_learner": 0.0, "select": 0.0, "commit": 0.0, "total": 0.0,
            "wait_weights": 2.0
        },
        "scoring": {"image_full": 1.0, "image_approximate": 0.5, "text": 0.25},
        "training": null, "probe_flops": 0.0, "uniform_flops": 0.0
    },
    "committed_unix_ms": 0, "selector_threads": 0, "writer_nonce": "",
    "embedding_dtype": "f16", "compute_dtype": "bf16", "run_totals": null,
    "left_out": {
        "clip_score_at_least": 1, "neg_clip_loss_keep": 2, "duplicates_above": 3,
        "score_columns": 4
    },
    "approximation": {"resolution": 112},
    "multi_resolution": {"share": 0.5, "whole_step": true},
    "uniform_score": -0.5, "trainer_wait_seconds": null,
    "trace_id": "4bf92f3577b34da6a3ce929d0e0e4736", "span_id": "",
    "probe": {
        "rows": 8, "draw": 4, "rank_correlation": 0.75, "overlap": 0.0, "score_full": 0.0,
        "score_approximate": 0.0, "score_uniform": 0.0, "seconds": 0.0
    },
    "score_columns": [{
        "name": "clip", "weight": 1.0, "at_least": null, "at_most": null, "missing": null
    }]
}"#;

/// Everything that `expected` has is in `found`, to the last bit.
fn assert_has(found: &Value, expected: &Value, at: &str) {
    match (found, expected) {
        (Value::Object(found), Value::Object(expected)) => {
            for (key, value) in expected {
                let at = format!("{at}.{key}");
                assert_has(found.get(key).unwrap_or_else(|| panic!("{at}")), value, &at);
            }
        }
        (Value::Array(found), Value::Array(expected)) => {
            assert_eq!(found.len(), expected.len(), "{at}");
            for (i, (found, expected)) in found.iter().zip(expected).enumerate() {
                assert_has(found, expected, &format!("{at}[{i}]"));
            }
        }
        (found, expected) => assert_eq!(found, expected, "{at}"),
    }
}

#[test]
fn a_summary_keeps_its_form() {
    let expected = serde_json::from_str(SUMMARY).unwrap();
    let found = summary(&full_summary());
    assert_has(&found, &expected, "");
    assert_eq!(
        found["tuning"],
        json!({"temperature": 0.5}),
        "only what is set"
    );
    assert_eq!(summary(&ReceiptSummary::default())["tuning"], json!(null));
}

#[test]
fn a_receipt_keeps_its_form() {
    let expected = json!({
        "summary": {"run_id": "a-run", "tuning": {"temperature": 0.5}},
        "chosen": [{
            "id": "s#1", "source": 1, "shard": 2, "row": 3, "position": 4, "chunk": 5,
            "score": -1.5, "weight": 1.0, "fidelity": "full", "content_hash": "01ab",
            "own_score": 0.5, "learner_loss": null, "reference_loss": null, "column_values": [0.5],
            "token_mask": [true, false]
        }],
        "bad_rows": [{
            "id": "s#2", "position": 9, "reason": "image_null", "detail": "of the download"
        }],
        "passed_over": [{
            "id": "s#3", "source": 0, "shard": 0, "row": 0, "position": 0,
            "own_score": f64::from(0.1_f32), "learner_loss": 0.25, "reference_loss": null,
            "sampled": true, "column_values": []
        }],
    });
    let bad = BadRow {
        id: "s#2".into(),
        position: 9,
        reason: BadRowReason::ImageNull.into(),
        detail: "of the download".into(),
    };
    let receipt = Receipt {
        summary: Some(full_summary()),
        chosen: vec![ChosenRow {
            id: "s#1".into(),
            source: 1,
            shard: 2,
            row: 3,
            position: 4,
            chunk: 5,
            score: -1.5,
            weight: 1.0,
            fidelity: Fidelity::Full.into(),
            content_hash: vec![1, 0xab].into(),
            own_score: Some(0.5),
            column_values: vec![0.5],
            token_mask: vec![true, false],
            ..Default::default()
        }],
        bad_rows: vec![bad.clone()],
        passed_over: vec![PassedRow {
            id: "s#3".into(),
            own_score: 0.1,
            learner_loss: Some(0.25),
            sampled: true,
            ..Default::default()
        }],
    };
    let found = super::receipt(&receipt);
    assert_has(&found, &expected, "");
    assert_eq!(bad_rows(&[bad]), found["bad_rows"]);
    assert_eq!(accounts(&spent()), found["summary"]["cost"]);
}

#[test]
fn what_is_set_is_shown_alone() {
    let tuned = Tuning {
        pressure: Some(2.0),
        ..Default::default()
    };
    assert_eq!(tuning(&tuned), json!({"pressure": 2.0}));
    assert_eq!(tuning(&Tuning::default()), json!({}));
    assert_eq!(approximation(&Approximation::default()), json!({}));
    assert_eq!(fidelity_name(Fidelity::Approximate.into()), "approximate");
    assert_eq!(fidelity_name(99), "99");
}
