//! Draws by scores of models.
use super::{decided::Decided, learner::Learner, maker::Maker};
use crate::{
    coordinator::{runs::models, score::scored::Rows, spec::Asked},
    error::{Error, Result},
};
use tokio::time::Instant;

impl Maker<'_> {
    /// Has all candidates embedded by the models that the phase needs, and selects.
    pub async fn scored(&self, decided: &mut Decided) -> Result<Rows> {
        let (run, phase, size) = (
            self.run,
            decided.phase.clone(),
            self.super_batch.candidates.len(),
        );
        let mut scoring = self
            .begin(self.job(decided, false), &self.super_batch.candidates)
            .await?;
        decided.candidates_scanned = size;
        decided.read(&scoring);
        let reference = scoring.reference()?;
        if let Some(scored) = &reference {
            models::check_unchanged(run.reference.as_ref(), scored, false, "reference")?;
            decided.embedded_reference(scored);
        }
        // The reference's embeddings are complete before the step waits for weights. So while the
        // trainer works on the step before, everything that does not depend on its weights is done
        // ahead.
        let waiting = Instant::now();
        let learner = match Asked::by(&phase).learner {
            false => Learner::NotAsked,
            true => self.await_weights(decided.step).await?,
        };
        decided.record_wait(waiting.elapsed());
        let learner = match learner {
            Learner::Version(published, mode) => {
                decided.mode = mode;
                let spec = self
                    .spec
                    .learner
                    .as_ref()
                    .ok_or_else(|| Error::internal("a scored phase has no learner"))?;
                let model =
                    models::published_ref(self.spec, spec, &published, run.learner.as_ref());
                let scored = scoring.learner(&model).await?;
                let is_pushed = published.version.version > 0;
                models::check_unchanged(run.learner.as_ref(), &scored, is_pushed, "learner")?;
                decided.embedded_learner(&published, &scored, run.learner.as_ref());
                Some((model, scored))
            }
            Learner::Degraded(mode) => {
                decided.mode = mode;
                None
            }
            Learner::NotAsked => None,
        };
        let (model, learner) = learner.unzip();
        decided.add_holes(scoring.holes(), &[&reference, &learner]);
        self.enough(decided)?;
        let embedded = model.as_ref().zip(learner.as_ref());
        self.probe(decided, embedded, reference.as_ref()).await;
        decided.drawn = self.draw(decided, learner, reference).await?;
        let rows = scoring.rows(&decided.drawn.indices).await?;
        decided.record_discarded(scoring.discarded_flops());
        Ok(rows)
    }
}
