//! Encodes chosen rows: an Arrow IPC stream of the data columns and each row's content hash.
use super::answers::Answers;
use crate::{
    batches::{row_bytes, row_ranges},
    dataset::content_hash,
    error::{Error, Result},
    ipc::Encoder,
    worker::inputs::{decode_pool::Pool, row::Row},
};
use arrow::{
    array::{ArrayRef, FixedSizeBinaryArray},
    compute::interleave_record_batch,
    datatypes::{DataType, Field, Schema, SchemaRef},
    record_batch::RecordBatch,
};
use bytes::Bytes;
use std::sync::Arc;

/// The column that holds BLAKE3 of image and caption, first 16 bytes.
pub const CONTENT_HASH_COLUMN: &str = "_superbatch_content_hash";

/// Encodes rows as an Arrow IPC stream.
pub struct RowWriter {
    encoder: Encoder,
    schema: SchemaRef,
}

impl RowWriter {
    pub fn new(data_schema: &SchemaRef) -> Result<Self> {
        let hash = Field::new(CONTENT_HASH_COLUMN, DataType::FixedSizeBinary(16), false);
        let fields = data_schema.fields().iter().cloned().chain([Arc::new(hash)]);
        let schema = Arc::new(Schema::new(fields.collect::<Vec<_>>()));
        let encoder = Encoder::new(&schema).map_err(encoding)?;
        Ok(Self { encoder, schema })
    }

    /// Appends rows as one record batch. All of them must have image and caption.
    pub fn push(&mut self, rows: &[Row]) -> Result<Vec<Bytes>> {
        let hashes = rows.iter().map(|row| {
            row.image()
                .zip(row.caption())
                .map(|(image, text)| content_hash(image, text))
        });
        let hashes: Option<Vec<[u8; 16]>> = hashes.collect();
        let hashes = hashes
            .ok_or_else(|| Error::internal("a row without image or caption was to be sent"))?;
        let hashes = FixedSizeBinaryArray::try_from_iter(hashes.into_iter()).map_err(encoding)?;
        let mut columns = gather(rows)?.columns().to_vec();
        columns.push(Arc::new(hashes) as ArrayRef);
        let batch = RecordBatch::try_new(self.schema.clone(), columns).map_err(encoding)?;
        self.encoder.encode(&batch).map_err(encoding)
    }

    /// Returns the end of the stream.
    pub fn finish(self) -> Result<Vec<Bytes>> {
        self.encoder.finish().map_err(encoding)
    }
}

/// Encodes rows on the pool and sends the bytes, each part wrapped by `wrap`.
pub async fn send_rows<T>(
    mut writer: RowWriter,
    rows: &[Row],
    pool: &Pool,
    answers: &Answers<T>,
    wrap: fn(Bytes) -> T,
) -> Result<RowWriter> {
    let sizes = rows
        .iter()
        .map(|row| row_bytes(&row.batch, row.row))
        .collect::<Result<Vec<_>, _>>()
        .map_err(encoding)?;
    for range in row_ranges(&sizes) {
        let batch = rows[range].to_vec();
        // Encoding copies and hashes megabytes of images. On an async thread it would delay every
        // other call of the worker.
        let (back, parts) = pool
            .run(move |_| writer.push(&batch).map(|parts| (writer, parts)))
            .await??;
        writer = back;
        for part in parts {
            answers.send(wrap(part)).await?;
        }
    }
    Ok(writer)
}

/// Joins rows of several batches to one batch, in order. Copies them, unless they follow each other
/// in one batch.
fn gather(rows: &[Row]) -> Result<RecordBatch> {
    if let Some(first) = rows.first().filter(|first| follow_each_other(first, rows)) {
        return Ok(first.batch.slice(first.row, rows.len()));
    }
    let mut batches: Vec<&RecordBatch> = Vec::new();
    let mut places = Vec::with_capacity(rows.len());
    for row in rows {
        // Searched from the end, since neighbouring rows mostly come from the same batch. There are
        // few batches, so a map would cost more.
        let found = batches
            .iter()
            .rposition(|batch| std::ptr::eq(*batch, &*row.batch));
        let batch = found.unwrap_or_else(|| {
            batches.push(&row.batch);
            batches.len() - 1
        });
        places.push((batch, row.row));
    }
    interleave_record_batch(&batches, &places).map_err(encoding)
}

fn follow_each_other(first: &Row, rows: &[Row]) -> bool {
    rows.iter()
        .zip(first.row..)
        .all(|(row, number)| Arc::ptr_eq(&row.batch, &first.batch) && row.row == number)
}

fn encoding(cause: arrow::error::ArrowError) -> Error {
    Error::internal("cannot encode chosen rows as Arrow IPC").because(cause)
}
