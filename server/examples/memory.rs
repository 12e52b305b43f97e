//! Measures what a coordinator's memory holds while one super-batch is scored and selected: the
//! largest resident size beside the bytes of the embeddings.
//!
//! The coordinator's own code runs: slices, streams, checks, selection. Its workers are this
//! program again, in processes of their own, which answer with random embeddings, so that no model
//! has to embed 163,840 rows.
use clap::Parser;
use futures::{StreamExt, stream};
use half::f16;
use rand::{Rng, SeedableRng, rngs::StdRng};
use std::{
    error::Error,
    io::{BufRead, BufReader},
    pin::Pin,
    process::{Command, Stdio},
    sync::Arc,
    time::{Duration, Instant},
};
use superbatch_proto::v1::{
    Criterion, EmbedDone, EmbeddingDtype, EmbeddingPart, FetchRowsRequest, FetchRowsResponse,
    Holes, Loss, ModelRef, Policy, PrepareModelRequest, PrepareModelResponse, RegisterRequest,
    RowsForm, ScoreRequest, ScoreResponse, SelectBegin, SelectRequest, SelectResponse, Tower,
    score_request, score_response,
    worker_service_server::{WorkerService, WorkerServiceServer},
};
use superbatch_server::{
    allocator::give_back_large_buffers,
    config::environment,
    coordinator::{
        plan::candidate::{Candidate, noise_keys},
        score::{claims::Claims, slice::Job, super_batch::Scoring},
        select::{Selector, local::LocalSelector},
        workers::pool::{Home, Pool},
    },
};
use tokio::net::TcpListener;
use tokio_stream::wrappers::TcpListenerStream;
use tonic::{Request, Response, Status, Streaming, transport::Server};

#[derive(Debug, Clone, Parser)]
struct Asked {
    #[arg(long, default_value_t = 163_840)]
    super_batch_size: u32,
    #[arg(long, default_value_t = 2_048)]
    sub_batch_size: u32,
    #[arg(long, default_value_t = 768)]
    dim: u32,
    #[arg(long, default_value_t = 4)]
    workers: usize,
    /// Be a worker, which prints its address.
    #[arg(long)]
    worker: bool,
}

/// Answers with embeddings of this length.
struct Random {
    dim: u32,
}

type Answers<T> = Pin<Box<dyn futures::Stream<Item = Result<T, Status>> + Send>>;

/// Random vectors of length one.
fn vectors(rows: u32, dim: u32, rng: &mut StdRng) -> Vec<u8> {
    let mut bytes = Vec::with_capacity((rows * dim * 2) as usize);
    for _ in 0..rows {
        let row: Vec<f32> = (0..dim).map(|_| rng.random::<f32>() - 0.5).collect();
        let length = row.iter().map(|value| value * value).sum::<f32>().sqrt();
        let values = row.iter().map(|value| f16::from_f32(value / length));
        bytes.extend(values.flat_map(f16::to_le_bytes));
    }
    bytes
}

fn message(message: score_response::Message) -> ScoreResponse {
    ScoreResponse {
        message: Some(message),
    }
}

impl Random {
    fn tower(&self, tower: Tower, rows: u32) -> impl Iterator<Item = ScoreResponse> + use<> {
        let (dim, step) = (self.dim, 256);
        let mut rng = StdRng::seed_from_u64(tower as u64);
        let parts = (0..rows).step_by(step).map(move |first| {
            let count = (rows - first).min(step as u32);
            let mut embed = || vectors(count, dim, &mut rng).into();
            message(score_response::Message::Embedding(EmbeddingPart {
                tower: tower.into(),
                first,
                rows: count,
                dim,
                image: embed(),
                text: embed(),
            }))
        });
        let done = EmbedDone {
            tower: tower.into(),
            logit_scale: 10.0,
            logit_bias: Some(-10.0),
            model_digest: "random".into(),
            compute_dtype: superbatch_proto::v1::ComputeDtype::F32.into(),
            ..Default::default()
        };
        parts.chain([message(score_response::Message::Done(done))])
    }
}

#[tonic::async_trait]
impl WorkerService for Random {
    type ScoreStream = Answers<ScoreResponse>;
    type FetchRowsStream = Answers<FetchRowsResponse>;

    async fn prepare_model(
        &self,
        _: Request<PrepareModelRequest>,
    ) -> Result<Response<PrepareModelResponse>, Status> {
        Err(Status::unimplemented("it scores only"))
    }

    async fn score(
        &self,
        request: Request<Streaming<ScoreRequest>>,
    ) -> Result<Response<Self::ScoreStream>, Status> {
        let dim = self.dim;
        let mut rows = 0;
        let answers = request.into_inner().flat_map(move |request| {
            let worker = Random { dim };
            let asked = request.ok().and_then(|request| request.message);
            let answers: Answers<ScoreResponse> = match asked {
                Some(score_request::Message::Begin(begin)) => {
                    rows = begin
                        .blocks
                        .iter()
                        .map(|block| block.rows.len() as u32)
                        .sum();
                    let holes = message(score_response::Message::Holes(Holes::default()));
                    let reference = worker.tower(Tower::Reference, rows);
                    Box::pin(stream::iter([holes].into_iter().chain(reference).map(Ok)))
                }
                Some(score_request::Message::Learner(_)) => {
                    Box::pin(stream::iter(worker.tower(Tower::Learner, rows).map(Ok)))
                }
                _ => Box::pin(stream::empty()),
            };
            answers
        });
        Ok(Response::new(Box::pin(answers)))
    }

    async fn fetch_rows(
        &self,
        _: Request<FetchRowsRequest>,
    ) -> Result<Response<Self::FetchRowsStream>, Status> {
        Err(Status::unimplemented("it scores only"))
    }

    async fn select(
        &self,
        _: Request<Streaming<SelectRequest>>,
    ) -> Result<Response<SelectResponse>, Status> {
        Err(Status::unimplemented("it scores only"))
    }
}

/// A value of this process's status, in bytes.
fn status(name: &str) -> Result<u64, Box<dyn Error>> {
    let text = std::fs::read_to_string("/proc/self/status")?;
    let line = text.lines().find(|line| line.starts_with(name));
    let words = line.and_then(|line| line.split_whitespace().nth(1));
    Ok(words.ok_or("no such line")?.parse::<u64>()? * 1024)
}

async fn work(asked: &Asked) -> Result<(), Box<dyn Error>> {
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    println!("http://{}", listener.local_addr()?);
    let service = WorkerServiceServer::new(Random { dim: asked.dim });
    let server = Server::builder().add_service(service);
    Ok(server
        .serve_with_incoming(TcpListenerStream::new(listener))
        .await?)
}

fn job(asked: &Asked) -> Job {
    let model = |name: &str| ModelRef {
        model_uri: name.into(),
        ..Default::default()
    };
    Job {
        run_id: "memory".into(),
        generation: 0,
        step: 0,
        manifest_digest: String::new(),
        micro_batch_rows: 64,
        reference: Some(model("reference")),
        is_sparse: false,
        learner_model: Some(model("learner")),
        reference_dim: Some(asked.dim),
        learner_dim: Some(asked.dim),
        embedding_dtype: EmbeddingDtype::F16,
        columns: Vec::new(),
        check_only: false,
        form: RowsForm::Whole,
        approximation: None,
    }
}

async fn measure(asked: &Asked) -> Result<(), Box<dyn Error>> {
    let pool = Pool::new(Duration::from_secs(3600), Duration::ZERO, Home::default());
    let mut children = Vec::new();
    for _ in 0..asked.workers {
        let mut child = Command::new(std::env::current_exe()?)
            .args(["--worker", "--dim", &asked.dim.to_string()])
            .stdout(Stdio::piped())
            .spawn()?;
        let mut address = String::new();
        BufReader::new(child.stdout.take().ok_or("no output")?).read_line(&mut address)?;
        children.push(child);
        let address = address.trim().to_owned();
        pool.register(
            &RegisterRequest {
                address,
                ..Default::default()
            },
            Instant::now(),
        )?;
    }
    let candidate = |n: u32| Candidate {
        source: 0,
        shard: 0,
        block: n / 1024,
        row: n % 1024,
        position: u64::from(n),
    };
    let candidates: Vec<Candidate> = (0..asked.super_batch_size).map(candidate).collect();
    let begin = SelectBegin {
        policy: Policy::Joint.into(),
        criterion: Criterion::Learnability.into(),
        loss: Loss::Sigmoid.into(),
        sub_batch_size: asked.sub_batch_size,
        n_chunks: 16,
        gain: 1.0,
        positions: noise_keys(&candidates),
        learner_scale: 10.0,
        learner_bias: -10.0,
        reference_scale: 10.0,
        reference_bias: -10.0,
        embedding_dtype: EmbeddingDtype::F16.into(),
        ..Default::default()
    };
    let selector = LocalSelector::new(0)?;
    let bare = status("VmRSS")?;
    let mut scoring =
        Scoring::begin(Arc::new(pool), &Claims::default(), job(asked), &candidates).await?;
    let reference = scoring.reference().await?.ok_or("no reference")?;
    let learner = scoring.learner(&ModelRef::default()).await?;
    let scored = status("VmHWM")? - bare;
    let drawn = selector
        .select(begin, Some(learner), Some(reference))
        .await?;
    assert_eq!(drawn.indices.len() as u32, asked.sub_batch_size);
    let selected = status("VmHWM")? - bare;
    // Two models, image and text, two bytes a number.
    let embeddings = u64::from(asked.super_batch_size) * u64::from(asked.dim) * 8;
    let ratio = |bytes: u64| bytes as f64 / embeddings as f64;
    println!(
        "workers {}: embeddings {embeddings} bytes; most memory above an idle coordinator: {:.3} \
         of them while they arrive, {:.3} with selection",
        asked.workers,
        ratio(scored),
        ratio(selected)
    );
    for mut child in children {
        child.kill()?;
        child.wait()?;
    }
    Ok(())
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let asked = Asked::parse();
    if asked.worker {
        work(&asked).await
    } else {
        give_back_large_buffers(environment());
        measure(&asked).await
    }
}
