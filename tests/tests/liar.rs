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
use superbatch_client::{
    Run,
    v1::{Criterion, Delivery, Intent},
};
use superbatch_proto::v1::{
    FetchRowsRequest, FetchRowsResponse, KeptRows, PrepareModelRequest, PrepareModelResponse,
    RegisterRequest, RowsDone, ScoreRequest, ScoreResponse, SelectRequest, SelectResponse,
    coordinator_service_client::CoordinatorServiceClient, fetch_rows_response,
    score_response::Message, worker_service_server::WorkerService,
    worker_service_server::WorkerServiceServer,
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
    /// Bytes that are no rows.
    Garbage,
    /// Parts of rows without a byte, before each that is due, and no end.
    EmptyRows,
    /// The end of more rows than it sent.
    MoreRows,
    /// A number of rows that it holds, where the rows are due.
    KeptForRows,
    /// One candidate chosen many times.
    OneChosen,
    /// Fewer chosen than asked for.
    FewChosen,
    /// A score that is no number.
    NanScore,
    /// No lie: there is no room for rows that trainers fetch.
    NoRoom,
}

/// A real worker, with one thing wrong in its answers.
struct Liar {
    worker: Worker,
    lie: Lie,
    counts: Counts,
}

/// How often it was given a slice, how often it was to read rows again, and to select.
#[derive(Debug, Clone, Default)]
struct Counts {
    told: Arc<AtomicUsize>,
    read_again: Arc<AtomicUsize>,
    selected: Arc<AtomicUsize>,
}

fn more(done: RowsDone) -> RowsDone {
    RowsDone {
        rows: done.rows + 1,
        ..done
    }
}

fn empty_part() -> ScoreResponse {
    ScoreResponse {
        message: Some(Message::ArrowIpc(Vec::new().into())),
    }
}

fn kept() -> KeptRows {
    KeptRows {
        id: 1,
        ..KeptRows::default()
    }
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
            (Some(Message::ArrowIpc(part)), Lie::Garbage) => *part = vec![0; part.len()].into(),
            (Some(Message::ArrowIpc(_)), Lie::EmptyRows) => return vec![empty_part(), response],
            (Some(Message::RowsDone(_)), Lie::EmptyRows) => return vec![empty_part(); 1000],
            (Some(Message::RowsDone(done)), Lie::MoreRows) => *done = more(*done),
            (message @ Some(Message::ArrowIpc(_)), Lie::KeptForRows) => {
                *message = Some(Message::Kept(kept()));
            }
            _ => {}
        }
        vec![response]
    }

    /// As [`Self::instead`], of rows that are read again.
    fn instead_of_rows(lie: Lie, mut response: FetchRowsResponse) -> Vec<FetchRowsResponse> {
        use fetch_rows_response::Message::{ArrowIpc, Done, Kept};
        match (&mut response.message, lie) {
            (Some(ArrowIpc(part)), Lie::Garbage) => *part = vec![0; part.len()].into(),
            (Some(Done(done)), Lie::MoreRows) => *done = more(*done),
            (message @ Some(ArrowIpc(_)), Lie::KeptForRows) => *message = Some(Kept(kept())),
            _ => {}
        }
        vec![response]
    }
}

/// What `instead` makes of each answer.
fn lies<T: Send + 'static>(
    answers: impl Stream<Item = Result<T, Status>> + Send + 'static,
    instead: impl Fn(T) -> Vec<T> + Send + 'static,
) -> Response<Answers<T>> {
    let lies = answers.flat_map(move |answer| {
        let answers: Vec<Result<T, Status>> = match answer {
            Ok(response) => instead(response).into_iter().map(Ok).collect(),
            Err(status) => vec![Err(status)],
        };
        futures::stream::iter(answers)
    });
    Response::new(Box::pin(lies))
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
        self.counts.told.fetch_add(1, Ordering::SeqCst);
        let lie = self.lie;
        if lie == Lie::Silence {
            return Ok(Response::new(Box::pin(futures::stream::pending())));
        }
        let answers = self.worker.score(request).await?.into_inner();
        Ok(lies(answers, move |answer| Self::instead(lie, answer)))
    }

    async fn fetch_rows(
        &self,
        request: Request<FetchRowsRequest>,
    ) -> Result<Response<Self::FetchRowsStream>, Status> {
        self.counts.read_again.fetch_add(1, Ordering::SeqCst);
        let lie = self.lie;
        let rows = self.worker.fetch_rows(request).await?.into_inner();
        Ok(lies(rows, move |answer| Self::instead_of_rows(lie, answer)))
    }

    async fn select(
        &self,
        request: Request<Streaming<SelectRequest>>,
    ) -> Result<Response<SelectResponse>, Status> {
        self.counts.selected.fetch_add(1, Ordering::SeqCst);
        let mut response = self.worker.select(request).await?;
        let selected = response.get_mut();
        match self.lie {
            Lie::OneChosen => {
                let first = selected.indices[0];
                selected.indices.fill(first);
            }
            Lie::FewChosen => drop(selected.indices.pop()),
            Lie::NanScore => selected.batch_score = f64::NAN,
            _ => {}
        }
        Ok(response)
    }
}

/// Adds a lying worker to the cluster.
async fn add_liar(cluster: &Cluster, lie: Lie) -> Counts {
    let stores = Stores::new(StorageConfig::default());
    let state = stores.open(&cluster.uri("state")).unwrap();
    let identity = state.get("identity").await.unwrap();
    let config = WorkerConfig {
        device: "cpu".into(),
        threads: 1,
        held_bytes_max: if lie == Lie::NoRoom { 1 } else { 1 << 30 },
        ..WorkerConfig::default()
    };
    let counts = Counts::default();
    let liar = Liar {
        worker: Worker::new(&config, stores, state).unwrap(),
        lie,
        counts: counts.clone(),
    };
    let ticket_key = liar.worker.ticket_key();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = format!("http://{}", listener.local_addr().unwrap());
    let server = Server::builder().add_service(WorkerServiceServer::new(liar));
    tokio::spawn(server.serve_with_incoming(TcpListenerStream::new(listener)));
    let request = RegisterRequest {
        address,
        incarnation: format!("{lie:?}"),
        device: "cpu".into(),
        state_id: String::from_utf8_lossy(&identity).into_owned(),
        ticket_key,
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
    counts
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
        let told = add_liar(&cluster, *lie).await.told;
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
async fn rows_without_room_come_by_the_call_that_read_them() {
    let none = |config: &mut Config| config.worker.held_bytes_max = 1;
    let cluster = Cluster::start_with(1, Script::default(), none).await;
    // A run that needs no pushes.
    let mut spec = cluster.spec();
    spec.phases[0].criterion = Criterion::Easy.into();
    let through = cluster.open_run("through", spec.clone()).await.unwrap();
    let mut wanted = Vec::new();
    for step in 0..4 {
        wanted.push(ids(&through, step).await);
    }
    let counts = add_liar(&cluster, Lie::NoRoom).await;
    spec.delivery = Delivery::Direct.into();
    let run = cluster.open_run("direct", spec).await.unwrap();
    for (step, wanted) in (0..).zip(&wanted) {
        assert_eq!(ids(&run, step).await, *wanted);
    }
    let [told, read_again] = [counts.told, counts.read_again].map(|n| n.load(Ordering::SeqCst));
    assert!(told > 0, "it was given slices");
    assert_eq!(read_again, 0, "its rows were at hand");
    cluster.stop().await;
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

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_whose_rows_cannot_be_is_passed_over() {
    let lies = [
        Lie::Garbage,
        Lie::EmptyRows,
        Lie::MoreRows,
        Lie::KeptForRows,
    ];
    chosen_as_without(&lies, |_| {}).await;
}

/// The rows of steps that are served from their receipts.
#[tokio::test(flavor = "multi_thread")]
async fn a_worker_whose_rows_of_a_served_step_cannot_be_is_passed_over() {
    for lie in [Lie::Garbage, Lie::MoreRows, Lie::KeptForRows] {
        let cluster = Cluster::start(1, Script::default()).await;
        let mut spec = cluster.spec();
        spec.phases[0].criterion = Criterion::Easy.into();
        let run = cluster.open_run("served", spec).await.unwrap();
        let mut wanted = Vec::new();
        for step in 0..6 {
            wanted.push(ids(&run, step).await);
        }
        let read_again = add_liar(&cluster, lie).await.read_again;
        for (step, wanted) in (0..4).zip(&wanted) {
            assert_eq!(ids(&run, step).await, *wanted, "{lie:?}");
        }
        let read_again = read_again.load(Ordering::SeqCst);
        assert!(read_again > 0, "{lie:?} was not asked");
        cluster.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_whose_selection_cannot_be_is_passed_over() {
    let on_workers = |config: &mut Config| config.coordinator.selector_device = "worker".into();
    for lie in [Lie::OneChosen, Lie::FewChosen, Lie::NanScore] {
        let cluster = Cluster::start_with(1, Script::default(), on_workers).await;
        let mut spec = cluster.spec();
        spec.phases[0].criterion = Criterion::Easy.into();
        let sound = cluster.open_run("sound", spec.clone()).await.unwrap();
        let mut wanted = Vec::new();
        for step in 0..4 {
            wanted.push(ids(&sound, step).await);
        }
        let selected = add_liar(&cluster, lie).await.selected;
        let run = cluster.open_run("lied-to", spec).await.unwrap();
        for (step, wanted) in (0..).zip(&wanted) {
            assert_eq!(ids(&run, step).await, *wanted, "{lie:?}");
        }
        let selected = selected.load(Ordering::SeqCst);
        assert!(selected > 0, "{lie:?} was not asked");
        cluster.stop().await;
    }
}
