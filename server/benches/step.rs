//! What a step costs beside its selection, a receipt beside one write, and how long it takes to
//! open a run over many shards: `make bench-step`.
//!
//!     cargo bench -p superbatch-server --bench step -- [step B b DIM ROUNDS] [receipts] \
//!         [manifest SHARDS] [open SHARDS]
//!
//! A step here is what the coordinator does between the last embedding and the last byte of the
//! answer: the plan, the candidates' own scores, the draw, the durable receipt, and the stream of
//! the only rank. Embeddings and rows are given.
#![allow(clippy::unwrap_used, clippy::print_stdout)]
use arrow::{
    array::{ArrayRef, BinaryArray, RecordBatch, StringArray},
    datatypes::{DataType, Field, Schema},
    ipc::writer::StreamWriter,
};
use half::f16;
use std::{
    fs::{self, File},
    io::Write,
    path::Path,
    process::Command,
    sync::Arc,
    time::Instant,
};
use superbatch_proto::{
    Checksum,
    v1::{
        ChosenRow, ComputeDtype, Criterion, EmbeddingDtype, Fidelity, Loss, OpenRunRequest, Phase,
        Policy, Receipt, ReceiptSummary, RunSpec, SelectBegin, Source,
        selection_service_client::SelectionServiceClient,
    },
};
use superbatch_server::{
    app::Serve,
    config::Config,
    coordinator::{
        facts::run::{self, RunFact},
        plan::{
            candidate::{SuperBatch, noise_keys},
            planner::Plan,
            rows::row_id,
        },
        receipts::store::Receipts,
        score::{scored::Scored, table::Table},
        select::{Selector, local::LocalSelector},
        serve::{output::rank_stream, share},
        spec,
    },
    dataset::{Block, Layout, Manifest, Shard, SourceManifest},
    selection::{Embedded, Values, judged::judge},
    storage::{Budget, Location, StorageConfig, Stores, nonce},
};

const SEED: u64 = 7;
const CHUNKS: u32 = 16;
/// Small images: moving rows has a benchmark of its own.
const ROW_BYTES: usize = 4096;
/// Of receipts, in turns with plain writes.
const RECEIPT_ROUNDS: usize = 20;

fn manifest(shards: u64, blocks: u64, rows: u32) -> Manifest {
    let shard = |shard: u64| Shard {
        path: format!("{:05}/{shard:08}.parquet", shard / 1000),
        size: 1 << 30,
        etag: Some(format!("\"{shard:032x}\"")),
        blocks: (0..blocks)
            .map(|block| Block {
                rows,
                first_row: block * u64::from(rows),
                bytes: (block << 20, (block + 1) << 20),
                mask: None,
            })
            .collect(),
        ..Shard::default()
    };
    let layout = Layout {
        image_column: "jpg".into(),
        caption_column: "caption".into(),
        ..Layout::default()
    };
    let source = SourceManifest {
        uri: "s3://data/pool".into(),
        root_uri: "s3://data/pool".into(),
        weight: 1.0,
        layout,
        shards: (0..shards).map(shard).collect(),
        ..SourceManifest::default()
    };
    Manifest {
        version: Manifest::VERSION,
        sources: vec![source],
    }
}

/// Made-up embeddings of unit length.
fn scored(rows: usize, dim: usize, seed: u64) -> Scored {
    let mut state = seed;
    let mut values = || {
        let mut all = Vec::with_capacity(rows * dim);
        for _ in 0..rows {
            let row: Vec<f32> = (0..dim)
                .map(|_| {
                    state = state
                        .wrapping_mul(6_364_136_223_846_793_005)
                        .wrapping_add(1);
                    (state >> 40) as f32 / (1 << 23) as f32 - 1.0
                })
                .collect();
            let length = row.iter().map(|x| x * x).sum::<f32>().sqrt();
            all.extend(row.iter().map(|x| f16::from_f32(x / length)));
        }
        Values::F16(all)
    };
    Scored {
        embedded: Embedded {
            image: values(),
            text: values(),
            dim,
        },
        scale: 10.0,
        bias: Some(-10.0),
        digest: String::new(),
        files: Default::default(),
        compute_dtype: ComputeDtype::F32,
        device: "cpu".into(),
        flops: 0.0,
        text_flops: 0.0,
        seconds: 0.0,
        not_finite: Vec::new(),
    }
}

fn copy_of(model: &Scored) -> Scored {
    Scored {
        embedded: model.embedded.clone(),
        digest: String::new(),
        device: String::new(),
        files: Default::default(),
        not_finite: Vec::new(),
        ..*model
    }
}

/// The chosen rows as workers send them.
fn table(rows: usize) -> Table {
    let images = (0..rows).map(|row| vec![row as u8; ROW_BYTES]);
    let captions = (0..rows).map(|row| format!("a picture of number {row}"));
    let columns: [(&str, ArrayRef); 2] = [
        ("image", Arc::new(BinaryArray::from_iter_values(images))),
        ("caption", Arc::new(StringArray::from_iter_values(captions))),
    ];
    let batch = RecordBatch::try_from_iter(columns).unwrap();
    let mut writer = StreamWriter::try_new(Vec::new(), &batch.schema()).unwrap();
    for at in (0..rows).step_by(1000) {
        writer.write(&batch.slice(at, 1000.min(rows - at))).unwrap();
    }
    Table::from_stream([writer.into_inner().unwrap().into()]).unwrap()
}

fn output_schema() -> Arc<Schema> {
    let field = |(name, data_type): (&str, DataType)| Field::new(name, data_type, false);
    let fields = [
        ("image", DataType::Binary),
        ("caption", DataType::Utf8),
        ("_superbatch_id", DataType::Utf8),
        ("_superbatch_position", DataType::UInt64),
        ("_superbatch_score", DataType::Float64),
        ("_superbatch_fidelity", DataType::Utf8),
        ("_superbatch_weight", DataType::Float64),
    ];
    Arc::new(Schema::new(fields.map(field).to_vec()))
}

fn receipt(step: u64, manifest: &Manifest, of: &SuperBatch, drawn: &[u32]) -> Receipt {
    let row = |index: &u32| {
        let candidate = &of.candidates[*index as usize];
        let (id, row) = row_id(manifest, candidate);
        ChosenRow {
            id,
            shard: candidate.shard,
            row,
            position: candidate.position,
            score: f64::from(*index) / 3.0,
            weight: 1.0,
            fidelity: Fidelity::Full.into(),
            content_hash: blake3::hash(&index.to_le_bytes()).as_bytes()[..16]
                .to_vec()
                .into(),
            own_score: Some(f64::from(*index) / 7.0),
            ..Default::default()
        }
    };
    let summary = ReceiptSummary {
        step,
        writer_nonce: nonce(),
        scanned: of.spans.clone(),
        ..Default::default()
    };
    Receipt {
        summary: Some(summary),
        chosen: drawn.iter().map(row).collect(),
        ..Default::default()
    }
}

/// Seconds of each part of a step, in order, and the processor's seconds of all.
type Parts = [(&'static str, f64); 5];

/// One whole step, from the plan to the last byte. `select` is what the selector reports of itself.
async fn step(
    step: u64,
    plan: &Plan,
    phases: &[Phase],
    models: [Scored; 2],
    rows: &Table,
    run: &Location,
    selector: &LocalSelector,
) -> Parts {
    let mut begun = Instant::now();
    let mut lap = || {
        std::mem::replace(&mut begun, Instant::now())
            .elapsed()
            .as_secs_f64()
    };
    let super_batch = plan.step(phases, step).unwrap();
    let planned = lap();
    let begin = SelectBegin {
        policy: Policy::Joint.into(),
        criterion: Criterion::Learnability.into(),
        loss: Loss::Sigmoid.into(),
        sub_batch_size: phases[0].sub_batch_size,
        n_chunks: CHUNKS,
        gain: 1.0,
        seed: SEED,
        step,
        positions: noise_keys(&super_batch.candidates),
        embedding_dtype: EmbeddingDtype::F16.into(),
        learner_scale: 10.0,
        learner_bias: -10.0,
        reference_scale: 10.0,
        reference_bias: -10.0,
        ..Default::default()
    };
    let [learner, reference] = models;
    let judged = judge(&begin, Some(&learner.embedded), Some(&reference.embedded));
    assert!(judged.is_some());
    let drawn = selector
        .select(begin, Some(learner), Some(reference))
        .await
        .unwrap();
    let around = lap() - drawn.seconds;
    let receipt = receipt(step, plan.manifest(), &super_batch, &drawn.indices);
    Receipts::new(run.clone())
        .commit(&receipt, &Budget::default())
        .await
        .unwrap();
    let committed = lap();
    let order = share::slice(SEED, step, &share::groups(&receipt.chosen), 1, 1, 0).unwrap();
    let mut checksum = Checksum::default();
    for part in rank_stream(&output_schema(), rows, &receipt, &order).unwrap() {
        checksum.update(&part);
    }
    std::hint::black_box(checksum.finish());
    [
        ("plan", planned),
        ("select", drawn.seconds),
        ("around select", around),
        ("commit", committed),
        ("serve", lap()),
    ]
}

fn local(folder: &Path) -> Location {
    let uri = format!("file://{}", folder.display());
    Stores::new(StorageConfig::default()).open(&uri).unwrap()
}

async fn bench_steps(candidates: u32, chosen: u32, dim: usize, rounds: u64) {
    let folder = tempfile::tempdir().unwrap();
    let run = local(folder.path());
    let shards = u64::from(candidates) * (rounds + 1) / 8000 + 2;
    let plan = Plan::new(Arc::new(manifest(shards, 8, 1000)), SEED, 0, 16).unwrap();
    let phases = [Phase {
        policy: Policy::Joint.into(),
        super_batch_size: candidates,
        sub_batch_size: chosen,
        ..Default::default()
    }];
    let models = [1, 2].map(|seed| scored(candidates as usize, dim, seed));
    let (rows, selector) = (table(chosen as usize), LocalSelector::new(0).unwrap());
    let mut least: Option<Parts> = None;
    for round in 0..rounds {
        let given = [copy_of(&models[0]), copy_of(&models[1])];
        let parts = step(round, &plan, &phases, given, &rows, &run, &selector).await;
        let whole = |parts: &Parts| parts.iter().map(|(_, seconds)| seconds).sum::<f64>();
        if least
            .as_ref()
            .is_none_or(|least| whole(&parts) / parts[1].1 < whole(least) / least[1].1)
        {
            least = Some(parts);
        }
    }
    let parts = least.unwrap();
    println!(
        "\nA step of B={candidates}, b={chosen}, d={dim}, f16, {CHUNKS} chunks, \
         rows of {ROW_BYTES} bytes"
    );
    let whole: f64 = parts.iter().map(|(_, seconds)| seconds).sum();
    for (name, seconds) in parts {
        println!(
            "  {name:16}{:10.2} ms{:8.2} % of the selection",
            seconds * 1e3,
            seconds / parts[1].1 * 100.0
        );
    }
    println!(
        "ratio\tA step of B={candidates}: selection alone, of the whole step\t{:.3}\tgoal=0.87",
        parts[1].1 / whole
    );
}

async fn bench_receipts(chosen: u32) {
    let folder = tempfile::tempdir().unwrap();
    let run = local(folder.path());
    let manifest = Arc::new(manifest(100, 8, 1000));
    let plan = Plan::new(manifest.clone(), SEED, 0, 16).unwrap();
    let phases = [Phase {
        super_batch_size: 5 * chosen,
        sub_batch_size: chosen,
        ..Default::default()
    }];
    let super_batch = plan.step(&phases, 0).unwrap();
    let drawn: Vec<u32> = (0..chosen).map(|n| n * 5).collect();
    let (mut ours, mut plain, mut bytes) = (f64::INFINITY, f64::INFINITY, 0);
    for round in 0..RECEIPT_ROUNDS as u64 {
        let receipt = receipt(round, &manifest, &super_batch, &drawn);
        let begun = Instant::now();
        Receipts::new(run.clone())
            .commit(&receipt, &Budget::default())
            .await
            .unwrap();
        ours = ours.min(begun.elapsed().as_secs_f64());
        let written =
            fs::read(folder.path().join(format!("receipts/0/{round}/0.parquet"))).unwrap();
        bytes = written.len();
        let begun = Instant::now();
        let mut file = File::create(folder.path().join(format!("plain-{round}"))).unwrap();
        file.write_all(&written).unwrap();
        file.sync_all().unwrap();
        plain = plain.min(begun.elapsed().as_secs_f64());
    }
    println!("\nA receipt of b={chosen}, {bytes} bytes, on a local disk");
    println!(
        "  committed {:.2} ms, one write and fsync of the same bytes {:.2} ms",
        ours * 1e3,
        plain * 1e3
    );
    println!(
        "ratio\tReceipt of b={chosen}: speed of one fsynced write\t{:.3}\tgoal=0.5",
        plain / ours
    );
}

/// The most memory that this process has held, in MiB.
fn peak() -> f64 {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let kib = line.and_then(|kib| kib.trim().trim_end_matches(" kB").parse::<f64>().ok());
    kib.unwrap_or_default() / 1024.0
}

/// Writes a manifest as an index would have left it, and returns its digest. By a process of its
/// own: memory that is freed here would still count as held.
fn indexed(state: &Path, shards: u64) -> String {
    let written = Command::new(std::env::current_exe().unwrap())
        .arg("write")
        .arg(shards.to_string())
        .arg(state)
        .output()
        .unwrap();
    assert!(written.status.success(), "{written:?}");
    String::from_utf8(written.stdout).unwrap().trim().to_owned()
}

fn write_manifest(state: &Path, shards: u64) {
    let manifest = manifest(shards, 1, 10_000);
    let digest = manifest.digest();
    fs::create_dir_all(state.join("manifests")).unwrap();
    let file = File::create(state.join(format!("manifests/{digest}.json"))).unwrap();
    serde_json::to_writer(std::io::BufWriter::new(file), &manifest).unwrap();
    println!("{digest}");
}

/// OpenRun itself, of a run that the service does not have in memory, as after a restart.
async fn bench_open(shards: u64) {
    let folder = tempfile::tempdir().unwrap();
    let digest = indexed(folder.path(), shards);
    let any = "127.0.0.1:0".parse().unwrap();
    let mut config = Config {
        listen: any,
        metrics_listen: None,
        page_listen: None,
        state: format!("file://{}", folder.path().display()),
        ..Config::default()
    };
    config.coordinator.workers_embedded = false;
    let need_deadline_seconds = config.coordinator.need_deadline_seconds;
    let serve = Serve::build(config).await.unwrap();
    let mut client = {
        let uri = serve.uri();
        tokio::spawn(serve.run(std::future::pending()));
        SelectionServiceClient::connect(uri).await.unwrap()
    };
    let asked = RunSpec {
        sources: vec![Source {
            uri: "s3://data/pool".into(),
            ..Default::default()
        }],
        phases: vec![Phase {
            policy: Policy::Uniform.into(),
            super_batch_size: 5120,
            sub_batch_size: 1024,
            ..Default::default()
        }],
        ..Default::default()
    };
    let mut opened = spec::complete(asked.clone(), need_deadline_seconds).unwrap();
    opened.micro_batch_rows = spec::micro_batch_rows_on("cpu");
    let fact = RunFact::new(&opened, digest, None, None, None);
    let location = local(folder.path()).below("runs/many");
    run::create_run(&location, fact).await.unwrap();
    fs::write("/proc/self/clear_refs", "5").unwrap();
    let (before, begun) = (peak(), Instant::now());
    let request = OpenRunRequest {
        run_id: "many".into(),
        spec: Some(asked),
    };
    let answer = client.open_run(request).await.unwrap().into_inner();
    let seconds = begun.elapsed().as_secs_f64();
    assert_eq!(answer.dataset_rows, shards * 10_000);
    println!(
        "\nOpenRun over {shards} shards: {seconds:.2} s, {:.0} MiB at most ({before:.0} before)",
        peak()
    );
    println!(
        "ratio\tOpenRun over {shards} shards: 5 seconds, of the time\t{:.3}\tgoal=1",
        5.0 / seconds
    );
    println!(
        "ratio\tOpenRun over {shards} shards: MiB at most\t{:.3}\tgoal=500\tbetter=lower",
        peak() - before
    );
}

async fn bench_manifest(shards: u64) {
    let folder = tempfile::tempdir().unwrap();
    let state = local(folder.path());
    let digest = indexed(folder.path(), shards);
    fs::write("/proc/self/clear_refs", "5").unwrap();
    let (before, begun) = (peak(), Instant::now());
    let manifest = Manifest::load(&state, &digest).await.unwrap();
    let loaded = begun.elapsed().as_secs_f64();
    let plan = Plan::new(Arc::new(manifest), SEED, 0, 64).unwrap();
    let phases = [Phase {
        super_batch_size: 5120,
        sub_batch_size: 1024,
        ..Default::default()
    }];
    let first = plan.step(&phases, 0).unwrap();
    assert_eq!(first.candidates.len(), 5120);
    println!(
        "\nA manifest of {shards} shards: read in {loaded:.2} s, first super-batch planned after \
        {:.2} s, {:.0} MiB at most ({before:.0} before)",
        begun.elapsed().as_secs_f64(),
        peak()
    );
    println!(
        "ratio\tManifest of {shards} shards, and a step: 5 seconds, of the time\t{:.3}",
        5.0 / begun.elapsed().as_secs_f64()
    );
}

fn main() {
    let words: Vec<String> = std::env::args()
        .skip(1)
        .filter(|word| word != "--bench")
        .collect();
    let number = |at: usize| words.get(at).map(|word| word.parse::<u64>().unwrap());
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .unwrap();
    runtime.block_on(async {
        match words.first().map(String::as_str) {
            Some("step") => {
                let of = |at, other| number(at).unwrap_or(other);
                bench_steps(
                    of(1, 5120) as u32,
                    of(2, 1024) as u32,
                    of(3, 768) as usize,
                    of(4, 5),
                )
                .await;
            }
            Some("receipts") => bench_receipts(4096).await,
            Some("manifest") => bench_manifest(number(1).unwrap_or(1_000_000)).await,
            Some("open") => bench_open(number(1).unwrap_or(1_000_000)).await,
            Some("write") => write_manifest(Path::new(&words[2]), number(1).unwrap()),
            _ => {
                // First: its peak is of the process.
                bench_open(1_000_000).await;
                bench_manifest(1_000_000).await;
                bench_receipts(4096).await;
                bench_steps(5120, 1024, 768, 5).await;
            }
        }
    });
}
