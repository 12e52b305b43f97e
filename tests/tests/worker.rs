//! The scoring worker behind its real protocol, on a loopback socket.
#![allow(clippy::unwrap_used)]
use arrow::{
    array::{ArrowPrimitiveType, AsArray},
    compute::concat_batches,
    datatypes::{Float16Type, Int64Type},
    ipc::reader::StreamReader,
    record_batch::RecordBatch,
};
use std::{collections::BTreeMap, io::Cursor, ops::Range};
use superbatch_proto::{
    Failure,
    columns::CONTENT_HASH,
    v1::{
        BadRowReason, BlockRows, ChosenRows, ComputeDtype, EmbedDone, EmbeddingDtype,
        FetchRowsRequest, Hole, LearnerGo, ModelRef, PrepareModelRequest, PrepareModelResponse,
        Reason, RowsDone, ScoreBegin, ScoreRequest, ScoreResponse, Tower, fetch_rows_response,
        score_request, score_response, worker_service_client::WorkerServiceClient,
    },
};
use superbatch_server::{
    dataset::content_hash,
    storage::{Location, StorageConfig, Stores},
    worker::{
        Worker, WorkerConfig,
        model::{ModelFolder, init},
    },
};
use superbatch_tests::fixture::{self, EMBEDDING_DIM, Row, png};
use tokio::{net::TcpListener, sync::mpsc};
use tokio_stream::wrappers::{ReceiverStream, TcpListenerStream};
use tonic::{
    Streaming,
    transport::{Channel, Server},
};

const DATA: &str = "memory:///data/train.parquet";
const BLOCK_ROWS: usize = 16;
const MICRO_BATCH_ROWS: u32 = 4;

/// Storage with a data set and model folders.
struct Rig {
    stores: Stores,
    state: Location,
    manifest: String,
    rows: Vec<Row>,
}

impl Rig {
    async fn new(rows: Vec<Row>) -> Self {
        Self::on(fixture::storage().0, rows).await
    }

    async fn on(stores: Stores, rows: Vec<Row>) -> Self {
        let state = stores.open("memory:///state").unwrap();
        let manifest = fixture::dataset(&stores, &state, DATA, &rows, BLOCK_ROWS).await;
        for (folder, mean) in [("memory:///model", 0.5), ("memory:///other", 0.25)] {
            fixture::model_folder(&stores.open(folder).unwrap(), mean).await;
        }
        Self {
            stores,
            state,
            manifest,
            rows,
        }
    }

    async fn good(rows: u32) -> Self {
        Self::new((0..rows).map(Row::good).collect()).await
    }

    fn worker(&self, config: WorkerConfig) -> Worker {
        Worker::new(&config, self.stores.clone(), self.state.clone()).unwrap()
    }

    /// A client of a new worker.
    async fn client(&self) -> WorkerServiceClient<Channel> {
        serve(&self.worker(config())).await
    }

    fn begin(&self, candidates: &[u32]) -> ScoreBegin {
        ScoreBegin {
            run_id: "test".into(),
            dataset_manifest: self.manifest.clone(),
            blocks: blocks(candidates),
            micro_batch_rows: MICRO_BATCH_ROWS,
            reference: Some(model("memory:///model", 1)),
            learner_model: Some(model("memory:///model", 2)),
            embedding_dtype: EmbeddingDtype::F16.into(),
            columns: vec!["n".into()],
            ..Default::default()
        }
    }
}

impl Rig {
    fn rows_request(&self, rows: &[u32]) -> FetchRowsRequest {
        FetchRowsRequest {
            dataset_manifest: self.manifest.clone(),
            blocks: blocks(rows),
            columns: vec!["n".into()],
            ..FetchRowsRequest::default()
        }
    }
}

fn config() -> WorkerConfig {
    WorkerConfig {
        device: "cpu".into(),
        threads: 2,
        ..Default::default()
    }
}

fn model(folder: &str, seed: u64) -> ModelRef {
    ModelRef {
        model_uri: folder.into(),
        random_seed: Some(seed),
        ..Default::default()
    }
}

/// Rows of the file as runs of one block each.
fn blocks(rows: &[u32]) -> Vec<BlockRows> {
    let mut blocks: Vec<BlockRows> = Vec::new();
    for row in rows {
        let (block, row) = (row / BLOCK_ROWS as u32, row % BLOCK_ROWS as u32);
        match blocks.last_mut() {
            Some(last) if last.block == block => last.rows.push(row),
            _ => blocks.push(BlockRows {
                source: 0,
                shard: 0,
                block,
                rows: vec![row],
            }),
        }
    }
    blocks
}

async fn prepared(
    client: &mut WorkerServiceClient<Channel>,
    model: ModelRef,
) -> Result<PrepareModelResponse, Failure> {
    let answer = client
        .prepare_model(PrepareModelRequest {
            model: Some(model),
            canary: true,
        })
        .await;
    answer
        .map(tonic::Response::into_inner)
        .map_err(|status| Failure::try_from(status).unwrap())
}

async fn serve(worker: &Worker) -> WorkerServiceClient<Channel> {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let server = Server::builder().add_service(worker.service());
    tokio::spawn(server.serve_with_incoming(TcpListenerStream::new(listener)));
    WorkerServiceClient::connect(format!("http://{address}"))
        .await
        .unwrap()
}

/// One Score call under way.
struct Call {
    requests: mpsc::Sender<ScoreRequest>,
    responses: Streaming<ScoreResponse>,
}

/// Embeddings of one tower, parts put together, and how they ended.
#[derive(Debug, Default, Clone, PartialEq)]
struct Embedded {
    image: Vec<u8>,
    text: Vec<u8>,
    done: EmbedDone,
}

impl Call {
    async fn begin(
        client: &mut WorkerServiceClient<Channel>,
        begin: ScoreBegin,
    ) -> Result<Self, Failure> {
        let (requests, receiver) = mpsc::channel(4);
        let call = Self::send_to(&requests, score_request::Message::Begin(begin));
        let (_, responses) = tokio::join!(call, client.score(ReceiverStream::new(receiver)));
        Ok(Self {
            requests,
            responses: responses
                .map_err(|status| Failure::try_from(status).unwrap())?
                .into_inner(),
        })
    }

    async fn send_to(requests: &mpsc::Sender<ScoreRequest>, message: score_request::Message) {
        requests
            .send(ScoreRequest {
                message: Some(message),
            })
            .await
            .unwrap();
    }

    async fn next(&mut self) -> Result<Option<score_response::Message>, Failure> {
        let response = self
            .responses
            .message()
            .await
            .map_err(|status| Failure::try_from(status).unwrap())?;
        Ok(response.map(|response| response.message.unwrap()))
    }

    async fn holes(&mut self) -> Result<Vec<Hole>, Failure> {
        match self.next().await? {
            Some(score_response::Message::Holes(holes)) => Ok(holes.holes),
            other => panic!("holes come first, not {other:?}"),
        }
    }

    async fn embedded(&mut self, tower: Tower) -> Result<Embedded, Failure> {
        self.embedded_from(tower, 0).await
    }

    /// Embeddings from candidate `rows` on.
    async fn embedded_from(&mut self, tower: Tower, mut rows: u32) -> Result<Embedded, Failure> {
        let mut all = Embedded::default();
        loop {
            match self.next().await? {
                Some(score_response::Message::Embedding(part)) => {
                    assert_eq!(
                        (part.tower(), part.first, part.dim),
                        (tower, rows, EMBEDDING_DIM as u32)
                    );
                    rows += part.rows;
                    all.image.extend_from_slice(&part.image);
                    all.text.extend_from_slice(&part.text);
                }
                Some(score_response::Message::Done(done)) => {
                    assert_eq!(done.tower(), tower);
                    return Ok(Embedded { done, ..all });
                }
                other => panic!("embeddings were due, not {other:?}"),
            }
        }
    }

    async fn learner(&mut self, learner: ModelRef) -> Result<Embedded, Failure> {
        Self::send_to(
            &self.requests,
            score_request::Message::Learner(LearnerGo {
                learner: Some(learner),
            }),
        )
        .await;
        self.embedded(Tower::Learner).await
    }

    async fn chosen(&mut self, candidates: &[u32]) -> Result<(RecordBatch, RowsDone), Failure> {
        let chosen = ChosenRows {
            candidates: candidates.to_vec(),
            form: 0,
        };
        Self::send_to(&self.requests, score_request::Message::Chosen(chosen)).await;
        let mut bytes = Vec::new();
        loop {
            match self.next().await? {
                Some(score_response::Message::ArrowIpc(part)) => bytes.extend_from_slice(&part),
                Some(score_response::Message::RowsDone(done)) => {
                    assert_eq!(self.next().await?, None, "the rows end the call");
                    return Ok((table(bytes), done));
                }
                other => panic!("rows were due, not {other:?}"),
            }
        }
    }
}

fn table(bytes: Vec<u8>) -> RecordBatch {
    let reader = StreamReader::try_new(Cursor::new(bytes), None).unwrap();
    let schema = reader.schema();
    concat_batches(&schema, &reader.collect::<Result<Vec<_>, _>>().unwrap()).unwrap()
}

/// Everything a slice gives: holes, the reference's and the learner's embeddings.
async fn scored(
    client: &mut WorkerServiceClient<Channel>,
    begin: ScoreBegin,
) -> Result<(Vec<Hole>, Embedded, Embedded), Failure> {
    let (learner, from) = (begin.learner_model.clone().unwrap(), begin.reference_from);
    let mut call = Call::begin(client, begin).await?;
    let (holes, reference) = (
        call.holes().await?,
        call.embedded_from(Tower::Reference, from).await?,
    );
    Ok((holes, reference, call.learner(learner).await?))
}

/// Every third row, then the others, block by block.
fn mixed(rows: u32) -> Vec<u32> {
    let mut mixed: Vec<u32> = (0..rows).collect();
    mixed.sort_by_key(|row| (row / BLOCK_ROWS as u32, row % 3, *row));
    mixed
}

/// Slices of a super-batch of `mixed(40)`, and the candidates of the blocks that begin in each.
const CUTS: [(Range<usize>, Range<usize>); 3] = [(0..8, 0..16), (8..20, 16..32), (20..40, 32..40)];

#[tokio::test]
async fn numbers_and_costs_do_not_depend_on_how_the_super_batch_is_cut() {
    let candidates = mixed(40);
    // In the first and the second half of blocks that are cut.
    let bad = |n: u32| Row {
        image: None,
        ..Row::good(n)
    };
    let rows = || {
        (0..40)
            .map(|n| {
                if [3, 12, 14, 18, 39].contains(&n) {
                    bad(n)
                } else {
                    Row::good(n)
                }
            })
            .collect()
    };
    let rig = Rig::new(rows()).await;
    let whole = scored(&mut rig.client().await, rig.begin(&candidates))
        .await
        .unwrap();
    assert_eq!(whole.0.len(), 5);
    assert!(whole.1.done.flops > 0.0 && whole.2.done.flops > 0.0);
    assert_ne!(whole.1.image, whole.2.image);
    let apart = Rig::new(rows()).await;
    let mut holes = BTreeMap::new();
    let (mut reference, mut learner) = (Embedded::default(), Embedded::default());
    for (slice, blocks) in CUTS {
        let begin = ScoreBegin {
            reference_from: (blocks.start - slice.start) as u32,
            reference_more: candidates[slice.end..blocks.end.max(slice.end)]
                .iter()
                .map(|row| row % 16)
                .collect(),
            ..apart.begin(&candidates[slice.clone()])
        };
        // Each on a worker of its own.
        let (found, one, other) = scored(&mut apart.client().await, begin).await.unwrap();
        holes.extend(
            found
                .into_iter()
                .map(|hole| (hole.candidate + slice.start as u32, hole.reason)),
        );
        for (all, part) in [(&mut reference, one), (&mut learner, other)] {
            all.image.extend(part.image);
            all.text.extend(part.text);
            all.done.flops += part.done.flops;
        }
    }
    assert_eq!(
        holes,
        whole
            .0
            .iter()
            .map(|hole| (hole.candidate, hole.reason))
            .collect()
    );
    assert_eq!(
        (reference.image, reference.text),
        (whole.1.image, whole.1.text)
    );
    assert_eq!((learner.image, learner.text), (whole.2.image, whole.2.text));
    assert_eq!(
        (reference.done.flops, learner.done.flops),
        (whole.1.done.flops, whole.2.done.flops)
    );
}

#[tokio::test]
async fn a_block_is_shared_whole_or_refused() {
    let rig = Rig::good(40).await;
    let mut client = rig.client().await;
    let begin = || rig.begin(&(0..20).collect::<Vec<u32>>());
    let refused = [
        (
            ScoreBegin {
                reference_from: 8,
                ..begin()
            },
            "reference_from",
        ),
        (
            ScoreBegin {
                reference_from: 21,
                ..begin()
            },
            "reference_from",
        ),
        (
            ScoreBegin {
                reference_more: vec![16],
                ..begin()
            },
            "reference_more",
        ),
        (
            ScoreBegin {
                reference_from: 20,
                reference_more: vec![5],
                ..begin()
            },
            "reference_more",
        ),
    ];
    for (begin, field) in refused {
        let mut call = Call::begin(&mut client, begin).await.unwrap();
        let failure = call.holes().await.unwrap_err();
        assert_eq!(
            (failure.reason, failure.metadata["field"].as_str()),
            (Reason::InvalidArgument, field)
        );
    }
}

/// A call names few bytes and costs much, where they are repeated or kept.
#[tokio::test]
async fn what_a_call_names_is_bounded() {
    let rig = Rig::good(40).await;
    let mut client = rig.client().await;
    let (long, rows): (String, Vec<u32>) = ("x".repeat(10_000), (0..8).collect());
    type Change = fn(&mut ScoreBegin, String);
    let cases: [(&str, Change); 10] = [
        ("dataset_manifest", |b, long| b.dataset_manifest = long),
        ("columns", |b, _| b.columns = vec!["n".into(); 1025]),
        ("micro_batch_rows", |b, _| b.micro_batch_rows = 4097),
        ("blocks", |b, _| b.blocks[0].rows.push(0)),
        ("blocks", |b, _| b.blocks.push(b.blocks[0].clone())),
        ("blocks", |b, _| b.blocks[0].block = 77),
        ("reference_more", |b, _| b.reference_more = vec![9; 2]),
        ("reference_more", |b, _| b.reference_more = vec![0]),
        ("model_uri", |b, long| {
            b.reference.as_mut().unwrap().model_uri = long
        }),
        ("snapshot_digest", |b, long| {
            b.reference.as_mut().unwrap().snapshot_digest = long
        }),
    ];
    for (field, beyond) in cases {
        let mut begin = rig.begin(&rows);
        beyond(&mut begin, long.clone());
        let mut call = Call::begin(&mut client, begin).await.unwrap();
        let failure = call.holes().await.unwrap_err();
        assert_eq!(
            (failure.reason, failure.metadata["field"].as_str()),
            (Reason::InvalidArgument, field)
        );
    }
    let snapshot = ModelRef {
        snapshot_uri: long,
        random_seed: None,
        ..model("memory:///model", 0)
    };
    let failure = prepared(&mut client, snapshot).await.unwrap_err();
    assert_eq!(failure.metadata["field"], "snapshot_uri");
    let failure = fetch(&mut client, &rig, &[3, 3]).await.unwrap_err();
    assert_eq!(failure.metadata["field"], "blocks");
}

#[tokio::test]
async fn what_a_call_for_rows_names_is_bounded() {
    let rig = Rig::good(40).await;
    let mut client = rig.client().await;
    type Change = fn(&mut FetchRowsRequest, String);
    let cases: [(&str, Change); 6] = [
        ("run_id", |r, long| r.run_id = long),
        ("dataset_manifest", |r, long| r.dataset_manifest = long),
        ("columns", |r, _| r.columns = vec!["n".into(); 1025]),
        ("blocks", |r, _| r.blocks[0].block = 77),
        ("blocks", |r, _| r.blocks[0].rows.push(77)),
        ("blocks", |r, _| r.blocks.push(r.blocks[0].clone())),
    ];
    for (field, beyond) in cases {
        let mut request = rig.rows_request(&[3, 5]);
        beyond(&mut request, "x".repeat(10_000));
        let failure = fetch_asked(&mut client, request).await.unwrap_err();
        assert_eq!(
            (failure.reason, failure.metadata["field"].as_str()),
            (Reason::InvalidArgument, field)
        );
    }
}

/// The coordinator has checked what a call names, but a worker cannot know who calls it.
#[tokio::test]
async fn a_worker_opens_only_what_its_operator_allows() {
    let allowed = StorageConfig {
        allow_uris: vec!["memory:///data".into(), "memory:///model".into()],
        ..StorageConfig::default()
    };
    let rig = Rig::on(Stores::new(allowed), (0..40).map(Row::good).collect()).await;
    let mut client = rig.client().await;
    let refused = |failure: Failure| {
        assert_eq!(failure.reason, Reason::UriNotAllowed, "{failure}");
        failure.metadata["uri"].clone()
    };
    prepared(&mut client, model("memory:///model", 0))
        .await
        .unwrap();
    let failure = prepared(&mut client, model("memory:///other", 0)).await;
    assert_eq!(refused(failure.unwrap_err()), "memory:///other");
    let snapshot = ModelRef {
        snapshot_uri: "memory:///other/config.json".into(),
        random_seed: None,
        ..model("memory:///model", 0)
    };
    let failure = prepared(&mut client, snapshot.clone()).await.unwrap_err();
    assert_eq!(refused(failure), snapshot.snapshot_uri);
    let begin = ScoreBegin {
        reference: Some(model("memory:///other", 1)),
        ..rig.begin(&mixed(40))
    };
    let failure = scored(&mut client, begin).await.unwrap_err();
    assert_eq!(refused(failure), "memory:///other");
}

#[tokio::test]
async fn reference_embeddings_are_computed_once_and_mended_where_damaged() {
    let rig = Rig::good(40).await;
    let begin = || rig.begin(&mixed(40));
    let (_, first, _) = scored(&mut rig.client().await, begin()).await.unwrap();
    assert_eq!(first.done.rows_cached, 0);
    let (_, second, _) = scored(&mut rig.client().await, begin()).await.unwrap();
    assert_eq!((second.done.flops, second.done.rows_cached), (0.0, 40));
    assert_eq!((&second.image, &second.text), (&first.image, &first.text));
    let stored = rig.state.list("reference").await.unwrap();
    assert_eq!(stored.len(), 3, "one object a block");
    let good = rig.state.get(&stored[0].0).await.unwrap();
    let mut bad = good.to_vec();
    bad[good.len() / 2] ^= 1;
    rig.state.put(&stored[0].0, bad.into()).await.unwrap();
    let (_, third, _) = scored(&mut rig.client().await, begin()).await.unwrap();
    assert!(third.done.flops > 0.0 && third.done.rows_cached < 40);
    assert_eq!((&third.image, &third.text), (&first.image, &first.text));
    assert_eq!(rig.state.get(&stored[0].0).await.unwrap(), good);
}

type Half = <Float16Type as ArrowPrimitiveType>::Native;

#[tokio::test]
async fn few_rows_of_a_block_are_taken_from_what_is_kept_or_embedded_alone() {
    let rig = Rig::good(40).await;
    let few = [37, 3, 1, 20, 21];
    let sparse = async || {
        let begin = ScoreBegin {
            learner_model: None,
            reference_sparse: true,
            ..rig.begin(&few)
        };
        let mut call = Call::begin(&mut rig.client().await, begin).await.unwrap();
        assert_eq!(call.holes().await.unwrap(), []);
        call.embedded(Tower::Reference).await.unwrap()
    };
    let alone = sparse().await;
    assert_eq!(alone.done.rows_cached, 0);
    assert!(rig.state.list("reference").await.unwrap().is_empty());
    let whole = rig.begin(&mixed(40));
    let (_, all, _) = scored(&mut rig.client().await, whole).await.unwrap();
    assert!(0.0 < alone.done.flops && alone.done.flops < all.done.flops);
    // From what is kept: the same bytes, at no cost.
    let kept = sparse().await;
    assert_eq!((kept.done.flops, kept.done.rows_cached), (0.0, 5));
    let order = mixed(40);
    let row_bytes = 2 * EMBEDDING_DIM;
    let of = |all: &[u8], row: u32| {
        let at = order.iter().position(|one| *one == row).unwrap() * row_bytes;
        all[at..at + row_bytes].to_vec()
    };
    let expected = |all: &[u8]| few.iter().flat_map(|row| of(all, *row)).collect::<Vec<_>>();
    assert_eq!(kept.image, expected(&all.image));
    assert_eq!(kept.text, expected(&all.text));
    // Alone they are the same up to rounding, and each in its place.
    assert_alike(&alone, &kept);
}

fn assert_alike(some: &Embedded, others: &Embedded) {
    let values = |bytes: &[u8]| -> Vec<f32> {
        let halves = bytes.chunks_exact(2);
        halves
            .map(|half| Half::from_le_bytes([half[0], half[1]]).to_f32())
            .collect()
    };
    for (some, others) in [(&some.image, &others.image), (&some.text, &others.text)] {
        assert_eq!(some.len(), others.len());
        let pairs = values(some).into_iter().zip(values(others));
        assert!(pairs.clone().all(|(a, b)| (a - b).abs() < 2e-3));
        assert!(pairs.clone().any(|(a, _)| a.abs() > 0.1));
    }
}

#[tokio::test]
async fn few_candidates_of_a_large_block_are_embedded_without_the_rest_of_it() {
    let mut rig = Rig::good(40).await;
    let few = [37, 3, 1, 20, 21];
    let (_, small, _) = scored(&mut rig.client().await, rig.begin(&few))
        .await
        .unwrap();
    let kept = rig.state.list("reference").await.unwrap().len();
    assert_eq!(kept, 3, "small blocks are embedded as a whole");
    // The same rows, in one block.
    let rows: Vec<Row> = (0..10_001).map(Row::good).collect();
    let uri = "memory:///large/train.parquet";
    rig.manifest = fixture::dataset(&rig.stores, &rig.state, uri, &rows, rows.len()).await;
    let begin = || ScoreBegin {
        blocks: vec![BlockRows {
            source: 0,
            shard: 0,
            block: 0,
            rows: few.to_vec(),
        }],
        ..rig.begin(&few)
    };
    let mut client = rig.client().await;
    for _ in 0..2 {
        let (holes, large, _) = scored(&mut client, begin()).await.unwrap();
        assert_eq!(holes, []);
        assert_eq!(large.done.rows_cached, 0);
        assert!(0.0 < large.done.flops && large.done.flops < small.done.flops);
        assert_alike(&large, &small);
    }
    let kept = rig.state.list("reference").await.unwrap().len();
    assert_eq!(kept, 3, "nothing of the large one");
}

#[tokio::test]
async fn bad_rows_are_holes_with_reasons() {
    let mut rows: Vec<Row> = (0..20).map(Row::good).collect();
    rows[2].image = None;
    rows[5].image = Some(b"no image".to_vec());
    rows[9].caption = None;
    rows[17].image = Some(png(80, 80, 1));
    let rig = Rig::new(rows).await;
    let worker = rig.worker(WorkerConfig {
        image_pixels_max: 1000,
        ..config()
    });
    let mut client = serve(&worker).await;
    let expected = BTreeMap::from([
        (2, BadRowReason::ImageNull),
        (5, BadRowReason::ImageUndecodable),
        (9, BadRowReason::CaptionNull),
        (17, BadRowReason::ImageTooLarge),
    ]);
    let found = |holes: &[Hole]| {
        holes
            .iter()
            .map(|hole| (hole.candidate, hole.reason()))
            .collect::<BTreeMap<_, _>>()
    };
    let all: Vec<u32> = (0..20).collect();
    // Twice: the second time the reference's holes come from the sidecar.
    for _ in 0..2 {
        let (holes, reference, learner) = scored(&mut client, rig.begin(&all)).await.unwrap();
        assert_eq!(found(&holes), expected);
        for embedded in [&reference, &learner] {
            assert!(embedded.done.not_finite.is_empty());
            for (candidate, row) in embedded.image.chunks(EMBEDDING_DIM * 2).enumerate() {
                let is_zero = row.iter().all(|byte| *byte == 0);
                assert_eq!(
                    is_zero,
                    expected.contains_key(&(candidate as u32)),
                    "candidate {candidate}"
                );
            }
        }
    }
    let check = ScoreBegin {
        reference: None,
        learner_model: None,
        check_only: true,
        ..rig.begin(&all)
    };
    let mut call = Call::begin(&mut client, check).await.unwrap();
    assert_eq!(found(&call.holes().await.unwrap()), expected);
    assert_eq!(
        call.chosen(&[3, 2]).await.unwrap_err().reason,
        Reason::InvalidArgument,
        "a hole cannot be chosen"
    );
}

/// `n`, and that each row is what the data set holds with the hash of that.
fn numbers(rig: &Rig, table: &RecordBatch) -> Vec<i64> {
    let numbers: Vec<i64> = table["n"].as_primitive::<Int64Type>().values().to_vec();
    let (images, captions) = (
        table["image"].as_binary::<i32>(),
        table["caption"].as_string::<i32>(),
    );
    let hashes = table[CONTENT_HASH].as_fixed_size_binary();
    for (at, n) in numbers.iter().enumerate() {
        let row = &rig.rows[*n as usize];
        let (image, caption) = (row.image.as_ref().unwrap(), row.caption.as_ref().unwrap());
        assert_eq!(
            (images.value(at), captions.value(at)),
            (image.as_slice(), caption.as_str())
        );
        assert_eq!(hashes.value(at), content_hash(image, caption));
    }
    numbers
}

#[tokio::test]
async fn chosen_rows_come_in_order_and_can_be_fetched_again() {
    let rig = Rig::good(40).await;
    let mut client = rig.client().await;
    let candidates = mixed(40);
    let chosen = [39, 0, 17, 18, 3, 25];
    let mut call = Call::begin(&mut client, rig.begin(&candidates))
        .await
        .unwrap();
    call.holes().await.unwrap();
    call.embedded(Tower::Reference).await.unwrap();
    // Chosen without the learner, as when the reference alone decides.
    let (table_of_chosen, done) = call.chosen(&chosen).await.unwrap();
    let expected: Vec<i64> = chosen
        .iter()
        .map(|n| i64::from(candidates[*n as usize]))
        .collect();
    assert_eq!(numbers(&rig, &table_of_chosen), expected);
    assert_eq!(
        done,
        RowsDone {
            rows: 6,
            rows_read_again: 0
        }
    );
    let rows: Vec<u32> = expected.iter().map(|n| *n as u32).collect();
    let fetched = fetch(&mut client, &rig, &rows).await.unwrap();
    assert_eq!(fetched, table_of_chosen);
}

async fn fetch(
    client: &mut WorkerServiceClient<Channel>,
    rig: &Rig,
    rows: &[u32],
) -> Result<RecordBatch, Failure> {
    fetch_asked(client, rig.rows_request(rows)).await
}

async fn fetch_asked(
    client: &mut WorkerServiceClient<Channel>,
    request: FetchRowsRequest,
) -> Result<RecordBatch, Failure> {
    let rows: usize = request.blocks.iter().map(|block| block.rows.len()).sum();
    let failed = |status| Failure::try_from(status).unwrap();
    let mut stream = client
        .fetch_rows(request)
        .await
        .map_err(failed)?
        .into_inner();
    let mut bytes = Vec::new();
    loop {
        match stream
            .message()
            .await
            .map_err(failed)?
            .and_then(|response| response.message)
        {
            Some(fetch_rows_response::Message::ArrowIpc(part)) => bytes.extend_from_slice(&part),
            Some(fetch_rows_response::Message::Kept(kept)) => panic!("{kept:?}"),
            Some(fetch_rows_response::Message::Done(done)) => {
                assert_eq!(done.rows as usize, rows);
                return Ok(table(bytes));
            }
            None => panic!("the stream ended without RowsDone"),
        }
    }
}

#[tokio::test]
async fn a_hole_among_fetched_rows_is_named() {
    let mut rows: Vec<Row> = (0..20).map(Row::good).collect();
    rows[17].caption = None;
    let rig = Rig::new(rows).await;
    let failure = fetch(&mut rig.client().await, &rig, &[3, 17])
        .await
        .unwrap_err();
    assert_eq!(
        (failure.reason, failure.metadata["id"].as_str()),
        (Reason::RowChanged, "train.parquet#17")
    );
    let failure = fetch(&mut rig.client().await, &rig, &[3, 20])
        .await
        .unwrap_err();
    assert_eq!(
        (failure.reason, failure.metadata["field"].as_str()),
        (Reason::InvalidArgument, "blocks")
    );
}

#[tokio::test]
async fn without_any_room_the_numbers_and_rows_are_the_same() {
    let rig = Rig::good(40).await;
    let none = WorkerConfig {
        slots: 1,
        block_cache_bytes: 0,
        row_bytes_max: 0,
        decoded_bytes_max: 0,
        reference_cache_bytes: 0,
        models_max: 2,
        ..config()
    };
    let worker = rig.worker(none);
    let (mut roomy, mut tight) = (rig.client().await, serve(&worker).await);
    let candidates = mixed(40);
    let expected = scored(&mut roomy, rig.begin(&candidates)).await.unwrap();
    // Twice: the second time the models have left the device for others, and the reference's
    // embeddings are gone.
    for (key, _) in rig.state.list("reference").await.unwrap() {
        rig.state.delete(&key).await.unwrap();
    }
    for _ in 0..2 {
        let mut call = Call::begin(&mut tight, rig.begin(&candidates))
            .await
            .unwrap();
        assert_eq!(call.holes().await.unwrap(), expected.0);
        let reference = call.embedded(Tower::Reference).await.unwrap();
        for seed in [3, 4] {
            prepared(&mut tight, model("memory:///model", seed))
                .await
                .unwrap();
        }
        let learner = call.learner(model("memory:///model", 2)).await.unwrap();
        assert_eq!(
            (reference.image, reference.text),
            (expected.1.image.clone(), expected.1.text.clone())
        );
        assert_eq!(
            (learner.image, learner.text),
            (expected.2.image.clone(), expected.2.text.clone())
        );
        assert_eq!(worker.retained_bytes(), (0, 0));
        let (rows, done) = call.chosen(&[5, 30, 1]).await.unwrap();
        assert_eq!(
            numbers(&rig, &rows),
            [5, 30, 1].map(|n| i64::from(candidates[n]))
        );
        assert_eq!(
            done,
            RowsDone {
                rows: 3,
                rows_read_again: 3
            }
        );
        for (key, _) in rig.state.list("reference").await.unwrap() {
            rig.state.delete(&key).await.unwrap();
        }
    }
}

#[tokio::test]
async fn more_models_than_the_device_keeps_take_turns() {
    let rig = Rig::good(40).await;
    let candidates = mixed(40);
    let of_seed = |seed| ScoreBegin {
        learner_model: Some(model("memory:///model", seed)),
        ..rig.begin(&candidates)
    };
    let mut roomy = rig.client().await;
    let mut alone = Vec::new();
    for seed in 2..8 {
        alone.push(scored(&mut roomy, of_seed(seed)).await.unwrap().2.image);
    }
    let tight = serve(&rig.worker(WorkerConfig {
        models_max: 2,
        slots: 6,
        ..config()
    }))
    .await;
    let together = (2..8).map(|seed| {
        let (mut client, begin) = (tight.clone(), of_seed(seed));
        async move {
            scored(&mut client, begin)
                .await
                .map(|(_, _, learner)| learner.image)
        }
    });
    assert_eq!(
        futures::future::try_join_all(together).await.unwrap(),
        alone
    );
}

/// Writes weights into a model folder, and gives the model that they make.
async fn folder_of_seed(rig: &Rig, seed: u64) -> ModelRef {
    let folder = rig.stores.open("memory:///model").unwrap();
    let parameters = ModelFolder::fetch(&folder)
        .await
        .unwrap()
        .config
        .parameters();
    folder
        .put(
            "model.safetensors",
            init::random(&parameters, seed).unwrap(),
        )
        .await
        .unwrap();
    ModelRef {
        model_uri: "memory:///model".into(),
        ..Default::default()
    }
}

#[tokio::test]
async fn a_folder_that_was_overwritten_is_not_taken_for_the_old_one() {
    let rig = Rig::good(20).await;
    let all: Vec<u32> = (0..20).collect();
    let (mut one, mut other) = (rig.client().await, rig.client().await);
    let folder = folder_of_seed(&rig, 1).await;
    let pinned = |info: &PrepareModelResponse| ModelRef {
        snapshot_digest: info.weights_digest.clone(),
        ..folder.clone()
    };
    let old = prepared(&mut one, folder.clone()).await.unwrap();
    assert_eq!(prepared(&mut other, folder.clone()).await.unwrap(), old);
    folder_of_seed(&rig, 2).await;
    let new = prepared(&mut one, folder.clone()).await.unwrap();
    assert_ne!(
        new.weights_digest, old.weights_digest,
        "a run that is opened now gets what is there now"
    );
    // The other worker knows the old folder only: it reads it once more.
    let begin = |reference| ScoreBegin {
        reference: Some(reference),
        learner_model: None,
        ..rig.begin(&all)
    };
    let mut call = Call::begin(&mut other, begin(pinned(&new))).await.unwrap();
    call.holes().await.unwrap();
    assert_eq!(
        call.embedded(Tower::Reference)
            .await
            .unwrap()
            .done
            .model_digest,
        new.digest
    );
    // A worker that never saw the old weights cannot serve the old run, and says so.
    let mut fresh = rig.client().await;
    let mut call = Call::begin(&mut fresh, begin(pinned(&old))).await.unwrap();
    let failure = call.holes().await.unwrap_err();
    assert_eq!(failure.reason, Reason::ModelInvalid);
    assert_eq!(
        (&failure.metadata["found"], &failure.metadata["expected"]),
        (&new.weights_digest, &old.weights_digest)
    );
}

#[tokio::test]
async fn a_worker_says_what_it_computes_in() {
    let rig = Rig::good(4).await;
    let mut client = rig.client().await;
    for (asked, told) in [
        (ComputeDtype::Unspecified, ComputeDtype::F32),
        (ComputeDtype::F32, ComputeDtype::F32),
        (ComputeDtype::Bf16, ComputeDtype::Bf16),
    ] {
        let model = ModelRef {
            compute_dtype: asked.into(),
            ..model("memory:///model", 1)
        };
        assert_eq!(
            prepared(&mut client, model.clone())
                .await
                .unwrap()
                .compute_dtype(),
            told
        );
        let begin = ScoreBegin {
            reference: Some(model),
            ..rig.begin(&[0, 1, 2])
        };
        let mut call = Call::begin(&mut client, begin).await.unwrap();
        call.holes().await.unwrap();
        assert_eq!(
            call.embedded(Tower::Reference)
                .await
                .unwrap()
                .done
                .compute_dtype(),
            told
        );
    }
}

#[tokio::test]
async fn a_caller_that_goes_frees_what_it_held() {
    let rig = Rig::good(40).await;
    let worker = rig.worker(WorkerConfig {
        slots: 1,
        ..config()
    });
    let mut client = serve(&worker).await;
    let begin = || rig.begin(&mixed(40));
    // One goes while its slice is under way, one while it waits for weights with rows and pixels
    // kept.
    drop(Call::begin(&mut client, begin()).await.unwrap());
    let mut waiting = Call::begin(&mut client, begin()).await.unwrap();
    waiting.holes().await.unwrap();
    waiting.embedded(Tower::Reference).await.unwrap();
    let (rows, pixels) = worker.retained_bytes();
    assert!(rows > 0 && pixels > 0);
    // Waiting holds no slot: the only one serves another call meanwhile.
    scored(&mut client, begin()).await.unwrap();
    drop(waiting);
    worker.wait_until_idle().await;
    while worker.retained_bytes() != (0, 0) {
        tokio::task::yield_now().await;
    }
}

#[tokio::test]
async fn a_learner_may_want_its_rows_otherwise_than_the_reference() {
    let rig = Rig::good(20).await;
    let mut client = rig.client().await;
    let all: Vec<u32> = (0..20).collect();
    let other = ScoreBegin {
        learner_model: Some(model("memory:///other", 2)),
        ..rig.begin(&all)
    };
    let (_, reference, learner) = scored(&mut client, rig.begin(&all)).await.unwrap();
    let (_, same, differs) = scored(&mut client, other.clone()).await.unwrap();
    assert_eq!(reference.image, same.image);
    assert_ne!(learner.image, differs.image);
    assert_eq!(learner.text, differs.text);
    // What was not announced was not prepared for.
    let mut call = Call::begin(&mut client, other).await.unwrap();
    call.holes().await.unwrap();
    call.embedded(Tower::Reference).await.unwrap();
    let failure = call.learner(model("memory:///model", 2)).await.unwrap_err();
    assert_eq!(failure.reason, Reason::InvalidArgument);
}

#[tokio::test]
async fn models_are_described_and_refused_by_name() {
    let rig = Rig::good(4).await;
    let mut client = rig.client().await;
    let info = prepared(&mut client, model("memory:///model", 1))
        .await
        .unwrap();
    assert_eq!(
        (
            info.model_type.as_str(),
            info.embedding_dim,
            info.device.as_str()
        ),
        ("siglip", 16, "cpu")
    );
    assert!(info.image_flops > 0.0 && info.text_flops > 0.0 && info.logit_bias.is_some());
    assert!(
        info.tensors
            .iter()
            .any(|tensor| tensor.name == "logit_scale")
    );
    let refused = [
        (model("memory:///nowhere", 1), Reason::ModelInvalid),
        (
            ModelRef {
                random_seed: None,
                ..model("memory:///model", 0)
            },
            Reason::ModelInvalid,
        ),
        (
            ModelRef {
                snapshot_uri: "memory:///x".into(),
                ..model("memory:///model", 0)
            },
            Reason::InvalidArgument,
        ),
        (ModelRef::default(), Reason::InvalidArgument),
    ];
    for (model, reason) in refused {
        assert_eq!(
            prepared(&mut client, model.clone())
                .await
                .unwrap_err()
                .reason,
            reason,
            "{model:?}"
        );
    }
}
