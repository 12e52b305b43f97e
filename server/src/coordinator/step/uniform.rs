//! Uniform draws.
use super::{decided::Decided, draw::select_begin, maker::Maker};
use crate::{
    coordinator::score::scored::Rows,
    error::{Error, Result},
};
use std::collections::BTreeSet;
use superbatch_proto::v1::{Hole, SelectBegin};

impl Maker<'_> {
    /// Draws from noise only, and reads only the rows that it draws. A bad row is replaced by the
    /// next row of the draw.
    pub async fn uniform(&self, decided: &mut Decided) -> Result<Rows> {
        let wanted = decided.phase.sub_batch_size as usize;
        // The whole super-batch is put into one random order, of which the first usable rows are
        // taken. Drawing exactly b rows and replacing bad ones by a second draw would give the same
        // law, but depend on how many rows were read at a time.
        let all = SelectBegin {
            sub_batch_size: self.super_batch.candidates.len() as u32,
            ..select_begin(self.spec, decided, self.super_batch)
        };
        let order = self
            .run
            .deps
            .selector
            .select(all, None, None)
            .await?
            .indices;
        let mut good: Option<Rows> = None;
        let mut drawn: Vec<u32> = Vec::with_capacity(wanted);
        let mut next = order.into_iter();
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
        decided.drawn_uniformly(drawn);
        good.ok_or_else(|| Error::internal("a sub-batch of no rows"))
    }
}
