use super::*;
use proptest::prelude::*;
use std::{env, path::Path, process::Command};
use superbatch_proto::v1::{
    Accounts, BadRow, BadRowReason, LeftOut, PassedRow, Policy, SourceSpan, StageSeconds, Tuning,
    WeightsVersion,
};

/// A receipt of a step, written by `nonce`, with three rows.
pub(crate) fn sample(step: u64, generation: u32, nonce: &str) -> Receipt {
    let chosen = (0..3).map(|i| ChosenRow {
        id: format!("00000.parquet#{i}"),
        row: i,
        position: 40 + i,
        chunk: i as u32 / 2,
        score: 0.1 * i as f64 - 1e-17,
        weight: 1.0,
        fidelity: Fidelity::Full.into(),
        content_hash: Bytes::from(vec![i as u8; 16]),
        own_score: (i > 0).then_some(0.25),
        token_mask: if i > 0 { vec![] } else { vec![true, false] },
        ..Default::default()
    });
    let summary = ReceiptSummary {
        run_id: "run".into(),
        generation,
        chosen_in_generation: generation,
        step,
        policy: Policy::Joint.into(),
        sub_batch_size: 3,
        learner: Some(WeightsVersion {
            version: 2,
            step: 7,
            generation,
            digest: "ab".into(),
        }),
        lag_steps: -1,
        scanned: vec![SourceSpan {
            source: 0,
            epoch: 1,
            start: 40,
            count: 16,
        }],
        cost: Some(Accounts {
            seconds: Some(StageSeconds {
                total: 0.25,
                ..Default::default()
            }),
            ..Default::default()
        }),
        writer_nonce: nonce.into(),
        tuning: Some(Tuning {
            duplicates_above: Some(0.95),
            ..Default::default()
        }),
        left_out: Some(LeftOut {
            duplicates_above: 5,
            ..Default::default()
        }),
        ..Default::default()
    };
    let bad = BadRow {
        id: "00000.parquet#9 \"ü\"".into(),
        position: 49,
        reason: BadRowReason::ImageNull.into(),
        detail: "no image".into(),
    };
    Receipt {
        summary: Some(summary),
        chosen: chosen.collect(),
        bad_rows: vec![bad],
        passed_over: vec![PassedRow {
            id: "00000.parquet#5".into(),
            own_score: 0.1,
            learner_loss: Some(0.3),
            sampled: true,
            ..Default::default()
        }],
    }
}

#[test]
fn a_receipt_comes_back_as_it_was() {
    let full = sample(3, 1, "n");
    for receipt in [
        full.clone(),
        Receipt {
            chosen: vec![],
            ..full
        },
        Receipt::default(),
    ] {
        assert_eq!(decode(encode(&receipt).unwrap()).unwrap(), receipt);
    }
}

#[test]
fn a_summary_is_read_from_the_end_of_the_file() {
    let receipt = sample(3, 1, "n");
    let bytes = encode(&receipt).unwrap();
    let size = bytes.len() as u64;
    let footer = bytes.len() / 10;
    assert_eq!(
        decode_summary(&bytes.slice(footer..), size),
        receipt.summary
    );
    assert_eq!(decode_summary(&bytes, size), receipt.summary);
    assert_eq!(decode_summary(&bytes.slice(bytes.len() - 20..), size), None);
    assert_eq!(decode_summary(&Bytes::from("no receipt"), 10), None);
}

#[test]
fn equal_receipts_have_equal_bytes_and_damage_is_seen() {
    let bytes = encode(&sample(3, 1, "n")).unwrap();
    assert_eq!(bytes, encode(&sample(3, 1, "n")).unwrap());
    assert_ne!(
        bytes,
        encode(&sample(3, 1, "m")).unwrap(),
        "the nonce is inside"
    );
    assert!(decode(bytes.slice(..bytes.len() - 3)).is_err());
    assert!(decode(Bytes::from("no receipt")).is_err());
}

/// Older builds wrote dictionaries, statistics and an offset index.
#[test]
fn a_receipt_of_an_older_build_comes_back() {
    let receipt = sample(3, 1, "n");
    let file = ParquetRecordBatchReaderBuilder::try_new(encode(&receipt).unwrap()).unwrap();
    let metadata = file.metadata().file_metadata().key_value_metadata();
    let properties = WriterProperties::builder()
        .set_compression(Compression::ZSTD(ZstdLevel::default()))
        .set_key_value_metadata(metadata.cloned())
        .build();
    let rows = file.build().unwrap().next().unwrap().unwrap();
    let mut writer = ArrowWriter::try_new(Vec::new(), rows.schema(), Some(properties)).unwrap();
    writer.write(&rows).unwrap();
    let older = Bytes::from(writer.into_inner().unwrap());
    assert_ne!(older, encode(&receipt).unwrap());
    assert_eq!(decode(older).unwrap(), receipt);
}

#[test]
fn rows_of_many_pages_come_back() {
    let few = sample(3, 1, "n");
    let row = |n: u64| ChosenRow {
        id: format!("00000.parquet#{n}"),
        row: n,
        position: n.wrapping_mul(0x9e37_79b9_7f4a_7c15),
        score: (n as f64).sqrt(),
        source: (n % 3) as u32,
        ..few.chosen[(n % 3) as usize].clone()
    };
    let receipt = Receipt {
        chosen: (0..50_000).map(row).collect(),
        ..few.clone()
    };
    assert_eq!(decode(encode(&receipt).unwrap()).unwrap(), receipt);
}

/// What a researcher does with a receipt.
const SCRIPT: &str = r#"
import json, sys
import pyarrow.parquet as pq
table = pq.read_table(sys.argv[1])
meta = table.schema.metadata or {}
meta = {**meta, **pq.read_metadata(sys.argv[1]).metadata}
summary = json.loads(meta[b"superbatch.summary"])
assert table["id"].to_pylist() == [f"00000.parquet#{i}" for i in range(3)], table
assert table["position"].to_pylist() == [40, 41, 42]
assert table["fidelity"].to_pylist() == ["full"] * 3
assert table["content_hash"][2].as_py() == bytes([2] * 16)
assert summary["policy"] == "joint" and summary["step"] == 3, summary
assert summary["learner"] == {"version": 2, "step": 7, "generation": 1, "digest": "ab"}
assert summary["cost"]["seconds"]["total"] == 0.25
assert summary["tuning"] == {"duplicates_above": 0.95}, summary
left_out = {"clip_score_at_least": 0, "neg_clip_loss_keep": 0}
left_out |= {"duplicates_above": 5, "score_columns": 0}
assert summary["left_out"] == left_out
[bad] = json.loads(meta[b"superbatch.bad_rows"])
passed = json.loads(meta[b"superbatch.passed_over"])
assert passed["id"] == ["00000.parquet#5"] and passed["own_score"] == [0.1]
assert passed["reference_loss"] == [None]
assert table["own_score"].to_pylist() == [None, 0.25, 0.25]
assert table["token_mask"].to_pylist() == [[True, False], None, None], table
expected = {"id": '00000.parquet#9 "ü"', "position": 49}
expected |= {"reason": "image_null", "detail": "no image"}
assert bad == expected, bad
"#;

#[test]
fn pyarrow_reads_rows_and_summary() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("receipt.parquet");
    std::fs::write(&path, encode(&sample(3, 1, "n")).unwrap()).unwrap();
    let venv = Path::new(env!("CARGO_MANIFEST_DIR")).join("../.venv/bin/python");
    let python = env::var_os("SUPERBATCH_PYTHON").unwrap_or(venv.into());
    let output = Command::new(python)
        .args(["-c", SCRIPT])
        .arg(&path)
        .output()
        .unwrap();
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
}

fn row() -> impl Strategy<Value = ChosenRow> {
    let places = (
        any::<u32>(),
        any::<u32>(),
        any::<u64>(),
        any::<u64>(),
        any::<u32>(),
    );
    let numbers = (
        any::<f64>(),
        any::<f64>(),
        0..5_i32,
        prop::collection::vec(any::<u8>(), 0..20),
    );
    let judged = any::<[Option<f64>; 3]>();
    let mask = prop::collection::vec(any::<bool>(), 0..20);
    (".{0,12}", places, numbers, judged, mask).prop_map(
        |(id, places, (score, weight, fidelity, hash), judged, mask)| {
            let (source, shard, row, position, chunk) = places;
            ChosenRow {
                id,
                source,
                shard,
                row,
                position,
                chunk,
                score,
                weight,
                fidelity,
                content_hash: hash.into(),
                own_score: judged[0],
                learner_loss: judged[1],
                reference_loss: judged[2],
                column_values: judged.into_iter().flatten().collect(),
                token_mask: mask,
            }
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]
    #[test]
    fn any_rows_come_back(
        chosen in prop::collection::vec(row(), 0..40),
        details in prop::collection::vec(".{0,20}", 0..5),
    ) {
        let bad_row = |detail| BadRow { detail, ..Default::default() };
        let bad_rows = details.into_iter().map(bad_row).collect();
        let receipt = Receipt { summary: None, chosen, bad_rows, passed_over: vec![] };
        prop_assert_eq!(decode(encode(&receipt).unwrap()).unwrap(), receipt);
    }
}
