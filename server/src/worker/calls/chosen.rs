//! Sends the chosen rows of a slice.
use super::{
    answers::Answers,
    hand::hand_over,
    messages::{answer, arrow_ipc, next},
    rows::{Form, RowWriter, compact, compact_bytes, content_hashes, send_rows},
    score::Scoring,
    slice::each,
    survey::AHEAD,
};
use crate::{
    error::{Error, Result},
    worker::{
        engine::Engine,
        inputs::row::Row,
        kept::held::{HeldFor, Hold},
    },
};
use futures::{FutureExt, Stream, StreamExt, TryStreamExt, stream};
use std::collections::BTreeMap;
use superbatch_proto::v1::{
    ChosenRows, KeptRows, Reason, RowsDone, RowsForm, ScoreRequest, ScoreResponse, score_request,
    score_response::Message,
};
use tonic::Status;

impl Scoring<'_> {
    /// Returns rows of a block's candidates, by their numbers in it, if they are kept.
    pub(crate) fn kept(&self, block: usize, numbers: &[usize]) -> Option<Vec<Row>> {
        let (about, found) = (&self.slice.blocks[block], &self.blocks[block]);
        let kept = found.raw.as_ref();
        if let Some(rows) = kept.and_then(|kept| kept.rows(about, numbers)) {
            return Some(rows);
        }
        let rows: Vec<u32> = numbers.iter().map(|n| about.rows[*n]).collect();
        about.known.all_kept(&rows)
    }

    /// Sends the chosen rows, in the order of the request.
    pub(crate) async fn send_chosen(
        &self,
        chosen: ChosenRows,
        answers: &Answers<ScoreResponse>,
    ) -> Result<()> {
        let (rows, rows_read_again) = self.chosen(&chosen).await?;
        let form = match chosen.form() {
            RowsForm::Located => {
                let candidates: Vec<usize> =
                    chosen.candidates.iter().map(|c| *c as usize).collect();
                let places = self.slice.image_places(self.engine, &candidates).await?;
                Form::Located(places, self.slice.manifest.image_place_fields())
            }
            _ => Form::Whole,
        };
        self.send(&rows, rows_read_again, form, answers).await
    }

    async fn send(
        &self,
        rows: &[Row],
        rows_read_again: usize,
        form: Form,
        answers: &Answers<ScoreResponse>,
    ) -> Result<()> {
        let (pool, buffers) = (&self.engine.pool, &self.engine.buffers);
        let manifest = &self.slice.manifest;
        let schema = manifest.data_schema(&self.slice.columns)?;
        match (&form, answers.handover()) {
            (Form::Whole, Some(handover)) => {
                handover.put(hand_over(&schema, rows, pool, buffers).await?);
            }
            _ => {
                let writer = RowWriter::new(&schema, form)?;
                let wrap = |part| Some(arrow_ipc(part));
                let writer = send_rows(writer, rows, pool, answers, wrap).await?;
                for part in writer.finish()? {
                    answers.send(arrow_ipc(part)).await?;
                }
            }
        }
        let done = RowsDone {
            rows: rows.len() as u32,
            rows_read_again: rows_read_again as u32,
        };
        answers.send(answer(Message::RowsDone(done))).await
    }

    /// Holds the chosen rows for trainers for as long as the call is open. If there is no room for
    /// them, the rows themselves may be asked for.
    pub(crate) async fn keep_chosen(
        self,
        chosen: ChosenRows,
        requests: &mut (impl Stream<Item = Result<ScoreRequest, Status>> + Unpin),
        answers: &Answers<ScoreResponse>,
    ) -> Result<()> {
        let (rows, rows_read_again) = self.chosen(&chosen).await?;
        let engine = self.engine;
        let (hold, kept) = hold(engine, self.held_for(), &rows).await?;
        if let Some(hold) = hold {
            // The candidates' rows are freed; only the chosen ones stay.
            drop((self, rows));
            answers.send(answer(Message::Kept(kept))).await?;
            hold.until(&engine.stopping).await;
            return Ok(());
        }
        answers.send(answer(Message::Kept(kept))).await?;
        match next(engine, requests).await? {
            None => Ok(()),
            Some(score_request::Message::Chosen(whole))
                if whole.candidates == chosen.candidates && is_whole(&whole) =>
            {
                self.send(&rows, rows_read_again, Form::Whole, answers)
                    .await
            }
            Some(_) => {
                let message = "after rows for which there is no room come ChosenRows of the same \
                    candidates, whole";
                Err(Error::invalid("message", message))
            }
        }
    }

    /// Returns the chosen rows, in the order of the request, and how many were read again.
    async fn chosen(&self, chosen: &ChosenRows) -> Result<(Vec<Row>, usize)> {
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
        Ok((rows, rows_read_again))
    }

    /// Returns the chosen rows of one block with their places among all that were chosen, and
    /// whether they had to be read again.
    async fn chosen_of(
        &self,
        block: usize,
        places: Vec<usize>,
        chosen: &[u32],
    ) -> Result<(Vec<(usize, Row)>, bool)> {
        let (was_read, about) = (self.blocks[block].was_read, &self.slice.blocks[block]);
        let numbers = places.iter().map(|n| chosen[*n] as usize - about.first);
        let numbers: Vec<usize> = numbers.collect();
        if let Some(rows) = self.kept(block, &numbers) {
            return Ok((places.into_iter().zip(rows).collect(), false));
        }
        let wanted = numbers.iter().map(|n| about.rows[*n]).collect();
        let whole = self.slice.read(self.engine, about).await?;
        let rows = self.slice.copied_rows(self.engine, about, whole, wanted);
        Ok((places.into_iter().zip(rows.await?).collect(), was_read))
    }

    pub(crate) fn changed(&self, candidate: usize, detail: &str) -> Error {
        let id = self.slice.id(candidate);
        Error::new(
            Reason::RowChanged,
            format!("row {id} was good and is not any more: {detail}"),
        )
        .with("id", id)
    }
}

fn is_whole(chosen: &ChosenRows) -> bool {
    matches!(chosen.form(), RowsForm::Unspecified | RowsForm::Whole)
}

/// Copies rows and holds them for trainers. Returns no hold if there is no room: then nothing is
/// copied, and only the content hashes are computed.
pub(crate) async fn hold(
    engine: &Engine,
    held_for: HeldFor,
    rows: &[Row],
) -> Result<(Option<Hold>, KeptRows)> {
    let Some(hold) = engine.held.reserve(held_for, compact_bytes(rows)?) else {
        return not_held(engine, rows).await;
    };
    let compact = compact(rows.to_vec(), &engine.pool).await?;
    let kept = KeptRows {
        id: hold.id,
        content_hashes: compact.hashes.into(),
        bytes: compact.bytes as u64,
    };
    if hold.fill(compact.rows, compact.bytes) {
        return Ok((Some(hold), kept));
    }
    let (id, bytes) = (0, 0);
    Ok((None, KeptRows { id, bytes, ..kept }))
}

async fn not_held(engine: &Engine, rows: &[Row]) -> Result<(Option<Hold>, KeptRows)> {
    let rows = rows.to_vec();
    let hashes = engine.pool.run(move || content_hashes(&rows)).await??;
    let kept = KeptRows {
        content_hashes: hashes.into(),
        ..Default::default()
    };
    Ok((None, kept))
}
