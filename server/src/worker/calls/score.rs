//! Serves one slice, from its first message to its chosen rows.
use super::{
    answers::Answers,
    embed::Shape,
    extent::{Extent, place},
    messages::{answer, next},
    slice::{Slice, each},
    survey::{AHEAD, Spent, Surveyed, Task, survey},
};
use crate::{
    bounds::MICRO_BATCH_ROWS_MAX,
    error::{Error, Result},
    fidelity::Fidelity,
    metrics,
    traces::stage,
    worker::{
        engine::Engine,
        inputs::{
            model_inputs::Inputs,
            preprocess::RowFault,
            row::{Prepared, PreparedRow},
        },
        kept::{embeddings::Embeddings, held::HeldFor, retained::Kept},
        loader::Loaded,
    },
};
use futures::{FutureExt, Stream, StreamExt, TryStreamExt, stream};
use std::{
    collections::HashMap,
    ops::Range,
    pin::pin,
    sync::{Arc, Mutex},
};
use superbatch_proto::v1::{
    BadRowReason, EmbedDone, EmbeddingDtype, Hole, Holes, LearnerGo, RowsForm, ScoreBegin,
    ScoreRequest, ScoreResponse, Tower, score_request, score_response::Message,
};
use tonic::Status;
use tracing::Instrument;

/// Serves one `Score` call.
///
/// # Errors
/// Those of reading, of models, and `InvalidArgument` if messages do not come in the order of
/// the protocol.
pub(crate) async fn score(
    engine: &Engine,
    requests: impl Stream<Item = Result<ScoreRequest, Status>>,
    answers: &Answers<ScoreResponse>,
) -> Result<()> {
    let mut requests = pin!(requests);
    let Some(score_request::Message::Begin(begin)) = next(engine, &mut requests).await? else {
        return Err(Error::invalid(
            "message",
            "a Score call starts with ScoreBegin",
        ));
    };
    let mut scoring = Scoring::open(engine, begin).await?;
    for message in scoring.survey().instrument(stage!("survey")).await? {
        answers.send(answer(message)).await?;
    }
    let mut learned = false;
    while let Some(message) = next(engine, &mut requests).await? {
        match message {
            score_request::Message::Learner(go) if scoring.task.keep_ready && !learned => {
                learned = true;
                for message in scoring.learner(go).instrument(stage!("learner")).await? {
                    answers.send(answer(message)).await?;
                }
            }
            score_request::Message::Chosen(chosen) if chosen.form() == RowsForm::Kept => {
                let kept = scoring.keep_chosen(chosen, &mut requests, answers);
                return kept.instrument(stage!("keep_rows")).await;
            }
            score_request::Message::Chosen(chosen) => {
                let sent = scoring.send_chosen(chosen, answers);
                return sent.instrument(stage!("send_rows")).await;
            }
            _ => {
                return Err(Error::invalid(
                    "message",
                    "after ScoreBegin comes LearnerGo, once and if announced, then ChosenRows",
                ));
            }
        }
    }
    Ok(())
}

/// The state of one call.
pub(crate) struct Scoring<'a> {
    pub engine: &'a Engine,
    pub slice: Slice,
    held_for: HeldFor,
    task: Task,
    pub blocks: Vec<Surveyed>,
    /// Faults by candidate. Candidates whose reference embedding is not finite are among them.
    pub faults: HashMap<usize, RowFault>,
    /// Decoded rows by candidate. A row is taken out when the learner reaches it.
    ready: Mutex<Vec<Option<Kept<Arc<Prepared>>>>>,
}

impl<'a> Scoring<'a> {
    async fn open(engine: &'a Engine, begin: ScoreBegin) -> Result<Self> {
        let dtype = match begin.embedding_dtype() {
            EmbeddingDtype::Unspecified => EmbeddingDtype::F16,
            given => given,
        };
        if begin.micro_batch_rows == 0 || begin.micro_batch_rows > MICRO_BATCH_ROWS_MAX {
            let message = format!(
                "micro_batch_rows is {}; it must be 1 to {MICRO_BATCH_ROWS_MAX}",
                begin.micro_batch_rows
            );
            return Err(Error::invalid("micro_batch_rows", message));
        }
        let fidelity = Fidelity::of(begin.approximation.as_ref())?;
        let mut slice =
            Slice::open(engine, &begin.dataset_manifest, begin.blocks, begin.columns).await?;
        slice.share(begin.reference_from as usize, begin.reference_more)?;
        slice.keep_for = Some(begin.step);
        let reference = match &begin.reference {
            Some(model) => Some(engine.models.load(model).await?.at(fidelity)?),
            None => None,
        };
        let inputs = match &begin.learner_model {
            Some(model) => Some(engine.models.inputs(model).await?.at(fidelity)),
            None if begin.check_only && slice.has_texts() => Some(Arc::new(Inputs::check_texts())),
            None if begin.check_only => Some(Arc::new(Inputs::check())),
            None => None,
        };
        let shape = Shape {
            micro_batch_rows: begin.micro_batch_rows as usize,
            dtype,
        };
        let extent = if begin.reference_sparse {
            Extent::Wanted
        } else {
            Extent::Step
        };
        let keep_ready = begin.learner_model.is_some() && !begin.check_only;
        let task = Task {
            step: begin.step,
            shape,
            fidelity,
            reference,
            extent,
            inputs,
            keep_ready,
        };
        Ok(Self {
            engine,
            slice,
            held_for: HeldFor {
                run_id: begin.run_id,
                generation: begin.generation,
                step: begin.step,
            },
            task,
            blocks: Vec::new(),
            faults: HashMap::new(),
            ready: Mutex::default(),
        })
    }

    /// Returns the step for which chosen rows are held.
    pub(crate) fn held_for(&self) -> HeldFor {
        self.held_for.clone()
    }

    /// Reads, decodes and embeds with the reference. Returns the holes, then the reference's
    /// embeddings.
    async fn survey(&mut self) -> Result<Vec<Message>> {
        let slot = self.engine.slot().await?;
        self.blocks = survey(self.engine, &self.slice, &self.task).await?;
        drop(slot);
        let spent: Spent = self.blocks.iter().map(|block| block.spent).sum();
        metrics::stage_duration("fetch").record(spent.fetch_seconds);
        metrics::stage_duration("decode").record(spent.decode_seconds);
        for (block, found) in self.slice.blocks.iter().zip(&mut self.blocks) {
            self.faults.extend(
                found
                    .faults
                    .drain(..)
                    .map(|(n, fault)| (block.first + n, fault)),
            );
            self.ready
                .get_mut()
                .expect("no panic while held")
                .append(&mut found.ready);
        }
        let mut messages = vec![Message::Holes(self.holes(&spent))];
        if let Some(model) = self.task.reference.clone() {
            self.reference(&model, &spent, &mut messages);
        }
        Ok(messages)
    }

    /// Returns the holes by rising candidate. Candidates whose embedding is not finite are left out
    /// here: they are reported with the embeddings.
    fn holes(&self, spent: &Spent) -> Holes {
        let mut holes: Vec<Hole> = Vec::new();
        for (candidate, RowFault { reason, detail, .. }) in &self.faults {
            if *reason != BadRowReason::EmbeddingNotFinite {
                holes.push(Hole {
                    candidate: *candidate as u32,
                    reason: (*reason).into(),
                    detail: detail.clone(),
                });
            }
        }
        holes.sort_unstable_by_key(|hole| hole.candidate);
        Holes {
            holes,
            fetch_seconds: spent.fetch_seconds,
            decode_seconds: spent.decode_seconds,
        }
    }

    fn reference(&mut self, model: &Loaded, spent: &Spent, messages: &mut Vec<Message>) {
        let rows = self.slice.reference_rows.clone();
        let mut embeddings =
            Embeddings::zeros(rows.len(), model.info.embedding_dim, self.task.shape.dtype);
        let mut rows_cached = 0;
        for (block, found) in self.slice.blocks.iter().zip(&mut self.blocks) {
            let Some(reference) = found.reference.take() else {
                continue;
            };
            for (candidate, row) in (block.first..).zip(block.reference_rows()) {
                // A row that the reference can use but the learner cannot is a hole for both. It
                // stays zero here: no score could compare the two models on it.
                if !self.faults.contains_key(&candidate) {
                    embeddings.copy_row(
                        candidate - rows.start,
                        &reference.embeddings,
                        place(found.reference_rows.as_deref(), row),
                    );
                }
            }
            rows_cached += if found.spent.rows_embedded == 0 {
                block.rows.len()
            } else {
                0
            };
        }
        metrics::stage_duration("embed_reference").record(spent.embed_seconds);
        let text_flops = spent.text_flops;
        let flops = spent.rows_embedded as f64 * model.info.image_flops + text_flops;
        metrics::flops("reference").increment(flops as u64);
        let is_not_finite = |(candidate, fault): (&usize, &RowFault)| {
            (fault.reason == BadRowReason::EmbeddingNotFinite).then_some(*candidate as u32)
        };
        let mut not_finite: Vec<u32> = self.faults.iter().filter_map(is_not_finite).collect();
        not_finite.sort_unstable();
        messages.extend(
            embeddings
                .parts(Tower::Reference, rows.start)
                .map(Message::Embedding),
        );
        messages.push(Message::Done(EmbedDone {
            seconds: spent.embed_seconds,
            flops,
            text_flops,
            rows_cached: rows_cached as u32,
            not_finite,
            ..self.done(Tower::Reference, model)
        }));
    }

    /// Returns the learner's embeddings of all candidates.
    async fn learner(&mut self, go: LearnerGo) -> Result<Vec<Message>> {
        let model = go
            .learner
            .ok_or_else(|| Error::invalid("learner", "LearnerGo names no model"))?;
        let model = self.engine.models.load(&model).await?;
        let model = model.at(self.task.fidelity)?;
        if self
            .task
            .inputs
            .as_ref()
            .is_none_or(|inputs| inputs.digest != model.inputs.digest)
        {
            let message =
                "the learner wants its rows otherwise than the model that ScoreBegin announced";
            return Err(Error::invalid("learner", message));
        }
        let slot = self.engine.slot().await?;
        let shape = self.task.shape;
        let mut embeddings =
            Embeddings::zeros(self.slice.candidates, model.info.embedding_dim, shape.dtype);
        let (mut not_finite, mut seconds, mut decode_seconds) = (Vec::new(), 0.0, 0.0);
        let mut text_flops = 0.0;
        let this = &*self;
        let micro_batches = shape.micro_batches(self.slice.candidates);
        let micro_batches =
            micro_batches.map(|range| this.micro_batch(range, &model.inputs).boxed());
        let mut micro_batches = stream::iter(micro_batches).buffered(AHEAD);
        while let Some((first, rows, decoded_in)) = micro_batches.try_next().await? {
            let done = shape
                .embed(this.engine, &model, &rows, &mut embeddings, first)
                .await?;
            seconds += done.seconds;
            text_flops += done.text_flops;
            decode_seconds += decoded_in;
            not_finite.extend(done.not_finite.iter().map(|row| (first + row) as u32));
        }
        drop(micro_batches);
        drop(slot);
        metrics::stage_duration("embed_learner").record(seconds);
        // Most images are kept from the survey. Recording zeros for them would hide the steps whose
        // images were decoded twice.
        if decode_seconds > 0.0 {
            metrics::stage_duration("decode").record(decode_seconds);
        }
        let rows = shape.padded(self.slice.candidates) as f64;
        let flops = rows * model.info.image_flops + text_flops;
        metrics::flops("learner").increment(flops as u64);
        let mut messages: Vec<Message> = embeddings
            .parts(Tower::Learner, 0)
            .map(Message::Embedding)
            .collect();
        messages.push(Message::Done(EmbedDone {
            seconds,
            flops,
            text_flops,
            not_finite,
            ..self.done(Tower::Learner, &model)
        }));
        Ok(messages)
    }

    /// Returns the rows of one micro-batch, ready for the learner: the kept ones, and the others
    /// decoded again.
    async fn micro_batch(
        &self,
        range: Range<usize>,
        inputs: &Arc<Inputs>,
    ) -> Result<(usize, Vec<PreparedRow>, f64)> {
        let mut rows: Vec<Option<PreparedRow>> = Vec::with_capacity(range.len());
        for candidate in range.clone() {
            let fault = self.faults.get(&candidate).map(|fault| Err(fault.clone()));
            rows.push(fault.or_else(|| self.take_ready(candidate).map(Ok)));
        }
        let missing: Vec<usize> = (0..rows.len()).filter(|n| rows[*n].is_none()).collect();
        let mut again = Vec::with_capacity(missing.len());
        let block_of = |n: &usize| self.slice.block_of(range.start + n);
        for same in missing.chunk_by(|a, b| block_of(a) == block_of(b)) {
            let block = block_of(&same[0]);
            let about = &self.slice.blocks[block];
            let numbers = same.iter().map(|n| range.start + n - about.first);
            let numbers: Vec<usize> = numbers.collect();
            again.extend(match self.kept(block, &numbers) {
                Some(kept) => kept,
                None => {
                    let rows: Vec<u32> = numbers.iter().map(|n| about.rows[*n]).collect();
                    let whole = self.slice.read(self.engine, about).await?;
                    self.slice.rows(self.engine, about, &whole, &rows).await?
                }
            });
        }
        let (decoded, seconds) = if again.is_empty() {
            (Vec::new(), 0.0)
        } else {
            self.engine.pool.prepare(again, inputs.clone()).await?
        };
        for (n, row) in missing.into_iter().zip(decoded) {
            // This row was decodable in the survey, and its hole would have been reported then. The
            // coordinator has closed its list of holes by now, so a new one cannot be reported: the
            // data changed under the run.
            if let Err(fault) = &row {
                return Err(self.changed(range.start + n, &fault.detail));
            }
            rows[n] = Some(row);
        }
        Ok((range.start, each(rows)?, seconds))
    }

    fn take_ready(&self, candidate: usize) -> Option<Arc<Prepared>> {
        self.ready
            .lock()
            .expect("no panic while held")
            .get_mut(candidate)?
            .take()?
            .get()
    }

    fn done(&self, tower: Tower, model: &Loaded) -> EmbedDone {
        EmbedDone {
            tower: tower.into(),
            logit_scale: model.info.logit_scale,
            logit_bias: model.info.logit_bias,
            model_digest: model.info.digest.clone(),
            device: self.engine.device.name().to_owned(),
            compute_dtype: model.info.key.compute.dtype().into(),
            files: model.info.files.clone().into_iter().collect(),
            ..Default::default()
        }
    }
}
