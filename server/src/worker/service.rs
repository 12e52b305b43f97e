//! The worker's gRPC service: each method in a few lines.
use super::{
    calls::{
        ahead::{Asked, Embedder},
        answers::{AnswerStream, Answers, answer_with},
        fetch::fetch_rows,
        score::score,
        select::select,
        ticket::{TicketStream, fetch_ticket},
    },
    config::WorkerConfig,
    engine::Engine,
    model::ModelInfo,
};
use crate::{
    error::{Error, Result},
    handed::Handover,
    process,
    pushed::Pushed,
    storage::{Location, Stores},
    traces::{continued, stage},
};
use bytes::Bytes;
use futures::{FutureExt, Stream};
use std::sync::Arc;
use superbatch_proto::{
    MESSAGE_BYTES_MAX,
    v1::{
        FetchRowsRequest, FetchRowsResponse, FetchTicketRequest, ImageTower, ModelRef,
        PrepareModelRequest, PrepareModelResponse, ScoreRequest, ScoreResponse, SelectRequest,
        SelectResponse, TensorInfo,
        delivery_service_server::{DeliveryService, DeliveryServiceServer},
        worker_service_server::{WorkerService, WorkerServiceServer},
    },
};
use tokio::sync::watch;
use tonic::{Request, Response, Status, Streaming};
use tracing::Instrument;

/// A scoring worker. Calls restore everything that it keeps, so it may be lost at any time.
#[derive(Clone)]
pub struct Worker(Arc<Engine>);

/// What a worker reports about itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WorkerInfo {
    pub device: String,
    pub threads: usize,
}

impl Worker {
    /// Starts the device and the decode threads.
    ///
    /// # Errors
    /// `InvalidArgument` for a setting that cannot work, `DeviceUnavailable`.
    pub fn new(config: &WorkerConfig, stores: Stores, state: Location) -> Result<Self> {
        let engine = Arc::new(Engine::new(config, stores, state)?);
        type Held = fn(&Engine) -> usize;
        let budgets: [(&'static str, usize, Held); 6] = [
            ("blocks", config.block_cache_bytes, |e| {
                e.reader.cached_bytes()
            }),
            ("rows", config.row_bytes_max, |e| e.raw.bytes()),
            ("buffers", config.buffer_bytes_max, |e| e.buffers.bytes()),
            ("images", config.decoded_bytes_max, |e| e.ready.bytes()),
            ("held", config.held_bytes_max, |e| e.held.bytes()),
            ("embeddings", config.reference_cache_bytes, |e| {
                e.sidecar.cached_bytes()
            }),
        ];
        for (name, limit, held) in budgets {
            // Weak: the meters live as long as the process and must not keep a stopped worker's
            // memory.
            let engine = Arc::downgrade(&engine);
            process::budget(name, limit as u64, move || {
                engine.upgrade().map(|engine| held(&engine) as u64)
            });
        }
        Ok(Self(engine))
    }

    /// Returns the service, with the protocol's message limits.
    pub fn service(&self) -> WorkerServiceServer<Self> {
        WorkerServiceServer::new(self.clone())
            .max_decoding_message_size(MESSAGE_BYTES_MAX)
            .max_encoding_message_size(MESSAGE_BYTES_MAX)
    }

    /// Returns the service for trainers, which asks for tickets only.
    pub fn delivery(&self) -> DeliveryServiceServer<Self> {
        DeliveryServiceServer::new(self.clone())
            .max_decoding_message_size(MESSAGE_BYTES_MAX)
            .max_encoding_message_size(MESSAGE_BYTES_MAX)
    }

    /// Returns the key by which the coordinator signs tickets for this worker.
    pub fn ticket_key(&self) -> Bytes {
        self.0.ticket_key.to_bytes()
    }

    pub fn info(&self) -> WorkerInfo {
        WorkerInfo {
            device: self.0.device.name().to_owned(),
            threads: self.0.threads,
        }
    }

    /// Returns whether the device works; `false` while it is hung and every call fails.
    pub fn is_well(&self) -> watch::Receiver<bool> {
        self.0.device.is_well()
    }

    /// Ends the calls that wait, so that the process may end. The coordinator moves them to other
    /// workers.
    pub fn stop(&self) {
        self.0.stop();
    }

    /// Waits until no slice is being read, decoded or embedded.
    pub async fn wait_until_idle(&self) {
        self.0.wait_until_idle().await;
    }

    /// Returns the bytes of rows, and of decoded images, that are kept for calls under way.
    pub fn retained_bytes(&self) -> (usize, usize) {
        (self.0.raw.bytes(), self.0.ready.bytes())
    }

    /// Embeds blocks ahead of any run, as scoring would.
    ///
    /// # Errors
    /// As [`Embedder::open`].
    pub async fn embedder(&self, asked: Asked) -> Result<Embedder<'_>> {
        Embedder::open(&self.0, asked).await
    }

    /// Serves a `Score` call, of another process or of this one: then rows are put into `handover`.
    pub fn answer_score(
        &self,
        requests: impl Stream<Item = Result<ScoreRequest, Status>> + Send + 'static,
        handover: Option<Handover>,
    ) -> AnswerStream<ScoreResponse> {
        let engine = self.0.clone();
        answer_with(|answers: Answers<_>| {
            let answers = answers.handing(handover);
            async move { score(&engine, requests, &answers).await }.boxed()
        })
    }

    /// Serves a `FetchRows` call, as [`Worker::answer_score`] does.
    pub fn answer_fetch_rows(
        &self,
        request: FetchRowsRequest,
        handover: Option<Handover>,
    ) -> AnswerStream<FetchRowsResponse> {
        let engine = self.0.clone();
        answer_with(|answers: Answers<_>| {
            let answers = answers.handing(handover);
            async move { fetch_rows(&engine, request, &answers).await }.boxed()
        })
    }

    async fn prepare(&self, request: PrepareModelRequest) -> Result<PrepareModelResponse> {
        let model = request
            .model
            .ok_or_else(|| Error::invalid("model", "PrepareModel names no model"))?;
        let loaded = self.0.models.load_anew(&model).await?;
        Ok(self.describe(&loaded.info))
    }

    /// As `PrepareModel`, for a snapshot that the coordinator of this process has in memory.
    pub(crate) async fn prepare_pushed(
        &self,
        model: ModelRef,
        pushed: Pushed,
    ) -> Result<PrepareModelResponse> {
        let loaded = self.0.models.load_pushed(&model, pushed).await?;
        Ok(self.describe(&loaded.info))
    }

    fn describe(&self, info: &ModelInfo) -> PrepareModelResponse {
        let tensors = info.tensors.iter().map(|(name, shape)| TensorInfo {
            name: name.clone(),
            shape: shape.clone(),
            optional: info.optional_tensors.contains(name),
        });
        let tower = &info.image_tower;
        PrepareModelResponse {
            digest: info.digest.clone(),
            model_type: info.model_type.to_string(),
            embedding_dim: info.embedding_dim as u32,
            image_size: info.image_size as u32,
            text_length: info.text_length as u32,
            logit_scale: info.logit_scale,
            logit_bias: info.logit_bias,
            image_flops: info.image_flops,
            text_flops: info.text_flops,
            tensors: tensors.collect(),
            device: self.0.device.name().to_owned(),
            weights_digest: info.weights_digest.clone(),
            files: info.files.clone().into_iter().collect(),
            compute_dtype: info.key.compute.dtype().into(),
            image_tower: Some(ImageTower {
                image_size: tower.image_size,
                patch_size: tower.patch_size,
                layers: tower.layers,
                constant: tower.constant,
                per_patch: tower.per_patch,
                per_patch_pair: tower.per_patch_pair,
                layer_constant: tower.layer_constant,
                layer_per_patch: tower.layer_per_patch,
                layer_per_patch_pair: tower.layer_per_patch_pair,
                per_pixel: tower.per_pixel,
                max_patches: tower.max_patches,
            }),
        }
    }
}

#[tonic::async_trait]
impl WorkerService for Worker {
    type ScoreStream = AnswerStream<ScoreResponse>;
    type FetchRowsStream = AnswerStream<FetchRowsResponse>;

    async fn prepare_model(
        &self,
        request: Request<PrepareModelRequest>,
    ) -> Result<Response<PrepareModelResponse>, Status> {
        Ok(Response::new(self.prepare(request.into_inner()).await?))
    }

    async fn score(
        &self,
        request: Request<Streaming<ScoreRequest>>,
    ) -> Result<Response<Self::ScoreStream>, Status> {
        let span = continued(stage!("score"), &request);
        let answers = span.in_scope(|| self.answer_score(request.into_inner(), None));
        Ok(Response::new(answers))
    }

    async fn fetch_rows(
        &self,
        request: Request<FetchRowsRequest>,
    ) -> Result<Response<Self::FetchRowsStream>, Status> {
        let span = continued(stage!("fetch_rows"), &request);
        let answers = span.in_scope(|| self.answer_fetch_rows(request.into_inner(), None));
        Ok(Response::new(answers))
    }

    async fn select(
        &self,
        request: Request<Streaming<SelectRequest>>,
    ) -> Result<Response<SelectResponse>, Status> {
        let span = continued(stage!("select_on_device"), &request);
        let selected = select(&self.0, request.into_inner()).instrument(span);
        Ok(Response::new(selected.await?))
    }
}

#[tonic::async_trait]
impl DeliveryService for Worker {
    type FetchTicketStream = TicketStream;

    async fn fetch_ticket(
        &self,
        request: Request<FetchTicketRequest>,
    ) -> Result<Response<Self::FetchTicketStream>, Status> {
        let stream = fetch_ticket(self.0.clone(), request.into_inner()).await?;
        Ok(Response::new(stream))
    }
}
