//! A pack as a Parquet file: a row for each receipt, in the order of steps.
//!
//! What a receipt's own file has is kept, and arranged anew: its rows are the row's list `chosen`,
//! with their columns as they were; the texts of its metadata are columns. So a receipt comes back
//! without loss, a thousand of them compress together, and any Parquet reader can ask all of a run
//! at once. `hash` is the BLAKE3 of the file that the receipt was. Nothing that this build does not
//! know is thrown away: columns are kept whatever they are, and a receipt with metadata of a newer
//! build is not packed.
use crate::{
    caught::caught,
    coordinator::receipts::parquet::{
        KEYS, SUMMARY_PROTOBUF, damaged, read_rows, summary_of, without_rows,
    },
};
use arrow::{
    array::{
        Array, ArrayRef, AsArray, FixedSizeBinaryArray, ListArray, RecordBatch, StringArray,
        StructArray, UInt32Array, UInt64Array,
    },
    buffer::OffsetBuffer,
    compute::concat_batches,
    datatypes::{DataType, Field, Fields, Schema, SchemaRef, UInt64Type},
};
use bytes::Bytes;
use parquet::{
    arrow::{
        ARROW_SCHEMA_META_KEY, ArrowWriter, ProjectionMask,
        arrow_reader::{ArrowReaderMetadata, ParquetRecordBatchReaderBuilder},
    },
    basic::{Compression, ZstdLevel},
    errors::ParquetError,
    file::{
        metadata::ParquetMetaData,
        properties::{EnabledStatistics, WriterProperties},
        reader::ChunkReader,
    },
    schema::types::ColumnPath,
};
use std::{ops::Range, sync::Arc};
use superbatch_proto::v1::{Receipt, ReceiptSummary};

type Result<T, E = ParquetError> = std::result::Result<T, E>;

const STEP: &str = "step";
const HASH: &str = "hash";
const CHOSEN: &str = "chosen";

/// Receipts that are read together, at most: whoever wants one reads its row group.
const GROUP_RECEIPTS: usize = 256;
/// Bytes of receipts' files after which a row group ends.
const GROUP_BYTES: usize = 4 << 20;
/// A pack is written once and read seldom, so it may cost more work than a receipt.
const LEVEL: i32 = 9;

/// Returns the column that holds the metadata `key`.
fn column_of(key: &str) -> String {
    key.trim_start_matches("superbatch.").replace('.', "_")
}

/// A receipt's own file, taken apart.
pub struct Parts {
    /// BLAKE3 of the file.
    pub hash: [u8; 32],
    pub bytes: usize,
    chosen: RecordBatch,
    /// The metadata, in the order of [`KEYS`].
    values: [Option<String>; KEYS.len()],
}

impl Parts {
    /// Takes the file of a receipt apart.
    ///
    /// # Errors
    /// If it is no receipt, or has metadata that this build does not know.
    pub fn of(file: Bytes) -> Result<Self> {
        caught(ParquetError::General, || Self::taken_apart(file))
    }

    fn taken_apart(file: Bytes) -> Result<Self> {
        let (hash, bytes) = (*blake3::hash(&file).as_bytes(), file.len());
        let builder = ParquetRecordBatchReaderBuilder::try_new(file)?;
        let metadata = builder.metadata().clone();
        let mut values: [Option<String>; KEYS.len()] = Default::default();
        let entries = metadata.file_metadata().key_value_metadata();
        for entry in entries.into_iter().flatten() {
            if entry.key == ARROW_SCHEMA_META_KEY {
                continue;
            }
            let known = KEYS.iter().position(|key| *key == entry.key);
            let known = known.ok_or_else(|| {
                let key = &entry.key;
                ParquetError::General(format!("its metadata '{key}' are of a newer build"))
            })?;
            values[known].clone_from(&entry.value);
        }
        // The reader's schema has the metadata too, which differ by receipt.
        let schema = Arc::new(Schema::new(builder.schema().fields().clone()));
        let batches = builder.build()?.collect::<Result<Vec<_>, _>>()?;
        Ok(Self {
            hash,
            bytes,
            chosen: concat_batches(&schema, &batches)?,
            values,
        })
    }

    fn columns(&self) -> &Fields {
        self.chosen.schema_ref().fields()
    }
}

/// Writes a pack.
pub struct Writer {
    generation: u32,
    first: u64,
    /// Bytes of all receipts' files.
    pub bytes: usize,
    pub count: u64,
    schema: SchemaRef,
    writer: ArrowWriter<Vec<u8>>,
    /// Receipts of the row group that is being gathered.
    group: Vec<Parts>,
    group_bytes: usize,
}

impl Writer {
    /// Begins a pack with the receipt of step `first`.
    pub fn begin(generation: u32, first: u64, parts: Parts) -> Result<Self> {
        let schema = Arc::new(schema(parts.columns()));
        let properties = WriterProperties::builder()
            .set_created_by(concat!("superbatch ", env!("CARGO_PKG_VERSION")).into())
            .set_compression(Compression::ZSTD(ZstdLevel::try_new(LEVEL)?))
            // Only steps are searched for. The others' would make the footer as large as a group.
            .set_statistics_enabled(EnabledStatistics::None)
            .set_column_statistics_enabled(ColumnPath::from(STEP), EnabledStatistics::Chunk)
            .set_offset_index_disabled(true)
            .build();
        let mut begun = Self {
            generation,
            first,
            bytes: 0,
            count: 0,
            writer: ArrowWriter::try_new(Vec::new(), schema.clone(), Some(properties))?,
            schema,
            group: Vec::new(),
            group_bytes: 0,
        };
        begun.push(parts)?;
        Ok(begun)
    }

    /// Returns whether a receipt has the columns of those before it, as it has unless an upgrade of
    /// the service lies between.
    pub fn takes(&self, parts: &Parts) -> bool {
        let before = self.schema.field_with_name(CHOSEN);
        before.is_ok_and(|before| *before == chosen_field(parts.columns()))
    }

    /// Adds the receipt of the next step.
    pub fn push(&mut self, parts: Parts) -> Result<()> {
        (self.bytes, self.count) = (self.bytes + parts.bytes, self.count + 1);
        self.group_bytes += parts.bytes;
        self.group.push(parts);
        if self.group.len() == GROUP_RECEIPTS || self.group_bytes >= GROUP_BYTES {
            self.end_group()?;
        }
        Ok(())
    }

    /// Returns the file.
    pub fn finish(mut self) -> Result<Bytes> {
        self.end_group()?;
        Ok(self.writer.into_inner()?.into())
    }

    fn end_group(&mut self) -> Result<()> {
        let group = std::mem::take(&mut self.group);
        self.group_bytes = 0;
        if group.is_empty() {
            return Ok(());
        }
        let first = self.first + self.count - group.len() as u64;
        let batch = rows(&self.schema, self.generation, first, &group)?;
        self.writer.write(&batch)?;
        self.writer.flush()
    }
}

/// Returns the columns of a pack whose receipts' rows have the columns `chosen`.
fn schema(chosen: &Fields) -> Schema {
    let mut fields = vec![
        Field::new(STEP, DataType::UInt64, false),
        Field::new("generation", DataType::UInt32, false),
        Field::new(HASH, DataType::FixedSizeBinary(32), false),
    ];
    fields.extend(KEYS.map(|key| Field::new(column_of(key), DataType::Utf8, true)));
    fields.push(chosen_field(chosen));
    Schema::new(fields)
}

fn chosen_field(columns: &Fields) -> Field {
    let row = Field::new("element", DataType::Struct(columns.clone()), false);
    Field::new(CHOSEN, DataType::List(Arc::new(row)), false)
}

/// Returns the receipts of the steps from `first` on as rows of a pack.
fn rows(schema: &SchemaRef, generation: u32, first: u64, group: &[Parts]) -> Result<RecordBatch> {
    let (count, steps) = (group.len(), first..first + group.len() as u64);
    let hashes = group.iter().map(|parts| parts.hash);
    let mut arrays: Vec<ArrayRef> = vec![
        Arc::new(UInt64Array::from_iter_values(steps)),
        Arc::new(UInt32Array::from_iter_values(std::iter::repeat_n(
            generation, count,
        ))),
        Arc::new(FixedSizeBinaryArray::try_from_iter(hashes)?),
    ];
    for key in 0..KEYS.len() {
        let texts = group.iter().map(|parts| parts.values[key].as_deref());
        arrays.push(Arc::new(StringArray::from_iter(texts)));
    }
    let DataType::List(row) = schema.field_with_name(CHOSEN)?.data_type() else {
        return Err(damaged(CHOSEN));
    };
    let of_group = group[0].chosen.schema();
    let chosen = concat_batches(&of_group, group.iter().map(|parts| &parts.chosen))?;
    let counts = group.iter().map(|parts| parts.chosen.num_rows());
    arrays.push(Arc::new(ListArray::try_new(
        row.clone(),
        OffsetBuffer::from_lengths(counts),
        Arc::new(StructArray::from(chosen)),
        None,
    )?));
    Ok(RecordBatch::try_new(schema.clone(), arrays)?)
}

/// Returns the row group that has the pack's row `row`, and the row's number in it.
pub fn place(metadata: &ParquetMetaData, row: u64) -> Option<(usize, usize)> {
    let mut left = usize::try_from(row).ok()?;
    for (number, group) in metadata.row_groups().iter().enumerate() {
        let rows = usize::try_from(group.num_rows()).ok()?;
        if left < rows {
            return Some((number, left));
        }
        left -= rows;
    }
    None
}

/// The columns of a pack that are read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Columns {
    All,
    /// What a summary needs.
    Summary,
}

impl Columns {
    /// Returns the bytes in which these columns of a row group lie.
    pub fn range(self, footer: &ArrowReaderMetadata, group: usize) -> Option<Range<u64>> {
        let mask = self.mask(footer);
        let chunks = footer.metadata().row_groups().get(group)?.columns().iter();
        let chunks = chunks
            .enumerate()
            .filter(|(leaf, _)| mask.leaf_included(*leaf));
        let ranges = chunks.map(|(_, chunk)| {
            let data = chunk.data_page_offset();
            let start = chunk.dictionary_page_offset().unwrap_or(data).min(data);
            let start = u64::try_from(start).ok()?;
            Some(start..start.checked_add(u64::try_from(chunk.compressed_size()).ok()?)?)
        });
        let ranges = ranges.collect::<Option<Vec<_>>>()?;
        let start = ranges.iter().map(|range| range.start).min()?;
        Some(start..ranges.iter().map(|range| range.end).max()?)
    }

    fn mask(self, footer: &ArrowReaderMetadata) -> ProjectionMask {
        let schema = footer.parquet_schema();
        let names = footer.schema().fields().iter().enumerate();
        match self {
            Self::All => ProjectionMask::all(),
            Self::Summary => {
                let needed = column_of(SUMMARY_PROTOBUF);
                let roots = names.filter(|(_, field)| *field.name() == needed);
                ProjectionMask::roots(schema, roots.map(|(root, _)| root))
            }
        }
    }
}

/// Returns the row groups' numbers of a pack.
pub fn groups(footer: &ArrowReaderMetadata) -> Range<usize> {
    0..footer.metadata().num_row_groups()
}

/// Reads rows of one row group: the one of number `only`, or all.
pub fn read(
    file: impl ChunkReader + 'static,
    footer: &ArrowReaderMetadata,
    group: usize,
    columns: Columns,
    only: Option<usize>,
) -> Result<RecordBatch> {
    let mask = columns.mask(footer);
    let builder = ParquetRecordBatchReaderBuilder::new_with_metadata(file, footer.clone())
        .with_row_groups(vec![group])
        .with_projection(mask);
    let builder = match only {
        Some(row) => builder.with_offset(row).with_limit(1),
        None => builder,
    };
    caught(ParquetError::General, || {
        let reader = builder.build()?;
        let schema = arrow::array::RecordBatchReader::schema(&reader);
        let batches = reader.collect::<Result<Vec<_>, _>>()?;
        Ok(concat_batches(&schema, &batches)?)
    })
}

/// Returns the receipt in a row, with its step.
pub fn receipt(rows: &RecordBatch, row: usize) -> Result<(u64, Receipt)> {
    let texts = KEYS.map(|key| text(rows, row, key));
    let value = |key: &str| {
        let at = KEYS.iter().position(|known| *known == key)?;
        texts[at]
    };
    let mut receipt = without_rows(value)?;
    let lists = rows.column_by_name(CHOSEN);
    let lists = lists.and_then(|lists| lists.as_list_opt::<i32>());
    let chosen = lists
        .filter(|lists| row < lists.len() && lists.is_valid(row))
        .map(|lists| lists.value(row));
    let chosen = chosen.as_ref().and_then(|chosen| chosen.as_struct_opt());
    let chosen = chosen.filter(|chosen| chosen.null_count() == 0);
    let chosen = chosen.ok_or_else(|| damaged(CHOSEN))?;
    read_rows(&RecordBatch::from(chosen), &mut receipt.chosen)?;
    Ok((step(rows, row)?, receipt))
}

/// Returns the summary in a row.
pub fn summary(rows: &RecordBatch, row: usize) -> Result<Option<ReceiptSummary>> {
    let summary = text(rows, row, SUMMARY_PROTOBUF);
    summary.map(summary_of).transpose()
}

/// Returns the hash of the file that the receipt in a row was.
pub fn hash(rows: &RecordBatch, row: usize) -> Result<[u8; 32]> {
    let hashes = rows.column_by_name(HASH);
    let hashes = hashes.and_then(|hashes| hashes.as_fixed_size_binary_opt());
    let hash = hashes.filter(|hashes| row < hashes.len());
    let hash = hash.and_then(|hashes| hashes.value(row).try_into().ok());
    hash.ok_or_else(|| damaged(HASH))
}

fn step(rows: &RecordBatch, row: usize) -> Result<u64> {
    let steps = rows.column_by_name(STEP);
    let steps = steps.and_then(|steps| steps.as_primitive_opt::<UInt64Type>());
    let steps = steps.filter(|steps| row < steps.len());
    steps
        .map(|steps| steps.value(row))
        .ok_or_else(|| damaged(STEP))
}

fn text<'a>(rows: &'a RecordBatch, row: usize, key: &str) -> Option<&'a str> {
    let texts = rows.column_by_name(&column_of(key))?;
    let texts = texts.as_string_opt::<i32>()?;
    (row < texts.len() && texts.is_valid(row)).then(|| texts.value(row))
}
