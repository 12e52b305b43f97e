//! Simulates scoring on 1 … 128 workers on a virtual clock, to find where more of them stop paying.
//!
//! What is real: the plan of each step, the cut into slices and blocks, the workers' leases and
//! turns, and the sizing rule. What is simulated: the time that stages take, from rates that are
//! given on the command line, on the resources that they use: each worker's store connection,
//! decode cores and GPU, the coordinator's network, the selector. One line of JSON a case goes to
//! standard output; `scripts/scaling.py` runs this and plots.
use clap::Parser;
use serde_json::json;
use std::{
    collections::BTreeMap,
    error::Error,
    sync::Arc,
    time::{Duration, Instant},
};
use superbatch_proto::v1::{Phase, Policy, RegisterRequest};
use superbatch_server::{
    coordinator::{
        plan::{candidate::Candidate, cut, planner::Plan},
        trainer::sizing::{Work, optimal_workers},
        workers::pool::{Home, Pool},
    },
    dataset::{Block, Layout, Manifest, Shard, SourceManifest},
};

/// Rates and sizes. Seconds, rows and bytes.
#[derive(Debug, Clone, Parser)]
struct Rates {
    #[arg(long, default_value_t = 163_840)]
    super_batch_size: u32,
    #[arg(long, default_value_t = 32_768)]
    sub_batch_size: u32,
    #[arg(long, default_value_t = 768)]
    dim: u32,
    /// Rows of a block (a row group, or a run of samples of a tar).
    #[arg(long, default_value_t = 1_024)]
    block_rows: u32,
    #[arg(long, default_value_t = 64)]
    micro_batch_rows: u32,
    #[arg(long, default_value_t = 60e3)]
    row_bytes: f64,
    /// Decoding, resizing and tokenizing one row on one core.
    #[arg(long, default_value_t = 2.0e-3)]
    decode: f64,
    #[arg(long, default_value_t = 16.0)]
    cores: f64,
    /// One row's forward pass of one model.
    #[arg(long, default_value_t = 61e-6)]
    forward: f64,
    /// The share of rows whose reference embeddings are not stored yet.
    #[arg(long, default_value_t = 1.0)]
    reference_share: f64,
    /// From the store, for each worker and for all together.
    #[arg(long, default_value_t = 2.5e9)]
    worker_bandwidth: f64,
    #[arg(long, default_value_t = 100e9)]
    store_bandwidth: f64,
    #[arg(long, default_value_t = 3e9)]
    coordinator_bandwidth: f64,
    /// Floating-point operations a second of the selector.
    #[arg(long, default_value_t = 100e12)]
    selector: f64,
    #[arg(long, default_value_t = 0.05)]
    commit: f64,
    /// Of one message to a worker and back.
    #[arg(long, default_value_t = 0.002)]
    round_trip: f64,
    /// The trainer's own step; 0 asks how fast steps can be decided.
    #[arg(long, default_value_t = 0.0)]
    train: f64,
    #[arg(long, default_value_t = 2)]
    max_ahead: u64,
    #[arg(long, default_value_t = 12)]
    steps: u64,
    /// Whether chosen rows go from the workers to the ranks.
    #[arg(long)]
    direct: bool,
}

/// When each resource is free, in virtual seconds.
#[derive(Debug, Clone, Default)]
struct Node {
    store: f64,
    cores: f64,
    gpu: f64,
}

/// Uses a resource from `ready` on for `seconds`. Returns when that is done.
fn busy(free: &mut f64, ready: f64, seconds: f64) -> f64 {
    *free = free.max(ready) + seconds;
    *free
}

fn manifest(rates: &Rates) -> Manifest {
    let blocks = 64 * 1024;
    let block = |n: u64| Block {
        rows: rates.block_rows,
        first_row: n * u64::from(rates.block_rows),
        bytes: (0, 0),
        mask: None,
    };
    let shard = |n: u64| Shard {
        path: format!("{n:05}.parquet"),
        blocks: (0..16).map(block).collect(),
        ..Shard::default()
    };
    let layout = Layout {
        image_column: "image".into(),
        caption_column: "caption".into(),
        ..Layout::default()
    };
    let source = SourceManifest {
        uri: "memory:///data".into(),
        root_uri: "memory:///data".into(),
        weight: 1.0,
        layout,
        shards: (0..blocks / 16).map(shard).collect(),
        ..SourceManifest::default()
    };
    Manifest {
        version: Manifest::VERSION,
        sources: vec![source],
    }
}

/// One run's course on so many workers.
struct Course<'a> {
    rates: &'a Rates,
    nodes: BTreeMap<String, Node>,
    /// When the coordinator's network and the selector are free.
    network: f64,
    selector: f64,
    /// Seconds of the slowest slice, of which the learner's, and of what no worker shortens.
    work: Work,
    /// Bytes that workers read from the store.
    read: f64,
}

impl Course<'_> {
    /// Reads, decodes and embeds one slice with the reference. Returns when that is done.
    fn survey(&mut self, address: &str, candidates: &[Candidate], whole: usize, from: f64) -> f64 {
        let (rates, workers) = (self.rates, self.nodes.len() as f64);
        let node = self.nodes.entry(address.to_owned()).or_default();
        let bandwidth = rates.worker_bandwidth.min(rates.store_bandwidth / workers);
        let mut done = from;
        let reference = rates.forward * rates.reference_share * whole as f64;
        for block in cut::block_rows(candidates) {
            // A block is read whole, also by each of two workers that share it.
            let bytes = f64::from(rates.block_rows) * rates.row_bytes;
            self.read += bytes;
            let read = busy(&mut node.store, from, bytes / bandwidth);
            let rows = block.rows.len() as f64;
            let decoded = busy(&mut node.cores, read, rows * rates.decode / rates.cores);
            let share = rows / candidates.len() as f64;
            done = busy(&mut node.gpu, decoded, reference * share);
        }
        done
    }

    /// Decides a step: returns when it is committed. `weights` is when its weights are published.
    fn decide(
        &mut self,
        candidates: &[Candidate],
        live: &[String],
        step: u64,
        (from, weights): (f64, f64),
    ) -> f64 {
        let rates = self.rates;
        let ranges = cut::slices(
            candidates.len(),
            live.len(),
            rates.micro_batch_rows as usize,
        );
        let whole = cut::whole_blocks(candidates, &ranges);
        let (mut scored, mut slowest, mut learner) = (from, 0.0_f64, 0.0_f64);
        let model_bytes = f64::from(rates.dim) * 4.0; // Image and text, f16.
        for (number, (range, whole)) in ranges.into_iter().zip(whole).enumerate() {
            let address = &live[(number + step as usize) % live.len()];
            let rows = range.len();
            let surveyed = self.survey(
                address,
                &candidates[range],
                whole.len(),
                from + rates.round_trip,
            );
            let padded = rows.div_ceil(rates.micro_batch_rows as usize) as f64;
            let forward = padded * f64::from(rates.micro_batch_rows) * rates.forward;
            let node = self.nodes.entry(address.clone()).or_default();
            let embedded = busy(&mut node.gpu, surveyed.max(weights), forward);
            // Both models' embeddings cross the coordinator's network.
            let bytes = rows as f64 * 2.0 * model_bytes;
            let arrived = busy(
                &mut self.network,
                embedded,
                bytes / rates.coordinator_bandwidth,
            );
            scored = scored.max(arrived + rates.round_trip);
            slowest = slowest.max(surveyed - from + forward);
            learner = learner.max(forward);
        }
        let (all, chosen) = (
            f64::from(rates.super_batch_size),
            f64::from(rates.sub_batch_size),
        );
        let operations = 8.0 * all * chosen * f64::from(rates.dim);
        let select = operations / rates.selector;
        let selected = busy(&mut self.selector, scored, select);
        let rest = select + rates.commit;
        self.work = Work {
            workers: live.len() as f64,
            scored: slowest,
            learner,
            rest,
        };
        selected + 2.0 * rates.round_trip + rates.commit
    }
}

#[expect(
    clippy::too_many_lines,
    reason = "one simulation, in the order of its events"
)]
fn case(rates: &Rates, plan: &Plan, workers: usize) -> Result<serde_json::Value, Box<dyn Error>> {
    let phases = [Phase {
        policy: Policy::Joint.into(),
        super_batch_size: rates.super_batch_size,
        sub_batch_size: rates.sub_batch_size,
        ..Default::default()
    }];
    let (begin, lease) = (Instant::now(), Duration::from_secs(15));
    let pool = Pool::new(lease, Duration::ZERO, Home::default());
    let mut course = Course {
        rates,
        nodes: BTreeMap::new(),
        network: 0.0,
        selector: 0.0,
        work: Work {
            workers: 0.0,
            scored: 0.0,
            learner: 0.0,
            rest: 0.0,
        },
        read: 0.0,
    };
    let (mut consumed, mut published, mut waited) = (Vec::new(), Vec::new(), 0.0);
    for step in 0..rates.steps {
        let at = |ends: &[f64], behind: u64| {
            let n = (step + 1).checked_sub(1 + behind);
            n.and_then(|n| ends.get(n as usize)).copied().unwrap_or(0.0)
        };
        // At most `max_ahead` beyond the last consumed step; weights of step s-2 (lag exact 1).
        let from = at(&consumed, rates.max_ahead);
        let weights = at(&published, 2);
        // Workers renew their leases in virtual time.
        let now = begin + Duration::from_secs_f64(from);
        for n in 0..workers {
            let address = format!("http://10.0.{}.{}:1", n / 256, n % 256);
            pool.register(
                &RegisterRequest {
                    address,
                    ..Default::default()
                },
                now,
            )?;
        }
        let live: Vec<String> = pool.live(now).into_iter().map(|w| w.address).collect();
        live.iter().for_each(|address| {
            course.nodes.entry(address.clone()).or_default();
        });
        let candidates = plan.step(&phases, step)?.candidates;
        let decided = course.decide(&candidates, &live, step, (from, weights));
        let bytes = f64::from(rates.sub_batch_size) * rates.row_bytes;
        let delivered = if rates.direct {
            decided + bytes / (rates.worker_bandwidth * workers as f64)
        } else {
            busy(
                &mut course.network,
                decided,
                2.0 * bytes / rates.coordinator_bandwidth,
            )
        };
        let ready = consumed.last().copied().unwrap_or(0.0);
        waited += if step > 2 {
            (delivered - ready).max(0.0)
        } else {
            0.0
        };
        let end = ready.max(delivered) + rates.train;
        consumed.push(end);
        published.push(end);
    }
    // The first steps fill the pipeline.
    let seen = rates.steps as usize - 4;
    let seconds = (consumed[seen + 3] - consumed[3]) / seen as f64;
    let asked = optimal_workers(
        &course.work,
        if rates.train > 0.0 {
            rates.train
        } else {
            seconds
        },
        1,
    );
    Ok(json!({
        "workers": workers,
        "seconds_a_step": seconds,
        "wait_a_step": waited / (rates.steps - 3) as f64,
        "direct": rates.direct,
        "optimal_workers": asked,
        "read_bytes_a_step": course.read / rates.steps as f64,
        "work": {
            "scored": course.work.scored,
            "learner": course.work.learner,
            "rest": course.work.rest,
        },
    }))
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Box<dyn Error>> {
    let rates = Rates::parse();
    let plan = Plan::new(Arc::new(manifest(&rates)), 7, 0, 16)?;
    for workers in [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128] {
        println!("{}", case(&rates, &plan, workers)?);
    }
    Ok(())
}
