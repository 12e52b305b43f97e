//! The life of one step: plan → score → select → commit. Serving is the caller's.
use super::{
    models,
    plan::SuperBatch,
    record::{self, Decided},
    run::Run,
    scoring::{self, Rows, Scored, Scoring},
    slice::{Job, fetch_rows},
    spec::phase_at,
    step::{Ready, Reporter},
    waiting::{Moment, Verdict, Why, verdict},
    weights::{Due, Published, due},
};
use crate::{
    error::{Error, Result},
    metrics,
};
use std::{collections::BTreeSet, time::Duration};
use superbatch_proto::v1::{
    BlockRows, Criterion, Fallback, Hole, Loss, Mode, ModelRef, Phase, Policy, Reason, Receipt, RunSpec, SelectBegin,
    SelectResponse,
};
use tokio::time::Instant;

/// Weights for a step, or the way it is decided without.
enum Learner {
    NotAsked,
    Version(Published, Mode),
    Degraded(Mode),
}

/// Decides `step` in the run's newest generation, or recalls what was decided before.
pub async fn decide(run: &Run, generation: u32, step: u64, reporter: &Reporter) -> Result<Ready> {
    if let Some(receipt) = run.find_receipt(step).await? {
        return recall(run, receipt).await;
    }
    let begun = Instant::now();
    let spec = run.spec();
    let phase = phase_at(&spec.phases, step).clone();
    let super_batch = run.plan.step(&spec.phases, step)?;
    let mut decided = Decided::new(generation, step, phase);
    decided.cost_seconds().plan = begun.elapsed().as_secs_f64();
    let maker = Maker { run, spec: &spec, super_batch: &super_batch, reporter };
    let rows = match decided.phase.policy() {
        Policy::Uniform => maker.uniform(&mut decided).await?,
        _ => maker.scored(&mut decided).await?,
    };
    decided.cost_seconds().total = begun.elapsed().as_secs_f64();
    let receipt = record::receipt(run, &spec, &super_batch, &decided, &rows)?;
    let (receipt, ours) = run.commit(receipt).await?;
    if ours { Ok(Ready { receipt, rows: rows.data }) } else { recall(run, receipt).await }
}

/// Reads the rows of a committed step again and checks that they are what its receipt recorded.
///
/// # Errors
/// `RowChanged` names the first row whose content differs.
pub async fn recall(run: &Run, receipt: Receipt) -> Result<Ready> {
    let manifest = &run.manifest;
    let block_of = |source: u32, shard: u32, row: u64| {
        let blocks = &manifest.sources[source as usize].shards[shard as usize].blocks;
        let block = blocks.partition_point(|b| b.first_row <= row) - 1;
        BlockRows { source, shard, block: block as u32, rows: vec![(row - blocks[block].first_row) as u32] }
    };
    let blocks = receipt.chosen.iter().map(|row| block_of(row.source, row.shard, row.row)).collect();
    let bytes = fetch_rows(&run.deps.pool, &run.manifest_digest, blocks, &run.spec().columns).await?;
    let batch = super::output::read_stream(bytes.into())?;
    let order = arrow::array::UInt32Array::from_iter_values(0..batch.num_rows() as u32);
    let rows = scoring::join(&[batch], &order)?;
    let changed = receipt.chosen.iter().zip(&rows.hashes).find(|(row, hash)| row.content_hash[..] != hash[..]);
    if let Some((row, _)) = changed {
        let message = format!(
            "row {} is not what it was when its step was chosen; restore the data, or rewind the run with reselect",
            row.id
        );
        return Err(Error::new(Reason::RowChanged, message).with("id", &row.id));
    }
    Ok(Ready { receipt, rows: rows.data })
}

struct Maker<'a> {
    run: &'a Run,
    spec: &'a RunSpec,
    super_batch: &'a SuperBatch,
    reporter: &'a Reporter,
}

impl Maker<'_> {
    fn job(&self, decided: &Decided, check_only: bool) -> Job {
        let criterion = decided.phase.criterion();
        let (spec, run) = (self.spec, self.run);
        let reference = spec.reference.as_ref().filter(|_| criterion != Criterion::Hard || can_degrade(spec));
        let learner = spec.learner.as_ref().filter(|_| criterion != Criterion::Easy);
        let bare = |model: ModelRef| ModelRef { snapshot_uri: String::new(), snapshot_digest: String::new(), ..model };
        Job {
            run_id: run.id.clone(),
            generation: decided.generation,
            step: decided.step,
            manifest_digest: run.manifest_digest.clone(),
            micro_batch_rows: spec.micro_batch_rows,
            reference: reference
                .filter(|_| !check_only)
                .map(|reference| models::reference_ref(spec, reference, run.reference.as_ref())),
            learner_model: learner
                .filter(|_| !check_only)
                .map(|learner| bare(models::initial_ref(spec, learner, run.learner.as_ref()))),
            embedding_dtype: spec.embedding_dtype(),
            columns: spec.columns.clone(),
            check_only,
        }
    }

    /// Uniform: draws from noise alone and reads only what it draws; a bad row is replaced by the next one drawn.
    async fn uniform(&self, decided: &mut Decided) -> Result<Rows> {
        let wanted = decided.phase.sub_batch_size as usize;
        let all = SelectBegin {
            sub_batch_size: self.super_batch.candidates.len() as u32,
            ..select_begin(self.spec, decided, self.super_batch)
        };
        let order = self.run.deps.selector.select(all, None, None).await?.indices;
        let mut good: Vec<(u32, Rows, u32)> = Vec::new();
        let mut count = 0;
        let mut next = order.into_iter();
        while count < wanted {
            let mut numbers: Vec<u32> = next.by_ref().take(wanted - count).collect();
            if numbers.is_empty() {
                return Err(too_few(self.super_batch.candidates.len(), decided.holes.len(), wanted));
            }
            numbers.sort_unstable();
            let candidates: Vec<_> = numbers.iter().map(|n| self.super_batch.candidates[*n as usize]).collect();
            let mut scoring = Scoring::begin(self.run.deps.pool.clone(), self.job(decided, true), &candidates).await?;
            decided.read(&scoring);
            let holes: BTreeSet<u32> = scoring.holes().iter().map(|hole| hole.candidate).collect();
            decided.holes.extend(
                scoring.holes().into_iter().map(|hole| Hole { candidate: numbers[hole.candidate as usize], ..hole }),
            );
            decided.candidates_scanned += numbers.len();
            let kept: Vec<u32> = (0..numbers.len() as u32).filter(|i| !holes.contains(i)).collect();
            if !kept.is_empty() {
                let rows = scoring.rows(&kept).await?;
                count += kept.len();
                good.extend(kept.iter().enumerate().map(|(i, k)| (numbers[*k as usize], rows.clone(), i as u32)));
            }
        }
        record::uniform_rows(decided, good)
    }

    /// Scores all candidates and selects.
    async fn scored(&self, decided: &mut Decided) -> Result<Rows> {
        let (run, phase) = (self.run, decided.phase.clone());
        let job = self.job(decided, false);
        let mut scoring = Scoring::begin(run.deps.pool.clone(), job, &self.super_batch.candidates).await?;
        decided.candidates_scanned = self.super_batch.candidates.len();
        decided.read(&scoring);
        let reference = scoring.reference()?;
        decided.embedded_reference(reference.as_ref());
        let waiting = Instant::now();
        let learner = match phase.criterion() {
            Criterion::Easy => Learner::NotAsked,
            _ => self.await_weights(decided.step).await?,
        };
        decided.waited(waiting.elapsed());
        let learner = match learner {
            Learner::Version(published, mode) => {
                decided.mode = mode;
                let spec =
                    self.spec.learner.as_ref().ok_or_else(|| Error::internal("a scored phase has no learner"))?;
                let model = models::published_ref(self.spec, spec, &published, run.learner.as_ref());
                let scored = scoring.learner(&model).await?;
                decided.embedded_learner(&published, &scored, self.run.learner.as_ref());
                Some(scored)
            }
            Learner::Degraded(mode) => {
                decided.mode = mode;
                None
            }
            Learner::NotAsked => None,
        };
        decided.add_holes(scoring.holes(), &[&reference, &learner]);
        let survivors = self.super_batch.candidates.len() - decided.hole_numbers().len();
        if survivors < phase.sub_batch_size as usize {
            return Err(too_few(
                self.super_batch.candidates.len(),
                decided.hole_numbers().len(),
                phase.sub_batch_size as usize,
            ));
        }
        let drawn = self.select(decided, learner, reference).await?;
        let rows = scoring.rows(&drawn.indices).await?;
        decided.discarded(scoring.discarded_flops());
        decided.drawn = drawn;
        Ok(rows)
    }

    async fn select(
        &self,
        decided: &mut Decided,
        learner: Option<Scored>,
        reference: Option<Scored>,
    ) -> Result<SelectResponse> {
        let mut begin = select_begin(self.spec, decided, self.super_batch);
        if self.spec.loss() == Loss::Sigmoid && begin.policy() != Policy::Uniform {
            if let Some(scored) = learner.as_ref() {
                let given = self.spec.learner.as_ref().and_then(|l| l.logit_bias);
                begin.learner_bias = models::sigmoid_bias(scored.bias, given, "learner")?;
            }
            if let Some(scored) = reference.as_ref() {
                let given = self.spec.reference.as_ref().and_then(|r| r.logit_bias);
                begin.reference_bias = models::sigmoid_bias(scored.bias, given, "reference")?;
            }
        }
        begin.learner_scale = learner.as_ref().map_or(0.0, |l| l.scale);
        begin.reference_scale = reference.as_ref().map_or(0.0, |r| r.scale);
        decided.scales = [begin.learner_scale, begin.learner_bias, begin.reference_scale, begin.reference_bias];
        let asked = begin.criterion();
        let unseen = begin.policy() == Policy::Uniform;
        let reference = reference.filter(|_| asked != Criterion::Hard && !unseen);
        let drawn = self.run.deps.selector.select(begin, learner, reference).await?;
        metrics::stage_duration("select").record(drawn.seconds);
        metrics::flops("selection").increment(drawn.flops as u64);
        Ok(drawn)
    }

    /// The weights that the lag asks for, or what the fallback puts in their place. Waits without holding a worker's slot.
    async fn await_weights(&self, step: u64) -> Result<Learner> {
        let run = self.run;
        let lag = self.spec.lag.unwrap_or_default();
        let due = due(step, &lag, self.spec.push_every_steps);
        let (mut book, mut staging, mut demand) =
            (run.weights.book(), run.weights.staging_steps(), self.reporter.demand());
        let deadline = Duration::from_secs_f64(self.spec.need_deadline_seconds);
        loop {
            let (began, current) = run.began();
            // Staging first: a push leaves it only after it has entered the book.
            let staged: BTreeSet<i64> =
                staging.borrow_and_update().iter().filter(|(g, _)| *g == current).map(|(_, step)| *step).collect();
            if let Some(published) = book.borrow_and_update().find(due, &began) {
                return Ok(Learner::Version(published, Mode::Normal));
            }
            let wanted = demand.borrow_and_update().clone();
            let verdict = verdict(&Moment {
                demand: &wanted,
                needed_for: wanted.since.map(|since| since.elapsed()),
                deadline,
                due: due_step(due),
                staging: &staged,
                fallback: self.spec.fallback(),
            });
            match verdict {
                Verdict::Wait => {}
                Verdict::TellRanks(why) => self.reporter.tell(missing(step, due, why, deadline)),
                Verdict::FallBack(_) => return Ok(self.fall_back(step)),
            }
            let alarm = async {
                match wanted.since.filter(|_| verdict == Verdict::Wait) {
                    Some(since) => tokio::time::sleep_until(since + deadline).await,
                    None => std::future::pending().await,
                }
            };
            let changed = tokio::select! {
                changed = book.changed() => changed,
                changed = staging.changed() => changed,
                changed = demand.changed() => changed,
                () = alarm => Ok(()),
            };
            changed.map_err(|_| super::gone())?;
        }
    }

    fn fall_back(&self, step: u64) -> Learner {
        match self.spec.fallback() {
            Fallback::ServeFlagged => {
                let newest = self.run.weights.book().borrow().last_before(step, &self.run.began().0);
                newest.map_or(Learner::Degraded(Mode::Uniform), |published| Learner::Version(published, Mode::Stale))
            }
            Fallback::ReferenceOnly if self.spec.reference.is_some() => Learner::Degraded(Mode::ReferenceOnly),
            _ => Learner::Degraded(Mode::Uniform),
        }
    }
}

fn can_degrade(spec: &RunSpec) -> bool {
    spec.fallback() == Fallback::ReferenceOnly
}

fn due_step(due: Due) -> Option<i64> {
    match due {
        Due::Initial => None,
        Due::Exactly(step) => i64::try_from(step).ok(),
        Due::Within { oldest, .. } => Some(oldest),
    }
}

/// How the step is drawn: as its phase says, or as the mode that it was degraded to.
fn select_begin(spec: &RunSpec, decided: &Decided, super_batch: &SuperBatch) -> SelectBegin {
    let Phase { policy, criterion, sub_batch_size, n_chunks, gain, .. } = decided.phase;
    let (policy, criterion) = match decided.mode {
        Mode::Uniform => (Policy::Uniform as i32, criterion),
        Mode::ReferenceOnly => (policy, Criterion::Easy as i32),
        _ => (policy, criterion),
    };
    SelectBegin {
        policy,
        criterion,
        loss: spec.loss,
        sub_batch_size,
        n_chunks,
        gain,
        seed: spec.seed,
        generation: decided.generation,
        step: decided.step,
        positions: record::noise_keys(&super_batch.candidates),
        holes: decided.hole_numbers(),
        embedding_dtype: spec.embedding_dtype,
        ..Default::default()
    }
}

fn too_few(candidates: usize, holes: usize, wanted: usize) -> Error {
    let message = format!(
        "of {candidates} candidates {holes} cannot be used, so fewer than sub_batch_size = {wanted} are left; mend the data \
         or raise super_batch_size (skipped rows are counted in superbatch_skipped_total and listed in receipts)"
    );
    Error::new(Reason::TooManyBadRows, message).with("candidates", candidates).with("holes", holes)
}

fn missing(step: u64, due: Due, why: Why, deadline: Duration) -> Error {
    let weights = match due {
        Due::Initial => "initial weights (a push of step -1)".to_owned(),
        Due::Exactly(push) => format!("weights pushed after step {push}"),
        Due::Within { oldest, .. } => format!("weights pushed after step {oldest} or later"),
    };
    let (reason, what) = match why {
        Why::Deadline => (Reason::NeedDeadline, format!("did not come within {} s", deadline.as_secs_f64())),
        Why::NobodyPushes => {
            (Reason::WeightsMissing, "are not there, every rank waits, and none has a push on its way".to_owned())
        }
    };
    let message =
        format!("step {step} is scored with the {weights}, which {what}; push them, or give the run a fallback");
    Error::new(reason, message).with("step", step)
}
