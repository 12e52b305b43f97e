//! Draws that ask no model: from noise alone, or by score columns.
use super::{decided::Decided, draw::select_begin, maker::Maker};
use crate::{
    coordinator::score::scored::Rows,
    error::{Error, Result},
    selection::judged::judge,
};
use std::collections::BTreeSet;
use superbatch_proto::v1::Hole;

impl Maker<'_> {
    /// Draws an order of all candidates and reads only what is served: a bad row is replaced by the
    /// next one drawn.
    pub async fn unasked(&self, decided: &mut Decided) -> Result<Rows> {
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
            let kept: Vec<u32> = (0..numbers.len() as u32)
                .filter(|i| !holes.contains(i))
                .collect();
            if !kept.is_empty() {
                let rows = scoring.rows(&kept).await?;
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
