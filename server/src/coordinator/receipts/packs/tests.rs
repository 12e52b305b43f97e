//! Packs as files.
use super::{
    file::{Parts, Writer},
    *,
};
use crate::{
    coordinator::receipts::parquet::{encode, tests::sample},
    storage::{StorageConfig, Stores},
};
use arrow::array::AsArray;
use std::{env, path::Path, process::Command};

/// More than a row group has.
const STEPS: std::ops::Range<u64> = 1000..1300;

fn file_of(step: u64) -> Bytes {
    encode(&sample(step, 1, "n")).unwrap()
}

fn packed(steps: std::ops::Range<u64>) -> Bytes {
    let parts = |step| Parts::of(file_of(step)).unwrap();
    let mut writer = Writer::begin(1, steps.start, parts(steps.start)).unwrap();
    for step in steps.skip(1) {
        let parts = parts(step);
        assert!(writer.takes(&parts));
        writer.push(parts).unwrap();
    }
    writer.finish().unwrap()
}

async fn opened(bytes: &Bytes) -> (Packs, Pack) {
    let run = Stores::new(StorageConfig::default())
        .open("memory:///runs/r")
        .unwrap();
    let pack = Pack {
        first: STEPS.start,
        last: STEPS.end - 1,
        generation: 1,
        digest: blake3::hash(bytes).to_hex().to_string(),
        bytes: bytes.len() as u64,
    };
    run.put(&pack.key(), bytes.clone()).await.unwrap();
    (Packs::new(run), pack)
}

#[tokio::test]
async fn each_receipt_is_found_in_whichever_row_group_it_lies() {
    let bytes = packed(STEPS);
    let (packs, pack) = opened(&bytes).await;
    for step in STEPS.step_by(37).chain([STEPS.end - 1]) {
        let expected = sample(step, 1, "n");
        assert_eq!(packs.receipt(&pack, step).await.unwrap(), expected);
        let summary = packs.summary(&pack, step).await.unwrap();
        assert_eq!(summary, expected.summary);
    }
    let is_kept = |group| packs.groups.find(&(packs.owner, pack.clone(), group));
    assert!(is_kept(0).is_some() && is_kept(1).is_some() && is_kept(2).is_none());
    let mut expected = STEPS;
    each(&bytes, |hash, step, receipt| {
        assert_eq!(Some(step), expected.next());
        assert_eq!(receipt, sample(step, 1, "n"));
        assert_eq!(hash, *blake3::hash(&file_of(step)).as_bytes());
    })
    .unwrap();
    assert_eq!(expected.next(), None);
    assert_eq!(packed(STEPS), bytes, "whoever packs them writes the same");
}

#[test]
fn what_the_fuzzer_begins_with_are_packs() {
    let seeds = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz/seeds/pack");
    for name in ["plain", "zstd"] {
        let seed = Bytes::from(std::fs::read(seeds.join(name)).unwrap());
        let mut found = Vec::new();
        let see = |_, step, receipt: Receipt| found.push((step, receipt.chosen.len()));
        each(&seed.slice(2..), see).unwrap();
        assert_eq!(found, [(3, 0), (4, 1), (5, 2)], "{name}");
    }
}

#[test]
fn small_receipts_are_packed_to_a_tenth_of_their_files() {
    let files: usize = STEPS.map(|step| file_of(step).len()).sum();
    let pack = packed(STEPS).len();
    assert!(pack < files / 10, "{pack} bytes of {files}");
}

/// Rewrites a receipt's file as another build might have written it.
pub(crate) fn rewritten(
    file: Bytes,
    change: impl FnOnce(&mut Vec<usize>, &mut Vec<(String, String)>),
) -> Bytes {
    use parquet::{
        arrow::{ArrowWriter, arrow_reader::ParquetRecordBatchReaderBuilder},
        file::{metadata::KeyValue, properties::WriterProperties},
    };
    let builder = ParquetRecordBatchReaderBuilder::try_new(file).unwrap();
    let known = builder.metadata().file_metadata().key_value_metadata();
    let known = known
        .unwrap()
        .iter()
        .filter(|entry| entry.key.starts_with("superbatch."));
    let mut entries: Vec<(String, String)> = known
        .map(|entry| (entry.key.clone(), entry.value.clone().unwrap()))
        .collect();
    let rows = builder.build().unwrap().next().unwrap().unwrap();
    let mut columns: Vec<usize> = (0..rows.num_columns()).collect();
    change(&mut columns, &mut entries);
    let rows = rows.project(&columns).unwrap();
    let schema = arrow::datatypes::Schema::new(rows.schema_ref().fields().clone());
    let entries = entries
        .into_iter()
        .map(|(key, value)| KeyValue::new(key, value));
    let properties = WriterProperties::builder()
        .set_key_value_metadata(Some(entries.collect()))
        .build();
    let mut writer = ArrowWriter::try_new(Vec::new(), schema.into(), Some(properties)).unwrap();
    writer.write(&rows).unwrap();
    writer.into_inner().unwrap().into()
}

#[test]
fn receipts_of_another_build_are_packed_apart_or_not_at_all() {
    let mut of_this = Writer::begin(1, 6, Parts::of(file_of(6)).unwrap()).unwrap();
    let same = Parts::of(rewritten(file_of(7), |_, _| {})).unwrap();
    assert!(of_this.takes(&same));
    of_this.push(same).unwrap();
    // An older build had fewer columns.
    let older = rewritten(file_of(7), |columns, _| columns.truncate(10));
    let parts = Parts::of(older.clone()).unwrap();
    assert!(!of_this.takes(&parts));
    let alone = Writer::begin(1, 7, parts).unwrap().finish().unwrap();
    let expected = crate::coordinator::receipts::parquet::decode(older).unwrap();
    each(&alone, |_, _, receipt| assert_eq!(receipt, expected)).unwrap();
    // A newer one may say more, which would be lost.
    let newer = rewritten(file_of(7), |_, entries| {
        entries.push(("superbatch.more".into(), "x".into()))
    });
    let error = Parts::of(newer).err().unwrap();
    assert!(error.to_string().contains("superbatch.more"), "{error}");
    assert!(Parts::of(Bytes::from("no receipt")).is_err());
}

#[test]
fn columns_are_called_as_the_metadata_are() {
    let footer = ArrowReaderMetadata::load(&packed(3..5), Default::default()).unwrap();
    let names: Vec<&String> = footer.schema().fields().iter().map(|f| f.name()).collect();
    let expected = "step generation hash summary summary_protobuf bad_rows bad_rows_protobuf \
        passed_over chosen";
    assert_eq!(names, expected.split(' ').collect::<Vec<_>>());
    let rows = file::read(packed(3..5), &footer, 0, Columns::All, None).unwrap();
    let steps = rows["step"].as_primitive::<arrow::datatypes::UInt64Type>();
    assert_eq!(steps.values(), &[3, 4]);
}

/// What a researcher does with packs.
const SCRIPT: &str = r#"
import json, sys
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

packs = pq.read_table(sys.argv[1])
lists = packs["chosen"].combine_chunks()
rows = pa.Table.from_struct_array(lists.flatten())
rows = rows.append_column("step", packs["step"].take(pc.list_parent_indices(lists)))
assert rows["step"].to_pylist() == [step for step in range(1000, 1300) for _ in range(3)]
assert rows["id"].to_pylist() == [f"00000.parquet#{i}" for i in range(3)] * 300
assert rows["own_score"].to_pylist()[:3] == [None, 0.25, 0.25]
summaries = [json.loads(summary) for summary in packs["summary"].to_pylist()]
assert [summary["step"] for summary in summaries] == packs["step"].to_pylist()
assert summaries[0]["policy"] == "joint"
[passed] = {*packs["passed_over"].to_pylist()}
assert json.loads(passed)["id"] == ["00000.parquet#5"]
one = pq.read_table(sys.argv[1], filters=[("step", "=", 1299)], columns=["step", "generation"])
assert one.to_pylist() == [{"step": 1299, "generation": 1}]
"#;

#[test]
fn pyarrow_reads_a_pack() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("pack.parquet");
    std::fs::write(&path, packed(STEPS)).unwrap();
    let venv = Path::new(env!("CARGO_MANIFEST_DIR")).join("../.venv/bin/python");
    let python = env::var_os("SUPERBATCH_PYTHON").unwrap_or(venv.into());
    let output = Command::new(python)
        .args(["-c", SCRIPT])
        .arg(&path)
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}");
}
