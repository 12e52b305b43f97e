//! A service in this process whose answers to `SelectBatch` and `PushWeights` are scripted.
use arrow::{
    array::{ArrayRef, BinaryArray, RecordBatch, StringArray, UInt64Array},
    ipc::writer::StreamWriter,
};
use std::{
    collections::{HashMap, VecDeque},
    net::SocketAddr,
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard},
    time::Duration,
};
use superbatch_client::{Client, ConnectConfig, Failure, Retry, Run, v1::*};
use superbatch_proto::{Checksum, MESSAGE_BYTES_MAX};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    sync::watch,
};
use tokio_stream::{Stream, StreamExt, wrappers::TcpListenerStream};
use tonic::{Request, Response, Status, Streaming};

pub(crate) type TestResult<T = ()> = Result<T, Box<dyn std::error::Error + Send + Sync>>;

/// What one request for a step is answered with. Steps without a script are answered whole.
#[derive(Debug, Clone)]
pub(crate) enum Answer {
    /// So many bytes, then UNAVAILABLE.
    BreakAfter(usize),
    /// So many bytes, then an end without a trailer.
    EndAfter(usize),
    /// Whole, with the byte at this offset changed.
    Damage(usize),
    Refuse(Reason),
    /// A message that is longer than the client takes.
    TooLong,
    /// Silence until a NEED for the step has come, then never an answer to this one.
    Ignore,
}

#[derive(Default)]
pub(crate) struct Fake {
    script: Mutex<HashMap<u64, VecDeque<Answer>>>,
    /// All requests for batches, in the order they came.
    asked: watch::Sender<Vec<SelectBatchRequest>>,
    pub pushed: Mutex<Vec<Vec<PushWeightsRequest>>>,
    pub refuse_pushes: Mutex<VecDeque<Reason>>,
    /// Pushes are answered once this is true.
    pub publish: watch::Sender<bool>,
    /// What pushes are answered to have published.
    pub published_digest: Mutex<String>,
    /// All announcements of pushes, in the order they came.
    announced: watch::Sender<Vec<AnnouncePushRequest>>,
    closed: Mutex<Vec<String>>,
}

pub(crate) const STEPS: u64 = 6;

/// The rows of a step: some MiB, so that its stream has several parts.
pub(crate) fn rows(step: u64) -> TestResult<RecordBatch> {
    let images: Vec<Vec<u8>> = (0..4)
        .map(|row| vec![(step as u8) ^ row; 700_000 + row as usize])
        .collect();
    let captions: Vec<String> = (0..4).map(|row| format!("step {step} row {row}")).collect();
    let columns: [(&str, ArrayRef); 3] = [
        ("image", Arc::new(BinaryArray::from_iter_values(&images))),
        (
            "caption",
            Arc::new(StringArray::from_iter_values(&captions)),
        ),
        (
            "_superbatch_position",
            Arc::new(UInt64Array::from_iter_values(4 * step..4 * step + 4)),
        ),
    ];
    Ok(RecordBatch::try_from_iter(columns)?)
}

/// The Arrow stream of some rows, as two record batches.
fn encode(rows: &RecordBatch, batches: usize) -> TestResult<Vec<u8>> {
    let mut writer = StreamWriter::try_new(Vec::new(), &rows.schema())?;
    let size = rows.num_rows() / batches.max(1);
    for i in 0..batches {
        writer.write(&rows.slice(i * size, size))?;
    }
    Ok(writer.into_inner()?)
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().expect("no test panics with the lock held")
}

impl Fake {
    pub(crate) fn script(&self, step: u64, answers: impl IntoIterator<Item = Answer>) {
        lock(&self.script).entry(step).or_default().extend(answers);
    }

    /// Whether every scripted answer was given.
    pub(crate) fn script_is_spent(&self) -> bool {
        lock(&self.script).values().all(VecDeque::is_empty)
    }

    pub(crate) fn asked(&self) -> Vec<SelectBatchRequest> {
        self.asked.borrow().clone()
    }

    /// Ids of the runs that were closed.
    pub(crate) fn closed(&self) -> Vec<String> {
        lock(&self.closed).clone()
    }

    /// (step, rank, withdrawn) of the announcements so far, once there are so many.
    pub(crate) async fn announced(&self, count: usize) -> TestResult<Vec<(i64, u32, bool)>> {
        let mut announced = self.announced.subscribe();
        let enough = announced.wait_for(|all| all.len() >= count);
        let all = tokio::time::timeout(Duration::from_secs(20), enough).await??;
        let shown = all
            .iter()
            .map(|push| (push.step, push.rank, push.withdrawn));
        Ok(shown.collect())
    }

    /// Waits until a request like this has come.
    pub(crate) async fn asked_for(&self, test: impl Fn(&SelectBatchRequest) -> bool) -> TestResult {
        let seen = |all: &Vec<SelectBatchRequest>| all.iter().any(&test);
        tokio::time::timeout(
            Duration::from_secs(20),
            self.asked.subscribe().wait_for(seen),
        )
        .await??;
        Ok(())
    }

    /// Serves on a free port.
    pub(crate) async fn serve(self: &Arc<Self>) -> TestResult<SocketAddr> {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let address = listener.local_addr()?;
        let service = selection_service_server::SelectionServiceServer::from_arc(self.clone());
        let server = tonic::transport::Server::builder().add_service(service);
        tokio::spawn(server.serve_with_incoming(TcpListenerStream::new(listener)));
        Ok(address)
    }

    /// Serves on a free port, and opens a run there.
    pub(crate) async fn open(self: &Arc<Self>, retry: Retry) -> TestResult<Run> {
        open_at(self.serve().await?, retry).await
    }
}

/// Opens a run.
pub(crate) async fn open_at(address: SocketAddr, retry: Retry) -> TestResult<Run> {
    open_with(
        address,
        ConnectConfig {
            retry,
            ..ConnectConfig::default()
        },
    )
    .await
}

pub(crate) async fn open_with(address: SocketAddr, config: ConnectConfig) -> TestResult<Run> {
    Ok(Client::connect_with(format!("http://{address}"), config)
        .await?
        .open_run("run", RunSpec::default())
        .await?)
}

/// A way to `server` whose first connection is cut after so many bytes of answers.
pub(crate) async fn cut_once(server: SocketAddr, bytes: u64) -> TestResult<SocketAddr> {
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    let address = listener.local_addr()?;
    tokio::spawn(async move {
        let mut longest = bytes;
        while let Ok((near, _)) = listener.accept().await {
            let Ok(far) = TcpStream::connect(server).await else {
                return;
            };
            let limit = std::mem::replace(&mut longest, u64::MAX);
            tokio::spawn(async move {
                let ((mut asks, mut hears), (answers, mut told)) =
                    (near.into_split(), far.into_split());
                let mut answers = answers.take(limit);
                let down = async {
                    tokio::io::copy(&mut answers, &mut hears).await?;
                    hears.shutdown().await
                };
                // The client hears all bytes up to the cut; when it hangs up, both ends close.
                let _ = tokio::join!(tokio::io::copy(&mut asks, &mut told), down);
            });
        }
    });
    Ok(address)
}

/// What becomes of the way to a server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Way {
    Open,
    /// Nothing moves on it any more, as if the server's process were stopped.
    Silent,
    /// Connections are cut, and nothing moves on new ones.
    CutAndSilent,
    /// Connections are cut, and nobody listens.
    Gone,
}

/// A way to `server` that is as `way` says.
pub(crate) async fn way_to(
    server: SocketAddr,
    mut way: watch::Receiver<Way>,
) -> TestResult<SocketAddr> {
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    let address = listener.local_addr()?;
    tokio::spawn(async move {
        loop {
            let of_new = way.clone();
            let near = tokio::select! {
                accepted = listener.accept() => accepted,
                _ = way.wait_for(|way| *way == Way::Gone) => return,
            };
            let Ok((near, _)) = near else { return };
            tokio::spawn(carry(near, server, of_new));
        }
    });
    Ok(address)
}

async fn carry(mut near: TcpStream, server: SocketAddr, mut way: watch::Receiver<Way>) {
    let is_old = *way.borrow() == Way::Open;
    let Ok(mut far) = TcpStream::connect(server).await else {
        return;
    };
    let changed = tokio::select! {
        biased;
        changed = way.wait_for(|way| *way != Way::Open) => changed.map(|way| *way),
        _ = tokio::io::copy_bidirectional(&mut near, &mut far) => return,
    };
    if changed.is_ok_and(|way| way == Way::Silent || (way == Way::CutAndSilent && !is_old)) {
        std::future::pending().await
    }
}

pub(crate) fn fast() -> Retry {
    let backoff = Duration::from_millis(1);
    Retry {
        attempts_max: 4,
        backoff_first: backoff,
        backoff_max: backoff,
        ..Retry::default()
    }
}

type Messages = Pin<Box<dyn Stream<Item = Result<SelectBatchResponse, Status>> + Send>>;

fn answer(request: &SelectBatchRequest, scripted: Option<Answer>) -> TestResult<Messages> {
    use select_batch_response::Message;
    let rows = rows(request.step)?;
    let mut bytes = encode(&rows, 2)?;
    let mut checksum = Checksum::default();
    checksum.update(&bytes);
    let (offset, whole) = (request.resume_offset as usize, bytes.len());
    if let Some(Answer::Damage(at)) = scripted {
        bytes[at] ^= 1;
    }
    let receipt = ReceiptSummary {
        step: request.step,
        sub_batch_size: 8,
        ..ReceiptSummary::default()
    };
    let header = BatchHeader {
        receipt: Some(receipt),
        rank: request.rank,
        world_size: request.world_size,
        rows: 4,
        stream_bytes: whole as u64,
        offset: request.resume_offset,
        tickets: Vec::new(),
    };
    let end = match scripted {
        Some(Answer::BreakAfter(n) | Answer::EndAfter(n)) => (offset + n).min(whole),
        _ => whole,
    };
    let mut messages = vec![Ok(Message::Header(header))];
    if let Some(Answer::TooLong) = scripted {
        messages.push(Ok(Message::ArrowIpc(vec![0; MESSAGE_BYTES_MAX + 1].into())));
    }
    messages.extend(
        bytes[offset..end]
            .chunks(1 << 20)
            .map(|part| Ok(Message::ArrowIpc(part.to_vec().into()))),
    );
    messages.extend(match scripted {
        Some(Answer::BreakAfter(_)) => Some(Err(Status::unavailable("connection reset"))),
        Some(Answer::EndAfter(_)) => None,
        _ => Some(Ok(Message::Trailer(BatchTrailer {
            rows: 4,
            xxh3: checksum.finish().to_vec().into(),
        }))),
    });
    let wrap = |message| SelectBatchResponse {
        message: Some(message),
    };
    Ok(Box::pin(
        tokio_stream::iter(messages).map(move |message| message.map(wrap)),
    ))
}

#[tonic::async_trait]
impl selection_service_server::SelectionService for Fake {
    type SelectBatchStream = Messages;

    async fn open_run(
        &self,
        _: Request<OpenRunRequest>,
    ) -> Result<Response<OpenRunResponse>, Status> {
        let schema = rows(0)
            .and_then(|rows| encode(&rows, 0))
            .map_err(|error| Status::internal(error.to_string()))?;
        let spec = RunSpec {
            max_ahead: 2,
            ..RunSpec::default()
        };
        let opened = OpenRunResponse {
            spec: Some(spec),
            output_schema: schema.into(),
            generation: 1,
            ..OpenRunResponse::default()
        };
        Ok(Response::new(opened))
    }

    async fn select_batch(
        &self,
        request: Request<SelectBatchRequest>,
    ) -> Result<Response<Messages>, Status> {
        let request = request.into_inner();
        self.asked.send_modify(|asked| asked.push(request.clone()));
        if request.step >= STEPS {
            return Err(Failure::new(Reason::EndOfData, "no more").into());
        }
        let scripted = lock(&self.script)
            .get_mut(&request.step)
            .and_then(VecDeque::pop_front);
        match scripted {
            Some(Answer::Refuse(reason)) => return Err(Failure::new(reason, "scripted").into()),
            Some(Answer::Ignore) => std::future::pending().await,
            _ => {}
        }
        Ok(Response::new(
            answer(&request, scripted).map_err(|error| Status::internal(error.to_string()))?,
        ))
    }

    async fn push_weights(
        &self,
        request: Request<Streaming<PushWeightsRequest>>,
    ) -> Result<Response<PushWeightsResponse>, Status> {
        let messages = request.into_inner().collect::<Result<Vec<_>, _>>().await?;
        let step = match messages.first().and_then(|first| first.message.clone()) {
            Some(push_weights_request::Message::Start(start)) => start.step,
            _ => return Err(Status::invalid_argument("no start")),
        };
        lock(&self.pushed).push(messages);
        if let Some(reason) = lock(&self.refuse_pushes).pop_front() {
            return Err(Failure::new(reason, "scripted").with("tensor", "w").into());
        }
        let _ = self.publish.subscribe().wait_for(|publish| *publish).await;
        let digest = lock(&self.published_digest).clone();
        let published = Some(WeightsVersion {
            version: 1,
            step,
            digest,
            ..WeightsVersion::default()
        });
        Ok(Response::new(PushWeightsResponse { published }))
    }

    async fn announce_push(
        &self,
        request: Request<AnnouncePushRequest>,
    ) -> Result<Response<AnnouncePushResponse>, Status> {
        self.announced
            .send_modify(|announced| announced.push(request.into_inner()));
        Ok(Response::new(AnnouncePushResponse {}))
    }

    async fn rewind(&self, _: Request<RewindRequest>) -> Result<Response<RewindResponse>, Status> {
        Ok(Response::new(RewindResponse { generation: 2 }))
    }

    async fn get_run(&self, _: Request<GetRunRequest>) -> Result<Response<GetRunResponse>, Status> {
        Err(Failure::new(Reason::RunNotFound, "no such run")
            .with("run_id", "run")
            .into())
    }

    async fn list_runs(
        &self,
        _: Request<ListRunsRequest>,
    ) -> Result<Response<ListRunsResponse>, Status> {
        Ok(Response::new(ListRunsResponse::default()))
    }

    async fn close_run(
        &self,
        request: Request<CloseRunRequest>,
    ) -> Result<Response<CloseRunResponse>, Status> {
        lock(&self.closed).push(request.into_inner().run_id);
        Ok(Response::new(CloseRunResponse::default()))
    }

    async fn report_losses(
        &self,
        _: Request<ReportLossesRequest>,
    ) -> Result<Response<ReportLossesResponse>, Status> {
        Ok(Response::new(ReportLossesResponse {}))
    }

    async fn list_weights(
        &self,
        _: Request<ListWeightsRequest>,
    ) -> Result<Response<ListWeightsResponse>, Status> {
        Ok(Response::new(ListWeightsResponse::default()))
    }

    /// One tensor in each answer, of three.
    async fn get_weights_digests(
        &self,
        request: Request<GetWeightsDigestsRequest>,
    ) -> Result<Response<GetWeightsDigestsResponse>, Status> {
        let (version, at) = (
            request.get_ref().version.unwrap_or(7),
            request.get_ref().tensor_offset,
        );
        Ok(Response::new(GetWeightsDigestsResponse {
            version: Some(WeightsVersion {
                version,
                ..Default::default()
            }),
            tensors: vec![TensorDigest {
                name: format!("{version}/{at}"),
                ..Default::default()
            }],
            next_tensor_offset: (at < 2).then_some(at + 1),
        }))
    }

    async fn roll_back_weights(
        &self,
        _: Request<RollBackWeightsRequest>,
    ) -> Result<Response<RollBackWeightsResponse>, Status> {
        Ok(Response::new(RollBackWeightsResponse::default()))
    }

    async fn append_phases(
        &self,
        _: Request<AppendPhasesRequest>,
    ) -> Result<Response<AppendPhasesResponse>, Status> {
        Ok(Response::new(AppendPhasesResponse::default()))
    }

    async fn get_receipt(
        &self,
        request: Request<GetReceiptRequest>,
    ) -> Result<Response<GetReceiptResponse>, Status> {
        let GetReceiptRequest {
            step,
            generation,
            row_offset,
            ..
        } = request.into_inner();
        if step >= STEPS {
            return Err(Failure::new(Reason::StepNotCommitted, "not yet")
                .with("step", step)
                .into());
        }
        // Two chosen rows and one bad one, a page each; the run is rewound after the first.
        let generation = generation.unwrap_or(if row_offset == 0 { 7 } else { 8 });
        let row = |row| (row_offset == row).then_some(row);
        let chosen = row(0).or(row(1)).map(|position| ChosenRow {
            position,
            ..ChosenRow::default()
        });
        let bad_row = row(2).map(|position| BadRow {
            position,
            ..BadRow::default()
        });
        let receipt = Receipt {
            summary: Some(ReceiptSummary {
                step,
                generation,
                ..ReceiptSummary::default()
            }),
            chosen: chosen.into_iter().collect(),
            bad_rows: bad_row.into_iter().collect(),
            passed_over: Vec::new(),
        };
        let next_row_offset = match step {
            // A step whose pages do not end.
            1 => Some(1),
            _ => Some(row_offset + 1).filter(|next| *next < 3),
        };
        Ok(Response::new(GetReceiptResponse {
            receipt: Some(receipt),
            next_row_offset,
        }))
    }
}
