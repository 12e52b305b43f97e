//! What receipts do not hold of rows: the length of captions and the size of images. They are
//! measured on a sample of blocks, since whole blocks are read.
use super::{Looked, shares::lift_of};
use crate::{
    coordinator::plan::planner::Plan,
    error::Result,
    page::{
        Known, Page,
        answer::Json,
        pictures::{caption, image},
    },
};
use serde_json::{Value, json};
use std::{
    collections::{BTreeMap, HashSet},
    sync::Arc,
};
use superbatch_proto::v1::{Phase, Receipt};

/// Most steps of which rows are read, and most blocks of each.
const STEPS: usize = 8;
const BLOCKS: usize = 4;
/// Most rows of a block.
const ROWS: usize = 1024;
/// Bins of about as many scanned rows each.
const BINS: usize = 5;

/// Candidates of one block: the number in the block, and whether it was chosen.
#[derive(Debug, PartialEq)]
pub(super) struct OfBlock {
    pub source: u32,
    pub shard: u32,
    pub block: u32,
    pub rows: Vec<(u32, bool)>,
}

/// A number of each row, and whether the row was chosen.
pub(super) type Numbers = Vec<(u64, bool)>;

#[derive(Default)]
struct Measured {
    caption_chars: Numbers,
    image_bytes: Numbers,
}

impl Looked {
    /// Measures rows. Returns also whether each block was read.
    ///
    /// # Errors
    /// Those of receipts; that of a block if none can be read.
    pub(super) async fn rows(self, page: &Arc<Page>, known: &Arc<Known>) -> Result<(Json, bool)> {
        let every = self.steps.len().div_ceil(STEPS).max(1);
        let steps = self.steps.iter().step_by(every).map(|step| step.step);
        let (mut all, mut read, mut steps_read) = (Measured::default(), 0, Vec::new());
        let (mut rows, mut unread, mut failure) = ([0; 2], 0, None);
        for step in steps {
            for block in self.blocks(page, known, step).await? {
                let scanned = block.rows.len();
                let chosen = block.rows.iter().filter(|(_, chosen)| *chosen).count();
                let found = match self.measure(page, block).await {
                    Ok(found) => found,
                    // One that is damaged must not keep the others from being seen.
                    Err(error) => {
                        unread += 1;
                        failure = failure.or(Some(error));
                        continue;
                    }
                };
                rows[0] += scanned;
                rows[1] += chosen;
                all.caption_chars.extend(found.caption_chars);
                all.image_bytes.extend(found.image_bytes);
                read += 1;
            }
            steps_read.push(step);
        }
        if let (0, Some(error)) = (read, failure) {
            return Err(error);
        }
        let answer = json!({
            "steps": steps_read,
            "blocks": read,
            "unread": unread,
            "scanned": rows[0],
            "chosen": rows[1],
            "caption_chars": binned(all.caption_chars),
            "image_bytes": binned(all.image_bytes),
        });
        Ok((answer.into(), unread == 0))
    }

    /// Picks the rows of a step.
    async fn blocks(
        &self,
        page: &Arc<Page>,
        known: &Arc<Known>,
        step: u64,
    ) -> Result<Vec<OfBlock>> {
        let (plan, of) = (self.plan.clone(), known.clone());
        let pick = move |receipt: Receipt| pick(&plan, &of.facts.spec.phases, step, &receipt);
        let generations = known.generations(step);
        let picked = page.with_receipt(known, step, generations, pick).await?;
        Ok(picked.unwrap_or_default())
    }

    async fn measure(&self, page: &Page, of: OfBlock) -> Result<Measured> {
        let held = page.blocks_held.take().await?;
        let blocks = &page.blocks;
        let read = blocks.block(&self.manifest, of.source, of.shard, of.block, None);
        let batch = read.await?;
        let measure = move || {
            let mut found = Measured::default();
            for (row, chosen) in of.rows {
                let row = row as usize;
                let chars = caption(&batch, row).map(|text| text.chars().count() as u64);
                let bytes = image(&batch, row).map(|image| image.len() as u64);
                found.caption_chars.extend(chars.map(|n| (n, chosen)));
                found.image_bytes.extend(bytes.map(|n| (n, chosen)));
            }
            drop(batch);
            drop(held);
            Ok(found)
        };
        page.work("measuring rows", measure).await
    }
}

/// Picks a few blocks of a step, and rows of them.
pub(super) fn pick(
    plan: &Plan,
    phases: &[Phase],
    step: u64,
    receipt: &Receipt,
) -> Result<Vec<OfBlock>> {
    let chosen = receipt.chosen.iter();
    let chosen: HashSet<_> = chosen.map(|row| (row.source, row.shard, row.row)).collect();
    let manifest = plan.manifest();
    let mut blocks: BTreeMap<(u32, u32, u32), Vec<(u32, bool)>> = BTreeMap::new();
    for candidate in plan.step(phases, step)?.candidates {
        let (source, shard) = (candidate.source, candidate.shard);
        let indexed = &manifest.sources[source as usize].shards[shard as usize];
        let row = indexed.blocks[candidate.block as usize].row_in_shard(candidate.row);
        let is_chosen = chosen.contains(&(source, shard, row));
        let block = blocks.entry((source, shard, candidate.block));
        block.or_default().push((candidate.row, is_chosen));
    }
    let every = blocks.len().div_ceil(BLOCKS).max(1);
    let picked = blocks.into_iter().step_by(every);
    let picked = picked.map(|((source, shard, block), rows)| {
        let every = rows.len().div_ceil(ROWS).max(1);
        let rows = rows.into_iter().step_by(every).collect();
        OfBlock {
            source,
            shard,
            block,
            rows,
        }
    });
    Ok(picked.collect())
}

/// Returns the numbers in bins, with the lift of each; null if there are none.
pub(super) fn binned(mut numbers: Numbers) -> Value {
    numbers.sort_unstable();
    let chosen: Vec<u64> = numbers.iter().filter(|n| n.1).map(|n| n.0).collect();
    let Some(median) = numbers.get(numbers.len() / 2) else {
        return Value::Null;
    };
    let total = [numbers.len() as u64, chosen.len() as u64];
    let (mut bins, mut from) = (Vec::new(), 0);
    for bin in 1..=BINS {
        let mut to = numbers.len() * bin / BINS;
        if to <= from {
            continue;
        }
        // Rows of one number are of one bin.
        while to < numbers.len() && numbers[to].0 == numbers[to - 1].0 {
            to += 1;
        }
        bins.push(one_bin(&numbers[from..to], total));
        from = to;
    }
    json!({
        "median_scanned": median.0,
        "median_chosen": chosen.get(chosen.len() / 2),
        "bins": bins,
    })
}

fn one_bin(bin: &[(u64, bool)], total: [u64; 2]) -> Value {
    let chosen = bin.iter().filter(|(_, chosen)| *chosen).count() as u64;
    let scanned = bin.len() as u64;
    let share = |part: u64, whole: u64| part as f64 / whole.max(1) as f64;
    json!({
        "least": bin.first().map(|n| n.0),
        "most": bin.last().map(|n| n.0),
        "scanned": scanned,
        "chosen": chosen,
        "scanned_share": share(scanned, total[0]),
        "chosen_share": share(chosen, total[1]),
        "lift": lift_of([scanned, chosen], total),
    })
}
