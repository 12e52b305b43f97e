//! The life of one step: plan → score → select → commit. Serving is the caller's.
mod draw;
mod learner;

use self::{draw::select_begin, learner::Learner};
use super::{
    models,
    plan::{self, Candidate, SuperBatch},
    ready::Ready,
    record::{self, Decided},
    run::Run,
    scoring::{self, Rows, Scoring},
    slice::{Job, fetch_rows},
    spec::{Asked, phase_at},
    step::Reporter,
    table::Table,
};
use crate::error::{Error, Result};
use std::collections::BTreeSet;
use superbatch_proto::v1::{Fallback, Hole, ModelRef, Reason, Receipt, RunSpec, SelectBegin, lag};
use tokio::time::Instant;

/// Decides `step` in the run's newest generation, or recalls what was decided before.
pub async fn decide(run: &Run, generation: u32, step: u64, reporter: &Reporter) -> Result<Ready> {
    if let Some(receipt) = run.find_receipt(step, Some(generation)).await? {
        run.found_committed(generation, &receipt);
        return recall(run, receipt).await;
    }
    let begun = Instant::now();
    let spec = run.spec();
    let phase = *phase_at(&spec.phases, step);
    let super_batch = run.plan.step(&spec.phases, step)?;
    let mut decided = Decided::new(generation, step, phase, run.wasted.spend());
    decided.planned(begun.elapsed());
    let maker = Maker { run, spec: &spec, super_batch: &super_batch, reporter };
    let rows = match Asked::by(&phase).nobody() {
        true => maker.uniform(&mut decided).await?,
        false => maker.scored(&mut decided).await?,
    };
    decided.cost_seconds().total = begun.elapsed().as_secs_f64();
    let receipt = record::receipt(run, &spec, &super_batch, &decided, &rows)?;
    let committing = Instant::now();
    let (receipt, ours) = run.commit(receipt).await?;
    run.deps.sizing.decided(&run.id, decided.work(committing.elapsed()), lag_steps(&spec));
    if !ours {
        return recall(run, receipt).await;
    }
    decided.spent.settle();
    Ok(run.deps.ready.hold(receipt, rows.data))
}

/// Reads the rows of a committed step again and checks that they are what its receipt recorded.
///
/// # Errors
/// `RowChanged` names the first row whose content differs.
async fn recall(run: &Run, receipt: Receipt) -> Result<Ready> {
    let located: Result<Vec<_>> = receipt.chosen.iter().map(|row| plan::locate(&run.manifest, row)).collect();
    let blocks = plan::block_rows(&located?);
    let parts = fetch_rows(&run.deps.pool, &run.manifest_digest, blocks, &run.spec().columns).await?;
    let rows = scoring::hashed(Table::from_stream(parts)?)?;
    let changed = receipt.chosen.iter().zip(&rows.hashes).find(|(row, hash)| row.content_hash[..] != hash[..]);
    if let Some((row, _)) = changed {
        let message = format!(
            "row {} is not what it was when its step was chosen; restore the data, or rewind the run with reselect",
            row.id
        );
        return Err(Error::new(Reason::RowChanged, message).with("id", &row.id));
    }
    Ok(run.deps.ready.hold(receipt, rows.data))
}

/// Decides one step.
struct Maker<'a> {
    run: &'a Run,
    spec: &'a RunSpec,
    super_batch: &'a SuperBatch,
    reporter: &'a Reporter,
}

impl Maker<'_> {
    fn job(&self, decided: &Decided, check_only: bool) -> Job {
        let (spec, run, asked) = (self.spec, self.run, Asked::by(&decided.phase));
        let can_degrade = asked.learner && spec.fallback() == Fallback::ReferenceOnly;
        let reference = spec.reference.as_ref().filter(|_| asked.reference || can_degrade);
        let learner = spec.learner.as_ref().filter(|_| asked.learner);
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

    async fn begin(&self, job: Job, candidates: &[Candidate]) -> Result<Scoring> {
        Scoring::begin(self.run.deps.pool.clone(), &self.run.claims, job, candidates).await
    }

    /// Uniform: draws from noise alone and reads only what it draws; a bad row is replaced by the next one drawn.
    async fn uniform(&self, decided: &mut Decided) -> Result<Rows> {
        let wanted = decided.phase.sub_batch_size as usize;
        let all = SelectBegin {
            sub_batch_size: self.super_batch.candidates.len() as u32,
            ..select_begin(self.spec, decided, self.super_batch)
        };
        let order = self.run.deps.selector.select(all, None, None).await?.indices;
        let mut good: Option<Rows> = None;
        let mut drawn: Vec<u32> = Vec::with_capacity(wanted);
        let mut next = order.into_iter();
        while drawn.len() < wanted {
            let mut numbers: Vec<u32> = next.by_ref().take(wanted - drawn.len()).collect();
            if numbers.is_empty() {
                return Err(self.too_few(decided));
            }
            numbers.sort_unstable();
            let candidates: Vec<_> = numbers.iter().map(|n| self.super_batch.candidates[*n as usize]).collect();
            let mut scoring = self.begin(self.job(decided, true), &candidates).await?;
            decided.read(&scoring);
            let holes: BTreeSet<u32> = scoring.holes().iter().map(|hole| hole.candidate).collect();
            decided.add_holes(
                scoring.holes().into_iter().map(|hole| Hole { candidate: numbers[hole.candidate as usize], ..hole }),
                &[],
            );
            decided.candidates_scanned += numbers.len();
            let kept: Vec<u32> = (0..numbers.len() as u32).filter(|i| !holes.contains(i)).collect();
            if !kept.is_empty() {
                let rows = scoring.rows(&kept).await?;
                drawn.extend(kept.iter().map(|k| numbers[*k as usize]));
                match &mut good {
                    Some(good) => good.append(rows)?,
                    None => good = Some(rows),
                }
            }
        }
        decided.drawn_uniformly(drawn);
        good.ok_or_else(|| Error::internal("a sub-batch of no rows"))
    }

    /// Has the models that the phase asks look at all candidates, and selects.
    async fn scored(&self, decided: &mut Decided) -> Result<Rows> {
        let (run, phase, size) = (self.run, decided.phase, self.super_batch.candidates.len());
        let mut scoring = self.begin(self.job(decided, false), &self.super_batch.candidates).await?;
        decided.candidates_scanned = size;
        decided.read(&scoring);
        let reference = scoring.reference()?;
        if let Some(scored) = &reference {
            models::check_unchanged(run.reference.as_ref(), scored, false, "reference")?;
            decided.embedded_reference(scored);
        }
        let waiting = Instant::now();
        let learner = match Asked::by(&phase).learner {
            false => Learner::NotAsked,
            true => self.await_weights(decided.step).await?,
        };
        decided.waited(waiting.elapsed());
        let learner = match learner {
            Learner::Version(published, mode) => {
                decided.mode = mode;
                let spec =
                    self.spec.learner.as_ref().ok_or_else(|| Error::internal("a scored phase has no learner"))?;
                let model = models::published_ref(self.spec, spec, &published, run.learner.as_ref());
                let scored = scoring.learner(&model).await?;
                let is_pushed = published.version.version > 0;
                models::check_unchanged(run.learner.as_ref(), &scored, is_pushed, "learner")?;
                decided.embedded_learner(&published, &scored, run.learner.as_ref());
                Some(scored)
            }
            Learner::Degraded(mode) => {
                decided.mode = mode;
                None
            }
            Learner::NotAsked => None,
        };
        decided.add_holes(scoring.holes(), &[&reference, &learner]);
        let holes = decided.holes.len();
        if size - holes < phase.sub_batch_size as usize {
            return Err(self.too_few(decided));
        }
        decided.drawn = self.draw(decided, learner, reference).await?;
        let rows = scoring.rows(&decided.drawn.indices).await?;
        decided.discarded(scoring.discarded_flops());
        Ok(rows)
    }

    /// Fewer candidates can be used than are wanted.
    fn too_few(&self, decided: &Decided) -> Error {
        let (candidates, holes) = (self.super_batch.candidates.len(), decided.holes.len());
        let first = decided.holes.iter().min_by_key(|hole| hole.candidate);
        let first = first.map_or_else(String::new, |hole| {
            let (id, _) = plan::row_id(&self.run.manifest, &self.super_batch.candidates[hole.candidate as usize]);
            record::first_bad(&id, hole.reason(), &hole.detail)
        });
        let message = format!(
            "of {candidates} candidates {holes} cannot be used{first}, so fewer than sub_batch_size = {} are left; mend the data \
             or raise super_batch_size (skipped rows are counted in superbatch_skipped_total)",
            decided.phase.sub_batch_size
        );
        Error::new(Reason::TooManyBadRows, message).with("candidates", candidates).with("holes", holes)
    }
}

/// Steps that the weights may lag behind.
fn lag_steps(spec: &RunSpec) -> u32 {
    match spec.lag.and_then(|lag| lag.bound) {
        Some(lag::Bound::Exact(steps) | lag::Bound::AtMost(steps)) => steps,
        None => 1,
    }
}
