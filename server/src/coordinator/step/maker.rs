//! The part of a step's decision that all policies share.
use super::decided::Decided;
use crate::{
    coordinator::{
        facts::run::ModelFact,
        plan::{
            candidate::{Candidate, SuperBatch},
            planner,
        },
        receipts::accounts,
        runs::{models, run::Run},
        score::{slice::Job, super_batch::Scoring},
        spec::{Asked, scores_at},
        trainer::cell::Reporter,
    },
    error::{Error, Result},
};
use superbatch_proto::v1::{Delivery, Fallback, ModelRef, Reason, RowsForm, RunSpec};

/// Returns what becomes of the chosen rows of a run.
pub(crate) fn form(spec: &RunSpec) -> RowsForm {
    match spec.delivery() {
        Delivery::Locators => RowsForm::Located,
        Delivery::Direct => RowsForm::Kept,
        Delivery::Unspecified | Delivery::Coordinator => RowsForm::Whole,
    }
}

/// Returns the error for a row that is not what it was.
pub(super) fn changed(id: &str) -> Error {
    let message = format!(
        "row {id} is not what it was when its step was chosen; restore the data, or rewind the \
        run with reselect"
    );
    Error::new(Reason::RowChanged, message).with("id", id)
}

/// Decides one step.
pub(crate) struct Maker<'a> {
    pub run: &'a Run,
    pub spec: &'a RunSpec,
    pub super_batch: &'a SuperBatch,
    pub reporter: &'a Reporter,
}

impl Maker<'_> {
    /// Returns the run's reference, if the phase scores with it. Where the phase's reference is the
    /// learner's own weights, the caller replaces it.
    fn reference(&self, asked: Asked) -> Option<ModelRef> {
        let (spec, run) = (self.spec, self.run);
        let can_degrade = asked.learner && spec.fallback() == Fallback::ReferenceOnly;
        let reference = spec.reference.as_ref();
        let reference = reference.filter(|_| asked.reference || can_degrade);
        reference.map(|reference| models::reference_ref(spec, reference, run.reference.as_ref()))
    }

    pub(crate) fn job(&self, decided: &Decided, check_only: bool) -> Job {
        let (spec, run, asked) = (self.spec, self.run, Asked::by(&decided.phase));
        let learner = spec.learner.as_ref().filter(|_| asked.learner);
        let bare = |model: ModelRef| ModelRef {
            snapshot_uri: String::new(),
            snapshot_digest: String::new(),
            ..model
        };
        Job {
            run_id: run.id.clone(),
            generation: decided.generation,
            step: decided.step,
            manifest_digest: run.manifest_digest.clone(),
            micro_batch_rows: spec.micro_batch_rows,
            reference: self.reference(asked).filter(|_| !check_only),
            is_sparse: false,
            learner_model: learner
                .filter(|_| !check_only)
                .map(|learner| bare(models::initial_ref(spec, learner, run.learner.as_ref()))),
            reference_dim: run.reference.as_ref().and_then(ModelFact::embedding_dim),
            learner_dim: run.learner.as_ref().and_then(ModelFact::embedding_dim),
            embedding_dtype: spec.embedding_dtype(),
            columns: spec.columns.clone(),
            check_only,
            form: form(spec),
            approximation: scores_at(&decided.phase),
        }
    }

    pub(crate) async fn begin(&self, job: Job, candidates: &[Candidate]) -> Result<Scoring> {
        Scoring::begin(
            self.run.deps.pool.clone(),
            &self.run.claims,
            job,
            candidates,
        )
        .await
    }

    /// Returns the error for a row that is not the one that was scored.
    pub(crate) fn changed(&self, candidate: usize) -> Error {
        let candidate = &self.super_batch.candidates[candidate];
        changed(&planner::row_id(&self.run.manifest, candidate).0)
    }

    /// Returns the error for a step with fewer usable candidates than `sub_batch_size`.
    pub(crate) fn too_few(&self, decided: &Decided) -> Error {
        let (candidates, holes) = (self.super_batch.candidates.len(), decided.holes.len());
        let first = decided.holes.iter().min_by_key(|hole| hole.candidate);
        let first = first.map_or_else(String::new, |hole| {
            let (id, _) = planner::row_id(
                &self.run.manifest,
                &self.super_batch.candidates[hole.candidate as usize],
            );
            accounts::first_bad(&id, hole.reason(), &hole.detail)
        });
        let message = format!(
            "of {candidates} candidates {holes} cannot be used{first}, so fewer than \
             sub_batch_size = {} are left; rewind the run to this step (reselect) and append a \
             phase \
             from it with a larger super_batch_size than sub_batch_size, or mend the data and \
             open a \
             new run (skipped rows are counted in superbatch_skipped_total)",
            decided.phase.sub_batch_size
        );
        Error::new(Reason::TooManyBadRows, message)
            .with("candidates", candidates)
            .with("holes", holes)
    }
}
