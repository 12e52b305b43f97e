//! A slice: the candidates of a super-batch that one call scores, block by block, and how their
//! rows are read.
use super::beside::Known;
use crate::{
    blocking::blocking,
    bounds::{COLUMNS_MAX, LABEL_BYTES_MAX, check_bytes, check_count},
    dataset::{Block, Manifest, SourceManifest},
    error::{Error, Result},
    worker::{
        engine::Engine,
        inputs::images,
        kept::read::{ImagePlace, ReadBlock},
    },
};
use arrow::{array::UInt32Array, compute::take_record_batch, record_batch::RecordBatch};
use std::{
    collections::{HashMap, hash_map::Entry},
    ops::Range,
    sync::Arc,
};
use superbatch_proto::{SUPER_BATCH_SIZE_MAX, v1::BlockRows};

/// Rows of some blocks. Candidate i is the i-th row over all blocks.
pub(crate) struct Slice {
    /// [`SourceManifest::rows_digest`] of each source.
    rows_digests: Arc<Vec<String>>,
    pub manifest: Arc<Manifest>,
    pub columns: Vec<String>,
    pub blocks: Vec<SliceBlock>,
    pub candidates: usize,
    /// The rows whose reference embeddings this slice returns: from its first candidate whose block
    /// begins in this slice to the last row of its last block that any slice wants. A block that
    /// two slices share is embedded by the first of them only, else its reference forward would be
    /// paid twice.
    pub reference_rows: Range<usize>,
    /// The step for which candidates are kept in memory as they are read one by one; `None` keeps
    /// none.
    pub keep_for: Option<u64>,
}

/// The candidates that lie in one block.
pub(crate) struct SliceBlock {
    pub source: u32,
    pub shard: u32,
    pub block: u32,
    /// Row numbers within the block, in the order of the candidates.
    pub rows: Vec<u32>,
    /// Candidates of other slices whose reference embeddings this slice returns.
    pub reference_more: Vec<u32>,
    /// The candidate number of `rows[0]`.
    pub first: usize,
    /// How many rows the block has.
    pub block_rows: usize,
    /// Of images that lie beside the file.
    pub known: Known,
}

impl Slice {
    /// Names the rows of a block's source, whatever run reads them.
    pub(crate) fn rows_digest(&self, block: &SliceBlock) -> &str {
        // Placing the block has checked that its source exists.
        &self.rows_digests[block.source as usize]
    }

    /// # Errors
    /// `InvalidArgument` if a block or row does not exist, `ColumnNotFound`, and those of
    /// reading the manifest.
    pub(crate) async fn open(
        engine: &Engine,
        manifest: &str,
        blocks: Vec<BlockRows>,
        columns: Vec<String>,
    ) -> Result<Self> {
        check_bytes("dataset_manifest", manifest, LABEL_BYTES_MAX)?;
        check_count("columns", columns.len(), COLUMNS_MAX)?;
        let manifest_digest = manifest.to_owned();
        let load = async {
            Ok(Arc::new(
                Manifest::load(&engine.state, &manifest_digest).await?,
            ))
        };
        let manifest = engine.manifests.get(&manifest_digest, load).await?;
        let of = manifest.clone();
        let digests = async move {
            let digests = move || of.sources.iter().map(SourceManifest::rows_digest).collect();
            blocking("hashing a manifest", move || Ok(Arc::new(digests()))).await
        };
        let rows_digests = engine.rows_digests.get(&manifest_digest, digests).await?;
        manifest.data_schema(&columns)?;
        let mut candidates = 0;
        let mut placed = Vec::new();
        let mut named = Named::default();
        for block in blocks {
            let placed_block = SliceBlock::place(&manifest, block, candidates)?;
            named.add(&placed_block)?;
            candidates += placed_block.rows.len();
            placed.push(placed_block);
        }
        let reference_rows = 0..candidates;
        Ok(Self {
            rows_digests,
            manifest,
            columns,
            blocks: placed,
            candidates,
            reference_rows,
            keep_for: None,
        })
    }

    /// Returns whether all rows hold texts in the place of images.
    pub(crate) fn has_texts(&self) -> bool {
        self.manifest.sources.iter().all(SourceManifest::has_texts)
    }

    /// Sets which reference embeddings this slice returns of the blocks that it shares with other
    /// slices.
    ///
    /// # Errors
    /// `InvalidArgument` if a block would be shared out, or a row does not exist.
    pub(crate) fn share(&mut self, from: usize, more: Vec<u32>) -> Result<()> {
        let begins = |block: &SliceBlock| block.first == from;
        if from > self.candidates || (from < self.candidates && !self.blocks.iter().any(begins)) {
            return Err(Error::invalid(
                "reference_from",
                format!("no block begins at candidate {from}"),
            ));
        }
        self.reference_rows = from..self.candidates + more.len();
        match self.blocks.last_mut() {
            Some(last) if from < self.candidates && last.are_others(&more) => {
                last.reference_more = more;
            }
            _ if more.is_empty() => {}
            _ => {
                return Err(Error::invalid(
                    "reference_more",
                    "the slice's last block has no such rows to give",
                ));
            }
        }
        Ok(())
    }

    /// Returns whether this slice returns the reference embeddings of `block`.
    pub(crate) fn gives_reference(&self, block: &SliceBlock) -> bool {
        block.first >= self.reference_rows.start
    }

    /// Reads a block whole, in the data schema, without images that lie beside the file.
    pub(crate) async fn read(&self, engine: &Engine, block: &SliceBlock) -> Result<ReadBlock> {
        engine
            .reader
            .read(
                &self.manifest,
                block.source,
                block.shard,
                block.block,
                &self.columns,
            )
            .await
    }

    /// Returns where the images of some candidates lie; nowhere for those in Parquet files, whose
    /// pages hold many.
    pub(crate) async fn image_places(
        &self,
        engine: &Engine,
        candidates: &[usize],
    ) -> Result<Vec<ImagePlace>> {
        let mut of_blocks = HashMap::new();
        let mut places = Vec::with_capacity(candidates.len());
        for candidate in candidates {
            let number = self.block_of(*candidate);
            let block = &self.blocks[number];
            if let Entry::Vacant(vacant) = of_blocks.entry(number) {
                let SliceBlock {
                    source,
                    shard,
                    block: at,
                    ..
                } = block;
                let (manifest, columns) = (&self.manifest, &self.columns);
                let reader = &engine.reader;
                let found = reader.image_places(manifest, *source, *shard, *at, columns);
                vacant.insert(found.await?);
            }
            let row = block.rows[candidate - block.first] as usize;
            places.push(of_blocks[&number].get(row).cloned().unwrap_or_default());
        }
        Ok(places)
    }

    /// Returns the index of the block that holds `candidate`.
    pub(crate) fn block_of(&self, candidate: usize) -> usize {
        self.blocks
            .partition_point(|block| block.first + block.rows.len() <= candidate)
    }

    /// Returns the id of a candidate's row, as receipts write it.
    pub(crate) fn id(&self, candidate: usize) -> String {
        let block = &self.blocks[self.block_of(candidate)];
        self.id_of(block, block.rows[candidate - block.first])
    }

    /// Returns the id of a row of a block.
    pub(crate) fn id_of(&self, block: &SliceBlock, row: u32) -> String {
        let shard = &self.manifest.sources[block.source as usize].shards[block.shard as usize];
        let row = shard.blocks[block.block as usize].row_in_shard(row);
        let shard = &shard.path;
        let source = (self.manifest.sources.len() > 1).then_some(block.source);
        superbatch_proto::ids::RowId { source, shard, row }.to_string()
    }
}

/// The rows that a call has named so far. Each row may be named once. Otherwise a request of a few
/// kilobytes could name one row a million times and ask for a million decodes.
#[derive(Default)]
struct Named {
    /// By block, one bit for each row.
    rows: HashMap<(u32, u32, u32), Vec<u64>>,
    count: usize,
}

impl Named {
    fn add(&mut self, block: &SliceBlock) -> Result<()> {
        let SliceBlock {
            source,
            shard,
            block: number,
            ..
        } = block;
        let at = format_args!("block {number} of shard {shard} of source {source}");
        if block.rows.is_empty() {
            return Err(Error::invalid("blocks", format!("no row of {at} is named")));
        }
        self.count += block.rows.len();
        if self.count > SUPER_BATCH_SIZE_MAX as usize {
            let message = format!("more than {SUPER_BATCH_SIZE_MAX} rows are named");
            return Err(Error::invalid("blocks", message));
        }
        let bits = self
            .rows
            .entry((*source, *shard, *number))
            .or_insert_with(|| vec![0; block.block_rows.div_ceil(64)]);
        for row in &block.rows {
            let (word, bit) = (*row as usize / 64, 1u64 << (row % 64));
            if bits[word] & bit != 0 {
                return Err(Error::invalid(
                    "blocks",
                    format!("row {row} of {at} is named twice"),
                ));
            }
            bits[word] |= bit;
        }
        Ok(())
    }
}

impl SliceBlock {
    /// Returns whether these are rows of the block, each named once and none of its candidates.
    fn are_others(&self, more: &[u32]) -> bool {
        let mut free = vec![true; self.block_rows];
        let mut take = |row: &u32| free.get_mut(*row as usize).is_some_and(std::mem::take);
        self.rows.iter().for_each(|row| {
            take(row);
        });
        more.iter().all(take)
    }

    fn place(manifest: &Manifest, rows: BlockRows, first: usize) -> Result<Self> {
        let BlockRows {
            source,
            shard,
            block,
            rows,
        } = rows;
        let found: Option<&Block> = manifest
            .sources
            .get(source as usize)
            .and_then(|source| source.shards.get(shard as usize))
            .and_then(|shard| shard.blocks.get(block as usize));
        let Some(found) = found else {
            let message =
                format!("the manifest has no block {block} in shard {shard} of source {source}");
            return Err(Error::invalid("blocks", message));
        };
        if let Some(row) = rows.iter().find(|row| **row >= found.rows) {
            let message = format!(
                "block {block} of shard {shard} of source {source} has {} rows, no row {row}",
                found.rows
            );
            return Err(Error::invalid("blocks", message));
        }
        let block_rows = found.rows as usize;
        Ok(Self {
            source,
            shard,
            block,
            rows,
            reference_more: Vec::new(),
            first,
            block_rows,
            known: Known::default(),
        })
    }

    /// Returns the rows that the reference embeds: this slice's candidates, then those of other
    /// slices.
    pub(crate) fn reference_rows(&self) -> impl Iterator<Item = u32> {
        self.rows.iter().chain(&self.reference_more).copied()
    }
}

/// Returns the value at each place, in order.
///
/// # Errors
/// `Internal` for an empty place. If it were skipped, each later row would count as another
/// candidate.
pub(crate) fn each<T>(places: Vec<Option<T>>) -> Result<Vec<T>> {
    let count = places.len();
    let missing = |n| move || Error::internal(format!("row {n} of {count} was not read"));
    let numbered = places.into_iter().enumerate();
    numbered
        .map(|(n, row)| row.ok_or_else(missing(n)))
        .collect()
}

/// Returns some rows of a batch. They are copied, unless they follow each other and are at least
/// half of the batch: then they stay a slice of it, which holds the rest in memory but copies
/// nothing. Images that are views are copied always.
pub(crate) fn pick(batch: &RecordBatch, rows: Vec<u32>) -> Result<RecordBatch> {
    let first = rows.first().copied().unwrap_or_default();
    let picked = if 2 * rows.len() >= batch.num_rows()
        && rows.iter().copied().eq(first..first + rows.len() as u32)
    {
        Ok(batch.slice(first as usize, rows.len()))
    } else {
        take_record_batch(batch, &UInt32Array::from(rows))
    };
    picked
        .and_then(|picked| images::without_views(&picked))
        .map_err(|e| Error::internal("cannot take rows out of a block").because(e))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn block(block: u32, rows: &[u32]) -> SliceBlock {
        SliceBlock {
            source: 0,
            shard: 0,
            block,
            rows: rows.to_vec(),
            reference_more: Vec::new(),
            first: 0,
            block_rows: 100,
            known: Known::default(),
        }
    }

    #[test]
    fn an_empty_place_is_an_error_and_no_shift() {
        assert_eq!(each(vec![Some(1), Some(2)]).unwrap(), [1, 2]);
        let error = each(vec![Some(1), None, Some(3)]).unwrap_err();
        assert!(error.to_string().contains("row 1 of 3"), "{error}");
    }

    #[test]
    fn a_call_names_each_row_once() {
        let mut named = Named::default();
        named.add(&block(0, &[99, 0, 64])).unwrap();
        named.add(&block(1, &[0])).unwrap();
        named.add(&block(0, &[1])).unwrap();
        for again in [block(0, &[64]), block(1, &[3, 3]), block(2, &[])] {
            assert!(named.add(&again).is_err(), "{:?}", again.rows);
        }
    }
}
