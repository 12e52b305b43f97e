//! The candidates of a step: a pure function of (manifest, seed, phases, step).

pub use super::rows::{locate, row_id};
use super::{
    candidate::{Candidate, SuperBatch},
    epoch::EpochOrder,
    schedule::{Cursor, shares, spans},
};
use crate::{
    dataset::Manifest,
    error::{Error, Result},
};
use std::sync::{Arc, Mutex};
use superbatch_proto::v1::{Phase, Reason, SourceSpan};

/// The version of the order of candidates. It is written into receipts. Raise it with any change
/// that would reshuffle a run: a resumed run must never see rows twice or miss them without a sign.
pub const PLAN_VERSION: u32 = 1;

/// Most positions of a source over all epochs: the keys of noise hold source and position in one
/// 64-bit number.
const POSITIONS_MAX: u64 = 1 << 48;

/// The order in which a run goes through its data.
///
/// In each epoch of a source a keyed permutation orders the blocks; rows are permuted inside
/// windows of `window_blocks` consecutive blocks of that order. A super-batch takes a fixed share
/// from each source: the next places of the source's epoch. The rows at the end of an epoch that do
/// not fill a share sit the epoch out.
#[derive(Debug)]
pub struct Plan {
    manifest: Arc<Manifest>,
    pub(super) seed: u64,
    epochs: u32,
    window_blocks: u32,
    /// Rows of each source.
    pub(super) rows: Vec<u64>,
    /// Orders of the epochs in use, newest last.
    orders: Mutex<Vec<(u32, u64, Arc<EpochOrder>)>>,
}

impl Plan {
    /// Makes a plan. `epochs` is the number of passes; 0 means without end.
    ///
    /// # Errors
    /// `DatasetEmpty` if a source has no rows; `InvalidArgument` for a window of no blocks.
    pub fn new(
        manifest: Arc<Manifest>,
        seed: u64,
        epochs: u32,
        window_blocks: u32,
    ) -> Result<Self> {
        if window_blocks == 0 {
            return Err(Error::invalid(
                "window_blocks",
                "window_blocks is 0; a window holds at least one block",
            ));
        }
        if manifest.sources.is_empty() {
            return Err(Error::new(Reason::DatasetEmpty, "the run has no source"));
        }
        let rows: Vec<u64> = manifest
            .sources
            .iter()
            .map(|source| source.rows())
            .collect();
        if let Some(empty) = rows.iter().position(|rows| *rows == 0) {
            let uri = &manifest.sources[empty].uri;
            let message = format!("source {empty} ({uri}) has no rows; check its pattern");
            return Err(Error::new(Reason::DatasetEmpty, message)
                .with("source", empty)
                .with("uri", uri));
        }
        Ok(Self {
            manifest,
            seed,
            epochs,
            window_blocks,
            rows,
            orders: Mutex::default(),
        })
    }

    pub fn manifest(&self) -> &Arc<Manifest> {
        &self.manifest
    }

    /// Checks that every phase can be filled from the sources. To be called at open and when phases
    /// are appended.
    ///
    /// # Errors
    /// `DatasetTooSmall` if a source has fewer rows than its share of a super-batch;
    /// `RunSpecImpossible` if its weight gives it no row at all.
    pub fn check(&self, phases: &[Phase]) -> Result<()> {
        phases
            .iter()
            .try_for_each(|phase| self.shares(phase.super_batch_size).map(drop))
    }

    /// Returns the candidates of `step`, in O(phases + candidates + blocks of an epoch that is not
    /// in memory).
    ///
    /// # Errors
    /// `EndOfData` from the step on in which the first source would begin epoch `epochs`; those of
    /// [`Plan::check`].
    pub fn step(&self, phases: &[Phase], step: u64) -> Result<SuperBatch> {
        let (cursors, shares) = self.cursors(phases, step)?;
        let mut spans = Vec::with_capacity(cursors.len());
        for (source, (cursor, share)) in cursors.iter().zip(&shares).enumerate() {
            let Cursor { epoch, place } = cursor.settle(self.rows[source], *share);
            if epoch >= self.epochs_of(source) {
                let message = format!(
                    "step {step} lies beyond the data: source {source} ({}) has been through its \
                    {} epochs; raise `epochs`",
                    self.manifest.sources[source].uri,
                    self.epochs_of(source)
                );
                return Err(Error::new(Reason::EndOfData, message)
                    .with("step", step)
                    .with("source", source));
            }
            spans.push(SourceSpan {
                source: source as u32,
                epoch,
                start: place,
                count: *share,
            });
        }
        let mut candidates = Vec::with_capacity(shares.iter().sum::<u64>() as usize);
        for span in &spans {
            self.place(span, &mut candidates);
        }
        Ok(SuperBatch { candidates, spans })
    }

    /// Returns the number of steps until the end of the data; `None` if there is no end.
    pub fn steps_total(&self, phases: &[Phase]) -> Option<u64> {
        let epochs = (self.epochs > 0).then_some(u64::from(self.epochs))?;
        let mut cursors = vec![Cursor::default(); self.rows.len()];
        for (super_batch_size, from, to) in spans(phases) {
            let shares = shares(&self.weights(), super_batch_size);
            let each = || self.rows.iter().zip(&shares);
            let left = cursors
                .iter()
                .zip(each())
                .map(|(cursor, (rows, share))| cursor.left(*rows, *share, epochs))
                .min()?;
            match to {
                Some(to) if to - from <= left => {
                    for (cursor, (rows, share)) in cursors.iter_mut().zip(each()) {
                        *cursor = cursor.advance(*rows, *share, to - from);
                    }
                }
                _ => return Some(from.saturating_add(left)),
            }
        }
        None
    }

    /// Returns the rows of all sources that sit an epoch out because they do not fill a share, for
    /// the super-batches of the last phase.
    pub fn tail_rows(&self, phases: &[Phase]) -> u64 {
        tail_rows(&self.rows, &self.weights(), phases)
    }

    /// Returns the passes through `source`: as declared, but not more than there are positions for.
    pub(super) fn epochs_of(&self, source: usize) -> u64 {
        let most = POSITIONS_MAX / self.rows[source];
        if self.epochs > 0 {
            most.min(u64::from(self.epochs))
        } else {
            most
        }
    }

    fn weights(&self) -> Vec<f64> {
        self.manifest
            .sources
            .iter()
            .map(|source| source.weight)
            .collect()
    }

    /// Returns each source's share of a super-batch, after a check that it fits.
    fn shares(&self, super_batch_size: u32) -> Result<Vec<u64>> {
        let shares = shares(&self.weights(), super_batch_size);
        for (source, (rows, share)) in self.rows.iter().zip(&shares).enumerate() {
            let uri = &self.manifest.sources[source].uri;
            if *share == 0 {
                let message = format!(
                    "the weight of source {source} ({uri}) gives it no row of a super-batch of \
                    {super_batch_size}; raise the \
                     weight or super_batch_size, or leave the source out"
                );
                let field = format!("sources[{source}].weight");
                return Err(Error::new(Reason::RunSpecImpossible, message).with("field", field));
            }
            if rows < share {
                let message = format!(
                    "source {source} ({uri}) has {rows} rows, and {share} are needed for a \
                    super-batch of {super_batch_size}; \
                     lower super_batch_size or add data"
                );
                let error = Error::new(Reason::DatasetTooSmall, message);
                return Err(error
                    .with("source", source)
                    .with("rows", rows)
                    .with("needed", share));
            }
        }
        Ok(shares)
    }

    /// Returns the cursor of each source before `step`, and its share of that step.
    pub(super) fn cursors(&self, phases: &[Phase], step: u64) -> Result<(Vec<Cursor>, Vec<u64>)> {
        let mut cursors = vec![Cursor::default(); self.rows.len()];
        for (super_batch_size, from, to) in spans(phases) {
            let shares = self.shares(super_batch_size)?;
            let here = to.is_none_or(|to| step < to);
            let steps = if here {
                step.saturating_sub(from)
            } else {
                to.unwrap_or(step) - from
            };
            for (source, cursor) in cursors.iter_mut().enumerate() {
                *cursor = cursor.advance(self.rows[source], shares[source], steps);
            }
            if here {
                return Ok((cursors, shares));
            }
        }
        Err(Error::invalid(
            "phases",
            "the run has no phase; the first starts at step 0",
        ))
    }

    /// Appends the candidates of a span in canonical order.
    fn place(&self, span: &SourceSpan, into: &mut Vec<Candidate>) {
        let order = self.order(span.source, span.epoch);
        let first = span.epoch * self.rows[span.source as usize];
        let mut rows = order.rows(self.seed);
        // For each block of the epoch, the order of its first appearance in this span, from 1. Rows
        // of one block become neighbours, so that a slice reads each block once; sorting by
        // appearance keeps the result independent of the blocks' numbers.
        let mut appearance = vec![0_u64; order.blocks().len()];
        let mut appeared = 0;
        let mut placed = Vec::with_capacity(span.count as usize);
        for place in span.start..span.start + span.count {
            let (number, row) = rows.at(place);
            if appearance[number] == 0 {
                appeared += 1;
                appearance[number] = appeared;
            }
            let (shard, block) = order.blocks()[number];
            let candidate = Candidate {
                source: span.source,
                shard,
                block,
                row,
                position: first + place,
            };
            placed.push((appearance[number] << u32::BITS | u64::from(row), candidate));
        }
        placed.sort_unstable_by_key(|(key, _)| *key);
        into.extend(placed.into_iter().map(|(_, candidate)| candidate));
    }

    pub(super) fn order(&self, source: u32, epoch: u64) -> Arc<EpochOrder> {
        // Steps under way are close together, so only an epoch and its successor are in use at the
        // same time.
        let keep = 2 * self.rows.len();
        let mut orders = self.orders.lock().expect("no panic while held");
        let order = match orders
            .iter()
            .position(|(s, e, _)| (*s, *e) == (source, epoch))
        {
            Some(at) => orders.remove(at).2,
            None => {
                let blocks = self.manifest.sources[source as usize].blocks();
                Arc::new(EpochOrder::new(
                    blocks,
                    self.seed,
                    source,
                    epoch,
                    self.window_blocks,
                ))
            }
        };
        orders.push((source, epoch, order.clone()));
        if orders.len() > keep {
            orders.remove(0);
        }
        order
    }
}

/// As [`Plan::tail_rows`], of sources with these rows and weights.
pub fn tail_rows(rows: &[u64], weights: &[f64], phases: &[Phase]) -> u64 {
    let Some(phase) = phases.last() else { return 0 };
    let shares = shares(weights, phase.super_batch_size);
    rows.iter()
        .zip(shares)
        .map(|(rows, share)| rows.checked_rem(share).unwrap_or(*rows))
        .sum()
}

#[cfg(test)]
mod tests;
