//! Load on a service: many ranks of many runs that ask for a step that is ready.
//!
//!     load URI SOURCE RUNS RANKS REQUESTS_PER_SECOND SECONDS
//!
//! `make load` starts a service and runs it. Every rank has a connection of its own, as in
//! training. Prints two JSON objects: at a fixed rate of requests, whatever the answers take, and
//! with every rank asking again as soon as it is answered.
use futures::future::try_join_all;
use std::{error::Error, time::Duration};
use superbatch_client::{Client, Run, v1};
use tokio::time::{Instant, sleep_until};

type Result<T> = std::result::Result<T, Box<dyn Error + Send + Sync>>;

/// Rows of a rank's slice.
const ROWS_PER_RANK: u32 = 4;

#[tokio::main]
async fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [uri, source, runs, ranks, rate, seconds] = arguments.as_slice() else {
        return Err("usage: load URI SOURCE RUNS RANKS REQUESTS_PER_SECOND SECONDS".into());
    };
    let (runs, ranks): (u32, u32) = (runs.parse()?, ranks.parse()?);
    let (rate, seconds): (f64, f64) = (rate.parse()?, seconds.parse()?);
    let lasts = Duration::from_secs_f64(seconds);
    let all = connect(uri, source, runs, ranks).await?;
    // The first request of each rank decides the step, or waits for it.
    try_join_all(all.iter().map(Rank::ask)).await?;
    println!("{}", at_rate(&all, rate, lasts).await?);
    println!("{}", as_fast_as_answered(&all, lasts).await?);
    Ok(())
}

#[derive(Clone)]
struct Rank {
    run: Run,
    rank: u32,
    world_size: u32,
}

impl Rank {
    /// Asks for the step, and returns how long the whole answer took.
    async fn ask(&self) -> Result<Duration> {
        let begun = Instant::now();
        let asked = self
            .run
            .select(0, self.rank, self.world_size, v1::Intent::Need);
        let batch = asked.await?;
        if batch.record_batch.num_rows() != ROWS_PER_RANK as usize {
            return Err(format!("{} rows", batch.record_batch.num_rows()).into());
        }
        Ok(begun.elapsed())
    }
}

async fn connect(uri: &str, source: &str, runs: u32, ranks: u32) -> Result<Vec<Rank>> {
    let sub_batch_size = ranks * ROWS_PER_RANK;
    let spec = v1::RunSpec {
        sources: vec![v1::Source {
            uri: source.to_owned(),
            ..Default::default()
        }],
        phases: vec![v1::Phase {
            policy: v1::Policy::Uniform.into(),
            super_batch_size: 2 * sub_batch_size,
            sub_batch_size,
            ..Default::default()
        }],
        ..Default::default()
    };
    let mut all = Vec::new();
    for run in 0..runs {
        let spec = v1::RunSpec {
            seed: run.into(),
            ..spec.clone()
        };
        for rank in 0..ranks {
            let client = Client::connect(uri).await?;
            let run = client.open_run(format!("load-{run}"), spec.clone()).await?;
            all.push(Rank {
                run: run.with_incarnation("load"),
                rank,
                world_size: ranks,
            });
        }
    }
    Ok(all)
}

/// Begins requests at fixed times. A slow answer delays no later request, so that it is not hidden.
async fn at_rate(all: &[Rank], rate: f64, lasts: Duration) -> Result<serde_json::Value> {
    let begun = Instant::now();
    let requests = (rate * lasts.as_secs_f64()) as usize;
    let mut asked = Vec::with_capacity(requests);
    for request in 0..requests {
        sleep_until(begun + Duration::from_secs_f64(request as f64 / rate)).await;
        let rank = all[request % all.len()].clone();
        asked.push(tokio::spawn(async move { rank.ask().await }));
    }
    let mut took = Vec::with_capacity(requests);
    for answer in asked {
        took.push(answer.await??);
    }
    Ok(summary("fixed rate", took, begun.elapsed()))
}

async fn as_fast_as_answered(all: &[Rank], lasts: Duration) -> Result<serde_json::Value> {
    let begun = Instant::now();
    let ends = begun + lasts;
    let asked = all.iter().cloned().map(|rank| {
        tokio::spawn(async move {
            let mut took = Vec::new();
            while Instant::now() < ends {
                took.push(rank.ask().await?);
            }
            Result::Ok(took)
        })
    });
    let mut took = Vec::new();
    for rank in asked.collect::<Vec<_>>() {
        took.extend(rank.await??);
    }
    Ok(summary("as fast as answered", took, begun.elapsed()))
}

fn summary(name: &str, mut took: Vec<Duration>, lasted: Duration) -> serde_json::Value {
    took.sort_unstable();
    let milliseconds = |share: f64| {
        let last = took.len().saturating_sub(1);
        let at = (last as f64 * share).round() as usize;
        took.get(at).map(|took| took.as_secs_f64() * 1e3)
    };
    serde_json::json!({
        "name": name,
        "requests": took.len(),
        "requests_per_second": took.len() as f64 / lasted.as_secs_f64(),
        "p50_ms": milliseconds(0.5),
        "p99_ms": milliseconds(0.99),
        "max_ms": milliseconds(1.0),
    })
}
