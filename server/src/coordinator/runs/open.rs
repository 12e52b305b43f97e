//! Opens a run. Everything is checked now, so that a run that can never work is refused before its
//! first step and not in the middle of the night.
use super::{
    calls::Calls,
    fork, models,
    registry::Coordinator,
    reported::Reported,
    rotten::Rotten,
    run::{Run, State},
    verifier,
    verifier::WorkerVerifier,
};
use crate::{
    coordinator::{
        facts::{
            incarnations::Incarnations,
            owner::Ownership,
            run::{self, ModelFact, RunFact, RunFacts},
        },
        losses::{self, Losses},
        plan::planner::Plan,
        receipts::doubt::InDoubt,
        score::claims::Claims,
        serve::output,
        spec,
        trainer::{ranks::Members, waits::Waits},
        weights::{Published, RunWeights, Weights},
        workers::prepare::prepare,
    },
    dataset::{self, Manifest, Scores, SourceRequest, index},
    error::{Error, Result},
    storage::Location,
};
use futures::FutureExt;
use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, Mutex, RwLock},
};
use superbatch_proto::v1::{
    ComputeDtype, ModelRef, OpenRunResponse, Phase, Reason, RunSpec, WeightsVersion,
    learner_spec::Initial,
};

/// Logs the first of the phases whose steps have no candidate to spare.
pub(super) fn tell_of_no_spare(run: &str, phases: &[Phase]) {
    let has_none = |phase: &&Phase| phase.super_batch_size == phase.sub_batch_size;
    if let Some(phase) = phases.iter().find(has_none) {
        tracing::warn!(
            run,
            from_step = phase.from_step,
            sub_batch_size = phase.sub_batch_size,
            "super_batch_size equals sub_batch_size: one row that cannot be used stops the run at \
             its step; candidates to spare would replace it"
        );
    }
}

/// A run that is being opened.
pub struct Opening<'a> {
    pub coordinator: &'a Coordinator,
    pub id: &'a str,
}

impl Opening<'_> {
    /// Opens a run that does not exist yet.
    pub async fn open_new(&self, spec: &RunSpec) -> Result<Arc<Run>> {
        self.coordinator.deps.limits.check(spec)?;
        let state = &self.coordinator.state;
        let fork = fork::point(state, self.id, spec).boxed().await?;
        let manifest = match &fork {
            Some(fork) => {
                self.allow(spec)?;
                Arc::new(Manifest::load(state, &fork.manifest).await?)
            }
            None => Arc::new(self.index(spec).await?),
        };
        output::schema(&manifest, spec)?;
        self.plan(spec, &manifest)?;
        self.scores(spec, &manifest).await?;
        let mut spec = spec.clone();
        let (reference, learner) = self.models(&mut spec).await?;
        models::check_biases(&spec, reference.as_ref(), learner.as_ref())?;
        models::check_approximations(&spec, reference.as_ref(), learner.as_ref())?;
        models::check_tokens(&spec, reference.as_ref(), learner.as_ref())?;
        let digest = manifest.save(state).await?;
        let location = self.coordinator.location(self.id);
        if let Some(fork) = &fork {
            fork.copy_files(&location).boxed().await?;
        }
        // The create may lose to another coordinator that opens the same id. So its result is not
        // used: the facts are read back, and whoever was first, both coordinators go on with the
        // same run.
        let fork = fork.map(|fork| fork.fact);
        let fact = RunFact::new(&spec, digest, reference, learner, fork);
        run::create_run(&location, fact).await?;
        tell_of_no_spare(self.id, &spec.phases);
        let facts = run::load(&location)
            .await?
            .ok_or_else(|| Error::internal("a run vanished while it was opened"))?;
        self.load(facts).await
    }

    /// Loads a run from its facts in the state.
    pub async fn load(&self, facts: RunFacts) -> Result<Arc<Run>> {
        let (coordinator, location) = (self.coordinator, self.coordinator.location(self.id));
        // The ownership is claimed before the receipts are listed. In the other order a former
        // owner could commit a step after the list was read, and this process would not know of it.
        let owner = Ownership::claim(&location, &coordinator.identity).await?;
        let manifest = Arc::new(Manifest::load(&coordinator.state, &facts.run.manifest).await?);
        fork::take_over(&coordinator.state, &location, &facts)
            .boxed()
            .await?;
        let receipts = fork::receipts(&coordinator.state, self.id, &facts).await?;
        let spec = facts.spec;
        let (committed, totals) = receipts.opened(&facts.chain, spec.max_ahead).await?;
        let incarnations = Incarnations::load(&location).await?;
        let opened_phases = facts.run.spec()?.phases.len();
        let state = State {
            totals,
            in_doubt: InDoubt::default(),
            members: Members::new(incarnations.known().await, committed.newest()),
            committed,
            chain: facts.chain,
            appended: facts.appended,
            appending_from: None,
            closed: facts.closed,
            failure: facts.failure,
            cells: BTreeMap::new(),
        };
        let output_schema = output::schema(&manifest, &spec)?;
        let plan = self.plan(&spec, &manifest)?;
        let weights = self
            .weights(&spec, facts.run.learner.as_ref(), &location, &owner)
            .await?;
        Ok(Arc::new_cyclic(|me| Run {
            id: self.id.to_owned(),
            deps: coordinator.deps.clone(),
            output_schema,
            plan,
            weights,
            manifest,
            manifest_digest: facts.run.manifest,
            reference: facts.run.reference,
            learner: facts.run.learner,
            receipts,
            owner,
            incarnations,
            scores: Scores::new(coordinator.stores.clone(), coordinator.state.clone()),
            losses: Losses::new(location.clone()),
            reported: Reported::default(),
            rotten: Rotten::default(),
            opened_phases,
            location,
            spec: RwLock::new(Arc::new(spec)),
            state: Mutex::new(state),
            committing: tokio::sync::Mutex::default(),
            wasted: coordinator.wasted.of(self.id),
            claims: Claims::default(),
            calls: Calls::default(),
            waits: Waits::default(),
            me: me.clone(),
        }))
    }

    fn plan(&self, spec: &RunSpec, manifest: &Arc<Manifest>) -> Result<Plan> {
        let plan = Plan::new(manifest.clone(), spec.seed, spec.epochs, spec.window_blocks)?;
        plan.check(&spec.phases)?;
        Ok(plan)
    }

    /// Checks that the operator allows what the sources name.
    ///
    /// # Errors
    /// `UriNotAllowed`.
    fn allow(&self, spec: &RunSpec) -> Result<()> {
        let stores = &self.coordinator.stores;
        for source in &spec.sources {
            dataset::parts(&source.uri).try_for_each(|uri| stores.allow(uri))?;
            for beside in [&source.allow, &source.scores] {
                let parts = dataset::parts(beside).filter(|uri| !uri.is_empty());
                parts.into_iter().try_for_each(|uri| stores.allow(uri))?;
            }
            named(&source.image_root).map_or(Ok(()), |root| stores.allow(&root))?;
        }
        Ok(())
    }

    async fn index(&self, spec: &RunSpec) -> Result<Manifest> {
        self.allow(spec)?;
        let stores = &self.coordinator.stores;
        let mut sources = Vec::new();
        for source in &spec.sources {
            sources.push(SourceRequest {
                uri: source.uri.clone(),
                weight: source.weight,
                image_column: named(&source.image_column).or(named(&source.text_column)),
                image_root: named(&source.image_root),
                caption_column: named(&source.caption_column).or(named(&source.target_column)),
                is_text: !source.text_column.is_empty(),
                is_target: !source.target_column.is_empty(),
                caption_seed: source.caption_seed,
                predicate: named(&source.r#where),
                allow: named(&source.allow),
                id_column: named(&source.id_column),
                scores: named(&source.scores),
            });
        }
        index(stores, Some(&self.coordinator.state), &sources)
            .boxed()
            .await
    }

    /// Reads the score columns of each source's first shard: what is no column of numbers is told
    /// before the first step.
    async fn scores(&self, spec: &RunSpec, manifest: &Manifest) -> Result<()> {
        let coordinator = self.coordinator;
        let scores = Scores::new(coordinator.stores.clone(), coordinator.state.clone());
        let asked = spec.phases.iter().flat_map(|phase| &phase.score_columns);
        let names = asked.map(|column| column.name.as_str());
        let names: BTreeSet<&str> = names.filter(|name| *name != losses::COLUMN).collect();
        for source in &manifest.sources {
            for name in &names {
                scores.check(source, name).await?;
            }
        }
        Ok(())
    }

    /// Has workers load the models. What the spec leaves to the device is fixed by what the first
    /// of them computes in: all workers must do the same.
    async fn models(&self, spec: &mut RunSpec) -> Result<(Option<ModelFact>, Option<ModelFact>)> {
        let stores = &self.coordinator.stores;
        let mut reference = None;
        if let Some(asked) = spec.reference.clone() {
            stores.open_allowed(&asked.model_uri)?;
            reference = Some(
                self.model(models::reference_ref(spec, &asked, None), spec)
                    .await?,
            );
        }
        let mut learner = None;
        if let Some(asked) = spec.learner.clone() {
            stores.open_allowed(&asked.model_uri)?;
            if let Some(Initial::SnapshotUri(uri)) = &asked.initial {
                let snapshot = stores.open_allowed(uri)?;
                // The model folder's own URI means the weights in it.
                if *uri != asked.model_uri && snapshot.head("").await?.is_none() {
                    return Err(no_snapshot(uri));
                }
            }
            learner = Some(
                self.model(models::initial_ref(spec, &asked, None), spec)
                    .await?,
            );
        }
        if spec.micro_batch_rows == 0 {
            // Without models it decides nothing; a run has a value all the same.
            spec.micro_batch_rows = spec::micro_batch_rows_on("cpu");
        }
        Ok((reference, learner))
    }

    async fn model(&self, model: ModelRef, spec: &mut RunSpec) -> Result<ModelFact> {
        let uri = model.model_uri.clone();
        let prepared = prepare(&self.coordinator.deps.pool, model, true).await?;
        models::check_gives(spec, &prepared.model_type, &uri)?;
        if spec.compute_dtype() == ComputeDtype::Unspecified {
            spec.compute_dtype = prepared.compute_dtype;
        }
        if spec.micro_batch_rows == 0 {
            spec.micro_batch_rows = spec::micro_batch_rows_on(&prepared.device);
        }
        Ok(prepared.into())
    }

    async fn weights(
        &self,
        spec: &RunSpec,
        learner: Option<&ModelFact>,
        location: &Location,
        owner: &Ownership,
    ) -> Result<Weights> {
        let limits = &self.coordinator.deps.limits;
        let settings = RunWeights {
            run_id: self.id.to_owned(),
            lag: spec.lag.unwrap_or_default(),
            push_every_steps: spec.push_every_steps,
            first_push: matches!(&spec.learner, Some(l) if matches!(l.initial,
                Some(Initial::FirstPush(_)))),
            initial: initial_weights(spec, learner),
            push_bytes_max: limits.push_bytes_max,
            push_deadline: limits.push_deadline,
            owner: Some(owner.clone()),
        };
        let verifier = WorkerVerifier {
            pool: self.coordinator.deps.pool.clone(),
            learner: spec
                .learner
                .as_ref()
                .map(|asked| models::initial_ref(spec, asked, None))
                .unwrap_or_default(),
            shape: verifier::shape(learner.unwrap_or(&ModelFact::none())),
            scores: verifier::Scores::of(spec),
        };
        Weights::open(location.clone(), settings, Arc::new(verifier))
            .boxed()
            .await
    }
}

/// Returns the weights that the learner begins with, unless the trainer pushes them.
pub(super) fn initial_weights(spec: &RunSpec, learner: Option<&ModelFact>) -> Option<Published> {
    let asked = spec.learner.as_ref()?;
    let is_pushed = matches!(asked.initial, Some(Initial::FirstPush(_)));
    let fact = learner.filter(|_| !is_pushed)?;
    Some(Published {
        version: WeightsVersion {
            version: 0,
            step: -1,
            generation: 0,
            digest: fact.weights_digest.clone(),
        },
        snapshot_uri: String::new(),
        logit_scale: fact.logit_scale,
        logit_bias: fact.logit_bias,
    })
}

/// Returns the error for a missing snapshot. It is not `StorageUnreachable`, which clients retry.
fn no_snapshot(uri: &str) -> Error {
    let message = format!(
        "the learner's snapshot {uri} is not there, or is no file; name a safetensors file, or \
        the model folder itself where it \
         holds the weights"
    );
    Error::new(Reason::ModelInvalid, message)
        .with("file", uri)
        .with("uri", uri)
}

fn named(column: &str) -> Option<String> {
    (!column.is_empty()).then(|| column.to_owned())
}

/// Returns the answer of OpenRun.
pub fn response(run: &Run) -> Result<OpenRunResponse> {
    let spec = run.spec();
    Ok(OpenRunResponse {
        dataset_manifest: run.manifest_digest.clone(),
        output_schema: output::schema_bytes(&run.output_schema)?,
        generation: run.generation(),
        next_step: run.next_step(),
        dataset_rows: run.manifest.rows(),
        steps_total: run.plan.steps_total(&spec.phases).unwrap_or(0),
        spec: Some((*spec).clone()),
    })
}
