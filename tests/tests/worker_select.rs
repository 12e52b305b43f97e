//! Selection on a worker, behind its real protocol on a loopback socket.
#![allow(clippy::unwrap_used)]
use superbatch_proto::{
    Failure, MESSAGE_BYTES_MAX, SUPER_BATCH_SIZE_MAX,
    v1::{
        CandidatesPart, Criterion, EmbeddingDtype, EmbeddingPart, Loss, Policy, Reason,
        SelectBegin, SelectRequest, SelectResponse, Tower, select_request::Message,
        worker_service_client::WorkerServiceClient,
    },
};
use superbatch_server::worker::{Worker, WorkerConfig};
use superbatch_tests::fixture;
use tokio::net::TcpListener;
use tokio_stream::wrappers::TcpListenerStream;
use tonic::transport::{Channel, Server};

const DIM: u32 = 2;
/// Candidates of one message.
const STEP: usize = 1 << 16;

async fn client() -> WorkerServiceClient<Channel> {
    let (stores, state) = fixture::storage();
    let config = WorkerConfig {
        device: "cpu".into(),
        threads: 2,
        ..Default::default()
    };
    let worker = Worker::new(&config, stores, state).unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(
        Server::builder()
            .add_service(worker.service())
            .serve_with_incoming(TcpListenerStream::new(listener)),
    );
    WorkerServiceClient::connect(format!("http://{address}"))
        .await
        .unwrap()
}

/// By the largest cosines of image and text, without noise.
fn begin() -> SelectBegin {
    SelectBegin {
        policy: Policy::TopK.into(),
        criterion: Criterion::Easy.into(),
        loss: Loss::Sigmoid.into(),
        sub_batch_size: 3,
        n_chunks: 1,
        gain: 1.0,
        reference_scale: 10.0,
        reference_bias: -5.0,
        embedding_dtype: EmbeddingDtype::F32.into(),
        ..Default::default()
    }
}

/// Positions that take the most bytes.
fn positions(count: usize) -> Vec<u64> {
    (0..count as u64).map(|n| u64::MAX - n).collect()
}

/// The reference's embeddings, cut into parts. The texts of `matching` candidates match their
/// images, all others are at right angles to them.
fn embeddings(count: usize, matching: &[usize]) -> Vec<Message> {
    let part = |first: usize| {
        let rows = first..(first + STEP).min(count);
        let bytes = |row: [f32; 2]| row.into_iter().flat_map(f32::to_le_bytes);
        let text = |row| {
            if matching.contains(&row) {
                [1.0, 0.0]
            } else {
                [0.0, 1.0]
            }
        };
        Message::Embedding(EmbeddingPart {
            tower: Tower::Reference.into(),
            first: first as u32,
            rows: rows.len() as u32,
            dim: DIM,
            image: rows.clone().flat_map(|_| bytes([1.0, 0.0])).collect(),
            text: rows.flat_map(|row| bytes(text(row))).collect(),
        })
    };
    (0..count).step_by(STEP).map(part).collect()
}

async fn select(messages: Vec<Message>) -> Result<SelectResponse, tonic::Status> {
    let requests: Vec<_> = messages
        .into_iter()
        .map(|message| SelectRequest {
            message: Some(message),
        })
        .collect();
    client()
        .await
        .select(tokio_stream::iter(requests))
        .await
        .map(tonic::Response::into_inner)
}

#[tokio::test(flavor = "multi_thread")]
async fn candidates_beyond_one_message_come_in_several() {
    let count = 1 << 20;
    let last = count - 1;
    let all = positions(count);
    let parts = all.chunks(STEP).skip(1).map(|part| CandidatesPart {
        terms: Vec::new(),
        positions: part.to_vec(),
        holes: Vec::new(),
    });
    let mut parts: Vec<_> = parts.collect();
    // It would be the last but one to be drawn.
    parts.last_mut().unwrap().holes = vec![last as u32 - 1];
    let messages = [Message::Begin(SelectBegin {
        positions: all[..STEP].to_vec(),
        ..begin()
    })]
    .into_iter()
    .chain(parts.into_iter().map(Message::Candidates))
    .chain(embeddings(count, &[7, 70_000, last - 1, last]));
    let answer = select(messages.collect()).await.unwrap();
    assert_eq!(answer.indices, [7, 70_000, last as u32]);

    let at_once = vec![Message::Begin(SelectBegin {
        positions: all,
        ..begin()
    })];
    let refused = Failure::try_from(select(at_once).await.unwrap_err()).unwrap();
    assert_eq!(
        refused.reason,
        Reason::MessageTooLarge,
        "over {MESSAGE_BYTES_MAX} bytes: {refused}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn candidates_without_end_are_refused() {
    // Small keys take a byte each, so a message holds more of them than a super-batch may. Terms
    // take eight, so they come in several.
    let most = SUPER_BATCH_SIZE_MAX as usize;
    let with = |change: fn(&mut SelectBegin, usize), count| {
        let mut begin = begin();
        change(&mut begin, count);
        Message::Begin(begin)
    };
    let positions: fn(&mut SelectBegin, usize) = |begin, count| begin.positions = vec![1; count];
    let holes: fn(&mut SelectBegin, usize) = |begin, count| begin.holes = vec![1; count];
    let one_more = |change: fn(&mut CandidatesPart)| {
        let mut part = CandidatesPart::default();
        change(&mut part);
        Message::Candidates(part)
    };
    let terms = || {
        Message::Candidates(CandidatesPart {
            terms: vec![0.5; STEP],
            ..Default::default()
        })
    };
    let begin_with_terms = with(|begin, count| begin.terms = vec![0.5; count], STEP);
    let all_terms = std::iter::repeat_with(terms).take(most / STEP - 1);
    let cases: [(&str, Vec<Message>); 5] = [
        ("positions", vec![with(positions, most + 1)]),
        ("holes", vec![with(holes, most + 1)]),
        (
            "positions",
            vec![
                with(positions, most),
                one_more(|part| part.positions = vec![1]),
            ],
        ),
        (
            "holes",
            vec![with(holes, most), one_more(|part| part.holes = vec![1])],
        ),
        (
            "terms",
            [begin_with_terms]
                .into_iter()
                .chain(all_terms)
                .chain([one_more(|part| part.terms = vec![0.5])])
                .collect(),
        ),
    ];
    for (field, messages) in cases {
        let failure = select(messages).await.unwrap_err();
        let failure = Failure::try_from(failure).unwrap();
        assert_eq!(
            (failure.reason, failure.metadata["field"].as_str()),
            (Reason::InvalidArgument, field)
        );
    }
    let wide = EmbeddingPart {
        tower: Tower::Reference.into(),
        dim: 1 << 15,
        ..Default::default()
    };
    let messages = vec![Message::Begin(begin()), Message::Embedding(wide)];
    let failure = Failure::try_from(select(messages).await.unwrap_err()).unwrap();
    assert_eq!(failure.metadata["field"], "dim");
}

#[tokio::test(flavor = "multi_thread")]
async fn candidates_after_an_embedding_and_missing_ones_are_refused() {
    let first = Message::Begin(SelectBegin {
        positions: positions(4),
        ..begin()
    });
    let more = Message::Candidates(CandidatesPart {
        terms: Vec::new(),
        positions: positions(4),
        holes: Vec::new(),
    });
    let [embedded] = embeddings(4, &[0]).try_into().unwrap();
    for (messages, field) in [
        (
            vec![first.clone(), embedded.clone(), more.clone()],
            "candidates",
        ),
        (vec![first.clone(), more.clone(), embedded], "embedding"),
        (vec![more], "message"),
    ] {
        let failure = Failure::try_from(select(messages).await.unwrap_err()).unwrap();
        assert_eq!(
            (failure.reason, failure.metadata["field"].as_str()),
            (Reason::InvalidArgument, field)
        );
    }
}
