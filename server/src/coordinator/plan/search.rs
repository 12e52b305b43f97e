//! The reverse search: the steps in which a row is a candidate.
use super::{candidate::Candidate, planner::Plan, schedule::Cursor};
use crate::error::Result;
use superbatch_proto::v1::Phase;

/// Most epochs that are searched, the newest ones.
const EPOCHS_MAX: u64 = 256;

impl Plan {
    /// Returns the steps up to `newest` in which a row is a candidate, rising, and the first step
    /// after. `row.position` is not read. A row that sits an epoch out is in none of its steps.
    ///
    /// # Errors
    /// Those of [`Plan::check`].
    pub fn steps_of(
        &self,
        phases: &[Phase],
        row: &Candidate,
        newest: u64,
    ) -> Result<(Vec<u64>, Option<u64>)> {
        let source = row.source as usize;
        let (at_newest, share) = self.cursor_and_share(phases, source, newest)?;
        // Every epoch has at least one step, so the next two epochs end before this step.
        let beyond = newest + 2 * (self.rows[source] / share.max(1)) + 2;
        let first = (at_newest.epoch + 1).saturating_sub(EPOCHS_MAX);
        let last = (at_newest.epoch + 1).min(self.epochs_of(source) - 1);
        let (mut steps, mut next) = (Vec::new(), None);
        for epoch in first..=last {
            let order = self.order(row.source, epoch);
            let Some(place) = order.place_of(self.seed, row.shard, row.block, row.row) else {
                continue;
            };
            let Some(step) = self.step_at(phases, source, (epoch, place), beyond)? else {
                continue;
            };
            if step <= newest {
                steps.push(step);
            } else if self.steps_total(phases).is_none_or(|total| step < total) {
                next = next.or(Some(step));
            }
        }
        Ok((steps, next))
    }

    /// Returns the step that scans a place of an epoch; `None` if no step does.
    fn step_at(
        &self,
        phases: &[Phase],
        source: usize,
        place: (u64, u64),
        beyond: u64,
    ) -> Result<Option<u64>> {
        // Binary search for the last step that begins at or before the place.
        let (mut low, mut high) = (0, beyond);
        while low < high {
            let middle = low + (high - low).div_ceil(2);
            let (begins, _) = self.cursor_and_share(phases, source, middle)?;
            if (begins.epoch, begins.place) <= place {
                low = middle
            } else {
                high = middle - 1
            }
        }
        let (begins, share) = self.cursor_and_share(phases, source, low)?;
        let inside =
            begins.epoch == place.0 && (begins.place..begins.place + share).contains(&place.1);
        Ok(inside.then_some(low))
    }

    /// Returns the cursor of a source at the beginning of a step, and the rows that the step takes
    /// of it.
    fn cursor_and_share(
        &self,
        phases: &[Phase],
        source: usize,
        step: u64,
    ) -> Result<(Cursor, u64)> {
        let (cursors, shares) = self.cursors(phases, step)?;
        let share = shares[source];
        Ok((cursors[source].settle(self.rows[source], share), share))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dataset::{Block, Manifest, Shard, SourceManifest};
    use std::{collections::BTreeMap, sync::Arc};

    fn source(shards: u32, blocks: u32, rows: u32) -> SourceManifest {
        let block = |b: u32| Block {
            rows,
            first_row: u64::from(b * rows),
            bytes: (0, 1),
            mask: None,
        };
        let shard = |s: u32| Shard {
            path: format!("{s}.parquet"),
            size: 1,
            blocks: (0..blocks).map(block).collect(),
            ..Shard::default()
        };
        SourceManifest {
            uri: "memory:///a".into(),
            root_uri: "memory:///a".into(),
            weight: 1.0,
            shards: (0..shards).map(shard).collect(),
            ..SourceManifest::default()
        }
    }

    #[test]
    fn every_step_of_every_row_is_found() {
        let sources = vec![source(3, 4, 7), source(1, 5, 11)];
        let manifest = Arc::new(Manifest {
            version: 1,
            sources,
        });
        let plan = Plan::new(manifest, 3, 4, 2).unwrap();
        let phase = |from_step, super_batch_size| Phase {
            from_step,
            super_batch_size,
            ..Default::default()
        };
        let phases = [phase(0, 20), phase(5, 32)];
        let total = plan.steps_total(&phases).unwrap();
        type Row = (u32, u32, u32, u32);
        let mut expected: BTreeMap<Row, (Candidate, Vec<u64>)> = BTreeMap::new();
        for step in 0..total {
            for c in plan.step(&phases, step).unwrap().candidates {
                let key = (c.source, c.shard, c.block, c.row);
                expected.entry(key).or_insert((c, Vec::new())).1.push(step);
            }
        }
        assert!(
            total > 8 && expected.len() > 100,
            "{total} steps, {} rows",
            expected.len()
        );
        let newest = total / 2;
        for (row, steps) in expected.values() {
            let (found, next) = plan.steps_of(&phases, row, newest).unwrap();
            let (before, after): (Vec<u64>, Vec<u64>) =
                steps.iter().partition(|step| **step <= newest);
            assert_eq!(found, before, "{row:?}");
            let near = after.first().copied();
            assert!(
                next == near || (next.is_none() && near.is_some()),
                "{row:?}: {next:?} {near:?}"
            );
            assert_eq!(
                plan.steps_of(&phases, row, total - 1).unwrap().0,
                *steps,
                "{row:?}"
            );
        }
    }
}
