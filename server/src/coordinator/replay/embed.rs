//! Embeddings of candidates, as the step had them.
use super::{Past, Replayer};
use crate::{
    coordinator::{
        facts::run::ModelFact,
        plan::candidate::Candidate,
        runs::models,
        score::{claims::Claims, scored::Scored, slice::Job, super_batch::Scoring},
        spec::scores_at,
        weights::{Published, stored},
    },
    error::{Error, Result},
};
use superbatch_proto::v1::{Hole, Loss, Mode, ModelRef, Reason, RowsForm, WeightsVersion};

/// The learner's weights of a step.
pub(super) enum Weights {
    Kept(Published),
    /// Why they are not to be had.
    Missing(String),
}

impl Weights {
    pub(super) async fn find(past: &Past) -> Result<Self> {
        let Some(version) = &past.summary.learner else {
            return Ok(Self::Missing(format!(
                "step {} was decided without the learner ({}), so no weights belong to it",
                past.summary.step,
                match past.summary.mode() {
                    Mode::Uniform | Mode::ReferenceOnly => "it was degraded",
                    _ => "its policy asks none",
                }
            )));
        };
        if version.version == 0 {
            return Ok(Self::Kept(initial(version)));
        }
        let found = stored::find(&past.run, version).await?;
        Ok(found.map_or_else(
            || Self::Missing(deleted(past.summary.step, version)),
            Self::Kept,
        ))
    }

    pub(super) fn kept(&self) -> bool {
        matches!(self, Self::Kept(_))
    }

    /// Returns why they are missing.
    pub(super) fn missing(&self) -> Option<&str> {
        match self {
            Self::Kept(_) => None,
            Self::Missing(why) => Some(why),
        }
    }

    /// # Errors
    /// `WeightsMissing`.
    pub(super) fn required(&self) -> Result<&Published> {
        match self {
            Self::Kept(published) => Ok(published),
            Self::Missing(why) => {
                let message = format!(
                    "{why}; draw by what needs no learner: --criterion easy, or a policy such as \
                     uniform or k_center"
                );
                Err(Error::new(Reason::WeightsMissing, message))
            }
        }
    }
}

/// Returns the learner as the run's spec has it: its weights are those of the spec.
fn initial(version: &WeightsVersion) -> Published {
    Published {
        snapshot_uri: String::new(),
        version: version.clone(),
        logit_scale: 0.0,
        logit_bias: None,
    }
}

/// Says why `version` is missing.
fn deleted(step: u64, version: &WeightsVersion) -> String {
    format!(
        "weights version {} (pushed after step {}), with which step {step} was scored, is deleted: \
         a service keeps the newest versions of a run, `coordinator.snapshots_kept` of them",
        version.version, version.step
    )
}

/// Candidates, embedded.
pub(super) struct Embedded {
    pub learner: Option<Scored>,
    pub reference: Option<Scored>,
    pub holes: Vec<Hole>,
    pub device: String,
}

impl Replayer {
    /// Has `candidates` embedded by the learner, if its weights are given, and by the reference, if
    /// it is wanted.
    ///
    /// # Errors
    /// `ModelInvalid` where a model is not the one that the run was opened with; workers' errors.
    pub(super) async fn embed(
        &self,
        past: &Past,
        candidates: &[Candidate],
        weights: Option<&Published>,
        wants_reference: bool,
    ) -> Result<Embedded> {
        let (spec, run) = (&past.facts.spec, &past.facts.run);
        if past.phase.reference_step.is_some() && wants_reference {
            let message = format!(
                "{}; draw by what needs no reference, such as --criterion hard",
                past.no_reference()
            );
            let error = Error::new(Reason::Unimplemented, message);
            return Err(error.with("feature", "reference_step"));
        }
        let learner = match (weights, &spec.learner) {
            (Some(published), Some(learner)) => {
                let of = models::published_ref(spec, learner, published, run.learner.as_ref());
                Some((of, published.version.version > 0))
            }
            _ => None,
        };
        let reference = spec.reference.as_ref().filter(|_| wants_reference);
        let reference =
            reference.map(|given| models::reference_ref(spec, given, run.reference.as_ref()));
        let job = job(past, learner.as_ref().map(|(model, _)| model), reference);
        let claims = Claims::default();
        let mut scoring = Scoring::begin(self.pool.clone(), &claims, job, candidates).await?;
        let reference = scoring.reference().await?;
        if let Some(scored) = &reference {
            models::check_unchanged(run.reference.as_ref(), scored, false, "reference")?;
        }
        let learner = match learner {
            None => None,
            Some((model, is_pushed)) => {
                let scored = scoring.learner(&model).await?;
                models::check_unchanged(run.learner.as_ref(), &scored, is_pushed, "learner")?;
                Some(scored)
            }
        };
        let (mut learner, mut reference) = (learner, reference);
        if spec.loss() == Loss::PerExample {
            // As in the step itself: nothing is drawn or measured by the losses of tokens.
            let both = [&mut learner, &mut reference];
            both.into_iter().flatten().for_each(Scored::of_examples);
        }
        let device = [&learner, &reference].into_iter().flatten().next();
        Ok(Embedded {
            device: device.map_or_else(|| "cpu".to_owned(), |scored| scored.device.clone()),
            holes: scoring.holes(),
            learner,
            reference,
        })
    }
}

fn job(past: &Past, learner: Option<&ModelRef>, reference: Option<ModelRef>) -> Job {
    let (spec, run) = (&past.facts.spec, &past.facts.run);
    let dim = |fact: &Option<ModelFact>| fact.as_ref().and_then(ModelFact::embedding_dim);
    Job {
        run_id: past.summary.run_id.clone(),
        generation: past.summary.generation,
        step: past.summary.step,
        manifest_digest: run.manifest.clone(),
        micro_batch_rows: spec.micro_batch_rows,
        check_only: learner.is_none() && reference.is_none(),
        form: RowsForm::Whole,
        learner_model: learner.map(|model| ModelRef {
            snapshot_uri: String::new(),
            snapshot_digest: String::new(),
            ..model.clone()
        }),
        reference,
        is_sparse: false,
        reference_dim: dim(&run.reference),
        learner_dim: dim(&run.learner),
        embedding_dtype: spec.embedding_dtype(),
        // No row is served.
        columns: Vec::new(),
        approximation: scores_at(&past.phase),
    }
}
