//! Verifies pushed weights on a worker before they are published.
use crate::{
    coordinator::{
        facts::run::ModelFact,
        weights::{ModelShape, Verifier},
        workers::{
            pool::Pool,
            prepare::{prepare, prepare_pushed},
        },
    },
    error::{Error, Result},
    pushed::Pushed,
    selection::{Embedded, Values, draw, response},
};
use async_trait::async_trait;
use std::sync::Arc;
use superbatch_kernels::Backend;
use superbatch_proto::{
    SUPER_BATCH_SIZE_MAX,
    v1::{
        Criterion, EmbeddingDtype, Loss, ModelRef, Policy, PrepareModelResponse, Reason, RunSpec,
        SelectBegin,
    },
};

/// Verifies pushes by having a worker load them.
pub struct WorkerVerifier {
    pub pool: Arc<Pool>,
    /// The learner, without weights.
    pub learner: ModelRef,
    pub shape: ModelShape,
    /// How the run will score with it.
    pub scores: Scores,
}

/// What a run's spec says of the scores of its learner.
#[derive(Debug, Clone, Copy)]
pub struct Scores {
    loss: Loss,
    gain: f64,
    /// For a model that has no bias.
    logit_bias: Option<f64>,
}

impl Scores {
    pub fn of(spec: &RunSpec) -> Self {
        let gains = spec.phases.iter().map(|phase| phase.gain);
        Self {
            loss: spec.loss(),
            gain: gains.fold(1.0, f64::max),
            logit_bias: spec.learner.as_ref().and_then(|learner| learner.logit_bias),
        }
    }

    /// Draws from a few made-up candidates as a step would. A scale or a bias may be finite, and
    /// every loss made of it not: then each step that is scored with it would fail, and the push
    /// that could have been refused is published.
    ///
    /// # Errors
    /// `WeightsRefused`, naming the tensor.
    pub fn check(&self, scale: f64, bias: Option<f64>) -> Result<()> {
        if self.loss == Loss::PerExample {
            // It has neither, and the worker has looked at its losses of a canary batch.
            return Ok(());
        }
        let bias = bias.or(self.logit_bias).unwrap_or_default();
        // The sums of a super-batch have to be finite, too.
        let room = f64::from(SUPER_BATCH_SIZE_MAX);
        let drawn = |bias: f64| self.draw(scale * room, bias * room);
        let Err(error) = drawn(bias) else {
            return Ok(());
        };
        let (tensor, value) = match drawn(0.0) {
            Err(_) => ("logit_scale", scale),
            Ok(()) => ("logit_bias", bias),
        };
        let message = format!(
            "a canary batch cannot be scored with a {tensor} of {value}{}; look at what the \
            trainer does to it",
            if tensor == "logit_scale" {
                " (exp applied)"
            } else {
                ""
            }
        );
        let refused = Error::new(Reason::WeightsRefused, message).with("tensor", tensor);
        Err(refused.because(error))
    }

    fn draw(&self, scale: f64, bias: f64) -> Result<()> {
        // At 0 all pairs are alike. Devices multiply in f32.
        let is_finite = |value: f64| (value as f32).is_finite();
        if scale <= 0.0 || !is_finite(scale) || !is_finite(bias) {
            let what = "sums over a super-batch are not finite in f32, or its scale is not above 0";
            return Err(Error::internal(what));
        }
        let begin = SelectBegin {
            policy: Policy::Joint.into(),
            criterion: Criterion::Hard.into(),
            loss: self.loss.into(),
            sub_batch_size: 2,
            n_chunks: 2,
            gain: self.gain,
            positions: (0..CANARY.len() as u64).collect(),
            learner_scale: scale,
            learner_bias: bias,
            embedding_dtype: EmbeddingDtype::F32.into(),
            ..Default::default()
        };
        let values =
            |of: fn(&[[f32; 2]; 2]) -> [f32; 2]| Values::F32(CANARY.iter().flat_map(of).collect());
        let learner = Embedded {
            image: values(|pair| pair[0]),
            text: values(|pair| pair[1]),
            dim: 2,
        };
        let drawn = response(draw(Backend::Native, &begin, Some(&learner), None)?);
        if drawn.batch_score.is_finite() && drawn.scores.iter().all(|score| score.is_finite()) {
            Ok(())
        } else {
            Err(Error::internal("its scores are not finite"))
        }
    }
}

/// Images and captions that match, that have nothing to do with each other, and that are opposed.
const CANARY: [[[f32; 2]; 2]; 4] = [
    [[1.0, 0.0], [1.0, 0.0]],
    [[0.0, 1.0], [1.0, 0.0]],
    [[0.0, 1.0], [0.0, -1.0]],
    [[0.6, 0.8], [0.8, 0.6]],
];

impl WorkerVerifier {
    /// Returns the learner with the weights of a snapshot.
    fn snapshot(&self, uri: &str, digest: &str) -> ModelRef {
        ModelRef {
            snapshot_uri: uri.to_owned(),
            snapshot_digest: digest.to_owned(),
            random_seed: None,
            ..self.learner.clone()
        }
    }

    /// Returns the shape of a loaded model, once a step could be scored with it.
    fn scored(&self, model: PrepareModelResponse) -> Result<ModelShape> {
        let shape = shape(&model.into());
        self.scores.check(shape.logit_scale, shape.logit_bias)?;
        Ok(shape)
    }
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
        let model = self.snapshot(snapshot_uri, digest);
        self.scored(prepare(&self.pool, model, true).await?)
    }

    async fn verify_in_memory(
        &self,
        snapshot_uri: &str,
        pushed: Pushed,
    ) -> Result<Option<ModelShape>> {
        let model = self.snapshot(snapshot_uri, &pushed.digest);
        let prepared = prepare_pushed(&self.pool, model, pushed).await?;
        prepared.map(|model| self.scored(model)).transpose()
    }

    async fn shape(&self) -> Result<ModelShape> {
        Ok(self.shape.clone())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_scale_or_a_bias_that_no_step_can_be_scored_with_is_refused() {
        for loss in [Loss::Sigmoid, Loss::Softmax] {
            let scores = Scores {
                loss,
                gain: 1.0,
                logit_bias: None,
            };
            for (scale, bias) in [(10.0, Some(-10.0)), (100.0, None), (1.0, Some(0.0))] {
                scores.check(scale, bias).unwrap();
            }
            for scale in [0.0, 3e38] {
                let refused = scores.check(scale, Some(-10.0)).err();
                let error = refused.unwrap_or_else(|| panic!("{loss:?}, scale {scale}"));
                assert_eq!(error.reason(), Reason::WeightsRefused);
                assert_eq!(
                    error.value("tensor"),
                    Some("logit_scale"),
                    "{scale}: {error}"
                );
            }
        }
        let sigmoid = Scores {
            loss: Loss::Sigmoid,
            gain: 1.0,
            logit_bias: None,
        };
        for bias in [3e38, -3e38] {
            let refused = sigmoid.check(10.0, Some(bias)).err();
            let error = refused.unwrap_or_else(|| panic!("bias {bias}"));
            assert_eq!(error.value("tensor"), Some("logit_bias"), "{error}");
        }
    }
}
