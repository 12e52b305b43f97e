//! What the mix takes of one step's receipt, in place of the receipt.
use crate::{
    coordinator::{plan::planner::Plan, receipts::parquet::has_scores},
    error::Result,
};
use std::collections::BTreeMap;
use superbatch_proto::v1::{ChosenRow, LeftOut, PassedRow, Phase, Receipt};

/// Rows scanned and rows chosen, by source and shard.
pub(super) type Counts = BTreeMap<(u32, u32), [u64; 2]>;
/// The beginning of a row's content hash, and the row: source, shard and number.
pub(super) type Content = (u64, (u32, u32, u64));
/// Of the chosen rows, and of the sample of those that were passed over.
pub(super) type Both = [Mean; 2];

/// About as many chosen rows of a step are compared by their content.
const CONTENTS: u64 = 1024;
/// A step with more shards is counted anew each time.
const SHARDS_KEPT: usize = 4096;

/// A mean of the numbers that are known.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(super) struct Mean {
    sum: f64,
    count: u64,
}

impl Mean {
    pub(super) fn of(numbers: impl Iterator<Item = f64>) -> Self {
        let known = numbers.filter(|number| number.is_finite());
        known.fold(Self::default(), |mean, number| Self {
            sum: mean.sum + number,
            count: mean.count + 1,
        })
    }

    pub(super) fn add(&mut self, other: Self) {
        self.sum += other.sum;
        self.count += other.count;
    }

    pub(super) fn value(self) -> Option<f64> {
        (self.count > 0).then(|| self.sum / self.count as f64)
    }
}

/// One step that was drawn by scores.
#[derive(Debug)]
pub(super) struct OfStep {
    pub step: u64,
    pub shards: Counts,
    pub learner_loss: Both,
    pub reference_loss: Both,
    /// The values of each score column.
    pub columns: BTreeMap<String, Both>,
    /// What rules left out before the draw, if the phase has any.
    pub left_out: Option<LeftOut>,
    /// The rule for near-duplicates.
    pub duplicates_above: Option<f64>,
    /// Chosen rows whose content is at most `contents_to`: all of them, or one in so many. By
    /// content and not by chance, so that those of one content are all here or none.
    pub contents: Vec<Content>,
    pub contents_to: u64,
}

impl OfStep {
    /// Counts a receipt; `None` if its step was not drawn by scores.
    pub(super) fn of(plan: &Plan, phases: &[Phase], receipt: &Receipt) -> Result<Option<Self>> {
        let Some(summary) = &receipt.summary else {
            return Ok(None);
        };
        if !has_scores(summary) {
            return Ok(None);
        }
        let mut shards = Counts::new();
        for candidate in plan.step(phases, summary.step)?.candidates {
            let place = (candidate.source, candidate.shard);
            shards.entry(place).or_default()[0] += 1;
        }
        for row in &receipt.chosen {
            shards.entry((row.source, row.shard)).or_default()[1] += 1;
        }
        let passed: Vec<&PassedRow> = receipt.passed_over.iter().filter(|p| p.sampled).collect();
        let both = |chosen: fn(&ChosenRow) -> Option<f64>, other: fn(&PassedRow) -> Option<f32>| {
            let other = passed.iter().filter_map(|row| other(row)).map(f64::from);
            [
                Mean::of(receipt.chosen.iter().filter_map(chosen)),
                Mean::of(other),
            ]
        };
        let largest = phases.iter().map(|phase| phase.sub_batch_size).max();
        let one_in = u64::from(largest.unwrap_or(0)).div_ceil(CONTENTS).max(1);
        let contents_to = u64::MAX / one_in;
        let contents = receipt.chosen.iter().filter_map(content);
        Ok(Some(Self {
            step: summary.step,
            shards,
            learner_loss: both(|row| row.learner_loss, |row| row.learner_loss),
            reference_loss: both(|row| row.reference_loss, |row| row.reference_loss),
            columns: columns(receipt, &passed),
            left_out: summary.left_out,
            duplicates_above: summary.tuning.as_ref().and_then(|t| t.duplicates_above),
            contents: contents.filter(|found| found.0 <= contents_to).collect(),
            contents_to,
        }))
    }

    /// Returns whether it may be kept.
    pub(super) fn is_small(&self) -> bool {
        self.shards.len() <= SHARDS_KEPT
    }
}

fn content(row: &ChosenRow) -> Option<Content> {
    let beginning: [u8; 8] = row.content_hash.get(..8)?.try_into().ok()?;
    let place = (row.source, row.shard, row.row);
    Some((u64::from_le_bytes(beginning), place))
}

fn columns(receipt: &Receipt, passed: &[&PassedRow]) -> BTreeMap<String, Both> {
    let columns = receipt.summary.iter().flat_map(|s| &s.score_columns);
    let found = columns.enumerate().map(|(n, column)| {
        let chosen = receipt.chosen.iter();
        let chosen = chosen.filter_map(|row| row.column_values.get(n).copied());
        let other = passed.iter();
        let other = other.filter_map(|row| row.column_values.get(n).copied());
        (column.name.clone(), [Mean::of(chosen), Mean::of(other)])
    });
    found.collect()
}
