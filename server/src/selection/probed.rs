//! What approximate scoring chooses beside full fidelity: the same candidates, embedded at both.
use super::{Embedded, draw, judged::judge, settings};
use crate::error::{Error, Result};
use superbatch_kernels::{Backend, Candidates, Noise, Policy, Settings, Tuning};
use superbatch_proto::v1::{Loss, ProbeResult, SelectBegin};

/// Learner's and reference's embeddings at one fidelity, where the criterion asks the model.
pub(crate) type Pair<'a> = [Option<&'a Embedded>; 2];

/// Compares what `begin` draws by embeddings of full fidelity and by approximate ones. `begin`
/// names the candidates that were embedded at both, their holes at either, and the size of a draw.
/// `seconds` is the caller's to fill. With the operations that it took.
///
/// # Errors
/// As [`draw`]; `Internal` if a model that the criterion asks is missing.
pub(crate) fn compare(
    begin: &SelectBegin,
    full: Pair<'_>,
    approximate: Pair<'_>,
) -> Result<(ProbeResult, f64)> {
    let mut flops = 0.0;
    let mut judged = |[learner, reference]: Pair<'_>| {
        let judged = judge(begin, learner, reference)
            .ok_or_else(|| Error::internal("a probe lacks a model that its criterion asks"))?;
        flops += judged.flops;
        Ok::<_, Error>(judged)
    };
    let (of_full, of_approximate) = (judged(full)?, judged(approximate)?);
    let score_uniform = of_full
        .uniform_score
        .ok_or_else(|| Error::internal("a probe has too few rows for a uniform draw"))?;
    let mut drawn = |[learner, reference]: Pair<'_>| {
        let drawn = draw(Backend::Native, begin, learner, reference)?;
        flops += drawn.flops;
        Ok::<_, Error>(drawn.indices)
    };
    let by_full = drawn(full)?;
    let by_approximate = drawn(approximate)?;
    let mut batch_score = |indices: &[u32]| {
        let (score, spent) = score_of(begin, full, indices)?;
        flops += spent;
        Ok::<_, Error>(score)
    };
    let result = ProbeResult {
        rows: (begin.positions.len() - begin.holes.len()) as u32,
        draw: begin.sub_batch_size,
        rank_correlation: spearman(&of_full.own, &of_approximate.own),
        overlap: overlap(&by_full, &by_approximate),
        score_full: batch_score(&by_full)?,
        score_approximate: batch_score(&by_approximate)?,
        score_uniform,
        seconds: 0.0,
    };
    Ok((result, flops))
}

/// Returns the share that the approximate draw keeps of what the full draw gains over a uniform
/// one. `None` if that gains nothing that could be kept.
pub(crate) fn kept_gain(found: &ProbeResult) -> Option<f64> {
    let gain = found.score_full - found.score_uniform;
    (gain > 0.0).then(|| (found.score_approximate - found.score_uniform) / gain)
}

/// Returns the batch score of these candidates, with the operations that it took.
///
/// # Errors
/// As [`draw`].
pub(crate) fn score_of(
    begin: &SelectBegin,
    [learner, reference]: Pair<'_>,
    indices: &[u32],
) -> Result<(f64, f64)> {
    if begin.loss() == Loss::PerExample {
        let judged = judge(begin, learner, reference);
        let judged = judged.ok_or_else(|| Error::internal("the losses of a model are missing"))?;
        let sum: f64 = indices
            .iter()
            .map(|index| judged.own[*index as usize])
            .sum();
        return Ok((sum / indices.len().max(1) as f64, judged.flops));
    }
    let rows: Vec<usize> = indices.iter().map(|index| *index as usize).collect();
    let [learner, reference] = [learner, reference].map(|model| model.map(|m| m.picked(&rows)));
    let keys: Vec<u64> = (0..rows.len() as u64).collect();
    let candidates = Candidates {
        count: rows.len(),
        learner: learner
            .as_ref()
            .map(|m| m.model(begin.learner_scale, begin.learner_bias)),
        reference: reference
            .as_ref()
            .map(|m| m.model(begin.reference_scale, begin.reference_bias)),
        holes: &[],
    };
    let all = Settings {
        policy: Policy::Uniform,
        sub_batch_size: rows.len(),
        n_chunks: 1,
        ..settings(begin)?
    };
    let noise = Noise::Seeded {
        seed: 0,
        generation: 0,
        step: 0,
        keys: &keys,
    };
    // A uniform draw's score holds the terms, too: without them here the gains would be of two
    // measures.
    let terms: Vec<f64> = rows
        .iter()
        .filter_map(|row| begin.terms.get(*row).copied())
        .collect();
    let terms = (!terms.is_empty()).then_some(terms.as_slice());
    let drawn =
        Backend::Native.select_with_terms(&candidates, &all, &Tuning::default(), terms, &noise);
    let drawn = drawn.map_err(super::refusal)?;
    let score = drawn
        .batch_score
        .ok_or_else(|| Error::internal("a probe's draw has no score"))?;
    Ok((score, drawn.flops))
}

/// Returns the share of the first draw that the second one has, too.
fn overlap(a: &[u32], b: &[u32]) -> f64 {
    let mut b = b.to_vec();
    b.sort_unstable();
    let common = a.iter().filter(|index| b.binary_search(index).is_ok());
    common.count() as f64 / a.len().max(1) as f64
}

/// Returns Spearman's rank correlation over the candidates that both have a score of; 0 where
/// either has one score only.
fn spearman(a: &[f64], b: &[f64]) -> f64 {
    let both = a.iter().zip(b).filter(|(a, b)| (*a + *b).is_finite());
    let (a, b): (Vec<f64>, Vec<f64>) = both.unzip();
    let (a, b) = (ranks(&a), ranks(&b));
    let mean = (a.len() as f64 - 1.0) / 2.0;
    let moment = |a: &[f64], b: &[f64]| -> f64 {
        let terms = a.iter().zip(b).map(|(a, b)| (a - mean) * (b - mean));
        terms.sum()
    };
    let spread = (moment(&a, &a) * moment(&b, &b)).sqrt();
    if spread > 0.0 {
        moment(&a, &b) / spread
    } else {
        0.0
    }
}

/// Returns each value's place by size from 0; equal values share the mean of their places.
fn ranks(values: &[f64]) -> Vec<f64> {
    let mut order: Vec<usize> = (0..values.len()).collect();
    order.sort_unstable_by(|a, b| values[*a].total_cmp(&values[*b]));
    let mut ranks = vec![0.0; values.len()];
    let mut first = 0;
    for run in order.chunk_by(|a, b| values[*a] == values[*b]) {
        let shared = first as f64 + (run.len() as f64 - 1.0) / 2.0;
        run.iter().for_each(|n| ranks[*n] = shared);
        first += run.len();
    }
    ranks
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::selection::Values;
    use superbatch_proto::v1::{self, Criterion};

    #[test]
    fn ranks_are_correlated_as_spearman_defines_it() {
        assert_eq!(ranks(&[3.0, 1.0, 3.0, 2.0]), [2.5, 0.0, 2.5, 1.0]);
        let rising = [1.0, 5.0, 7.0, 100.0];
        assert_eq!(spearman(&rising, &[0.0, 0.1, 0.2, 0.3]), 1.0);
        assert_eq!(spearman(&rising, &[4.0, 3.0, 2.0, 1.0]), -1.0);
        assert_eq!(spearman(&rising, &[1.0; 4]), 0.0);
        // 1 - 6 * (1 + 1) / (4 * 15), and a hole of either is left out.
        let swapped = [1.0, 2.0, 4.0, 3.0, f64::NAN];
        let found = spearman(&[1.0, 2.0, 3.0, 4.0, 5.0], &swapped);
        assert!((found - 0.8).abs() < 1e-12, "{found}");
        assert_eq!(overlap(&[1, 2, 3, 4], &[9, 4, 2, 7]), 0.5);
    }

    /// Captions on the axes; image n is turned from its caption by `angles[n]`.
    fn turned(angles: &[f64]) -> Embedded {
        let dim = angles.len() + 1;
        let (mut image, mut text) = (vec![0.0; angles.len() * dim], vec![0.0; angles.len() * dim]);
        for (n, angle) in angles.iter().enumerate() {
            image[n * dim + n] = angle.cos() as f32;
            image[n * dim + dim - 1] = angle.sin() as f32;
            text[n * dim + n] = 1.0;
        }
        let [image, text] = [image, text].map(Values::F32);
        Embedded { image, text, dim }
    }

    fn begin(rows: u64, sub_batch_size: u32) -> SelectBegin {
        SelectBegin {
            policy: v1::Policy::TopK.into(),
            criterion: Criterion::Hard.into(),
            loss: Loss::Sigmoid.into(),
            sub_batch_size,
            n_chunks: 1,
            gain: 1.0,
            positions: (0..rows).collect(),
            learner_scale: 10.0,
            learner_bias: -5.0,
            ..Default::default()
        }
    }

    #[test]
    fn an_approximation_that_ranks_alike_keeps_the_whole_gain() {
        let full = turned(&[0.1, 0.3, 0.5, 0.7, 0.9, 1.1, 1.3, 1.5]);
        let milder = turned(&[0.05, 0.15, 0.25, 0.35, 0.45, 0.55, 0.65, 0.75]);
        let begin = begin(8, 3);
        let (found, flops) = compare(&begin, [Some(&full), None], [Some(&milder), None]).unwrap();
        assert_eq!((found.rows, found.draw), (8, 3));
        assert_eq!((found.rank_correlation, found.overlap), (1.0, 1.0));
        assert_eq!(found.score_approximate, found.score_full);
        assert!(
            found.score_full > found.score_uniform && flops > 0.0,
            "{found:?}"
        );
        assert_eq!(kept_gain(&found), Some(1.0));
    }

    #[test]
    fn an_approximation_that_ranks_the_other_way_is_worse_than_chance() {
        let full = turned(&[0.1, 0.3, 0.5, 0.7, 0.9, 1.1, 1.3, 1.5]);
        let reversed = turned(&[1.5, 1.3, 1.1, 0.9, 0.7, 0.5, 0.3, 0.1]);
        let mut begin = begin(8, 3);
        begin.holes = vec![7];
        let (found, _) = compare(&begin, [Some(&full), None], [Some(&reversed), None]).unwrap();
        assert_eq!(found.rows, 7, "{found:?}");
        assert_eq!((found.rank_correlation, found.overlap), (-1.0, 0.0));
        assert!(kept_gain(&found).unwrap() < 0.0);
        let level = ProbeResult::default();
        assert_eq!(kept_gain(&level), None, "nothing was to be gained");
        let error = compare(&begin, [None, None], [Some(&full), None]).unwrap_err();
        assert_eq!(error.reason(), superbatch_proto::v1::Reason::Internal);
    }
}
