//! What is left out before a policy draws: near-duplicates, and pairs whose text does not fit the image.
use crate::{
    error::{Error, Result},
    native::{Others, clip_losses},
    problem::check_model,
    types::{Candidates, ModelEmbeddings, Rows, Tuning},
};
use rayon::prelude::*;

/// Candidates that one cell of near ones is meant to hold: duplicates are looked for inside cells.
const CELL: usize = 1_024;
/// Most candidates of the batch that stands for all in a CLIP loss.
const CONTEXT: usize = 4_096;
/// How often centres are moved to the mean of their cell.
const ROUNDS: usize = 2;

/// The candidates of `offered` to leave out, rising. Judged by the reference, which does not change, else by the learner.
pub(crate) fn left_out(candidates: &Candidates<'_>, tuning: &Tuning, offered: &[u32]) -> Result<Vec<u32>> {
    let Tuning { duplicates_above, clip_score_at_least, neg_clip_loss_keep, .. } = *tuning;
    if [duplicates_above, clip_score_at_least, neg_clip_loss_keep].iter().all(Option::is_none) {
        return Ok(Vec::new());
    }
    let named = candidates.reference.map(|model| ("reference", model));
    let Some((name, model)) = named.or(candidates.learner.map(|model| ("learner", model))) else {
        let setting = "duplicates_above, clip_score_at_least or neg_clip_loss_keep";
        let must = "absent where there are no embeddings";
        return Err(Error::SettingInvalid { setting, value: "set".to_owned(), must });
    };
    let cosines = check_model(name, &model, candidates.count, offered)?;
    let (mut kept, mut out) = (offered.to_vec(), Vec::new());
    if let Some(least) = clip_score_at_least {
        (kept, out) = kept.iter().partition(|&&index| 2.5 * cosines[index as usize].max(0.0) >= least);
    }
    if let Some(share) = neg_clip_loss_keep {
        out.extend(worst(&model, cosines, &mut kept, share));
    }
    if let Some(above) = duplicates_above {
        out.extend(duplicates(&model, &kept, above as f32));
    }
    out.sort_unstable();
    Ok(out)
}

/// Takes all but a share of `kept` out of it, those of the smallest negCLIPLoss (Wang et al. 2024): the cosine of image and
/// text less what the softmax loss normalises it by. Their random batches are here up to [`CONTEXT`] of the candidates,
/// evenly spaced: candidates come in random order.
fn worst(model: &ModelEmbeddings<'_>, cosines: Vec<f64>, kept: &mut Vec<u32>, share: f64) -> Vec<u32> {
    let keep = ((share * kept.len() as f64).ceil() as usize).clamp(kept.len().min(1), kept.len());
    let batch = kept.len().min(CONTEXT);
    let context: Vec<u32> = (0..batch).map(|k| kept[k * kept.len() / batch]).collect();
    let losses = clip_losses(model, cosines, kept, &context);
    let mut order: Vec<(f64, u32)> = losses.into_iter().zip(kept.iter().copied()).collect();
    order.sort_unstable_by(|a, b| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1)));
    let out: Vec<u32> = order.drain(keep..).map(|(_, index)| index).collect();
    *kept = order.into_iter().map(|(_, index)| index).collect();
    kept.sort_unstable();
    out
}

/// SemDeDup's rule (Abbas et al. 2023) on image embeddings: candidates are cut into cells of near ones by k-means; in a
/// cell, from the farthest from its centre on, one whose cosine with one already kept is above `above` is left out. Pairs
/// across two cells are not seen.
fn duplicates(model: &ModelEmbeddings<'_>, offered: &[u32], above: f32) -> Vec<u32> {
    let left_out = |cell: &Vec<(f32, u32)>| {
        let members: Vec<u32> = cell.iter().map(|(_, index)| *index).collect();
        let kept = kept(model, &members, above);
        members.into_iter().zip(kept).filter(|(_, kept)| !kept).map(|(index, _)| index).collect::<Vec<_>>()
    };
    cells(model, offered).par_iter().flat_map_iter(left_out).collect()
}

/// Which of a cell's members are kept, taken in order.
fn kept(model: &ModelEmbeddings<'_>, members: &[u32], above: f32) -> Vec<bool> {
    let others = Others::new(&model.image, model.dim, members);
    let mut scratch = others.scratch();
    let mut kept: Vec<bool> = Vec::with_capacity(members.len());
    for group in members.chunks(64) {
        let start = kept.len();
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

/// Cells of near candidates, each as (cosine with the centre, candidate), the farthest first.
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
            centres[cell * dim..][..dim].iter_mut().zip(row).for_each(|(sum, value)| *sum += value);
        }
        for centre in centres.chunks_exact_mut(dim) {
            let norm = centre.iter().map(|value| value * value).sum::<f32>().sqrt().max(f32::MIN_POSITIVE);
            centre.iter_mut().for_each(|value| *value /= norm);
        }
        nearest = nearest_centres(model, offered, &centres);
    }
    let mut cells = vec![Vec::new(); count];
    offered.iter().zip(nearest).for_each(|(&index, (cosine, cell))| cells[cell].push((cosine, index)));
    cells.iter_mut().for_each(|cell| cell.sort_unstable_by(|a, b| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1))));
    cells
}

/// For each candidate offered, (cosine, which centre) of the nearest centre.
fn nearest_centres(model: &ModelEmbeddings<'_>, offered: &[u32], centres: &[f32]) -> Vec<(f32, usize)> {
    let all: Vec<u32> = (0..(centres.len() / model.dim) as u32).collect();
    let others = Others::new(&Rows::F32(centres), model.dim, &all);
    let mut nearest = vec![(f32::NEG_INFINITY, 0); offered.len()];
    nearest.par_chunks_mut(64).zip(offered.par_chunks(64)).for_each_init(
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
