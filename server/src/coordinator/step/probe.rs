//! The fidelity probe: some candidates are embedded at the fidelity that the step is not scored at,
//! too, so that it is known what approximate scoring costs in choice.
use super::{decided::Decided, maker::Maker, own::Reference};
use crate::{
    coordinator::{
        facts::run::ModelFact,
        plan::candidate::{Candidate, noise_keys},
        runs::models,
        score::{scored::Scored, slice::Job, super_batch::Scoring},
        spec::probes_at,
    },
    error::{Error, Result},
    metrics,
    selection::{Embedded, probed::compare},
};
use std::collections::BTreeSet;
use superbatch_proto::v1::{
    Approximation, Fidelity, Mode, ModelRef, Phase, ProbeResult, SelectBegin,
};
use tokio::time::Instant;

const PURPOSE: &str = "superbatch rows of a fidelity probe v1";

impl Maker<'_> {
    /// Compares both fidelities where a probe is due. The step does without a probe that fails.
    /// `learner` and `reference` come with the weights that they were embedded with.
    pub(crate) async fn probe(
        &self,
        decided: &mut Decided,
        learner: Option<(&ModelRef, &Scored)>,
        reference: Option<(&Reference, &Scored)>,
    ) {
        let degraded = matches!(decided.mode, Mode::Uniform | Mode::ReferenceOnly);
        let Some(other) = probes_at(&decided.phase, decided.step).filter(|_| !degraded) else {
            return;
        };
        let started = Instant::now();
        let found = self.probed(decided, other, learner, reference).await;
        let seconds = started.elapsed().as_secs_f64();
        metrics::stage_duration("probe").record(seconds);
        match found {
            Ok(found) => decided.probe = Some(ProbeResult { seconds, ..found }),
            Err(error) => {
                metrics::probes("failed").increment(1);
                tracing::warn!(
                    run = self.run.id,
                    step = decided.step,
                    error = error.chain(),
                    "the fidelity probe failed; the step goes on without"
                );
            }
        }
    }

    async fn probed(
        &self,
        decided: &mut Decided,
        other: Option<Approximation>,
        learner: Option<(&ModelRef, &Scored)>,
        reference: Option<(&Reference, &Scored)>,
    ) -> Result<ProbeResult> {
        let (mut begin, asked) = self.asking(
            decided,
            learner.map(|(_, scored)| scored),
            reference.map(|(_, scored)| scored),
        )?;
        let rows = sample(&begin, &decided.phase, decided.step);
        let terms = rows.iter().filter_map(|row| begin.terms.get(*row));
        begin.terms = terms.copied().collect();
        let all = &self.super_batch.candidates;
        let candidates: Vec<Candidate> = rows.iter().map(|row| all[*row]).collect();
        let of_learner = learner.filter(|_| asked.learner);
        let of_reference = reference.filter(|_| asked.reference);
        let mut holes = BTreeSet::new();
        let (mut given, mut made) = ([None, None], [None, None]);
        if let Some((model, scored)) = of_learner {
            let fact = self.run.learner.as_ref();
            let at_other = self.embedded_at(decided, other, (model, fact), &candidates);
            given[0] = Some(scored.embedded.picked(&rows));
            made[0] = Some(at_other.await?.unsound(&mut holes));
        }
        if let Some((own, scored)) = of_reference {
            let (model, fact) = match (own, &self.spec.reference) {
                (Reference::Own(model), _) => (model.clone(), self.run.learner.as_ref()),
                (_, Some(spec)) => {
                    let fact = self.run.reference.as_ref();
                    (models::reference_ref(self.spec, spec, fact), fact)
                }
                _ => return Err(Error::internal("a reference that the run does not have")),
            };
            let at_other = self.referred_at(decided, other, (&model, fact), &candidates);
            given[1] = Some(scored.embedded.picked(&rows));
            made[1] = Some(at_other.await?.unsound(&mut holes));
        }
        let begin = smaller(begin, &decided.phase, &candidates, holes);
        let is_full = decided.phase.fidelity() != Fidelity::Approximate;
        let work = move || {
            if is_full {
                compare(&begin, each(&given), each(&made))
            } else {
                compare(&begin, each(&made), each(&given))
            }
        };
        let done = tokio::task::spawn_blocking(work).await;
        let (found, flops) =
            done.map_err(|e| Error::internal("comparing fidelities panicked").because(e))??;
        decided.spent.add(flops);
        decided.cost.selection_flops += flops;
        metrics::flops("selection").increment(flops as u64);
        Ok(found)
    }

    /// Embeds these candidates by the learner.
    async fn embedded_at(
        &self,
        decided: &mut Decided,
        approximation: Option<Approximation>,
        (model, fact): (&ModelRef, Option<&ModelFact>),
        candidates: &[Candidate],
    ) -> Result<Scored> {
        let bare = ModelRef {
            snapshot_uri: String::new(),
            snapshot_digest: String::new(),
            ..model.clone()
        };
        let job = Job {
            reference: None,
            learner_model: Some(bare),
            learner_dim: fact.and_then(ModelFact::embedding_dim),
            approximation,
            ..self.job(decided, false)
        };
        let mut scoring = self.begin(job, candidates).await?;
        let scored = scoring.learner(model).await;
        compared(decided, &scoring, scored)
    }

    /// Embeds these candidates by the reference, as far as its embeddings are not kept.
    /// Few rows of each block are compared, so what is missing is embedded without the rest of its
    /// block.
    async fn referred_at(
        &self,
        decided: &mut Decided,
        approximation: Option<Approximation>,
        (model, fact): (&ModelRef, Option<&ModelFact>),
        candidates: &[Candidate],
    ) -> Result<Scored> {
        let job = Job {
            reference: Some(model.clone()),
            is_sparse: true,
            reference_dim: fact.and_then(ModelFact::embedding_dim),
            learner_model: None,
            approximation,
            ..self.job(decided, false)
        };
        let mut scoring = self.begin(job, candidates).await?;
        let scored = scoring.reference().await?;
        let scored =
            scored.ok_or_else(|| Error::internal("the reference's embeddings are missing"));
        compared(decided, &scoring, scored)
    }
}

/// Accounts for what was embedded for the comparison. Candidates that are holes have no embedding.
fn compared(decided: &mut Decided, scoring: &Scoring, scored: Result<Scored>) -> Result<Scored> {
    let spent = scored.as_ref().map_or(0.0, |scored| scored.flops);
    decided.probe_spent(spent + scoring.discarded_flops());
    let mut scored = scored?;
    let holes = scoring.holes().into_iter().map(|hole| hole.candidate);
    scored.not_finite.extend(holes);
    Ok(scored)
}

impl Scored {
    /// Returns the embeddings, and adds the candidates that have none to `holes`.
    fn unsound(self, holes: &mut BTreeSet<u32>) -> Embedded {
        holes.extend(self.not_finite);
        self.embedded
    }
}

fn each(models: &[Option<Embedded>; 2]) -> [Option<&Embedded>; 2] {
    [models[0].as_ref(), models[1].as_ref()]
}

/// Returns the candidates that are compared, rising: as many as the phase says, those of the lowest
/// seeded hashes that are no holes.
fn sample(begin: &SelectBegin, phase: &Phase, step: u64) -> Vec<usize> {
    let wanted = phase.probe.map_or(0, |probe| probe.rows) as usize;
    let holes: BTreeSet<u32> = begin.holes.iter().copied().collect();
    let hash = |key: u64| {
        let mut hasher = blake3::Hasher::new_derive_key(PURPOSE);
        for word in [begin.seed, step, key] {
            hasher.update(&word.to_le_bytes());
        }
        *hasher.finalize().as_bytes()
    };
    let mut rows: Vec<usize> = (0..begin.positions.len())
        .filter(|row| !holes.contains(&(*row as u32)))
        .collect();
    rows.sort_by_cached_key(|row| hash(begin.positions[*row]));
    rows.truncate(wanted);
    rows.sort_unstable();
    rows
}

/// Returns the step's draw on `candidates` alone, with the same share of them drawn.
fn smaller(
    begin: SelectBegin,
    phase: &Phase,
    candidates: &[Candidate],
    holes: BTreeSet<u32>,
) -> SelectBegin {
    let share = f64::from(phase.sub_batch_size) / f64::from(phase.super_batch_size.max(1));
    let usable = candidates.len() - holes.len();
    let drawn = ((usable as f64 * share).round() as u32).max(1);
    SelectBegin {
        sub_batch_size: drawn,
        n_chunks: begin.n_chunks.min(drawn),
        positions: noise_keys(candidates),
        holes: holes.into_iter().collect(),
        ..begin
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use superbatch_proto::v1::FidelityProbe;

    fn candidates(count: u64) -> Vec<Candidate> {
        let candidate = |position| Candidate {
            source: 0,
            shard: 0,
            block: 0,
            row: position as u32,
            position,
        };
        (0..count).map(candidate).collect()
    }

    fn asked(rows: u32) -> (SelectBegin, Phase) {
        let begin = SelectBegin {
            positions: noise_keys(&candidates(100)),
            holes: vec![3, 50],
            n_chunks: 16,
            seed: 5,
            ..Default::default()
        };
        let probe = FidelityProbe {
            every_steps: 10,
            rows,
        };
        let phase = Phase {
            super_batch_size: 100,
            sub_batch_size: 20,
            probe: Some(probe),
            ..Default::default()
        };
        (begin, phase)
    }

    #[test]
    fn a_seeded_part_of_the_usable_candidates_is_compared() {
        let (begin, phase) = asked(40);
        let rows = sample(&begin, &phase, 7);
        assert_eq!(rows.len(), 40);
        assert!(rows.is_sorted() && !rows.contains(&3) && !rows.contains(&50));
        assert_eq!(sample(&begin, &phase, 7), rows);
        assert_ne!(
            sample(&begin, &phase, 8),
            rows,
            "other rows at another step"
        );
        let (begin, phase) = asked(1024);
        assert_eq!(sample(&begin, &phase, 7).len(), 98);
    }

    #[test]
    fn a_probes_draw_is_the_steps_in_small() {
        let (begin, phase) = asked(40);
        let small = smaller(begin, &phase, &candidates(40), BTreeSet::from([1, 9]));
        assert_eq!(small.sub_batch_size, 8, "a fifth of 38");
        assert_eq!((small.n_chunks, small.positions.len()), (8, 40));
        assert_eq!(small.holes, [1, 9]);
    }
}
