//! How long it takes to open a long run, and how much memory: `open_run STEPS PUSHES` makes a
//! synthetic state in a temporary folder and opens it twice, first as an older build left it behind
//! (no summaries, so that every fact is read), then with the summaries that the first opening
//! wrote. `make bench-open` prints how many times faster the second one is.
#![allow(clippy::unwrap_used, clippy::print_stdout)]
use async_trait::async_trait;
use std::{fs, path::Path, sync::Arc, time::Duration, time::Instant};
use superbatch_proto::v1::{Accounts, Lag, Receipt, ReceiptSummary, lag::Bound};
use superbatch_server::{
    coordinator::{
        facts::chain::Chain,
        receipts::store::Receipts,
        weights::{ModelShape, RunWeights, Verifier, Weights},
    },
    error::{Error, Result},
    pushed::Pushed,
    storage::{Budget, Location, StorageConfig, Stores},
};

/// Nothing is pushed here.
struct NoVerifier;

#[async_trait]
impl Verifier for NoVerifier {
    async fn verify(&self, _: &str, _: &str) -> Result<ModelShape> {
        Err(Error::internal("nothing is pushed"))
    }

    async fn verify_in_memory(&self, _: &str, _: Pushed) -> Result<Option<ModelShape>> {
        Ok(None)
    }

    async fn shape(&self) -> Result<ModelShape> {
        Err(Error::internal("nothing is pushed"))
    }
}

/// The receipts of all steps, of which the newest alone are read, and the facts of all pushes.
async fn fill(folder: &Path, run: &Location, steps: u64, pushes: u64) {
    for step in 0..steps.saturating_sub(4) {
        let at = folder.join(format!("receipts/{}/{step}", step / 1000));
        fs::create_dir_all(&at).unwrap();
        fs::write(at.join("0.parquet"), "").unwrap();
    }
    for step in steps.saturating_sub(4)..steps {
        let totals = Accounts {
            candidates_scanned: (step + 1) * 64,
            ..Default::default()
        };
        let summary = ReceiptSummary {
            step,
            writer_nonce: "n".into(),
            run_totals: Some(totals),
            ..Default::default()
        };
        let receipt = Receipt {
            summary: Some(summary),
            ..Default::default()
        };
        let receipts = Receipts::new(run.clone());
        receipts.commit(&receipt, &Budget::default()).await.unwrap();
    }
    fs::create_dir_all(folder.join("pushes/0")).unwrap();
    for step in 0..pushes {
        let digest = blake3::hash(&step.to_le_bytes()).to_hex();
        let fact = format!(
            r#"{{"nonce":"n","push_id":"p{step}","version":{},"generation":0,"step":{step},
            "digest":"{digest}","logit_scale":10.0,"logit_bias":-10.0}}"#,
            step + 1
        );
        fs::write(folder.join(format!("pushes/0/{step}.json")), fact).unwrap();
    }
}

async fn open(run: &Location) -> (u64, Weights) {
    let receipts = Receipts::new(run.clone());
    let (trail, totals) = receipts.opened(&Chain::default(), 2).await.unwrap();
    let settings = RunWeights {
        run_id: "r".into(),
        lag: Lag {
            bound: Some(Bound::Exact(1)),
        },
        push_every_steps: 1,
        first_push: true,
        initial: None,
        push_bytes_max: 1,
        push_deadline: Duration::from_secs(1),
        owner: None,
    };
    let weights = Weights::open(run.clone(), settings, Arc::new(NoVerifier));
    let weights = weights.await.unwrap();
    let newest = weights.book().borrow().newest().map(|v| v.version.version);
    println!(
        "  next step {}, {} candidates scanned, newest version {newest:?}",
        trail.next(),
        totals.candidates_scanned
    );
    (trail.next(), weights)
}

/// The most memory that this process has held, in MiB.
fn peak() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let kib = line.and_then(|kib| kib.trim().trim_end_matches(" kB").parse::<u64>().ok());
    kib.unwrap_or(0) / 1024
}

#[tokio::main]
async fn main() {
    let numbers: Vec<u64> = std::env::args()
        .skip(1)
        .map(|n| n.parse().unwrap())
        .collect();
    let [steps, pushes] = numbers[..] else {
        println!("usage: open_run STEPS PUSHES");
        return;
    };
    let folder = tempfile::tempdir().unwrap();
    let uri = format!("file://{}", folder.path().display());
    let run = Stores::new(StorageConfig::default()).open(&uri).unwrap();
    fill(folder.path(), &run, steps, pushes).await;
    println!("{steps} steps, {pushes} pushes, {} MiB before", peak());
    let mut took = Vec::new();
    for what in ["without summaries", "with summaries"] {
        let begun = Instant::now();
        let (next, weights) = open(&run).await;
        let seconds = begun.elapsed().as_secs_f64();
        assert_eq!(next, steps);
        // The pushes' summary is written meanwhile.
        weights.drain().await;
        println!("{what}: {seconds:.2} s, {} MiB at most", peak());
        took.push(seconds);
        // Peak memory is of the next opening alone.
        fs::write("/proc/self/clear_refs", "5").unwrap();
    }
    println!(
        "ratio\topening a run: summaries against every fact\t{:.3}",
        took[0] / took[1]
    );
}
