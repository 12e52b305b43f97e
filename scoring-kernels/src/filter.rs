//! The rules that leave candidates out before a policy draws: near-duplicates, and pairs whose text
//! does not fit the image.
use crate::{
    error::{Error, Result},
    native::{Others, clip_losses},
    problem::{Problem, check_model},
    types::{Candidates, LeftOut, ModelEmbeddings, Rows, Tuning},
};
use rayon::prelude::*;

/// Aimed number of candidates of one cell. Duplicates are searched inside cells only, so the cost
/// is B times this number instead of B².
const CELL: usize = 1_024;
/// Most candidates of the sample batch by which a CLIP loss is normalised.
const CONTEXT: usize = 4_096;
/// How often candidates are assigned to centres. The centres move to the mean of their cell in
/// between. More rounds improve the cells little and cost as much each.
const ROUNDS: usize = 2;

/// The result of the rules.
pub(crate) struct Filtered {
    /// In rising order.
    pub kept: Vec<u32>,
    pub left_out: LeftOut,
    /// Floating-point operations spent on dot products.
    pub flops: f64,
}

/// Applies the rules of `tuning` to `offered`. The reference judges, since it does not change
/// during a run; without one, the learner does.
pub(crate) fn filter(
    candidates: &Candidates<'_>,
    tuning: &Tuning,
    offered: &[u32],
) -> Result<Filtered> {
    let mut filtered = Filtered {
        kept: offered.to_vec(),
        left_out: LeftOut::default(),
        flops: 0.0,
    };
    if !tuning.leaves_out() {
        return Ok(filtered);
    }
    let named = candidates.reference.map(|model| ("reference", model));
    let Some((name, model)) = named.or(candidates.learner.map(|model| ("learner", model))) else {
        let setting = "duplicates_above, clip_score_at_least or neg_clip_loss_keep";
        let must = "absent where there are no embeddings";
        return Err(Error::SettingInvalid {
            setting,
            value: "set".to_owned(),
            must,
        });
    };
    let cosines = check_model(name, &model, candidates.count, offered)?;
    if let Some(least) = tuning.clip_score_at_least {
        filtered
            .kept
            .retain(|&index| 2.5 * cosines[index as usize].max(0.0) >= least);
        filtered.left_out.clip_score_at_least = offered.len() - filtered.kept.len();
    }
    if let Some(share) = tuning.neg_clip_loss_keep {
        filtered.left_out.neg_clip_loss_keep = filtered.keep_best(&model, cosines, share);
    }
    if let Some(above) = tuning.duplicates_above {
        filtered.left_out.duplicates_above = filtered.leave_out_duplicates(&model, above as f32);
    }
    Ok(filtered)
}

impl Problem<'_> {
    /// Offers only what was kept.
    pub(crate) fn leave_out(&mut self, filtered: &Filtered) -> Result<()> {
        let (sub_batch_size, holes) = (self.chunks.iter().sum(), self.count - self.offered.len());
        self.offered.clone_from(&filtered.kept);
        if sub_batch_size <= self.offered.len() {
            return Ok(());
        }
        Err(Error::TooManyLeftOut {
            sub_batch_size,
            candidates: self.count,
            holes,
            left_out: filtered.left_out,
        })
    }
}

impl Filtered {
    /// Keeps a share of the candidates, those of the largest negCLIPLoss (Wang et al. 2024): the
    /// cosine of image and text minus the softmax loss's normaliser. The paper normalises over
    /// random batches. Here up to [`CONTEXT`] evenly spaced candidates serve as one, since
    /// candidates come in random order. Returns how many are left out.
    fn keep_best(&mut self, model: &ModelEmbeddings<'_>, cosines: Vec<f64>, share: f64) -> usize {
        let count = self.kept.len();
        let keep = ((share * count as f64).ceil() as usize).clamp(count.min(1), count);
        let batch = count.min(CONTEXT);
        let context: Vec<u32> = (0..batch).map(|k| self.kept[k * count / batch]).collect();
        let losses = clip_losses(model, cosines, &self.kept, &context);
        self.flops += 4.0 * count as f64 * batch as f64 * model.dim as f64;
        let mut order: Vec<(f64, u32)> =
            losses.into_iter().zip(self.kept.iter().copied()).collect();
        order.sort_unstable_by(|a, b| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1)));
        self.kept = order[..keep].iter().map(|(_, index)| *index).collect();
        self.kept.sort_unstable();
        count - keep
    }

    /// Applies SemDeDup's rule (Abbas et al. 2023) to image embeddings. K-means divides the
    /// candidates into cells. In each cell, beginning with the candidate farthest from the centre,
    /// a candidate is left out if its cosine with a kept one is above `above`. Pairs across two
    /// cells are not compared. Returns how many are left out.
    fn leave_out_duplicates(&mut self, model: &ModelEmbeddings<'_>, above: f32) -> usize {
        let count = self.kept.len();
        let cells = cells(model, &self.kept);
        let pairs: usize = cells.iter().map(|cell| cell.len() * cell.len()).sum();
        self.flops += 2.0 * model.dim as f64 * (pairs + ROUNDS * count * cells.len()) as f64;
        let kept_in = |cell: &Vec<(f32, u32)>| {
            let members: Vec<u32> = cell.iter().map(|(_, index)| *index).collect();
            let kept = without_duplicates(model, &members, above);
            members
                .into_iter()
                .zip(kept)
                .filter(|(_, kept)| *kept)
                .map(|(index, _)| index)
                .collect::<Vec<_>>()
        };
        self.kept = cells.par_iter().flat_map_iter(kept_in).collect();
        self.kept.sort_unstable();
        count - self.kept.len()
    }
}

/// Returns which of a cell's members are kept, decided in order.
fn without_duplicates(model: &ModelEmbeddings<'_>, members: &[u32], above: f32) -> Vec<bool> {
    let others = Others::new(&model.image, model.dim, members);
    let mut scratch = others.scratch();
    let mut kept: Vec<bool> = Vec::with_capacity(members.len());
    for group in members.chunks(64) {
        let start = kept.len();
        // Whether a member is kept depends on the members before it, which would forbid comparing
        // many at once. So a group of 64 is compared with all members in one pass. Comparisons with
        // earlier groups are settled at once; those inside the group are noted as bits and settled
        // in order after the pass.
        let (mut near_kept, mut near_in_group) = ([false; 64], [0u64; 64]);
        others.visit(&model.image, group, &mut scratch, |lane, other, cosine| {
            let near = cosine > above && other < start + lane;
            match other.checked_sub(start) {
                None => near_kept[lane] |= near && kept[other],
                Some(in_group) if near => near_in_group[lane] |= 1 << in_group,
                Some(_) => {}
            }
        });
        let mut kept_in_group = 0u64;
        for lane in 0..group.len() {
            let keep = !near_kept[lane] && near_in_group[lane] & kept_in_group == 0;
            kept_in_group |= u64::from(keep) << lane;
            kept.push(keep);
        }
    }
    kept
}

/// Returns cells of near candidates, each as (cosine with the centre, candidate), the farthest
/// first.
fn cells(model: &ModelEmbeddings<'_>, offered: &[u32]) -> Vec<Vec<(f32, u32)>> {
    let (dim, count) = (model.dim, offered.len().div_ceil(CELL));
    let (mut centres, mut buffer) = (vec![0f32; count * dim], vec![0f32; dim]);
    for (k, centre) in centres.chunks_exact_mut(dim).enumerate() {
        let row = offered[k * offered.len() / count] as usize;
        let values = model.image.read(row, dim, 0, &mut buffer);
        centre.copy_from_slice(values);
    }
    let mut nearest = nearest_centres(model, offered, &centres);
    for _ in 1..ROUNDS {
        centres.fill(0.0);
        for (&index, &(_, cell)) in offered.iter().zip(&nearest) {
            let row = model.image.read(index as usize, dim, 0, &mut buffer);
            centres[cell * dim..][..dim]
                .iter_mut()
                .zip(row)
                .for_each(|(sum, value)| *sum += value);
        }
        for centre in centres.chunks_exact_mut(dim) {
            let norm = centre
                .iter()
                .map(|value| value * value)
                .sum::<f32>()
                .sqrt()
                .max(f32::MIN_POSITIVE);
            centre.iter_mut().for_each(|value| *value /= norm);
        }
        nearest = nearest_centres(model, offered, &centres);
    }
    let mut cells = vec![Vec::new(); count];
    offered
        .iter()
        .zip(nearest)
        .for_each(|(&index, (cosine, cell))| cells[cell].push((cosine, index)));
    cells
        .iter_mut()
        .for_each(|cell| cell.sort_unstable_by(|a, b| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1))));
    cells
}

/// Returns, for each offered candidate, the nearest centre as (cosine, index).
fn nearest_centres(
    model: &ModelEmbeddings<'_>,
    offered: &[u32],
    centres: &[f32],
) -> Vec<(f32, usize)> {
    let all: Vec<u32> = (0..(centres.len() / model.dim) as u32).collect();
    let others = Others::new(&Rows::F32(centres), model.dim, &all);
    let mut nearest = vec![(f32::NEG_INFINITY, 0); offered.len()];
    nearest
        .par_chunks_mut(64)
        .zip(offered.par_chunks(64))
        .for_each_init(
            || others.scratch(),
            |scratch, (nearest, indices)| {
                others.visit(&model.image, indices, scratch, |lane, centre, cosine| {
                    if cosine > nearest[lane].0 {
                        nearest[lane] = (cosine, centre);
                    }
                });
            },
        );
    nearest
}
