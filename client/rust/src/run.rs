//! One open run: its batches, receipts, weights and changes.
use crate::{
    Batch, Batches, BatchesConfig, Client, Error, Part, Push, Result,
    batches::fetch::{Cursor, Fetch, Urgency},
    client::Api,
    push::{self, announce::Pushes},
};
use arrow::datatypes::SchemaRef;
use std::sync::{
    Arc, OnceLock,
    atomic::{AtomicU32, Ordering},
};
use superbatch_proto::{arrow_stream, v1};
use tonic::Status;

/// An open run. Cheap to clone; clones share the generation.
#[derive(Debug, Clone)]
pub struct Run {
    pub(crate) client: Client,
    pub(crate) shared: Arc<Shared>,
    incarnation: Arc<str>,
}

#[derive(Debug)]
pub(crate) struct Shared {
    run_id: String,
    opened: v1::OpenRunResponse,
    schema: SchemaRef,
    generation: AtomicU32,
    pushes: Arc<Pushes>,
    dropped: OnceLock<i64>,
}

impl Run {
    pub(crate) fn new(client: Client, run_id: String, opened: v1::OpenRunResponse) -> Result<Self> {
        let read = arrow_stream::read([opened.output_schema.clone()]);
        let (schema, _) = read.map_err(|error| {
            let message = format!("OpenRun answered with a schema that cannot be read: {error}");
            Error::from(Status::internal(message))
        })?;
        let generation = AtomicU32::new(opened.generation);
        let shared = Arc::new(Shared {
            run_id,
            opened,
            schema,
            generation,
            pushes: Arc::default(),
            dropped: OnceLock::new(),
        });
        Ok(Self {
            client,
            shared,
            incarnation: "".into(),
        })
    }

    /// Names this start of the trainer, by an id that all its ranks share. After a restart, ranks
    /// with a new id take over the steps that the old ranks had opened, whatever the world size.
    /// Late ranks of the old start are refused.
    #[must_use]
    pub fn with_incarnation(self, incarnation: impl Into<Arc<str>>) -> Self {
        Self {
            incarnation: incarnation.into(),
            ..self
        }
    }

    /// Returns the name under which the run was opened.
    pub fn run_id(&self) -> &str {
        &self.shared.run_id
    }

    /// Returns the spec in force, with defaults filled in.
    pub fn spec(&self) -> v1::RunSpec {
        self.shared.opened.spec.clone().unwrap_or_default()
    }

    /// Returns the schema of every batch.
    pub fn schema(&self) -> &SchemaRef {
        &self.shared.schema
    }

    /// Returns the service's answer when the run was opened.
    pub fn opened(&self) -> &v1::OpenRunResponse {
        &self.shared.opened
    }

    /// Returns the first step that was not committed when the run was opened. A trainer without a
    /// checkpoint goes on there.
    pub fn next_step(&self) -> u64 {
        self.shared.opened.next_step
    }

    /// Returns the generation that this handle requests and pushes to.
    pub fn generation(&self) -> u32 {
        self.shared.generation.load(Ordering::Acquire)
    }

    /// Returns this rank's share of the step's sub-batch.
    ///
    /// Under [`v1::Intent::Need`] the service's deadline applies; under `Prefetch` the call waits
    /// as long as it takes.
    pub async fn select(
        &self,
        step: u64,
        rank: u32,
        world_size: u32,
        intent: v1::Intent,
    ) -> Result<Batch> {
        let urgency = Urgency::Fixed(intent);
        Fetch {
            run: self.clone(),
            step,
            rank,
            world_size,
            cursor: Cursor::default(),
            held: 0,
            urgency,
            delivery: self.spec().delivery(),
        }
        .batch()
        .await
    }

    /// Returns the steps from `config.start_step` on, each requested ahead of time.
    pub fn batches(&self, config: BatchesConfig) -> Result<Batches> {
        Batches::new(self.clone(), config)
    }

    /// Pushes all weights after `step` (-1: the initial ones), and waits until they are published.
    ///
    /// The push id is made from (generation, step). So several ranks of one push agree without
    /// communication, and a trainer that resumes and repeats a step gets the published version.
    /// Other weights for a published step change nothing ([`Run::dropped_push`]): to retrain from
    /// it, [`Run::rewind`] to it first.
    pub async fn push_weights(&self, step: i64, parts: Vec<Part>) -> Result<v1::WeightsVersion> {
        self.push(Push::whole(step, parts)).await
    }

    /// Pushes whole weights or one rank's parts of them, and waits until the whole push is
    /// published or refused.
    pub async fn push(&self, push: Push) -> Result<v1::WeightsVersion> {
        let announced = self.announce_push(push.step, push.rank).await;
        push::push(self, push, announced).await
    }

    /// Returns the first step for which this process pushed other weights than the published ones,
    /// which stay in force.
    ///
    /// This is known for whole pushes only: one rank does not know the other ranks' parts.
    pub fn dropped_push(&self) -> Option<i64> {
        self.shared.dropped.get().copied()
    }

    /// Returns what the service knows of the run.
    ///
    /// # Errors
    /// As the service refuses it, or if the service cannot be reached.
    pub async fn get_run(&self) -> Result<v1::RunInfo> {
        self.client.get_run(self.run_id()).await
    }

    /// Returns the pushes that a trainer which goes on at `resume_step` must repeat with its
    /// checkpoint's weights. They were under way when the earlier trainer ended, and steps wait for
    /// them.
    pub async fn missing_pushes(&self, resume_step: u64) -> Result<Vec<i64>> {
        let run_id = self.run_id().to_owned();
        let run = self
            .client
            .get_run_resumed(run_id, Some(resume_step))
            .await?;
        Ok(run.missing_pushes)
    }

    /// Ends the run for all ranks: no further steps or pushes. Its receipts stay.
    pub async fn close_run(&self) -> Result<()> {
        self.client.close_run(self.run_id()).await
    }

    /// Adds phases for steps that are not committed yet. Returns the spec in force. Not retried.
    pub async fn append_phases(&self, phases: Vec<v1::Phase>) -> Result<v1::RunSpec> {
        let request = v1::AppendPhasesRequest {
            run_id: self.run_id().to_owned(),
            phases,
        };
        let response = self
            .client
            .api()
            .append_phases(request)
            .await
            .map_err(|status| self.broken_stream_error(status))?
            .into_inner();
        Ok(response.spec.unwrap_or_default())
    }

    /// Goes back to `to_step` in a new generation. This handle and its clones follow; other ranks
    /// open the run again. Not retried, because each call opens a generation.
    pub async fn rewind(&self, to_step: u64, mode: v1::RewindMode) -> Result<u32> {
        let request = v1::RewindRequest {
            run_id: self.run_id().to_owned(),
            to_step,
            mode: mode.into(),
        };
        let rewound = self
            .client
            .api()
            .rewind(request)
            .await
            .map_err(|status| self.broken_stream_error(status))?;
        let generation = rewound.into_inner().generation;
        self.shared.generation.store(generation, Ordering::Release);
        Ok(generation)
    }

    /// Returns a step's receipt: why its batch was chosen, row by row. Joins all pages.
    /// `generation` is the run's current one if absent.
    pub async fn receipt(&self, step: u64, generation: Option<u32>) -> Result<v1::Receipt> {
        let mut request = v1::GetReceiptRequest {
            run_id: self.run_id().to_owned(),
            step,
            generation,
            ..Default::default()
        };
        let mut whole = v1::Receipt::default();
        loop {
            let asked = request.clone();
            let page = self
                .client
                .call(asked, |mut api, request| async move {
                    api.get_receipt(request).await
                })
                .await?;
            let next = page.next_row_offset;
            let part = page
                .receipt
                .ok_or_else(|| incomplete_answer("without a receipt"))?;
            whole.chosen.extend(part.chosen);
            whole.bad_rows.extend(part.bad_rows);
            whole.passed_over.extend(part.passed_over);
            whole.summary = part.summary;
            let Some(next) = next else { return Ok(whole) };
            if next <= request.row_offset {
                return Err(incomplete_answer("with a page that leads nowhere"));
            }
            request.row_offset = next;
            // Pins the generation, since the run may be rewound between two pages.
            request.generation = whole.summary.as_ref().map(|summary| summary.generation);
        }
    }

    /// Reports the trainer's own losses of examples of `step`, by their `_superbatch_id`. They are
    /// the score column `_superbatch_loss` of steps that are decided later. Reporting again what
    /// was reported changes nothing.
    pub async fn report_losses(&self, step: u64, ids: Vec<String>, losses: Vec<f32>) -> Result<()> {
        let request = v1::ReportLossesRequest {
            run_id: self.run_id().to_owned(),
            generation: self.generation(),
            step,
            ids,
            losses,
        };
        let call = |mut api: Api, request| async move { api.report_losses(request).await };
        self.client.call(request, call).await.map(drop)
    }

    fn broken_stream_error(&self, status: Status) -> Error {
        self.client.located(status.into())
    }

    pub(crate) fn incarnation(&self) -> &str {
        &self.incarnation
    }

    pub(crate) fn pushing_through(&self) -> Option<i64> {
        self.shared.pushes.newest(self.generation())
    }

    pub(crate) fn has_published(&self, generation: u32, step: i64) -> bool {
        self.shared.pushes.has_published(generation, step)
    }

    /// Remembers that the weights pushed for `step` are not the published ones.
    pub(crate) fn drop_push(&self, step: i64) {
        if self.shared.dropped.set(step).is_ok() {
            tracing::warn!(
                run = self.run_id(),
                step,
                "other weights are published for this step, and stay"
            );
        }
    }

    pub(crate) fn pushes(&self) -> &Arc<Pushes> {
        &self.shared.pushes
    }
}

fn incomplete_answer(how: &str) -> Error {
    Error::from(Status::internal(format!("GetReceipt answered {how}")))
}
