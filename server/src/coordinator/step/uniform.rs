//! Draws that ask no model: from noise alone, or by score columns.
use super::{decided::Decided, draw::select_begin, maker::Maker};
use crate::{
    coordinator::{score::scored::Rows, serve::share},
    error::{Error, Result},
    selection::judged::judge,
};
use std::collections::{BTreeSet, HashSet};
use superbatch_proto::v1::Hole;

/// Returns the candidates that such a step serves, where all its `holes` are known: each round
/// reads as many of `order` as are missing, in the order of storage. `None` if there are fewer than
/// `wanted`.
pub(crate) fn served(order: &[u32], wanted: usize, holes: &HashSet<u32>) -> Option<Vec<u32>> {
    let (mut next, mut drawn) = (order.iter().copied(), Vec::with_capacity(wanted));
    while drawn.len() < wanted {
        let mut numbers: Vec<u32> = next.by_ref().take(wanted - drawn.len()).collect();
        if numbers.is_empty() {
            return None;
        }
        numbers.sort_unstable();
        drawn.extend(numbers.into_iter().filter(|number| !holes.contains(number)));
    }
    Some(drawn)
}

impl Maker<'_> {
    /// Draws an order of all candidates and reads only what is served: a bad row is replaced by the
    /// next one drawn.
    pub(crate) async fn unasked(&self, decided: &mut Decided) -> Result<Rows> {
        let wanted = decided.phase.sub_batch_size as usize;
        self.enough(decided)?;
        let mut all = select_begin(self.spec, decided, self.super_batch);
        all.sub_batch_size = (self.super_batch.candidates.len() - all.holes.len()) as u32;
        decided.judged = judge(&all, None, None);
        let order = self.run.deps.selector.select(all, None, None).await?;
        let mut good: Option<Rows> = None;
        let mut drawn: Vec<u32> = Vec::with_capacity(wanted);
        let mut next = order.indices.iter().copied();
        while drawn.len() < wanted {
            let mut numbers: Vec<u32> = next.by_ref().take(wanted - drawn.len()).collect();
            if numbers.is_empty() {
                return Err(self.too_few(decided));
            }
            // In the order of storage, so that rows of one block are read together. The rank's
            // shuffle comes later, so the order here does not reach the trainer.
            numbers.sort_unstable();
            let candidates: Vec<_> = numbers
                .iter()
                .map(|n| self.super_batch.candidates[*n as usize])
                .collect();
            let mut scoring = self.begin(self.job(decided, true), &candidates).await?;
            decided.read(&scoring);
            let holes: BTreeSet<u32> = scoring.holes().iter().map(|hole| hole.candidate).collect();
            decided.add_holes(
                scoring.holes().into_iter().map(|hole| Hole {
                    candidate: numbers[hole.candidate as usize],
                    ..hole
                }),
                &[],
            );
            decided.candidates_scanned += numbers.len();
            let looked_at = decided.looked_at.get_or_insert_default();
            looked_at.extend_from_slice(&numbers);
            let kept: Vec<u32> = (0..numbers.len() as u32)
                .filter(|i| !holes.contains(i))
                .collect();
            if !kept.is_empty() {
                let served = share::places(self.spec.seed, decided.step, kept.len());
                let rows = scoring
                    .rows(&kept, &served, |c| self.changed(numbers[c] as usize))
                    .await?;
                drawn.extend(kept.iter().map(|k| numbers[*k as usize]));
                match &mut good {
                    Some(good) => good.append(rows)?,
                    None => good = Some(rows),
                }
            }
        }
        decided.drawn_of(&order, drawn);
        decided.drawn.left_out.get_or_insert_default().score_columns =
            decided.columns.left_out.len() as u32;
        good.ok_or_else(|| Error::internal("a sub-batch of no rows"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hole_is_replaced_by_the_next_of_the_order() {
        let order = [5, 2, 9, 7, 1];
        let none = HashSet::new();
        assert_eq!(served(&order, 3, &none), Some(vec![2, 5, 9]));
        assert_eq!(served(&order, 3, &HashSet::from([2])), Some(vec![5, 9, 7]));
        assert_eq!(
            served(&order, 3, &HashSet::from([2, 7])),
            Some(vec![5, 9, 1])
        );
        assert_eq!(served(&order, 4, &HashSet::from([2, 7])), None);
    }
}
