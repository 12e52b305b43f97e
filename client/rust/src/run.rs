//! One open run: its batches, receipts, weights and life.
use crate::{
    Batch, Batches, BatchesConfig, Client, Error, Part, Push, Result,
    batches::fetch::{Cursor, Fetch, Urgency},
    push::{self, announce::Pushes},
};
use arrow::{datatypes::SchemaRef, ipc::reader::StreamReader};
use std::sync::{
    Arc, OnceLock,
    atomic::{AtomicU32, Ordering},
};
use superbatch_proto::v1;
use tonic::Status;

/// A run that was opened. Cheap to clone; clones share the generation.
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
        let schema = StreamReader::try_new(&opened.output_schema[..], None)
            .map_err(|error| {
                Error::from(Status::internal(format!(
                    "OpenRun answered with a schema that {error}"
                )))
            })?
            .schema();
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
    /// with a new id take over together the steps that the old ones had opened, whatever the world
    /// size; stragglers of the old are refused.
    #[must_use]
    pub fn with_incarnation(self, incarnation: impl Into<Arc<str>>) -> Self {
        Self {
            incarnation: incarnation.into(),
            ..self
        }
    }

    pub fn run_id(&self) -> &str {
        &self.shared.run_id
    }

    /// The spec in force, defaults filled.
    pub fn spec(&self) -> v1::RunSpec {
        self.shared.opened.spec.clone().unwrap_or_default()
    }

    /// The schema of every batch.
    pub fn schema(&self) -> &SchemaRef {
        &self.shared.schema
    }

    /// What the service answered when the run was opened.
    pub fn opened(&self) -> &v1::OpenRunResponse {
        &self.shared.opened
    }

    /// When the run was opened, the step after the last committed one: where a trainer without a
    /// checkpoint goes on.
    pub fn next_step(&self) -> u64 {
        self.shared.opened.next_step
    }

    /// The trajectory that this handle asks for and pushes to.
    pub fn generation(&self) -> u32 {
        self.shared.generation.load(Ordering::Acquire)
    }

    /// This rank's slice of the step's sub-batch.
    ///
    /// Under [`v1::Intent::Need`] the service's deadline runs; under `Prefetch` the call waits as
    /// long as it takes.
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
        }
        .batch()
        .await
    }

    /// The steps from `config.start_step` on, each asked for ahead of time.
    pub fn batches(&self, config: BatchesConfig) -> Result<Batches> {
        Batches::new(self.clone(), config)
    }

    /// Pushes the weights that `step` left behind (-1: the initial ones), whole, and waits until
    /// they are published.
    ///
    /// Its push id follows from (generation, step), so that a trainer which resumes from a
    /// checkpoint and repeats a step is answered with what was published, and several ranks of one
    /// push agree without talking. So other weights for a step that is published change nothing
    /// ([`Run::dropped_push`]): to retrain from it, [`Run::rewind`] to it first.
    pub async fn push_weights(&self, step: i64, parts: Vec<Part>) -> Result<v1::WeightsVersion> {
        self.push(Push::whole(step, parts)).await
    }

    /// Pushes whole weights or one rank's parts of them, and waits until the whole push is
    /// published or refused.
    pub async fn push(&self, push: Push) -> Result<v1::WeightsVersion> {
        let announced = self.announce_push(push.step, push.rank).await;
        push::push(self, push, announced).await
    }

    /// The first step for which this process pushed other weights than those that are published,
    /// and stay.
    ///
    /// Known of whole pushes only: of one rank's parts, what the other ranks pushed is not known
    /// here.
    pub fn dropped_push(&self) -> Option<i64> {
        self.shared.dropped.get().copied()
    }

    pub async fn get_run(&self) -> Result<v1::RunInfo> {
        self.client.get_run(self.run_id()).await
    }

    /// The pushes that a trainer which goes on at `resume_step` has to repeat, with its
    /// checkpoint's weights: they were on their way when the trainer before it ended, and steps
    /// wait for them.
    pub async fn missing_pushes(&self, resume_step: u64) -> Result<Vec<i64>> {
        let run_id = self.run_id().to_owned();
        let run = self
            .client
            .get_run_resumed(run_id, Some(resume_step))
            .await?;
        Ok(run.missing_pushes)
    }

    /// Ends the run, for all ranks: no further steps or pushes. Its receipts stay.
    pub async fn close_run(&self) -> Result<()> {
        self.client.close_run(self.run_id()).await
    }

    /// Adds phases for steps that are not committed yet, and returns the spec in force. Not
    /// repeated on faults.
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

    /// Goes back to `to_step` in a new generation, which this handle and its clones follow; other
    /// ranks open the run again. Not repeated on faults, because each call opens a generation.
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

    /// Why a step's batch was chosen, row by row, in however many pages it comes. `generation`: the
    /// run's current one if absent.
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
            // The run may be rewound between two pages.
            request.generation = whole.summary.as_ref().map(|summary| summary.generation);
        }
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

    /// Remembers that the weights pushed for `step` are not those that are published.
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
