//! The gRPC methods of the coordinator, a few lines each.
use super::{
    receipts::page::page,
    runs::{registry::Coordinator, run::Run},
    serve::{output, ready::Ready, share},
    trainer::ranks::check_incarnation,
    weights::member::read_start,
};
use crate::{
    access::Caller,
    error::{Error, Result},
    ipc, metrics,
};
use bytes::Bytes;
use futures::{Stream, StreamExt, stream};
use serde_json::{Value, json};
use std::{pin::Pin, sync::Arc};
use superbatch_proto::v1::{
    AnnouncePushRequest, AnnouncePushResponse, AppendPhasesRequest, AppendPhasesResponse,
    BatchHeader, BatchTrailer, CloseRunRequest, CloseRunResponse, Delivery, GetReceiptRequest,
    GetReceiptResponse, GetRunRequest, GetRunResponse, Intent, ListRunsRequest, ListRunsResponse,
    OpenRunRequest, OpenRunResponse, PushStart, PushWeightsRequest, PushWeightsResponse, Reason,
    Receipt, RegisterRequest, RegisterResponse, RewindMode, RewindRequest, RewindResponse,
    SelectBatchRequest, SelectBatchResponse, WeightsVersion,
    coordinator_service_server::CoordinatorService, select_batch_response::Message,
    selection_service_server::SelectionService,
};
use tokio::time::Instant;
use tonic::{Request, Response, Status, Streaming};

/// Serves trainers and operators.
#[derive(Clone)]
pub struct Selection(pub Arc<Coordinator>);

/// Serves workers.
#[derive(Clone)]
pub struct WorkerPlane(pub Arc<Coordinator>);

#[tonic::async_trait]
impl CoordinatorService for WorkerPlane {
    async fn register(
        &self,
        request: Request<RegisterRequest>,
    ) -> Result<Response<RegisterResponse>, Status> {
        let pool = &self.0.deps.pool;
        pool.register(request.get_ref(), std::time::Instant::now())?;
        Ok(Response::new(RegisterResponse {
            lease_seconds: pool.lease().as_secs_f64(),
        }))
    }
}

type BatchStream = Pin<Box<dyn Stream<Item = Result<SelectBatchResponse, Status>> + Send>>;

#[tonic::async_trait]
impl SelectionService for Selection {
    type SelectBatchStream = BatchStream;

    async fn open_run(
        &self,
        request: Request<OpenRunRequest>,
    ) -> Result<Response<OpenRunResponse>, Status> {
        let (caller, request) = (Caller::of(&request)?, request.into_inner());
        let run_id = request.run_id.clone();
        caller.check_run(&run_id)?;
        let opened = self.0.open_run(request).await;
        caller.record("open", &run_id, &opened, Value::Null);
        Ok(Response::new(opened?))
    }

    async fn get_run(
        &self,
        request: Request<GetRunRequest>,
    ) -> Result<Response<GetRunResponse>, Status> {
        Caller::of(&request)?.check_run(&request.get_ref().run_id)?;
        let run = self.0.run(&request.get_ref().run_id).await?;
        Ok(Response::new(GetRunResponse {
            run: Some(run.run().info(request.get_ref().resume_step)),
        }))
    }

    async fn list_runs(
        &self,
        request: Request<ListRunsRequest>,
    ) -> Result<Response<ListRunsResponse>, Status> {
        let caller = Caller::of(&request)?;
        let mut runs = self.0.list().await?;
        runs.retain(|run| caller.may_see(&run.run_id));
        Ok(Response::new(ListRunsResponse { runs }))
    }

    async fn close_run(
        &self,
        request: Request<CloseRunRequest>,
    ) -> Result<Response<CloseRunResponse>, Status> {
        let (caller, request) = (Caller::of(&request)?, request.into_inner());
        caller.check_run(&request.run_id)?;
        let run = self.0.run(&request.run_id).await?;
        let closed = whole(async move { run.close().await }).await;
        caller.record("close", &request.run_id, &closed, Value::Null);
        closed?;
        Ok(Response::new(CloseRunResponse {}))
    }

    async fn append_phases(
        &self,
        request: Request<AppendPhasesRequest>,
    ) -> Result<Response<AppendPhasesResponse>, Status> {
        let (caller, request) = (Caller::of(&request)?, request.into_inner());
        let run_id = request.run_id;
        caller.check_run(&run_id)?;
        let run = self.0.run(&run_id).await?;
        let phases = request.phases;
        let detail = json!({"phases": phases.len()});
        let spec = whole(async move { run.append_phases(phases).await }).await;
        caller.record("append phases", &run_id, &spec, detail);
        let spec = spec?;
        Ok(Response::new(AppendPhasesResponse {
            spec: Some((*spec).clone()),
        }))
    }

    async fn rewind(
        &self,
        request: Request<RewindRequest>,
    ) -> Result<Response<RewindResponse>, Status> {
        let (caller, request) = (Caller::of(&request)?, request.into_inner());
        caller.check_run(&request.run_id)?;
        let (to_step, mode) = (request.to_step, request.mode());
        if mode == RewindMode::Unspecified {
            return Err(Error::invalid(
                "mode",
                "say whether to replay the old choices or to reselect",
            )
            .into());
        }
        let run = self.0.run(&request.run_id).await?;
        let rewound = whole(async move { run.rewind(to_step, mode).await }).await;
        let detail = json!({"to_step": to_step, "mode": mode.as_str_name()});
        caller.record("rewind", &request.run_id, &rewound, detail);
        let generation = rewound?;
        Ok(Response::new(RewindResponse { generation }))
    }

    async fn select_batch(
        &self,
        request: Request<SelectBatchRequest>,
    ) -> Result<Response<BatchStream>, Status> {
        Caller::of(&request)?.check_run(&request.get_ref().run_id)?;
        let mut outcome = Outcome::new();
        let batch = batch(&self.0, request.get_ref())
            .await
            .inspect_err(|error| outcome.failed(error))?;
        Ok(Response::new(Box::pin(
            batch.into_messages(outcome).map(Ok),
        )))
    }

    async fn push_weights(
        &self,
        request: Request<Streaming<PushWeightsRequest>>,
    ) -> Result<Response<PushWeightsResponse>, Status> {
        let (caller, mut stream) = (Caller::of(&request)?, request.into_inner());
        let start = read_start(&mut stream, self.0.deps.limits.push_deadline).await?;
        caller.check_run(&start.run_id)?;
        let (run_id, detail) = (start.run_id.clone(), json!({"step": start.step}));
        let published = push(&self.0, start, stream).await;
        caller.record("push", &run_id, &published, detail);
        let published = published?;
        Ok(Response::new(PushWeightsResponse {
            published: Some(published),
        }))
    }

    async fn announce_push(
        &self,
        request: Request<AnnouncePushRequest>,
    ) -> Result<Response<AnnouncePushResponse>, Status> {
        Caller::of(&request)?.check_run(&request.get_ref().run_id)?;
        let request = request.into_inner();
        check_incarnation(&request.incarnation)?;
        let run = self.0.run(&request.run_id).await?;
        run.announce_push(&request).await?;
        Ok(Response::new(AnnouncePushResponse {}))
    }

    async fn get_receipt(
        &self,
        request: Request<GetReceiptRequest>,
    ) -> Result<Response<GetReceiptResponse>, Status> {
        Caller::of(&request)?.check_run(&request.get_ref().run_id)?;
        let request = request.get_ref();
        let receipt = receipt(&self.0, request).await?;
        let page = page(receipt, request.row_offset, request.max_rows)?;
        Ok(Response::new(page))
    }
}

async fn push(
    coordinator: &Coordinator,
    start: PushStart,
    stream: Streaming<PushWeightsRequest>,
) -> Result<WeightsVersion> {
    let run = coordinator.run(&start.run_id).await?;
    run.run().calls.train();
    run.push(start, stream).await
}

/// Runs `work` to its end, even if the caller goes away. tonic drops a call's future when the
/// connection breaks; between the write of a fact and the change of the memory, that would leave
/// the two different.
async fn whole<T: Send + 'static>(
    work: impl Future<Output = Result<T>> + Send + 'static,
) -> Result<T> {
    tokio::spawn(work)
        .await
        .map_err(|e| Error::internal("the call panicked").because(e))?
}

/// Returns the receipt that is asked for. A run that is not in memory is not loaded for it: its
/// receipts are in the state, and reading them must put no trainer's run to sleep.
async fn receipt(coordinator: &Coordinator, request: &GetReceiptRequest) -> Result<Receipt> {
    let (chain, receipts) = coordinator.history(&request.run_id).await?;
    let newest = chain.current();
    let generation = request.generation.unwrap_or(newest);
    if generation > newest {
        return Err(Error::invalid(
            "generation",
            format!("the run's newest generation is {newest}, not {generation}"),
        ));
    }
    let found = receipts.find_of(&chain, request.step, generation).await?;
    let mut receipt = found.ok_or_else(|| {
        let message = format!(
            "step {} of run '{}' is not committed in generation {generation} (yet)",
            request.step, request.run_id
        );
        Error::new(Reason::StepNotCommitted, message)
            .with("step", request.step)
            .with("generation", generation)
    })?;
    // The generation of the request; `chosen_in_generation` stays.
    receipt.summary.get_or_insert_default().generation = generation;
    Ok(receipt)
}

/// One rank's slice, ready to be sent.
struct Batch {
    header: BatchHeader,
    /// The rest of the stream, from the offset on.
    parts: Vec<Bytes>,
    trailer: BatchTrailer,
}

async fn batch(coordinator: &Coordinator, request: &SelectBatchRequest) -> Result<Batch> {
    check_delivery(request)?;
    let run = coordinator.run(&request.run_id).await?;
    run.run().calls.train();
    let asked = Instant::now();
    let need = request.intent() != Intent::Prefetch;
    let ready = run.select(request, need).await?;
    if need {
        metrics::trainer_wait().record(asked.elapsed().as_secs_f64());
        run.run().waits.record(asked.elapsed());
    }
    let (of, asked_for, batch) = (run.run().clone(), request.clone(), ready.clone());
    // Copies and hashes all bytes of the rank's slice, off the async threads.
    let encoded = tokio::task::spawn_blocking(move || {
        let (parts, mut hasher) = (rank_parts(&of, &asked_for, &batch)?, blake3::Hasher::new());
        for part in &parts {
            hasher.update(part);
        }
        Ok::<_, Error>((parts, hasher.finalize().as_bytes().to_vec()))
    });
    let (parts, hash) = encoded
        .await
        .map_err(|e| Error::internal("encoding the batch panicked").because(e))??;
    let stream_bytes = parts.iter().map(|part| part.len() as u64).sum();
    if request.resume_offset > stream_bytes {
        let message = format!(
            "resume_offset {} is beyond the stream's {stream_bytes} bytes",
            request.resume_offset
        );
        return Err(Error::invalid("resume_offset", message));
    }
    let summary = ready.receipt.summary.clone().unwrap_or_default();
    let rows = summary.sub_batch_size / request.world_size;
    let receipt = superbatch_proto::v1::ReceiptSummary {
        generation: request.generation,
        run_totals: None,
        ..summary
    };
    Ok(Batch {
        header: BatchHeader {
            receipt: Some(receipt),
            rank: request.rank,
            world_size: request.world_size,
            rows,
            stream_bytes,
            offset: request.resume_offset,
        },
        trailer: BatchTrailer {
            rows,
            blake3: hash.into(),
        },
        parts: ipc::from_offset(parts, request.resume_offset).collect(),
    })
}

fn rank_parts(run: &Run, request: &SelectBatchRequest, ready: &Ready) -> Result<Vec<Bytes>> {
    let spec = run.spec();
    let groups = share::groups(&ready.receipt.chosen);
    let (rank, world) = (request.rank, request.world_size);
    let indices = share::slice(
        spec.seed,
        request.step,
        &groups,
        world,
        spec.micro_batches,
        rank,
    )?;
    output::rank_stream(&run.output_schema, &ready.rows, &ready.receipt, &indices)
}

fn check_delivery(request: &SelectBatchRequest) -> Result<()> {
    let feature = match request.delivery() {
        Delivery::Unspecified | Delivery::Bytes => return Ok(()),
        Delivery::Locators => "DELIVERY_LOCATORS",
        Delivery::WorkerDirect => "DELIVERY_WORKER_DIRECT",
    };
    let message = format!("{feature} is in the protocol and not built yet; ask for DELIVERY_BYTES");
    Err(Error::new(Reason::Unimplemented, message).with("feature", feature))
}

impl Batch {
    fn into_messages(self, mut outcome: Outcome) -> impl Stream<Item = SelectBatchResponse> + Send {
        outcome.sending();
        let parts = self.parts.into_iter().map(Message::ArrowIpc);
        let first = std::iter::once(Message::Header(self.header));
        let last = std::iter::once_with(move || {
            outcome.sent();
            Message::Trailer(self.trailer)
        });
        stream::iter(first.chain(parts).chain(last)).map(|message| SelectBatchResponse {
            message: Some(message),
        })
    }
}

/// Counts how a SelectBatch call ended. Counting happens on drop, since a cancelled call is dropped
/// without another sign.
struct Outcome {
    begun: Instant,
    what: &'static str,
    /// When sending began.
    sending: Option<Instant>,
}

impl Outcome {
    fn new() -> Self {
        Self {
            begun: Instant::now(),
            what: "cancelled",
            sending: None,
        }
    }

    fn failed(&mut self, error: &Error) {
        self.what = superbatch_proto::reason_name(error.reason());
    }

    fn sending(&mut self) {
        self.sending = Some(Instant::now());
    }

    fn sent(&mut self) {
        self.what = "ok";
    }
}

impl Drop for Outcome {
    fn drop(&mut self) {
        metrics::select_requests(self.what).increment(1);
        if let Some(sending) = self.sending.filter(|_| self.what == "ok") {
            metrics::select_duration().record(self.begun.elapsed().as_secs_f64());
            metrics::stage_duration("send").record(sending.elapsed().as_secs_f64());
        }
    }
}
