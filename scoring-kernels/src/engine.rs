//! The loop of joint selection, and the interface to the engines that compute the scores.
use crate::{
    error::{Error, Result},
    law,
    noise::{ChunkNoise, Noise},
    problem::Problem,
    types::{LeftOut, Loss, Selection},
};
use rayon::prelude::*;

/// Running conditional scores of one selection, on some device.
pub(crate) trait Engine {
    /// Returns the score of every candidate given all absorbed examples, by index, `[B]`, with
    /// gain. It is unspecified for holes and for absorbed examples.
    fn scores(&mut self) -> Result<Vec<f64>>;

    /// Adds a drawn chunk's terms to every candidate left: c new rows and c new columns of each
    /// model's pair matrix.
    fn absorb(&mut self, chunk: &[u32]) -> Result<()>;

    /// Returns what the running scores lack for a batch score, without gain. Sigmoid: the sum of
    /// the pair terms among `chosen`, the diagonal left out. Softmax: the sum of the batch losses
    /// of `chosen` as one batch.
    fn inner(&mut self, chosen: &[u32]) -> Result<f64>;

    /// Returns the floating-point operations spent so far.
    fn flops(&self) -> f64;
}

/// K-center: how near candidates' images are to the images of all chosen examples, on some device.
pub(crate) trait Spread {
    /// Adds a chunk to the chosen. Returns, for each candidate `left`, the largest cosine of its
    /// image with one of theirs.
    fn absorb(&mut self, chunk: &[u32], left: &[u32]) -> Result<Vec<f32>>;
}

/// One drawn example.
struct Drawn {
    index: u32,
    score: f64,
}

/// Draws the sub-batch (Algorithm 1, and the other policies as variants of it). Without an engine
/// there are no losses, and the fields that depend on them are absent.
pub(crate) fn run(
    problem: &Problem<'_>,
    mut engine: Option<Box<dyn Engine + '_>>,
    mut spread: Option<Box<dyn Spread + '_>>,
    noise: &Noise<'_>,
) -> Result<Selection> {
    let own = match engine.as_mut() {
        Some(engine) => Some(with_terms(problem, engine.scores()?)),
        None => problem.terms.map(<[f64]>::to_vec),
    };
    let mut scores = match &own {
        Some(own) if problem.policy.is_scored() => own.clone(),
        _ => vec![0.0; problem.count],
    };
    let mut spread_flops = 0.0;
    let mut left = problem.offered.clone();
    let mut drawn: Vec<Drawn> = Vec::with_capacity(problem.chunks.iter().sum());
    for (k, &size) in problem.chunks.iter().enumerate() {
        if k > 0 {
            // A chunk is absorbed only when another one follows it: the terms of the last chunk
            // would be computed for candidates that are never drawn.
            let last = indices(&drawn[drawn.len() - problem.chunks[k - 1]..]);
            if let (Some(spread), Some(embeddings)) = (&mut spread, &problem.spread) {
                let nearest = spread.absorb(&last, &left)?;
                left.iter()
                    .zip(nearest)
                    .for_each(|(&index, cosine)| scores[index as usize] = 1.0 - f64::from(cosine));
                spread_flops += 2.0 * left.len() as f64 * last.len() as f64 * embeddings.dim as f64;
            } else if let Some(engine) = engine.as_mut() {
                engine.absorb(&last)?;
                scores = with_terms(problem, engine.scores()?);
            }
        }
        let noise = problem
            .policy
            .is_noisy(k)
            .then(|| noise.chunk(k, problem.count));
        drawn.extend(draw(
            &mut left,
            &law::logits(problem, &scores),
            &scores,
            noise,
            size,
        )?);
    }
    let chosen = indices(&drawn);
    let mut selection = Selection {
        chunks: problem.chunks.iter().map(|&size| size as u32).collect(),
        scores: drawn.iter().map(|drawn| drawn.score).collect(),
        weights: law::weights(problem, own.as_deref().unwrap_or(&scores), &chosen),
        indices: chosen,
        left_out: LeftOut::default(),
        batch_score: None,
        mean_score_chosen: None,
        mean_score_candidates: None,
        flops: spread_flops,
    };
    if let Some(own) = own {
        selection.mean_score_chosen = Some(mean(&own, &selection.indices));
        selection.mean_score_candidates = Some(mean(&own, &problem.offered));
        selection.batch_score = selection.mean_score_chosen;
        if let Some(mut engine) = engine {
            selection.batch_score = Some(batch_score(problem, engine.as_mut(), &selection, &own)?);
            selection.flops += engine.flops();
        }
    }
    Ok(selection)
}

fn with_terms(problem: &Problem<'_>, mut scores: Vec<f64>) -> Vec<f64> {
    let terms = problem.terms.into_iter().flatten();
    scores
        .iter_mut()
        .zip(terms)
        .for_each(|(score, term)| *score += term);
    scores
}

/// Takes the `size` candidates of largest logit + noise out of `left`, largest first; ties go to
/// the lower index. With Gumbel noise this is a draw without replacement with p ~ exp(logit),
/// without an exponential that could overflow.
fn draw(
    left: &mut Vec<u32>,
    logits: &[f64],
    scores: &[f64],
    noise: Option<ChunkNoise<'_>>,
    size: usize,
) -> Result<Vec<Drawn>> {
    let perturb = |&index: &u32| {
        let noise = noise.as_ref().map_or(0.0, |noise| noise.of(index));
        (logits[index as usize] + noise, index)
    };
    let mut perturbed: Vec<(f64, u32)> = left.par_iter().with_min_len(2048).map(perturb).collect();
    // NaN would not fail by itself. `total_cmp` orders it above infinity, so the broken candidate
    // would be drawn first, at every step.
    if let Some((_, row)) = perturbed.iter().find(|(value, _)| !value.is_finite()) {
        return Err(Error::ScoreNotFinite { row: *row as usize });
    }
    let order = |a: &(f64, u32), b: &(f64, u32)| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1));
    // Only the chosen are sorted: B may be millions and a chunk has thousands.
    if size < perturbed.len() {
        perturbed.select_nth_unstable_by(size, order);
        perturbed.truncate(size);
    }
    perturbed.sort_unstable_by(order);
    let mut taken = vec![false; scores.len()];
    perturbed
        .iter()
        .for_each(|(_, index)| taken[*index as usize] = true);
    left.retain(|index| !taken[*index as usize]);
    Ok(perturbed
        .into_iter()
        .map(|(_, index)| Drawn {
            index,
            score: scores[index as usize],
        })
        .collect())
}

/// Returns the mean conditional score per example of the sub-batch, without gain.
///
/// Sigmoid: the conditional scores of joint selection hold every pair of two chunks exactly once,
/// in both directions; what they lack are the pairs inside each chunk. Scores of other policies
/// contain no pairs. Softmax: the denominators must hold the whole sub-batch, so the losses are
/// computed anew.
fn batch_score(
    problem: &Problem<'_>,
    engine: &mut dyn Engine,
    selection: &Selection,
    own: &[f64],
) -> Result<f64> {
    let chosen = selection.indices.as_slice();
    let total = match problem.loss {
        Loss::Softmax => {
            let terms = |terms: &[f64]| chosen.iter().map(|&n| terms[n as usize]).sum::<f64>();
            engine.inner(chosen)? + problem.terms.map_or(0.0, terms)
        }
        Loss::Sigmoid if problem.policy.is_conditional() => {
            let (mut total, mut rest) = (selection.scores.iter().sum::<f64>(), chosen);
            for &size in &problem.chunks {
                let (chunk, after) = rest.split_at(size);
                total += engine.inner(chunk)?;
                rest = after;
            }
            total
        }
        Loss::Sigmoid => {
            chosen.iter().map(|&index| own[index as usize]).sum::<f64>() + engine.inner(chosen)?
        }
    };
    Ok(total / chosen.len() as f64)
}

fn indices(drawn: &[Drawn]) -> Vec<u32> {
    drawn.iter().map(|drawn| drawn.index).collect()
}

fn mean(scores: &[f64], of: &[u32]) -> f64 {
    of.iter().map(|&index| scores[index as usize]).sum::<f64>() / of.len() as f64
}
