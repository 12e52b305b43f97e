//! Sends the chosen rows of a slice.
use super::{
    answers::Answers,
    messages::{answer, arrow_ipc},
    rows::{RowWriter, send_rows},
    score::Scoring,
    slice::{Rows, each, pick},
    survey::AHEAD,
};
use crate::{
    error::{Error, Result},
    worker::{inputs::row::Row, kept::retained::Kept},
};
use futures::{FutureExt, StreamExt, TryStreamExt, stream};
use std::{collections::BTreeMap, sync::Arc};
use superbatch_proto::v1::{ChosenRows, Reason, RowsDone, ScoreResponse, score_response::Message};

impl Scoring<'_> {
    /// Returns the rows of a block: the kept ones, or else the block read again.
    pub async fn rows(&self, block: usize) -> Result<Rows> {
        match self.blocks[block].raw.as_ref().and_then(Kept::get) {
            Some(kept) => Ok(Rows::Candidates(kept)),
            None => Ok(Rows::Whole(
                self.slice
                    .read(self.engine, &self.slice.blocks[block])
                    .await?,
            )),
        }
    }

    /// Sends the chosen rows, in the order of the request.
    pub async fn chosen(&self, chosen: ChosenRows, answers: &Answers<ScoreResponse>) -> Result<()> {
        if chosen.candidates.len() > self.slice.candidates {
            let message = format!(
                "{} candidates are chosen of {}",
                chosen.candidates.len(),
                self.slice.candidates
            );
            return Err(Error::invalid("candidates", message));
        }
        // All indices off the wire are checked before the first read.
        for candidate in &chosen.candidates {
            let candidate = *candidate as usize;
            if candidate >= self.slice.candidates || self.faults.contains_key(&candidate) {
                let message = format!(
                    "candidate {candidate} of {} is a hole or does not exist",
                    self.slice.candidates
                );
                return Err(Error::invalid("candidates", message));
            }
        }
        let mut by_block: BTreeMap<usize, Vec<usize>> = BTreeMap::new();
        for (place, candidate) in chosen.candidates.iter().enumerate() {
            by_block
                .entry(self.slice.block_of(*candidate as usize))
                .or_default()
                .push(place);
        }
        let chosen = &chosen.candidates;
        let reads: Vec<_> = by_block
            .into_iter()
            .map(|(block, places)| self.chosen_of(block, places, chosen).boxed())
            .collect();
        let mut reads = stream::iter(reads).buffered(AHEAD);
        // Rows arrive by block and are put at their places; `each` refuses an empty place, which
        // would shift every later row to another candidate.
        let mut rows: Vec<Option<Row>> = vec![None; chosen.len()];
        let mut rows_read_again = 0;
        while let Some((found, was_read_again)) = reads.try_next().await? {
            rows_read_again += if was_read_again { found.len() } else { 0 };
            found
                .into_iter()
                .for_each(|(place, row)| rows[place] = Some(row));
        }
        let rows: Vec<Row> = each(rows)?;
        // The row had image and caption when it was embedded. A shard that was replaced in the
        // meantime must not be served under the receipt of the old one.
        if let Some(n) = rows
            .iter()
            .position(|row| row.image().is_none() || row.caption().is_none())
        {
            return Err(self.changed(chosen[n] as usize, "image or caption is null now"));
        }
        let schema = self.slice.manifest.data_schema(&self.slice.columns)?;
        let writer = send_rows(
            RowWriter::new(&schema)?,
            &rows,
            &self.engine.pool,
            answers,
            arrow_ipc,
        )
        .await?;
        for part in writer.finish()? {
            answers.send(arrow_ipc(part)).await?;
        }
        let done = RowsDone {
            rows: rows.len() as u32,
            rows_read_again: rows_read_again as u32,
        };
        answers.send(answer(Message::RowsDone(done))).await
    }

    /// The chosen rows of one block with their places among all that were chosen, and whether they
    /// had to be read again.
    async fn chosen_of(
        &self,
        block: usize,
        places: Vec<usize>,
        chosen: &[u32],
    ) -> Result<(Vec<(usize, Row)>, bool)> {
        let rows = self.rows(block).await?;
        let (was_read, block) = (self.blocks[block].was_read, &self.slice.blocks[block]);
        let n = |place: &usize| chosen[*place] as usize - block.first;
        let Rows::Whole(whole) = rows else {
            return Ok((
                places
                    .into_iter()
                    .map(|place| (place, block.row(&rows, n(&place))))
                    .collect(),
                false,
            ));
        };
        // A block may be hundreds of megabytes of which a few rows are chosen. Copying them lets
        // the block go; a slice of it would keep the whole block in memory until the last row is
        // sent.
        let wanted: Vec<u32> = places.iter().map(|place| block.rows[n(place)]).collect();
        let batch = Arc::new(
            self.engine
                .pool
                .run(move |_| pick(&whole, wanted))
                .await??,
        );
        let rows = places.into_iter().enumerate().map(|(row, place)| {
            (
                place,
                Row {
                    batch: batch.clone(),
                    row,
                },
            )
        });
        Ok((rows.collect(), was_read))
    }

    pub fn changed(&self, candidate: usize, detail: &str) -> Error {
        let id = self.slice.id(candidate);
        Error::new(
            Reason::RowChanged,
            format!("row {id} was good and is not any more: {detail}"),
        )
        .with("id", id)
    }
}
