//! Rows of a block, with their images. Images that lie beside the file are read only for the rows
//! that are used, and candidates' rows stay while there is room.
use super::slice::{Slice, SliceBlock, each, pick};
use crate::{
    error::{Error, Result},
    worker::{
        engine::Engine,
        inputs::{
            model_inputs::Inputs,
            row::{PreparedRow, Row},
        },
        kept::{read::ReadBlock, retained::Kept},
    },
};
use arrow::record_batch::RecordBatch;
use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard},
};
use superbatch_proto::v1::Reason;
use tokio::time::Instant;

/// What a call knows of images that lie beside a block's file.
#[derive(Default)]
pub(crate) struct Known(Mutex<HashMap<u32, KnownRow>>);

#[derive(Default)]
struct KnownRow {
    /// Of the image as it was first read.
    hash: Option<blake3::Hash>,
    /// The row alone, if there was room for it.
    kept: Option<Kept<Arc<RecordBatch>>>,
}

impl Known {
    fn rows(&self) -> MutexGuard<'_, HashMap<u32, KnownRow>> {
        self.0.lock().expect("no panic while held")
    }

    fn kept(&self, row: u32) -> Option<Row> {
        let batch = self.rows().get(&row)?.kept.as_ref()?.get()?;
        Some(Row { batch, row: 0 })
    }

    /// Returns these rows if all of them are kept.
    pub(crate) fn all_kept(&self, rows: &[u32]) -> Option<Vec<Row>> {
        rows.iter().map(|row| self.kept(*row)).collect()
    }

    /// Notes the hash of a row's image. Returns whether it is the one that was noted before.
    fn is_same(&self, row: u32, hash: Option<blake3::Hash>) -> bool {
        let Some(hash) = hash else { return true };
        let mut rows = self.rows();
        *rows.entry(row).or_default().hash.get_or_insert(hash) == hash
    }

    fn keep(&self, row: u32, kept: Kept<Arc<RecordBatch>>) {
        self.rows().entry(row).or_default().kept = Some(kept);
    }
}

/// Rows of a block's candidates, which are kept until some of them are chosen.
pub(crate) struct Candidates {
    kept: Kept<Arc<RecordBatch>>,
    /// Whether it is the whole block, with its other rows.
    is_whole: bool,
}

impl Candidates {
    /// Returns rows by their numbers among the candidates of `block`; `None` if they were dropped
    /// for lack of room.
    pub(crate) fn rows(&self, block: &SliceBlock, numbers: &[usize]) -> Option<Vec<Row>> {
        let batch = self.kept.get()?;
        let row = |number: &usize| Row {
            batch: batch.clone(),
            row: if self.is_whole {
                block.rows[*number] as usize
            } else {
                *number
            },
        };
        Some(numbers.iter().map(row).collect())
    }
}

/// Rows that were read and decoded, and how long each took.
pub(crate) struct Prepared {
    pub rows: Vec<PreparedRow>,
    pub fetch_seconds: f64,
    pub decode_seconds: f64,
}

impl Slice {
    /// Returns rows of `whole`, which is this block, with their images.
    ///
    /// # Errors
    /// Those of reading; `RowChanged` if an image is another than the one that this call read
    /// before: its row would be scored by one, and served with the other.
    pub(crate) async fn rows(
        &self,
        engine: &Engine,
        block: &SliceBlock,
        whole: &ReadBlock,
        rows: &[u32],
    ) -> Result<Vec<Row>> {
        if !whole.has_images_beside() {
            let row = |row: &u32| Row {
                batch: whole.batch.clone(),
                row: *row as usize,
            };
            return Ok(rows.iter().map(row).collect());
        }
        let mut found: Vec<Option<Row>> = rows.iter().map(|row| block.known.kept(*row)).collect();
        let places: Vec<usize> = (0..rows.len()).filter(|n| found[*n].is_none()).collect();
        let missing: Vec<u32> = places.iter().map(|n| rows[*n]).collect();
        let mut places = places.into_iter();
        for piece in engine.reader.with_images(whole, &missing).await? {
            let mut kept = Vec::new();
            // In the order of `missing`; `each` refuses a row that did not come.
            for ((row, hash), place) in piece.rows.iter().zip(&mut places) {
                if !block.known.is_same(*row, *hash) {
                    return Err(self.replaced(block, *row));
                }
                if hash.is_some() && self.keep_for.is_some() && block.rows.contains(row) {
                    kept.push(*row);
                }
                found[place] = Some(Row {
                    batch: piece.batch.clone(),
                    row: *row as usize,
                });
            }
            self.keep(engine, block, &piece.batch, kept).await?;
        }
        each(found)
    }

    /// Keeps the candidates of a block whose images are in the file, if there is room. A call that
    /// `waits` for its models before rows are chosen copies them out of the block. In others the
    /// rows are chosen next: they stay in the block while there is much room, and are copied once
    /// it is known where they go. Steps of one window of blocks share them.
    pub(crate) async fn keep_candidates(
        &self,
        engine: &Engine,
        block: &SliceBlock,
        whole: &ReadBlock,
        waits: bool,
    ) -> Result<Option<Candidates>> {
        let Some(step) = self.keep_for else {
            return Ok(None);
        };
        let bytes = whole.bytes();
        let (whole, wanted) = (whole.batch.clone(), block.rows.clone());
        let shared = || engine.raw.keep_shared(step, bytes, whole.clone());
        if let Some(kept) = (!waits).then(shared).flatten() {
            let is_whole = true;
            return Ok(Some(Candidates { kept, is_whole }));
        }
        let rows = engine.pool.run(move || pick(&whole, wanted)).await??;
        let bytes = rows.get_array_memory_size();
        let kept = engine.raw.keep(step, bytes, Arc::new(rows));
        let is_whole = false;
        Ok(kept.map(|kept| Candidates { kept, is_whole }))
    }

    /// Keeps candidates, each as a copy of its own.
    async fn keep(
        &self,
        engine: &Engine,
        block: &SliceBlock,
        batch: &Arc<RecordBatch>,
        rows: Vec<u32>,
    ) -> Result<()> {
        let Some(step) = self.keep_for.filter(|_| !rows.is_empty()) else {
            return Ok(());
        };
        let (batch, wanted) = (batch.clone(), rows.clone());
        let copy = move || {
            let one = |row: &u32| pick(&batch, vec![*row]);
            wanted.iter().map(one).collect::<Result<Vec<_>>>()
        };
        for (row, copy) in rows.into_iter().zip(engine.pool.run(copy).await??) {
            let bytes = copy.get_array_memory_size();
            if let Some(kept) = engine.raw.keep(step, bytes, Arc::new(copy)) {
                block.known.keep(row, kept);
            }
        }
        Ok(())
    }

    /// As [`Slice::rows`], of rows that are served. They are copied, so that the rest of the block
    /// does not stay in memory: it may be hundreds of megabytes.
    pub(crate) async fn copied_rows(
        &self,
        engine: &Engine,
        block: &SliceBlock,
        whole: ReadBlock,
        rows: Vec<u32>,
    ) -> Result<Vec<Row>> {
        if whole.has_images_beside() {
            return self.rows(engine, block, &whole, &rows).await;
        }
        let copy = move || pick(&whole.batch, rows);
        let batch = Arc::new(engine.pool.run(copy).await??);
        let row = |row| Row {
            batch: batch.clone(),
            row,
        };
        Ok((0..batch.num_rows()).map(row).collect())
    }

    /// Reads and decodes rows of `whole`, which is this block.
    ///
    /// # Errors
    /// As [`Slice::rows`].
    pub(crate) async fn prepare(
        &self,
        engine: &Engine,
        block: &SliceBlock,
        whole: &ReadBlock,
        rows: &[u32],
        inputs: &Arc<Inputs>,
    ) -> Result<Prepared> {
        let started = Instant::now();
        let rows = self.rows(engine, block, whole, rows).await?;
        let fetch_seconds = started.elapsed().as_secs_f64();
        let (rows, decode_seconds) = engine.pool.prepare(rows, inputs.clone()).await?;
        Ok(Prepared {
            rows,
            fetch_seconds,
            decode_seconds,
        })
    }

    fn replaced(&self, block: &SliceBlock, row: u32) -> Error {
        let id = self.id_of(block, row);
        let message = format!("the image of row {id} was replaced while its step was scored");
        Error::new(Reason::RowChanged, message).with("id", id)
    }
}

#[cfg(test)]
mod tests;
