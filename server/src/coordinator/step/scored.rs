//! Draws by scores of models.
use super::{decided::Decided, learner::Learner, maker::Maker, own::Reference};
use crate::{
    coordinator::{runs::models, score::scored::Rows, serve::share, spec::Asked},
    error::{Error, Result},
    traces::stage,
};
use tokio::time::Instant;
use tracing::Instrument;

impl Maker<'_> {
    /// Has all candidates embedded by the models that the phase needs, and selects.
    pub(crate) async fn scored(&self, decided: &mut Decided) -> Result<Rows> {
        let (run, size) = (self.run, self.super_batch.candidates.len());
        let own = self.reference_of(&decided.phase).await?;
        let job = own.put_into(self.job(decided, false));
        let mut scoring = self.begin(job, &self.super_batch.candidates).await?;
        decided.candidates_scanned = size;
        decided.read(&scoring);
        let reference = scoring.reference().await?;
        if let Some(scored) = &reference {
            let fact = if own.is_own() {
                run.learner.as_ref()
            } else {
                run.reference.as_ref()
            };
            models::check_unchanged(fact, scored, own.is_own(), "reference")?;
            decided.embedded_reference(scored);
        }
        let learner = self.learner(&own, decided).await?;
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
        let compared = reference.as_ref().map(|scored| (&own, scored));
        self.probe(decided, embedded, compared).await;
        let drawn = self.draw(decided, learner, reference);
        decided.drawn = drawn.instrument(stage!("select")).await?;
        let drawn = &decided.drawn.indices;
        let served = share::places(self.spec.seed, decided.step, drawn.len());
        let rows = scoring
            .rows(drawn, &served, |c| self.changed(c))
            .instrument(stage!("rows"))
            .await?;
        decided.record_discarded(scoring.discarded_flops());
        Ok(rows)
    }

    /// Returns the learner that scores the step, once its weights are here.
    ///
    /// The reference's embeddings are complete before the step waits for weights. So while the
    /// trainer works on the step before, everything that does not depend on its weights is done
    /// ahead.
    async fn learner(&self, own: &Reference, decided: &mut Decided) -> Result<Learner> {
        let waiting = Instant::now();
        let learner = match (own, Asked::by(&decided.phase).learner) {
            (Reference::Degraded(mode), _) => Learner::Degraded(*mode),
            (_, false) => Learner::NotAsked,
            (_, true) => {
                let weights = self.await_weights(decided.step);
                weights.instrument(stage!("wait_weights")).await?
            }
        };
        decided.record_wait(waiting.elapsed());
        Ok(learner)
    }
}
