//! A worker that answers what no sound worker answers: it is named, and another one does its work.
#![allow(clippy::unwrap_used)]
use arrow::array::AsArray;
use futures::{Stream, StreamExt};
use std::{
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};
use superbatch_client::{Run, v1::Intent};
use superbatch_proto::v1::{
    FetchRowsRequest, FetchRowsResponse, PrepareModelRequest, PrepareModelResponse,
    RegisterRequest, ScoreRequest, ScoreResponse, SelectRequest, SelectResponse,
    coordinator_service_client::CoordinatorServiceClient, score_response::Message,
    worker_service_server::WorkerService, worker_service_server::WorkerServiceServer,
};
use superbatch_server::{
    config::Config,
    storage::{StorageConfig, Stores},
    worker::{Worker, WorkerConfig},
};
use superbatch_tests::{cluster::Cluster, faults::Script};
use tokio::net::TcpListener;
use tokio_stream::wrappers::TcpListenerStream;
use tonic::{Request, Response, Status, Streaming, transport::Server};

/// What it does instead of its work.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Lie {
    /// Embeddings of 4,294,967,295 numbers.
    HugeDim,
    /// Embeddings of other rows than those that are due.
    OtherRows,
    /// The end of embeddings of which some never came.
    Missing,
    /// Nothing but zeros.
    Zeros,
    /// The same embeddings over and over.
    Endless,
    /// Operations that are no number.
    NanFlops,
    /// A hole beyond its slice.
    HoleOutside,
    /// Never a word.
    Silence,
}

/// A real worker, with one thing wrong in its answers.
struct Liar {
    worker: Worker,
    lie: Lie,
    told: Arc<AtomicUsize>,
}

type Answers<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

impl Liar {
    /// What it sends in place of one message.
    fn instead(lie: Lie, mut response: ScoreResponse) -> Vec<ScoreResponse> {
        match (&mut response.message, lie) {
            (Some(Message::Embedding(part)), Lie::HugeDim) => part.dim = u32::MAX,
            (Some(Message::Embedding(part)), Lie::OtherRows) => part.first += 1,
            (Some(Message::Embedding(_)), Lie::Missing) => return Vec::new(),
            (Some(Message::Embedding(part)), Lie::Zeros) => {
                part.image = vec![0; part.image.len()].into();
            }
            (Some(Message::Embedding(_)), Lie::Endless) => return vec![response; 1000],
            (Some(Message::Done(done)), Lie::NanFlops) => done.flops = f64::NAN,
            (Some(Message::Holes(holes)), Lie::HoleOutside) => {
                holes.holes.push(superbatch_proto::v1::Hole {
                    candidate: u32::MAX,
                    ..Default::default()
                });
            }
            _ => {}
        }
        vec![response]
    }
}

#[tonic::async_trait]
impl WorkerService for Liar {
    type ScoreStream = Answers<ScoreResponse>;
    type FetchRowsStream = Answers<FetchRowsResponse>;

    async fn prepare_model(
        &self,
        request: Request<PrepareModelRequest>,
    ) -> Result<Response<PrepareModelResponse>, Status> {
        let mut response = self.worker.prepare_model(request).await?;
        if self.lie == Lie::NanFlops {
            response.get_mut().image_flops = f64::NAN;
        }
        Ok(response)
    }

    async fn score(
        &self,
        request: Request<Streaming<ScoreRequest>>,
    ) -> Result<Response<Self::ScoreStream>, Status> {
        self.told.fetch_add(1, Ordering::SeqCst);
        let lie = self.lie;
        if lie == Lie::Silence {
            return Ok(Response::new(Box::pin(futures::stream::pending())));
        }
        let answers = self.worker.score(request).await?.into_inner();
        let lies = answers.flat_map(move |answer| {
            let answers: Vec<Result<ScoreResponse, Status>> = match answer {
                Ok(response) => Self::instead(lie, response).into_iter().map(Ok).collect(),
                Err(status) => vec![Err(status)],
            };
            futures::stream::iter(answers)
        });
        Ok(Response::new(Box::pin(lies)))
    }

    async fn fetch_rows(
        &self,
        request: Request<FetchRowsRequest>,
    ) -> Result<Response<Self::FetchRowsStream>, Status> {
        let rows = self.worker.fetch_rows(request).await?.into_inner();
        Ok(Response::new(Box::pin(rows)))
    }

    async fn select(
        &self,
        request: Request<Streaming<SelectRequest>>,
    ) -> Result<Response<SelectResponse>, Status> {
        self.worker.select(request).await
    }
}

/// Adds a lying worker to the cluster, and returns how often it was given a slice.
async fn add_liar(cluster: &Cluster, lie: Lie) -> Arc<AtomicUsize> {
    let stores = Stores::new(StorageConfig::default());
    let state = stores.open(&cluster.uri("state")).unwrap();
    let identity = state.get("identity").await.unwrap();
    let config = WorkerConfig {
        device: "cpu".into(),
        threads: 1,
        ..WorkerConfig::default()
    };
    let told = Arc::<AtomicUsize>::default();
    let liar = Liar {
        worker: Worker::new(&config, stores, state).unwrap(),
        lie,
        told: told.clone(),
    };
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = format!("http://{}", listener.local_addr().unwrap());
    let server = Server::builder().add_service(WorkerServiceServer::new(liar));
    tokio::spawn(server.serve_with_incoming(TcpListenerStream::new(listener)));
    let request = RegisterRequest {
        address,
        incarnation: format!("{lie:?}"),
        device: "cpu".into(),
        state_id: String::from_utf8_lossy(&identity).into_owned(),
        ..Default::default()
    };
    let mut coordinator = CoordinatorServiceClient::connect(cluster.address().to_owned())
        .await
        .unwrap();
    coordinator.register(request.clone()).await.unwrap();
    tokio::spawn(async move {
        // Again within every lease; a lost worker comes back by it.
        let mut ticks = tokio::time::interval(Duration::from_secs(2));
        loop {
            ticks.tick().await;
            if coordinator.register(request.clone()).await.is_err() {
                return;
            }
        }
    });
    told
}

/// Ids of the rows of a step.
async fn ids(run: &Run, step: u64) -> Vec<String> {
    let batch = run.select(step, 0, 1, Intent::Need).await.unwrap();
    let column = batch.record_batch.column_by_name("_superbatch_id").unwrap();
    column
        .as_string::<i32>()
        .iter()
        .flatten()
        .map(str::to_owned)
        .collect()
}

/// A worker that is sound and one that lies choose what the sound one chooses alone.
async fn chosen_as_without(lies: &[Lie], settings: fn(&mut Config)) {
    for lie in lies {
        let cluster = Cluster::start_with(1, Script::default(), settings).await;
        let sound = cluster.open_run("sound", cluster.spec()).await.unwrap();
        let wanted = [ids(&sound, 0).await, ids(&sound, 1).await];
        let told = add_liar(&cluster, *lie).await;
        let run = cluster.open_run("lied-to", cluster.spec()).await.unwrap();
        let found = [ids(&run, 0).await, ids(&run, 1).await];
        assert_eq!(found, wanted, "{lie:?}");
        assert!(told.load(Ordering::SeqCst) > 0, "{lie:?} was not asked");
        let accounts = run.get_run().await.unwrap().accounts.unwrap();
        assert!(accounts.reference_flops.is_finite(), "{lie:?}");
        cluster.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_whose_embeddings_cannot_be_is_passed_over() {
    let lies = [
        Lie::HugeDim,
        Lie::OtherRows,
        Lie::Missing,
        Lie::Zeros,
        Lie::Endless,
    ];
    chosen_as_without(&lies, |_| {}).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_whose_numbers_cannot_be_is_passed_over() {
    chosen_as_without(&[Lie::NanFlops, Lie::HoleOutside], |_| {}).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_that_says_nothing_is_given_up() {
    let short = |config: &mut Config| config.coordinator.worker_silence_seconds = 10.0;
    chosen_as_without(&[Lie::Silence], short).await;
}
