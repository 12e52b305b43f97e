//! Runs that are not in memory, as the state has them: for calls that only read.
//!
//! A call that reads must not load a run. Loading takes the run over, holds it in memory, and may
//! put another run to sleep: a dashboard that polls more runs than fit would end the calls of
//! trainers. All that such calls ask for is in the state.
use super::{
    open::initial_weights,
    registry::{Coordinator, check_id, not_found, stored_state},
    run::missing_pushes,
};
use crate::{
    coordinator::{
        facts::{
            owner::Ownership,
            run::{self, RunFacts},
        },
        plan::planner::tail_rows,
        runs::fork,
        weights,
    },
    dataset::Manifest,
    error::Result,
};
use futures::FutureExt;
use std::{
    collections::HashMap,
    sync::{Arc, Mutex},
};
use superbatch_proto::v1::{
    GetWeightsDigestsRequest, GetWeightsDigestsResponse, KeptWeights, RunInfo, RunSummary,
};

/// Manifests whose sizes are kept in memory.
const SIZES_KEPT: usize = 1024;

/// What is kept for calls about runs that are not in memory.
#[derive(Default)]
pub(super) struct Asleep {
    /// By the manifest's digest. A manifest may be hundreds of megabytes, and of all that only
    /// this is needed.
    sizes: Mutex<HashMap<String, Arc<Sizes>>>,
    /// Held while a manifest is read, so that calls at once hold one in memory.
    loading: tokio::sync::Mutex<()>,
    /// Held while the digests of a version's tensors are computed, one version at a time.
    reading: tokio::sync::Mutex<()>,
}

/// The sources of a manifest.
struct Sizes {
    rows: Vec<u64>,
    weights: Vec<f64>,
}

impl Coordinator {
    /// Describes a run, as [`super::run::Run::info`] does. Of a run that is not in memory the state
    /// does not know what its trainer has consumed.
    ///
    /// # Errors
    /// `RunNotFound`; `NotOwner` with the owner's address; `StorageUnreachable`.
    pub async fn info(&self, id: &str, resume: Option<u64>) -> Result<RunInfo> {
        check_id(id)?;
        if let Some(run) = self.owned(id).await? {
            return Ok(run.run().info(resume));
        }
        let facts = self.facts(id).await?;
        let receipts = fork::receipts(&self.state, id, &facts).await?;
        // From one list of receipts: the last step and the totals are of one moment.
        let opened = receipts.opened(&facts.chain, facts.spec.max_ahead);
        let (committed, totals) = opened.boxed().await?;
        let weights = self.stored_weights(id, &facts).await?;
        let sizes = self.sizes(&facts.run.manifest).await?;
        let (spec, began) = (&facts.spec, facts.chain.began());
        Ok(RunInfo {
            summary: Some(RunSummary {
                run_id: id.to_owned(),
                state: stored_state(&facts) as i32,
                generation: facts.chain.current(),
                last_committed_step: committed.newest(),
            }),
            candidates_scanned: totals.candidates_scanned,
            examples_delivered: 0,
            consumed_through: None,
            accounts: Some(totals),
            learner: weights.book.newest().map(|published| published.version),
            tail_rows_per_epoch: tail_rows(&sizes.rows, &sizes.weights, &spec.phases),
            missing_pushes: missing_pushes(spec, &committed, &began, &weights.book, resume),
            dataset_manifest: facts.run.manifest,
            failure: facts.failure.unwrap_or_default(),
            spec: Some(facts.spec),
        })
    }

    /// Returns the newest versions of a run's weights, the newest first.
    ///
    /// # Errors
    /// As [`Coordinator::info`].
    pub async fn weights(&self, id: &str, newest: usize) -> Result<Vec<KeptWeights>> {
        check_id(id)?;
        if let Some(run) = self.owned(id).await? {
            return Ok(run.run().weights.list(newest));
        }
        let facts = self.facts(id).await?;
        Ok(self.stored_weights(id, &facts).await?.list(newest))
    }

    /// Returns the digests of a version's tensors.
    ///
    /// # Errors
    /// As [`Coordinator::info`]; `WeightsMissing` if the version is not kept.
    pub async fn weights_digests(
        &self,
        request: &GetWeightsDigestsRequest,
    ) -> Result<GetWeightsDigestsResponse> {
        let (id, version) = (request.run_id.as_str(), request.version);
        check_id(id)?;
        if let Some(run) = self.owned(id).await? {
            let weights = &run.run().weights;
            return weights.digests(version, request.tensor_offset).await;
        }
        let facts = self.facts(id).await?;
        let weights = self.stored_weights(id, &facts).await?;
        let _alone = self.asleep.reading.lock().await;
        weights.digests(version, request.tensor_offset).await
    }

    /// Reads the facts of a run that no other live coordinator owns: that one knows more of it than
    /// the state.
    async fn facts(&self, id: &str) -> Result<RunFacts> {
        let location = self.location(id);
        let facts = run::load(&location).await?;
        let facts = facts.ok_or_else(|| not_found(id))?;
        Ownership::check_free(&location, &self.identity).await?;
        Ok(facts)
    }

    async fn stored_weights(&self, id: &str, facts: &RunFacts) -> Result<weights::Asleep> {
        let initial = initial_weights(&facts.spec, facts.run.learner.as_ref());
        weights::Asleep::read(self.location(id), initial)
            .boxed()
            .await
    }

    async fn sizes(&self, manifest: &str) -> Result<Arc<Sizes>> {
        let kept = || self.asleep.sizes.lock().expect("no panic while held");
        let known = || kept().get(manifest).cloned();
        if let Some(sizes) = known() {
            return Ok(sizes);
        }
        let _alone = self.asleep.loading.lock().await;
        if let Some(sizes) = known() {
            return Ok(sizes);
        }
        let loaded = Manifest::load(&self.state, manifest).await?;
        let sizes = Arc::new(Sizes {
            rows: loaded.sources.iter().map(|source| source.rows()).collect(),
            weights: loaded.sources.iter().map(|source| source.weight).collect(),
        });
        let mut kept = kept();
        if kept.len() >= SIZES_KEPT {
            kept.clear();
        }
        kept.insert(manifest.to_owned(), sizes.clone());
        Ok(sizes)
    }
}
