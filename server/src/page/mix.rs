//! What the data is made of, and what selection makes of it: the shares of sources and shards among
//! the scanned and among the chosen rows, how they drift, and in what the chosen rows differ.
mod rows;
mod shares;
mod step;
#[cfg(test)]
mod tests;

use super::{
    Known, Page, StepKey,
    answer::{Answer, Json},
    keep::Keep,
    turns::Turns,
};
use crate::{coordinator::plan::planner::Plan, dataset::Manifest, error::Result};
use axum::extract::{Path, State};
use std::sync::Arc;
use step::OfStep;
use superbatch_proto::v1::Receipt;

/// Most steps whose receipts are read, spread evenly over the run.
const STEPS: u64 = 48;
/// Steps of which the counts are kept; most take a few kilobytes.
const STEPS_KEPT: usize = 256;
const ANSWERS_KEPT: usize = 32;
/// Requests that wait for the one that reads.
const WAITING: usize = 64;

/// What was counted. One request at a time reads receipts, one after the other, and keeps of each
/// the counts alone; what it has read the next ones find.
pub(super) struct Mixes {
    turns: Turns,
    /// Of a step that was not drawn by scores: `None`.
    steps: Keep<StepKey, Option<Arc<OfStep>>>,
    answers: Keep<AnswerKey, Json>,
}

/// What is asked, the nonce of the run's definition, its newest step and generation.
type AnswerKey = (What, String, Option<u64>, u32);

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum What {
    Shares,
    Rows,
}

impl Default for Mixes {
    fn default() -> Self {
        Self {
            turns: Turns::new(WAITING, "try again later"),
            steps: Keep::new(STEPS_KEPT),
            answers: Keep::new(ANSWERS_KEPT),
        }
    }
}

/// Answers `GET /api/runs/{run}/mix`.
pub(super) async fn mix(State(page): State<Arc<Page>>, Path(id): Path<String>) -> Answer {
    Ok(in_turn(page, &id, What::Shares).await?)
}

/// Answers `GET /api/runs/{run}/mix/rows`: captions' lengths and images' sizes, which receipts do
/// not hold, measured on a sample of rows.
pub(super) async fn rows(State(page): State<Arc<Page>>, Path(id): Path<String>) -> Answer {
    Ok(in_turn(page, &id, What::Rows).await?)
}

async fn in_turn(page: Arc<Page>, id: &str, what: What) -> Result<Json> {
    let known = page.find_or_load(id).await?;
    let generation = known.facts.chain.current();
    let key = (what, known.nonce().to_owned(), known.newest, generation);
    if let Some(kept) = page.mixes.answers.get(&key) {
        return Ok(kept);
    }
    let turn = page.mixes.turns.take().await?;
    let work = async move {
        // Another request may have asked for the same before.
        if let Some(kept) = page.mixes.answers.get(&key) {
            return Ok(kept);
        }
        let looked = Looked::of(&page, &known).await?;
        let has_all_steps = looked.has_all;
        let (answer, has_all_rows) = match what {
            What::Shares => (looked.shares(&page).await?, true),
            What::Rows => looked.rows(&page, &known).await?,
        };
        if has_all_steps && has_all_rows {
            page.mixes.answers.put(key, answer.clone());
        }
        Ok(answer)
    };
    turn.spend_on(work).await
}

/// The steps that were looked at.
struct Looked {
    manifest: Arc<Manifest>,
    plan: Arc<Plan>,
    stride: u64,
    /// Those that were drawn by scores, rising.
    steps: Vec<Arc<OfStep>>,
    /// Whether each was committed. Steps are committed out of order, so one may come later, and the
    /// run's newest step stays the same.
    has_all: bool,
}

impl Looked {
    async fn of(page: &Arc<Page>, known: &Arc<Known>) -> Result<Self> {
        let manifest = page.manifest(&known.facts.run.manifest).await?;
        let (data, of) = (manifest.clone(), known.clone());
        let plan = move || {
            let spec = &of.facts.spec;
            Plan::new(data, spec.seed, spec.epochs, spec.window_blocks)
        };
        let plan = Arc::new(page.work("planning", plan).await?);
        let (stride, numbers) = sampled(known.newest);
        let (mut steps, mut has_all) = (Vec::new(), true);
        for number in numbers {
            let counted = of_step(page, known, &plan, number).await?;
            has_all &= counted.is_some();
            steps.extend(counted.flatten());
        }
        Ok(Self {
            manifest,
            plan,
            stride,
            steps,
            has_all,
        })
    }

    async fn shares(self, page: &Page) -> Result<Json> {
        let count = move || {
            let shares = shares::shares(&self.manifest, self.stride, &self.steps);
            Ok(Json::from(shares))
        };
        page.work("counting the mix", count).await
    }
}

/// Returns every stride-th step of a run, from 0 on. The stride is a power of two: while the run
/// grows, most steps that are looked at next time have been counted already.
fn sampled(newest: Option<u64>) -> (u64, Vec<u64>) {
    let Some(newest) = newest else {
        return (1, Vec::new());
    };
    let stride = (newest + 1).div_ceil(STEPS).next_power_of_two();
    (stride, (0..=newest).step_by(stride as usize).collect())
}

/// Counts a step; `None` if it is not committed, `Some(None)` if it was not drawn by scores.
async fn of_step(
    page: &Arc<Page>,
    known: &Arc<Known>,
    plan: &Arc<Plan>,
    step: u64,
) -> Result<Option<Option<Arc<OfStep>>>> {
    let generations = known.generations(step);
    let best = generations.first().copied().unwrap_or_default();
    let key = (known.nonce().to_owned(), step, best);
    if let Some(kept) = page.mixes.steps.get(&key) {
        return Ok(Some(kept));
    }
    let (plan, of) = (plan.clone(), known.clone());
    let count = move |receipt: Receipt| OfStep::of(&plan, &of.facts.spec.phases, &receipt);
    let counted = page.with_receipt(known, step, generations, count).await?;
    let Some(counted) = counted else {
        return Ok(None);
    };
    let counted = counted.map(Arc::new);
    if counted.as_ref().is_none_or(|counted| counted.is_small()) {
        page.mixes.steps.put(key, counted.clone());
    }
    Ok(Some(counted))
}
