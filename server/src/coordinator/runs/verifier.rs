//! Verifies pushed weights on a worker before they are published.
use crate::{
    coordinator::{
        facts::run::ModelFact,
        weights::{ModelShape, Verifier},
        workers::{pool::Pool, prepare::prepare},
    },
    error::Result,
};
use async_trait::async_trait;
use std::sync::Arc;
use superbatch_proto::v1::ModelRef;

/// Verifies pushes by having a worker load them.
pub struct WorkerVerifier {
    pub pool: Arc<Pool>,
    /// The learner, without weights.
    pub learner: ModelRef,
    pub shape: ModelShape,
}

pub fn shape(fact: &ModelFact) -> ModelShape {
    ModelShape {
        tensors: fact.tensors.clone(),
        optional: fact.optional_tensors.clone(),
        logit_scale: fact.logit_scale,
        logit_bias: fact.logit_bias,
    }
}

#[async_trait]
impl Verifier for WorkerVerifier {
    async fn verify(&self, snapshot_uri: &str, digest: &str) -> Result<ModelShape> {
        let model = ModelRef {
            snapshot_uri: snapshot_uri.to_owned(),
            snapshot_digest: digest.to_owned(),
            random_seed: None,
            ..self.learner.clone()
        };
        let model = prepare(&self.pool, model, true).await?;
        Ok(shape(&model.into()))
    }

    async fn shape(&self) -> Result<ModelShape> {
        Ok(self.shape.clone())
    }
}
