//! The gRPC methods of the coordinator, a few lines each.
mod receipts;
mod weights;

use super::{
    receipts::page::page,
    runs::registry::Coordinator,
    serve::{
        answer::{Answer, UNREAD_MAX},
        body::{BatchStream, carrying},
    },
    step::batch::{Batch, batch},
    trainer::ranks::check_incarnation,
    weights::member::read_start,
};
use crate::{
    access::Caller,
    error::{Error, Result},
    metrics,
};
use prost::Message as _;
use serde_json::{Value, json};
use std::sync::Arc;
use superbatch_proto::v1::{
    AnnouncePushRequest, AnnouncePushResponse, AppendPhasesRequest, AppendPhasesResponse,
    CloseRunRequest, CloseRunResponse, GetReceiptRequest, GetReceiptResponse, GetRunRequest,
    GetRunResponse, GetWeightsDigestsRequest, GetWeightsDigestsResponse, ListRunsRequest,
    ListRunsResponse, ListWeightsRequest, ListWeightsResponse, OpenRunRequest, OpenRunResponse,
    PushWeightsRequest, PushWeightsResponse, RegisterRequest, RegisterResponse,
    ReportLossesRequest, ReportLossesResponse, RewindMode, RewindRequest, RewindResponse,
    RollBackWeightsRequest, RollBackWeightsResponse, SelectBatchRequest,
    coordinator_service_server::CoordinatorService, select_batch_response::Message,
    selection_service_server::SelectionService,
};
use tokio::time::Instant;
use tonic::{Request, Response, Status, Streaming};
use tracing::Span;

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
        let fork = request.spec.as_ref().and_then(|spec| spec.fork_of.as_ref());
        // Its receipts would be readable by the fork.
        fork.map_or(Ok(()), |fork| caller.check_run(&fork.run_id))?;
        let opened = self.0.open_run(request).await;
        caller.record("open", &run_id, &opened, Value::Null);
        Ok(Response::new(opened?))
    }

    async fn get_run(
        &self,
        request: Request<GetRunRequest>,
    ) -> Result<Response<GetRunResponse>, Status> {
        Caller::of(&request)?.check_run(&request.get_ref().run_id)?;
        let request = request.get_ref();
        let info = self.0.info(&request.run_id, request.resume_step).await?;
        Ok(Response::new(GetRunResponse { run: Some(info) }))
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
        let header_bytes = batch.header.encoded_len();
        let answer = Answer::new(messages(batch, outcome)).each_within(UNREAD_MAX);
        Ok(carrying(answer, header_bytes))
    }

    async fn push_weights(
        &self,
        request: Request<Streaming<PushWeightsRequest>>,
    ) -> Result<Response<PushWeightsResponse>, Status> {
        let (caller, mut stream) = (Caller::of(&request)?, request.into_inner());
        let start = read_start(&mut stream, self.0.deps.limits.push_deadline).await?;
        caller.check_run(&start.run_id)?;
        let (run_id, detail) = (start.run_id.clone(), json!({"step": start.step}));
        let published = match check_incarnation(&start.incarnation) {
            Ok(()) => weights::push(&self.0, start, stream).await,
            Err(refused) => Err(refused),
        };
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

    async fn list_weights(
        &self,
        request: Request<ListWeightsRequest>,
    ) -> Result<Response<ListWeightsResponse>, Status> {
        Caller::of(&request)?.check_run(&request.get_ref().run_id)?;
        let listed = weights::list(&self.0, request.get_ref()).await?;
        Ok(Response::new(listed))
    }

    async fn get_weights_digests(
        &self,
        request: Request<GetWeightsDigestsRequest>,
    ) -> Result<Response<GetWeightsDigestsResponse>, Status> {
        Caller::of(&request)?.check_run(&request.get_ref().run_id)?;
        let digests = self.0.weights_digests(request.get_ref()).await?;
        Ok(Response::new(digests))
    }

    async fn roll_back_weights(
        &self,
        request: Request<RollBackWeightsRequest>,
    ) -> Result<Response<RollBackWeightsResponse>, Status> {
        let (caller, request) = (Caller::of(&request)?, request.into_inner());
        caller.check_run(&request.run_id)?;
        let run = self.0.run(&request.run_id).await?;
        let version = request.version;
        let rolled_back = whole(async move { run.roll_back_weights(version).await }).await;
        let detail = json!({"version": version});
        caller.record("roll back weights", &request.run_id, &rolled_back, detail);
        Ok(Response::new(weights::rolled_back(rolled_back?)))
    }

    async fn report_losses(
        &self,
        request: Request<ReportLossesRequest>,
    ) -> Result<Response<ReportLossesResponse>, Status> {
        let (caller, request) = (Caller::of(&request)?, request.into_inner());
        caller.check_run(&request.run_id)?;
        let run = self.0.run(&request.run_id).await?;
        whole(async move { run.report_losses(&request).await }).await?;
        Ok(Response::new(ReportLossesResponse {}))
    }

    async fn get_receipt(
        &self,
        request: Request<GetReceiptRequest>,
    ) -> Result<Response<GetReceiptResponse>, Status> {
        Caller::of(&request)?.check_run(&request.get_ref().run_id)?;
        let request = request.get_ref();
        let receipt = receipts::of(&self.0, request).await?;
        let page = page(receipt, request.row_offset, request.max_rows)?;
        Ok(Response::new(page))
    }
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

fn messages(batch: Batch, mut outcome: Outcome) -> impl Iterator<Item = Message> + Send {
    outcome.sending(batch.span);
    let parts = batch.parts.into_iter().map(Message::ArrowIpc);
    let first = std::iter::once(Message::Header(batch.header));
    let last = std::iter::once_with(move || {
        outcome.sent();
        Message::Trailer(batch.trailer)
    });
    first.chain(parts).chain(last)
}

/// Counts how a SelectBatch call ended. Counting happens on drop, since a cancelled call is dropped
/// without another sign.
struct Outcome {
    begun: Instant,
    what: &'static str,
    /// When sending began.
    sending: Option<Instant>,
    /// The span of serving the batch, which ends with the call.
    span: Span,
}

impl Outcome {
    fn new() -> Self {
        Self {
            begun: Instant::now(),
            what: "cancelled",
            sending: None,
            span: Span::none(),
        }
    }

    fn failed(&mut self, error: &Error) {
        self.what = superbatch_proto::reason_name(error.reason());
    }

    fn sending(&mut self, span: Span) {
        self.sending = Some(Instant::now());
        self.span = span;
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
