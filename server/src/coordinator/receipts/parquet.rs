//! A receipt as a Parquet file: the chosen rows are its rows in draw order, the rest is in the
//! file's metadata.
//!
//! Any Parquet reader can read the rows, and the summary and the bad rows as JSON. The metadata
//! also have the exact protobuf bytes in hex, from which [`decode`] restores the receipt without
//! loss: JSON has no NaN and would lose fields of a newer version.

use super::{
    json::{self, fidelity_name},
    masks, passed,
};
use crate::{
    caught::caught,
    error::{Error, Result},
    selection::is_scored,
};
use arrow::{
    array::{
        Array, ArrayRef, AsArray, BinaryArray, Float64Array, ListArray, RecordBatch, StringArray,
        UInt32Array, UInt64Array,
    },
    datatypes::{DataType, Field, Float64Type, Schema},
};
use bytes::Bytes;
use parquet::{
    arrow::{ArrowWriter, arrow_reader::ParquetRecordBatchReaderBuilder},
    basic::{Compression, ZstdLevel},
    errors::ParquetError,
    file::{
        metadata::{KeyValue, ParquetMetaData, ParquetMetaDataReader},
        properties::{EnabledStatistics, WriterProperties},
    },
    schema::types::ColumnPath,
};
use prost::Message;
use std::{collections::BTreeMap, sync::Arc};
use superbatch_proto::v1::{ChosenRow, Fidelity, Mode, Policy, Receipt, ReceiptSummary};

const COLUMN_VALUES: &str = "column_values";
const TOKEN_MASK: &str = "token_mask";
const SUMMARY: &str = "superbatch.summary";
pub(super) const SUMMARY_PROTOBUF: &str = "superbatch.summary.protobuf";
const PASSED_OVER: &str = "superbatch.passed_over";
const BAD_ROWS: &str = "superbatch.bad_rows";
const BAD_ROWS_PROTOBUF: &str = "superbatch.bad_rows.protobuf";

/// The keys of a receipt's metadata.
pub(super) const KEYS: [&str; 5] = [
    SUMMARY,
    SUMMARY_PROTOBUF,
    BAD_ROWS,
    BAD_ROWS_PROTOBUF,
    PASSED_OVER,
];

/// Returns the columns, in the order of the fields of `ChosenRow`.
fn schema() -> Schema {
    let column = |name: &str, data_type| Field::new(name, data_type, false);
    Schema::new(vec![
        column("id", DataType::Utf8),
        column("source", DataType::UInt32),
        column("shard", DataType::UInt32),
        column("row", DataType::UInt64),
        column("position", DataType::UInt64),
        column("chunk", DataType::UInt32),
        column("score", DataType::Float64),
        column("weight", DataType::Float64),
        column("fidelity", DataType::Utf8),
        column("content_hash", DataType::Binary),
        Field::new("own_score", DataType::Float64, true),
        Field::new("learner_loss", DataType::Float64, true),
        Field::new("reference_loss", DataType::Float64, true),
        Field::new(
            COLUMN_VALUES,
            DataType::new_list(DataType::Float64, true),
            true,
        ),
        Field::new(TOKEN_MASK, masks::data_type(), true),
    ])
}

/// Returns whether the step was drawn by scores; a uniform or k-center draw has none.
pub fn has_scores(summary: &ReceiptSummary) -> bool {
    draws_by_scores(summary.policy(), summary.mode())
}

/// As [`has_scores`], of a draw.
pub fn draws_by_scores(policy: Policy, mode: Mode) -> bool {
    mode != Mode::Uniform && is_scored(policy)
}

/// Writes a receipt as Parquet.
pub fn encode(receipt: &Receipt) -> Result<Bytes> {
    Gathered::of(receipt)?.encode()
}

/// A receipt whose rows are gathered as columns. They take a small part of the time of a copy of
/// the rows, which another thread would need in order to encode them.
pub struct Gathered {
    rows: RecordBatch,
    /// All of the receipt but its chosen rows.
    rest: Receipt,
}

impl Gathered {
    pub fn of(receipt: &Receipt) -> Result<Self> {
        let rows = RecordBatch::try_new(Arc::new(schema()), columns(&receipt.chosen));
        Ok(Self {
            rows: rows.map_err(|e| unencodable(e.into()))?,
            rest: Receipt {
                summary: receipt.summary.clone(),
                chosen: Vec::new(),
                bad_rows: receipt.bad_rows.clone(),
                passed_over: receipt.passed_over.clone(),
            },
        })
    }

    /// Writes it as Parquet, which takes milliseconds.
    pub fn encode(self) -> Result<Bytes> {
        let encoded = to_parquet(&self.rows, self.rest);
        encoded.map(Bytes::from).map_err(unencodable)
    }
}

fn unencodable(cause: ParquetError) -> Error {
    Error::internal("cannot encode a receipt").because(cause)
}

/// Reads a receipt that [`encode`] wrote.
///
/// # Errors
/// `Internal` if the bytes are no receipt.
pub fn decode(bytes: Bytes) -> Result<Receipt> {
    caught(ParquetError::General, || from_parquet(bytes)).map_err(unreadable)
}

pub(super) fn unreadable(cause: ParquetError) -> Error {
    Error::internal("a receipt is damaged or of another version of Superbatch").because(cause)
}

fn fidelity_of(name: &str) -> Option<i32> {
    let known = Fidelity::from_str_name(&format!("FIDELITY_{}", name.to_uppercase()));
    known.map(i32::from).or_else(|| name.parse().ok())
}

fn to_parquet(rows: &RecordBatch, rest: Receipt) -> Result<Vec<u8>, ParquetError> {
    let Receipt {
        summary,
        bad_rows,
        passed_over,
        ..
    } = rest;
    let mut metadata = vec![KeyValue::new(
        BAD_ROWS.into(),
        json::bad_rows(&bad_rows).to_string(),
    )];
    let bad_only = Receipt {
        bad_rows,
        ..Default::default()
    };
    metadata.push(KeyValue::new(
        BAD_ROWS_PROTOBUF.into(),
        hex::encode(bad_only.encode_to_vec()),
    ));
    if !passed_over.is_empty() {
        metadata.push(KeyValue::new(
            PASSED_OVER.into(),
            passed::encode(&passed_over),
        ));
    }
    if let Some(summary) = summary {
        metadata.push(KeyValue::new(
            SUMMARY.into(),
            json::summary(&summary).to_string(),
        ));
        metadata.push(KeyValue::new(
            SUMMARY_PROTOBUF.into(),
            hex::encode(summary.encode_to_vec()),
        ));
    }
    let mut writer = ArrowWriter::try_new(Vec::new(), rows.schema(), Some(properties(metadata)))?;
    writer.write(rows)?;
    writer.into_inner()
}

/// Returns how a receipt's file is written. A trainer waits for it, so it takes no work of which
/// readers have nothing.
fn properties(metadata: Vec<KeyValue>) -> WriterProperties {
    let alike = ["source", "shard", "chunk", "weight", "fidelity"];
    let begun = WriterProperties::builder()
        .set_created_by(concat!("superbatch ", env!("CARGO_PKG_VERSION")).into())
        .set_compression(Compression::ZSTD(ZstdLevel::default()))
        // Hashes are as good as random.
        .set_column_compression(ColumnPath::from("content_hash"), Compression::UNCOMPRESSED)
        // Readers take all rows, so there is nothing to search for.
        .set_statistics_enabled(EnabledStatistics::None)
        .set_offset_index_disabled(true)
        // In most columns no two rows are alike: a dictionary would hold all values once more, and
        // looking each of them up is most of the work.
        .set_dictionary_enabled(false)
        .set_key_value_metadata(Some(metadata));
    let all = alike.into_iter().fold(begun, |properties, column| {
        properties.set_column_dictionary_enabled(ColumnPath::from(column), true)
    });
    all.build()
}

fn columns(chosen: &[ChosenRow]) -> Vec<ArrayRef> {
    let u32s = |of: fn(&ChosenRow) -> u32| {
        Arc::new(UInt32Array::from_iter_values(chosen.iter().map(of))) as ArrayRef
    };
    let u64s = |of: fn(&ChosenRow) -> u64| {
        Arc::new(UInt64Array::from_iter_values(chosen.iter().map(of))) as ArrayRef
    };
    let f64s = |of: fn(&ChosenRow) -> f64| {
        Arc::new(Float64Array::from_iter_values(chosen.iter().map(of))) as ArrayRef
    };
    let maybe = |of: fn(&ChosenRow) -> Option<f64>| {
        Arc::new(Float64Array::from_iter(chosen.iter().map(of))) as ArrayRef
    };
    let mut fidelities = BTreeMap::new();
    for row in chosen {
        let name = || fidelity_name(row.fidelity);
        fidelities.entry(row.fidelity).or_insert_with(name);
    }
    vec![
        Arc::new(StringArray::from_iter_values(
            chosen.iter().map(|row| &row.id),
        )),
        u32s(|row| row.source),
        u32s(|row| row.shard),
        u64s(|row| row.row),
        u64s(|row| row.position),
        u32s(|row| row.chunk),
        f64s(|row| row.score),
        f64s(|row| row.weight),
        Arc::new(StringArray::from_iter_values(
            chosen.iter().map(|row| &fidelities[&row.fidelity]),
        )),
        Arc::new(BinaryArray::from_iter_values(
            chosen.iter().map(|row| &row.content_hash),
        )),
        maybe(|row| row.own_score),
        maybe(|row| row.learner_loss),
        maybe(|row| row.reference_loss),
        Arc::new(ListArray::from_iter_primitive::<Float64Type, _, _>(
            chosen.iter().map(|row| {
                let values = row.column_values.iter().copied().map(Some);
                (!row.column_values.is_empty()).then(|| values.collect::<Vec<_>>())
            }),
        )),
        masks::column(chosen.iter()),
    ]
}

fn from_parquet(bytes: Bytes) -> Result<Receipt, ParquetError> {
    let builder = ParquetRecordBatchReaderBuilder::try_new(bytes)?;
    let metadata = builder.metadata().clone();
    let mut receipt = without_rows(|key| value(&metadata, key))?;
    for batch in builder.build()? {
        read_rows(&batch?, &mut receipt.chosen)?;
    }
    Ok(receipt)
}

/// Returns the receipt whose metadata are `value`, without its chosen rows.
pub(super) fn without_rows<'a>(
    value: impl Fn(&str) -> Option<&'a str>,
) -> Result<Receipt, ParquetError> {
    let bad_rows = value(BAD_ROWS_PROTOBUF).ok_or_else(|| damaged(BAD_ROWS_PROTOBUF))?;
    let mut receipt: Receipt = message(bad_rows, BAD_ROWS_PROTOBUF)?;
    receipt.summary = value(SUMMARY_PROTOBUF).map(summary_of).transpose()?;
    if let Some(text) = value(PASSED_OVER) {
        receipt.passed_over = passed::decode(text).ok_or_else(|| damaged(PASSED_OVER))?;
    }
    Ok(receipt)
}

/// Returns the summary whose protobuf is `hex`.
pub(super) fn summary_of(hex: &str) -> Result<ReceiptSummary, ParquetError> {
    message(hex, SUMMARY_PROTOBUF)
}

/// Returns the summary of a receipt's file of `size` bytes, of which `end` is the end. `None` if
/// `end` does not hold all metadata.
pub fn decode_summary(end: &Bytes, size: u64) -> Option<ReceiptSummary> {
    let mut reader = ParquetMetaDataReader::new();
    reader.try_parse_sized(end, size).ok()?;
    let metadata = reader.finish().ok()?;
    summary_of(value(&metadata, SUMMARY_PROTOBUF)?).ok()
}

/// Returns the value of a key in the file's metadata.
fn value<'a>(metadata: &'a ParquetMetaData, key: &str) -> Option<&'a str> {
    let entries = metadata.file_metadata().key_value_metadata()?;
    entries
        .iter()
        .find(|entry| entry.key == key)?
        .value
        .as_deref()
}

fn message<M: Message + Default>(hex: &str, key: &str) -> Result<M, ParquetError> {
    let bytes = hex::decode(hex).ok().ok_or_else(|| damaged(key))?;
    M::decode(bytes.as_slice()).map_err(|e| ParquetError::External(Box::new(e)))
}

pub(super) fn read_rows(
    batch: &RecordBatch,
    into: &mut Vec<ChosenRow>,
) -> Result<(), ParquetError> {
    let (id, fidelity) = (
        column::<StringArray>(batch, "id")?,
        column::<StringArray>(batch, "fidelity")?,
    );
    let source = column::<UInt32Array>(batch, "source")?;
    let shard = column::<UInt32Array>(batch, "shard")?;
    let row = column::<UInt64Array>(batch, "row")?;
    let position = column::<UInt64Array>(batch, "position")?;
    let chunk = column::<UInt32Array>(batch, "chunk")?;
    let score = column::<Float64Array>(batch, "score")?;
    let weight = column::<Float64Array>(batch, "weight")?;
    let content_hash = column::<BinaryArray>(batch, "content_hash")?;
    // Receipts of earlier versions lack these columns.
    let [own_score, learner_loss, reference_loss] = ["own_score", "learner_loss", "reference_loss"]
        .map(|name| {
            let found = batch.column_by_name(name)?;
            found.as_any().downcast_ref::<Float64Array>()
        });
    let maybe = |column: Option<&Float64Array>, i: usize| {
        column
            .filter(|column| column.is_valid(i))
            .map(|column| column.value(i))
    };
    let column_values = batch.column_by_name(COLUMN_VALUES);
    let column_values = column_values.and_then(|found| found.as_list_opt::<i32>());
    let values_of = |i: usize| {
        let lists = column_values.filter(|lists| lists.is_valid(i))?;
        let values = lists.value(i);
        Some(values.as_primitive_opt::<Float64Type>()?.values().to_vec())
    };
    let token_mask = batch.column_by_name(TOKEN_MASK);
    for i in 0..batch.num_rows() {
        into.push(ChosenRow {
            id: id.value(i).to_owned(),
            source: source.value(i),
            shard: shard.value(i),
            row: row.value(i),
            position: position.value(i),
            chunk: chunk.value(i),
            score: score.value(i),
            weight: weight.value(i),
            fidelity: fidelity_of(fidelity.value(i)).ok_or_else(|| damaged("fidelity"))?,
            content_hash: Bytes::copy_from_slice(content_hash.value(i)),
            own_score: maybe(own_score, i),
            learner_loss: maybe(learner_loss, i),
            reference_loss: maybe(reference_loss, i),
            column_values: values_of(i).unwrap_or_default(),
            token_mask: masks::mask(token_mask, i),
        });
    }
    Ok(())
}

fn column<'a, A: Array + 'static>(
    batch: &'a RecordBatch,
    name: &str,
) -> Result<&'a A, ParquetError> {
    let found = batch
        .column_by_name(name)
        .and_then(|array| array.as_any().downcast_ref::<A>());
    found
        .filter(|array| array.null_count() == 0)
        .ok_or_else(|| damaged(name))
}

pub(super) fn damaged(what: &str) -> ParquetError {
    ParquetError::General(format!("'{what}' is missing or malformed"))
}

#[cfg(test)]
pub(crate) mod tests;
