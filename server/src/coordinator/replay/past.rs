//! A step of the past.
use crate::{
    blocking::blocking,
    coordinator::{
        facts::run::{self, RunFacts},
        plan::{candidate::SuperBatch, planner::Plan, rows::row_id},
        runs::fork,
        spec::phase_at,
    },
    dataset::Manifest,
    error::{Error, Result},
    storage::Location,
};
use std::{collections::HashMap, sync::Arc};
use superbatch_proto::v1::{BadRow, ChosenRow, Hole, Phase, Reason, Receipt, ReceiptSummary};

/// A committed step, before its candidates are known.
pub struct CommittedStep {
    /// The run that decided the step, and its facts: of a step that a fork inherited, the other
    /// run, which has its weights.
    run: Location,
    facts: RunFacts,
    receipt: Receipt,
    summary: ReceiptSummary,
}

/// A committed step: its receipt, and its candidates in canonical order.
pub struct Past {
    /// The run that decided the step, and its facts; see [`CommittedStep`].
    pub run: Location,
    pub facts: RunFacts,
    pub manifest: Arc<Manifest>,
    pub receipt: Receipt,
    pub summary: ReceiptSummary,
    /// The phase by which it was decided.
    pub phase: Phase,
    pub super_batch: SuperBatch,
}

impl CommittedStep {
    /// Reads the receipt of `step` of the run `id`, and the facts of the run that decided it.
    ///
    /// # Errors
    /// `RunNotFound`, `StepNotCommitted`; those of reading.
    pub async fn find(
        state: &Location,
        id: &str,
        step: u64,
        generation: Option<u32>,
    ) -> Result<Self> {
        let (run, facts) = load(state, id).await?;
        let generation = generation.unwrap_or(facts.chain.current());
        let receipts = fork::receipts(state, id, &facts).await?;
        let found = receipts.find_of(&facts.chain, step, generation);
        let Some(receipt) = found.await? else {
            let message = format!(
                "step {step} of run '{id}' is not committed in generation {generation}; \
                 `superbatch runs` tells its last step and its newest generation"
            );
            return Err(Error::new(Reason::StepNotCommitted, message).with("step", step));
        };
        let summary = receipt.summary.clone().unwrap_or_default();
        let (run, facts) = match summary.run_id.as_str() {
            "" => (run, facts),
            own if own == id => (run, facts),
            other => load(state, other).await?,
        };
        Ok(Self {
            run,
            facts,
            receipt,
            summary,
        })
    }

    /// Returns the digest of the run's manifest.
    pub fn manifest(&self) -> &str {
        &self.facts.run.manifest
    }
}

async fn load(state: &Location, id: &str) -> Result<(Location, RunFacts)> {
    let run = state.below(&format!("runs/{id}"));
    if let Some(facts) = run::load(&run).await? {
        return Ok((run, facts));
    }
    let message = format!(
        "there is no run '{id}' in the state {}; name the service's state with --state or --config",
        state.uri()
    );
    Err(Error::new(Reason::RunNotFound, message).with("uri", state.uri()))
}

impl Past {
    /// Reads what is known of `step` of the run `id`.
    ///
    /// # Errors
    /// Those of [`CommittedStep::find`], of reading the manifest and of [`Past::of`].
    pub async fn find(
        state: &Location,
        id: &str,
        step: u64,
        generation: Option<u32>,
    ) -> Result<Self> {
        let found = CommittedStep::find(state, id, step, generation).await?;
        let manifest = Manifest::load(state, found.manifest()).await?;
        Self::of(found, Arc::new(manifest)).await
    }

    /// Plans the step's candidates anew.
    ///
    /// # Errors
    /// `Internal` if the plan of this build finds other candidates than the receipt names.
    pub async fn of(found: CommittedStep, manifest: Arc<Manifest>) -> Result<Self> {
        let CommittedStep {
            run,
            facts,
            receipt,
            summary,
        } = found;
        let (id, step) = (summary.run_id.as_str(), summary.step);
        let of = (facts.clone(), manifest.clone());
        let planned = blocking("planning a step", move || {
            let (facts, manifest) = of;
            let spec = &facts.spec;
            let plan = Plan::new(manifest, spec.seed, spec.epochs, spec.window_blocks)?;
            plan.step(&spec.phases, step)
        });
        let super_batch = planned.await?;
        if super_batch.spans != summary.scanned {
            let message = format!(
                "step {step} of run '{id}' scanned other positions than the run's plan now names: \
                 its phases were changed after a rewind, or another build planned it (plan {})",
                summary.plan_version
            );
            return Err(Error::internal(message));
        }
        Ok(Self {
            phase: phase_of(phase_at(&facts.spec.phases, step), &summary),
            run,
            facts,
            manifest,
            receipt,
            summary,
            super_batch,
        })
    }

    /// Returns the chosen rows as numbers of candidates, in the order of the draw.
    ///
    /// # Errors
    /// `Internal` if a row is no candidate.
    pub fn chosen(&self) -> Result<Vec<u32>> {
        let numbered = self.super_batch.candidates.iter().zip(0_u32..);
        let numbers: HashMap<(u32, u64), u32> = numbered
            .map(|(c, number)| ((c.source, c.position), number))
            .collect();
        let number = |row: &ChosenRow| {
            let number = numbers.get(&(row.source, row.position)).copied();
            let message = || format!("row {} of the receipt is no candidate of its step", row.id);
            number.ok_or_else(|| Error::internal(message()))
        };
        self.receipt.chosen.iter().map(number).collect()
    }

    /// Returns whether the run's reference was this step's, so that it can be embedded with again.
    pub(super) fn has_reference(&self) -> bool {
        self.facts.spec.reference.is_some() && self.phase.reference_step.is_none()
    }

    /// Says why there is no reference; see [`Self::has_reference`].
    pub(super) fn no_reference(&self) -> String {
        if self.phase.reference_step.is_none() {
            return "the run names no reference".to_owned();
        }
        format!(
            "step {} had the learner's own earlier weights as reference (reference_step), which \
             replay does not embed with",
            self.summary.step
        )
    }

    /// Returns the candidates that could not be used then: they are not used now either.
    pub(super) fn holes(&self) -> Vec<Hole> {
        let bad = self.receipt.bad_rows.iter();
        let mut bad: HashMap<&str, &BadRow> = bad.map(|row| (row.id.as_str(), row)).collect();
        let mut holes = Vec::new();
        for (candidate, number) in self.super_batch.candidates.iter().zip(0_u32..) {
            if bad.is_empty() {
                break;
            }
            let (id, _) = row_id(&self.manifest, candidate);
            holes.extend(bad.remove(id.as_str()).map(|row| Hole {
                candidate: number,
                reason: row.reason,
                detail: row.detail.clone(),
            }));
        }
        holes
    }
}

/// Returns the phase as the receipt has it: after a rewind the run may have other phases.
fn phase_of(phase: &Phase, summary: &ReceiptSummary) -> Phase {
    Phase {
        policy: summary.policy,
        criterion: summary.criterion,
        super_batch_size: summary.super_batch_size,
        sub_batch_size: summary.sub_batch_size,
        gain: summary.gain,
        tuning: summary.tuning,
        score_columns: summary.score_columns.clone(),
        fidelity: summary.fidelity,
        approximation: summary.approximation,
        // They concern training, and cost scoring.
        multi_resolution: None,
        probe: None,
        ..phase.clone()
    }
}
