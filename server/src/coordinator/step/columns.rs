//! Score columns of a step's candidates: what they add to scores, and whom they leave out.
use super::{decided::Decided, maker::Maker};
use crate::{
    coordinator::{
        losses::{self, Losses},
        plan::candidate::Candidate,
    },
    dataset::{Block, Manifest, Scores},
    error::{Error, Result},
};
use futures::{StreamExt, TryStreamExt, stream};
use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};
use superbatch_proto::v1::{Reason, ScoreColumn};

/// Shards whose columns are read at once.
const SHARDS_AT_ONCE: usize = 16;

/// The columns of a phase, by candidate.
#[derive(Debug, Default, Clone, PartialEq)]
pub(crate) struct Columns {
    /// By column, then by candidate; not finite where there is no value.
    pub values: Vec<Vec<f64>>,
    /// The sum of weight x value; not finite for those that are left out. `None` if no column
    /// has a weight.
    pub terms: Option<Vec<f64>>,
    /// Candidates that a rule, or a value that is missing, leaves out; rising.
    pub left_out: Vec<u32>,
}

/// Judges candidates by the values of `asked`.
pub(crate) fn weigh(asked: &[ScoreColumn], mut values: Vec<Vec<f64>>) -> Columns {
    let candidates = values.first().map_or(0, Vec::len);
    for (column, values) in asked.iter().zip(&mut values) {
        let missing = column.missing.unwrap_or(f64::NAN);
        let not_finite = values.iter_mut().filter(|value| !value.is_finite());
        not_finite.for_each(|value| *value = missing);
    }
    let fits = |column: &ScoreColumn, value: f64| {
        let high_enough = column.at_least.is_none_or(|least| value >= least);
        let low_enough = column.at_most.is_none_or(|most| value <= most);
        value.is_finite() && high_enough && low_enough
    };
    let weighted = asked
        .iter()
        .zip(&values)
        .filter(|(column, _)| column.weight.is_some());
    let weighted: Vec<_> = weighted
        .map(|(column, values)| (column.weight.unwrap_or_default(), values))
        .collect();
    let term = |n: usize| {
        weighted
            .iter()
            .map(|(weight, values)| weight * values[n])
            .sum()
    };
    let terms = (!weighted.is_empty()).then(|| (0..candidates).map(term).collect());
    let is_out = |n: &u32| {
        let n = *n as usize;
        // A weight times a value may overflow although both are finite.
        let is_finite = terms
            .as_ref()
            .is_none_or(|terms: &Vec<f64>| terms[n].is_finite());
        let mut columns = asked.iter().zip(&values);
        !is_finite || !columns.all(|(column, values)| fits(column, values[n]))
    };
    let left_out: Vec<u32> = (0..candidates as u32).filter(is_out).collect();
    Columns {
        values,
        terms,
        left_out,
    }
}

/// Reads the columns `asked` of `candidates`.
///
/// # Errors
/// Those of [`Scores`].
pub(crate) async fn read(
    scores: &Scores,
    losses: &Losses,
    manifest: &Manifest,
    candidates: &[Candidate],
    asked: &[ScoreColumn],
) -> Result<Columns> {
    if asked.is_empty() {
        return Ok(Columns::default());
    }
    let shards: BTreeSet<_> = candidates.iter().map(|c| (c.source, c.shard)).collect();
    let read = |(source_number, shard_number): (u32, u32)| async move {
        let source = &manifest.sources[source_number as usize];
        let shard = &source.shards[shard_number as usize];
        let mut columns = Vec::with_capacity(asked.len());
        for column in asked {
            let values = if column.name == losses::COLUMN {
                Arc::default()
            } else {
                scores.of_shard(source, shard, &column.name).await?
            };
            columns.push(values);
        }
        Ok::<_, Error>(((source_number, shard_number), columns))
    };
    let reads: Vec<_> = shards.into_iter().map(read).collect();
    let known: BTreeMap<_, _> = stream::iter(reads)
        .buffered(SHARDS_AT_ONCE)
        .try_collect()
        .await?;
    let mut values = vec![Vec::with_capacity(candidates.len()); asked.len()];
    for c in candidates {
        let shard = &manifest.sources[c.source as usize].shards[c.shard as usize];
        let block: &Block = &shard.blocks[c.block as usize];
        let row = block.row_in_shard(c.row) as usize;
        let columns = &known[&(c.source, c.shard)];
        for (values, column) in values.iter_mut().zip(columns) {
            values.push(column.get(row).copied().unwrap_or(f64::NAN));
        }
    }
    let reported = asked.iter().zip(&mut values);
    for (_, values) in reported.filter(|(column, _)| column.name == losses::COLUMN) {
        *values = losses_of(losses, manifest, candidates).await?;
    }
    Ok(weigh(asked, values))
}

/// Returns the losses of candidates that the trainer has reported so far.
async fn losses_of(
    losses: &Losses,
    manifest: &Manifest,
    candidates: &[Candidate],
) -> Result<Vec<f64>> {
    let example = |c: &Candidate| {
        let shard = &manifest.sources[c.source as usize].shards[c.shard as usize];
        let row = shard.blocks[c.block as usize].row_in_shard(c.row);
        (c.source, c.shard, row)
    };
    let examples = candidates.iter().map(example).collect();
    losses.of(examples).await
}

impl Maker<'_> {
    /// As [`read`], for this step.
    pub(crate) async fn columns(&self, asked: &[ScoreColumn]) -> Result<Columns> {
        let (run, candidates) = (self.run, &self.super_batch.candidates);
        read(&run.scores, &run.losses, &run.manifest, candidates, asked).await
    }

    /// Checks that what is left is enough for the sub-batch.
    ///
    /// # Errors
    /// `TooManyBadRows`, or `TooFewCandidates` if it would be enough but for the columns.
    pub(crate) fn enough(&self, decided: &Decided) -> Result<()> {
        let (candidates, wanted) = (
            self.super_batch.candidates.len(),
            decided.phase.sub_batch_size as usize,
        );
        if candidates - decided.holes.len() < wanted {
            return Err(self.too_few(decided));
        }
        let unusable = decided.unusable().len();
        if candidates - unusable >= wanted {
            return Ok(());
        }
        let (step, left_out) = (decided.step, unusable - decided.holes.len());
        let message = format!(
            "step {step}: score_columns leave out {left_out} of {candidates} candidates, and \
             sub_batch_size is {wanted}; loosen at_least or at_most, give `missing`, or raise \
             super_batch_size"
        );
        Err(Error::new(Reason::TooFewCandidates, message)
            .with("candidates", candidates)
            .with("holes", decided.holes.len())
            .with("left_out", left_out))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn column(weight: Option<f64>) -> ScoreColumn {
        ScoreColumn {
            name: "x".to_owned(),
            weight,
            ..Default::default()
        }
    }

    #[test]
    fn values_are_summed_by_their_weights() {
        let asked = [column(Some(2.0)), column(Some(-1.0)), column(None)];
        let values = vec![vec![1.0, 2.0], vec![0.5, 0.25], vec![9.0, 9.0]];
        let found = weigh(&asked, values.clone());
        assert_eq!(found.terms.as_deref(), Some(&[1.5, 3.75][..]));
        assert_eq!((found.values, found.left_out), (values, vec![]));
        assert_eq!(weigh(&[column(None)], vec![vec![1.0]]).terms, None);
    }

    #[test]
    fn a_term_that_overflows_leaves_its_row_out() {
        let found = weigh(&[column(Some(1e200))], vec![vec![1.0, 1e200, -1e200]]);
        assert_eq!(found.left_out, [1, 2]);
    }

    #[test]
    fn rows_outside_a_rule_or_without_a_value_are_left_out() {
        let asked = [ScoreColumn {
            at_least: Some(0.25),
            at_most: Some(0.75),
            ..column(None)
        }];
        let values = || vec![vec![0.2, 0.25, f64::NAN, 0.75, 0.8, f64::INFINITY]];
        assert_eq!(weigh(&asked, values()).left_out, [0, 2, 4, 5]);
        let filled = [ScoreColumn {
            missing: Some(0.5),
            ..asked[0].clone()
        }];
        let found = weigh(&filled, values());
        assert_eq!(found.left_out, [0, 4]);
        assert_eq!(found.values[0][2], 0.5);
    }
}
