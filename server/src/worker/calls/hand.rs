//! Hands rows over to the coordinator of the same process. Nothing is encoded, and a record batch
//! of which most rows are wanted is not copied: the coordinator gathers rows from where they lie.
use super::{
    rows::{content_hashes, copy, encoding, hashed_schema, sizes},
    survey::AHEAD,
};
use crate::{
    batches::{RANK_BATCH_BYTES_MAX, SENT_BATCH_BYTES_MAX, row_ranges},
    buffers::Buffers,
    error::Result,
    handed,
    worker::inputs::{decode_pool::DecodePool, images, row::Row},
};
use arrow::{
    array::{ArrayRef, FixedSizeBinaryArray},
    datatypes::SchemaRef,
    record_batch::RecordBatch,
};
use futures::{FutureExt, StreamExt, TryStreamExt, stream};
use std::{collections::HashMap, sync::Arc};

const HASH_BYTES: usize = 16;

/// What becomes one record batch.
struct Piece {
    /// For each row, its place among all rows.
    places: Vec<usize>,
    rows: Vec<Row>,
    /// Whether the rows lie in one batch, which is handed over with its other rows.
    is_shared: bool,
}

/// Returns `rows` with their content hashes as last column, in the order given. All of them must
/// have image and caption.
pub(crate) async fn hand_over(
    data_schema: &SchemaRef,
    rows: &[Row],
    pool: &DecodePool,
    buffers: &Buffers,
) -> Result<handed::Rows> {
    let schema = hashed_schema(data_schema);
    let sizes = sizes(rows)?;
    let hashes = Arc::new(hashed(rows, &sizes, pool).await?);
    let pieces: Vec<_> = pieces(rows, &sizes)
        .into_iter()
        .map(|piece| {
            let (hashes, schema, buffers) = (hashes.clone(), schema.clone(), buffers.clone());
            let make =
                move || batch(&piece, &hashes, &schema, &buffers).map(|batch| (batch, piece));
            async move { pool.run(make).await? }.boxed()
        })
        .collect();
    let mut pieces = stream::iter(pieces).buffered(AHEAD);
    let mut all = handed::Rows {
        schema: schema.clone(),
        batches: Vec::new(),
        places: vec![(0, 0); rows.len()],
        value_bytes: sizes.iter().map(|size| *size as u64).sum(),
        bytes: 0,
    };
    while let Some((batch, piece)) = pieces.try_next().await? {
        add(&mut all, batch, &piece);
    }
    Ok(all)
}

/// Returns the content hashes of rows, 16 bytes each. Several threads share the work.
async fn hashed(rows: &[Row], sizes: &[usize], pool: &DecodePool) -> Result<Vec<u8>> {
    let runs: Vec<_> = row_ranges(sizes, SENT_BATCH_BYTES_MAX)
        .into_iter()
        .map(|range| {
            let rows = rows[range].to_vec();
            pool.run(move || content_hashes(&rows)).boxed()
        })
        .collect();
    let mut runs = stream::iter(runs).buffered(AHEAD);
    let mut hashes = Vec::with_capacity(rows.len() * HASH_BYTES);
    while let Some(some) = runs.try_next().await? {
        hashes.extend(some?);
    }
    Ok(hashes)
}

/// Divides rows by the batches in which they lie. A batch without views is shared if the wanted
/// rows are at least half of its memory, so that the coordinator never holds more than twice what
/// it asked for. Rows of other batches are copied together, in pieces as large as a rank's record
/// batches: of rows that come in the order in which ranks have them, a rank's record batch is not
/// copied again if it lies within one piece.
fn pieces(rows: &[Row], sizes: &[usize]) -> Vec<Piece> {
    let mut numbers = HashMap::new();
    let mut by_batch: Vec<Vec<usize>> = Vec::new();
    for (place, row) in rows.iter().enumerate() {
        let number = *numbers.entry(Arc::as_ptr(&row.batch)).or_insert_with(|| {
            by_batch.push(Vec::new());
            by_batch.len() - 1
        });
        by_batch[number].push(place);
    }
    let is_shared = |places: &Vec<usize>| {
        let wanted: usize = places.iter().map(|place| sizes[*place]).sum();
        let first = places.first().map(|place| &rows[*place].batch);
        let is_shared = |batch: &Arc<RecordBatch>| {
            !images::are_views(batch) && 2 * wanted >= batch.get_array_memory_size()
        };
        first.is_some_and(is_shared)
    };
    let (shared, others): (Vec<_>, Vec<_>) = by_batch.into_iter().partition(is_shared);
    let mut others = others.concat();
    others.sort_unstable();
    let size = |place: &usize| sizes[*place] + HASH_BYTES;
    let copied: Vec<usize> = others.iter().map(size).collect();
    let copied = row_ranges(&copied, RANK_BATCH_BYTES_MAX).into_iter();
    let copied = copied.map(|range| (others[range].to_vec(), false));
    let shared = shared.into_iter().map(|places| (places, true));
    let piece = |(places, is_shared): (Vec<usize>, bool)| Piece {
        rows: places.iter().map(|place| rows[*place].clone()).collect(),
        places,
        is_shared,
    };
    shared.chain(copied).map(piece).collect()
}

/// Makes the record batch of a piece. Megabytes may be copied.
fn batch(
    piece: &Piece,
    hashes: &[u8],
    schema: &SchemaRef,
    buffers: &Buffers,
) -> Result<RecordBatch> {
    let of_place = |place: &usize| &hashes[place * HASH_BYTES..][..HASH_BYTES];
    let hashes: Vec<u8> = piece.places.iter().flat_map(of_place).copied().collect();
    let shared = piece.rows.first().filter(|_| piece.is_shared);
    let (data, hashes) = match shared {
        Some(first) => {
            let batch = RecordBatch::clone(&first.batch);
            let hashes = spread(&hashes, &piece.rows, batch.num_rows());
            (batch, hashes)
        }
        None => (copy(&piece.rows, buffers)?, hashes),
    };
    let hashes = FixedSizeBinaryArray::try_new(HASH_BYTES as i32, hashes.into(), None);
    let hashes: ArrayRef = Arc::new(hashes.map_err(encoding)?);
    let mut columns = data.columns().to_vec();
    columns.push(hashes);
    RecordBatch::try_new(schema.clone(), columns).map_err(encoding)
}

/// Puts the hashes of `rows` at their places among all rows of their batch. Nobody reads others.
fn spread(hashes: &[u8], rows: &[Row], count: usize) -> Vec<u8> {
    let mut all = vec![0; count * HASH_BYTES];
    for (row, hash) in rows.iter().zip(hashes.chunks(HASH_BYTES)) {
        all[row.row * HASH_BYTES..][..HASH_BYTES].copy_from_slice(hash);
    }
    all
}

fn add(all: &mut handed::Rows, batch: RecordBatch, piece: &Piece) {
    let number = all.batches.len();
    for (copied, (place, row)) in piece.places.iter().zip(&piece.rows).enumerate() {
        let row = if piece.is_shared { row.row } else { copied };
        all.places[*place] = (number, row);
    }
    all.bytes += batch.get_array_memory_size();
    all.batches.push(batch);
}

#[cfg(test)]
mod tests;
