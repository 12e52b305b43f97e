//! Encodes chosen rows: an Arrow IPC stream of the data columns and each row's content hash.
use super::answers::Answers;
use crate::{
    batches::{SENT_BATCH_BYTES_MAX, row_bytes, row_ranges},
    buffers::Buffers,
    dataset::content_hash,
    error::{Error, Result},
    ipc::Encoder,
    worker::{
        inputs::{decode_pool::DecodePool, images, row::Row},
        kept::read::ImagePlace,
    },
};
use arrow::{
    array::{Array, ArrayRef, AsArray, FixedSizeBinaryArray, StringArray, UInt64Array},
    compute::{interleave, interleave_record_batch},
    datatypes::{DataType, Field, Schema, SchemaRef},
    error::ArrowError,
    record_batch::RecordBatch,
};
use bytes::Bytes;
use std::{
    collections::{HashMap, hash_map::Entry},
    ops::Range,
    sync::Arc,
};
use superbatch_proto::columns::{CONTENT_HASH, IMAGE_OFFSET, IMAGE_URI};

const HASH_BYTES: usize = 16;

/// What is sent of each row.
pub(crate) enum Form {
    /// The data columns and the content hash.
    Whole,
    /// As `Whole`, but instead of the image where it lies, of each row in order, in the columns of
    /// [`Manifest::image_place_fields`]. In a Parquet file a reader finds it by its row number.
    ///
    /// [`Manifest::image_place_fields`]: crate::dataset::Manifest::image_place_fields
    Located(Vec<ImagePlace>, Vec<Field>),
    /// The row as it is: its content hash is its last column.
    Hashed,
}

/// Encodes rows as an Arrow IPC stream.
pub(crate) struct RowWriter {
    encoder: Encoder,
    schema: SchemaRef,
    form: Form,
    written: usize,
}

impl RowWriter {
    pub(crate) fn new(data_schema: &SchemaRef, form: Form) -> Result<Self> {
        let schema = match &form {
            Form::Whole | Form::Hashed => hashed_schema(data_schema),
            Form::Located(_, fields) => located_schema(data_schema, fields),
        };
        let encoder = Encoder::new(&schema).map_err(encoding)?;
        Ok(Self {
            encoder,
            schema,
            form,
            written: 0,
        })
    }

    /// Appends rows as one record batch. All of them must have image and caption.
    pub(crate) fn push(&mut self, rows: &[Row]) -> Result<Vec<Bytes>> {
        let gathered = match &self.form {
            Form::Hashed | Form::Whole => gather(rows)?,
            Form::Located(..) => gather(&without_images(rows)?)?,
        };
        let mut columns = gathered.columns().to_vec();
        match &self.form {
            Form::Hashed => {}
            Form::Whole => columns.push(hashes(rows)?),
            Form::Located(places, fields) => {
                let places = places.get(self.written..self.written + rows.len());
                let places = places.ok_or_else(|| Error::internal("rows without a place"))?;
                columns.extend(
                    fields
                        .iter()
                        .map(|field| image_places(field.name(), places)),
                );
                columns.push(hashes(rows)?);
            }
        }
        self.written += rows.len();
        let batch = RecordBatch::try_new(self.schema.clone(), columns).map_err(encoding)?;
        self.encoder.encode(&batch).map_err(encoding)
    }

    /// Returns the end of the stream.
    pub(crate) fn finish(self) -> Result<Vec<Bytes>> {
        self.encoder.finish().map_err(encoding)
    }
}

pub(crate) fn hashed_schema(data: &SchemaRef) -> SchemaRef {
    let hash = Field::new(CONTENT_HASH, DataType::FixedSizeBinary(16), false);
    let fields = data.fields().iter().cloned().chain([Arc::new(hash)]);
    Arc::new(Schema::new(fields.collect::<Vec<_>>()))
}

fn located_schema(data: &SchemaRef, places: &[Field]) -> SchemaRef {
    let hash = Field::new(CONTENT_HASH, DataType::FixedSizeBinary(16), false);
    // The image is the first of the data columns.
    let fields = data.fields().iter().skip(1).cloned();
    let fields = fields.chain(places.iter().cloned().map(Arc::new));
    let fields = fields.chain([Arc::new(hash)]);
    Arc::new(Schema::new(fields.collect::<Vec<_>>()))
}

fn image_places(name: &str, places: &[ImagePlace]) -> ArrayRef {
    let number = |of: fn(&Range<u64>) -> u64| {
        let values = places.iter().map(|place| place.bytes.as_ref().map(of));
        Arc::new(values.collect::<UInt64Array>()) as ArrayRef
    };
    match name {
        IMAGE_URI => {
            let uris = places.iter().map(|place| place.uri.as_deref());
            Arc::new(uris.collect::<StringArray>())
        }
        IMAGE_OFFSET => number(|bytes| bytes.start),
        _ => number(|bytes| bytes.end - bytes.start),
    }
}

/// Returns the content hashes of rows.
fn hashes(rows: &[Row]) -> Result<ArrayRef> {
    let hashes = rows.iter().map(|row| {
        row.image()
            .zip(row.caption())
            .map(|(image, text)| content_hash(image, text))
    });
    let hashes: Option<Vec<[u8; 16]>> = hashes.collect();
    let hashes =
        hashes.ok_or_else(|| Error::internal("a row without image or caption was to be sent"))?;
    let hashes = FixedSizeBinaryArray::try_from_iter(hashes.into_iter()).map_err(encoding)?;
    Ok(Arc::new(hashes))
}

/// Returns the content hashes of rows, 16 bytes each.
pub(crate) fn content_hashes(rows: &[Row]) -> Result<Vec<u8>> {
    let hashes = hashes(rows)?;
    Ok(hashes.as_fixed_size_binary().value_data().to_vec())
}

/// Returns about how many bytes rows will take when they are copied.
pub(crate) fn compact_bytes(rows: &[Row]) -> Result<usize> {
    Ok(sizes(rows)?.iter().sum::<usize>() + rows.len() * HASH_BYTES)
}

/// Rows that share memory with nothing else, with their content hashes as last column.
pub(crate) struct Compact {
    pub rows: Vec<Row>,
    /// 16 bytes a row.
    pub hashes: Vec<u8>,
    pub bytes: usize,
}

/// Copies rows out of their blocks, so that these do not stay in memory.
pub(crate) async fn compact(rows: Vec<Row>, pool: &DecodePool) -> Result<Compact> {
    pool.run(move || {
        let mut all = Compact {
            rows: Vec::with_capacity(rows.len()),
            hashes: Vec::new(),
            bytes: 0,
        };
        for range in row_ranges(&sizes(&rows)?, SENT_BATCH_BYTES_MAX) {
            let rows = &rows[range];
            let copied = copy(rows, &Buffers::new(0))?;
            let mut columns = copied.columns().to_vec();
            let hashes = hashes(rows)?;
            let values = hashes.as_fixed_size_binary();
            (0..rows.len()).for_each(|row| all.hashes.extend_from_slice(values.value(row)));
            columns.push(hashes);
            let batch = RecordBatch::try_new(hashed_schema(&copied.schema()), columns);
            let batch = Arc::new(batch.map_err(encoding)?);
            all.bytes += batch.get_array_memory_size();
            let row = |row| Row {
                batch: batch.clone(),
                row,
            };
            all.rows.extend((0..rows.len()).map(row));
        }
        Ok(all)
    })
    .await?
}

pub(crate) fn sizes(rows: &[Row]) -> Result<Vec<usize>> {
    let sizes = rows.iter().map(|row| row_bytes(&row.batch, row.row));
    sizes.collect::<Result<_, _>>().map_err(encoding)
}

/// Encodes rows on the decode pool and sends the bytes, each part wrapped by `wrap`. Parts for
/// which that returns nothing are not sent.
pub(crate) async fn send_rows<T>(
    mut writer: RowWriter,
    rows: &[Row],
    pool: &DecodePool,
    answers: &Answers<T>,
    mut wrap: impl FnMut(Bytes) -> Option<T>,
) -> Result<RowWriter> {
    for range in row_ranges(&sizes(rows)?, SENT_BATCH_BYTES_MAX) {
        let batch = rows[range].to_vec();
        // Encoding copies and hashes megabytes of images. On an async thread it would delay every
        // other call of the worker.
        let (back, parts) = pool
            .run(move || writer.push(&batch).map(|parts| (writer, parts)))
            .await??;
        writer = back;
        for part in parts {
            if let Some(message) = wrap(part) {
                answers.send(message).await?;
            }
        }
    }
    Ok(writer)
}

/// Joins rows of several batches to one batch, in order. Copies them, unless they follow each other
/// in one batch.
fn gather(rows: &[Row]) -> Result<RecordBatch> {
    if let Some(first) = rows.first().filter(|first| follow_each_other(first, rows)) {
        let slice = first.batch.slice(first.row, rows.len());
        return images::without_views(&slice).map_err(encoding);
    }
    copy(rows, &Buffers::new(0))
}

/// Returns rows without their images, which are the first column. Nothing is copied.
fn without_images(rows: &[Row]) -> Result<Vec<Row>> {
    let mut projected: HashMap<*const RecordBatch, Arc<RecordBatch>> = HashMap::new();
    let mut without = Vec::with_capacity(rows.len());
    for Row { batch, row } in rows {
        let batch = match projected.entry(Arc::as_ptr(batch)) {
            Entry::Occupied(known) => known.get().clone(),
            Entry::Vacant(new) => {
                let others: Vec<usize> = (1..batch.num_columns()).collect();
                let others = batch.project(&others).map_err(encoding)?;
                new.insert(Arc::new(others)).clone()
            }
        };
        without.push(Row { batch, row: *row });
    }
    Ok(without)
}

/// Copies rows into one record batch, their images into a buffer that may be used again.
pub(crate) fn copy(rows: &[Row], buffers: &Buffers) -> Result<RecordBatch> {
    let mut numbers = HashMap::new();
    let mut batches: Vec<&RecordBatch> = Vec::new();
    let mut places = Vec::with_capacity(rows.len());
    for row in rows {
        let number = *numbers.entry(Arc::as_ptr(&row.batch)).or_insert_with(|| {
            batches.push(&row.batch);
            batches.len() - 1
        });
        places.push((number, row.row));
    }
    if !batches.iter().all(|batch| images::are_bytes(batch)) {
        return interleave_record_batch(&batches, &places).map_err(encoding);
    }
    interleaved(rows, &batches, &places, buffers).map_err(encoding)
}

/// Copies rows of batches whose images are views, or arrays of bytes.
fn interleaved(
    rows: &[Row],
    batches: &[&RecordBatch],
    places: &[(usize, usize)],
    buffers: &Buffers,
) -> Result<RecordBatch, ArrowError> {
    let schema = images::typed(batches[0].schema_ref(), DataType::Binary);
    let mut columns = vec![images::gathered(rows.iter().map(Row::image), buffers)?];
    for number in 1..schema.fields().len() {
        let parts = batches.iter().map(|batch| batch.column(number).as_ref());
        columns.push(interleave(&parts.collect::<Vec<&dyn Array>>(), places)?);
    }
    RecordBatch::try_new(schema, columns)
}

fn follow_each_other(first: &Row, rows: &[Row]) -> bool {
    rows.iter()
        .zip(first.row..)
        .all(|(row, number)| Arc::ptr_eq(&row.batch, &first.batch) && row.row == number)
}

pub(crate) fn encoding(cause: arrow::error::ArrowError) -> Error {
    Error::internal("cannot encode chosen rows as Arrow IPC").because(cause)
}

#[cfg(test)]
mod tests {
    use super::*;
    use arrow::{array::BinaryArray, datatypes::UInt64Type};
    use superbatch_proto::arrow_stream;

    #[test]
    fn rows_with_places_take_no_image_along() {
        let batch = |rows: Range<usize>| {
            let images = rows.clone().map(|row| vec![row as u8; 4_000]);
            let images: ArrayRef = Arc::new(BinaryArray::from_iter_values(images));
            let captions = rows.map(|row| format!("caption {row}"));
            let captions: ArrayRef = Arc::new(StringArray::from_iter_values(captions));
            let columns = [("image", images, true), ("caption", captions, true)];
            Arc::new(RecordBatch::try_from_iter_with_nullable(columns).unwrap())
        };
        let batches = [batch(0..4), batch(4..8)];
        let row = |n: usize| Row {
            batch: batches[n / 4].clone(),
            row: n % 4,
        };
        let rows = [6, 1, 4, 3].map(row);
        let others = without_images(&rows).unwrap();
        assert!(others.iter().all(|row| row.batch.num_columns() == 1));
        assert!(Arc::ptr_eq(&others[0].batch, &others[2].batch));
        let place = |n: u64| ImagePlace {
            bytes: Some(n..n + 10),
            uri: None,
        };
        let fields = vec![Field::new(IMAGE_OFFSET, DataType::UInt64, true)];
        let form = Form::Located([60, 10, 40, 30].map(place).to_vec(), fields);
        let mut writer = RowWriter::new(&batches[0].schema(), form).unwrap();
        let mut parts = writer.push(&rows).unwrap();
        parts.extend(writer.finish().unwrap());
        let (_, found) = arrow_stream::read(parts).unwrap();
        let captions = found[0]["caption"].as_string::<i32>().iter().flatten();
        assert!(captions.eq(["caption 6", "caption 1", "caption 4", "caption 3"]));
        let offsets = found[0][IMAGE_OFFSET].as_primitive::<UInt64Type>();
        assert_eq!(offsets.values().to_vec(), [60, 10, 40, 30]);
        let hashes = found[0][CONTENT_HASH].as_fixed_size_binary();
        assert_eq!(hashes.value(0), content_hash(&[6; 4_000], "caption 6"));
    }
}
