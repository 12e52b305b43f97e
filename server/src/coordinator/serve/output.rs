//! Encodes the Arrow IPC stream of a rank's rows.
use super::located;
use crate::coordinator::score::table::Table;
use crate::{
    batches::{RANK_BATCH_BYTES_MAX, row_ranges},
    coordinator::{
        receipts::{json::fidelity_name, masks},
        spec::has_masks,
    },
    dataset::Manifest,
    error::{Error, Result},
    ipc::Encoder,
};
use arrow::{
    array::{ArrayRef, Float64Array, RecordBatch, StringArray, UInt64Array},
    datatypes::{Field, FieldRef, Schema, SchemaRef},
    error::ArrowError,
};
use bytes::Bytes;
use std::{ops::Range, sync::Arc};
use superbatch_proto::{
    columns as own,
    v1::{ChosenRow, Delivery, Receipt, RunSpec},
};

/// Bytes of a row's values in the own columns and the content hash, beside its id.
const OWN_BYTES: usize = 64;

/// Returns the schema as the bytes of an empty stream.
pub fn schema_bytes(schema: &Schema) -> Result<Bytes> {
    write(schema, []).map(|parts| parts.concat().into())
}

/// Returns the stream of the rows at `indices` of the draw order, in the order of `indices`, in
/// parts.
///
/// `rows` are all chosen rows in draw order, with at least the data columns of `schema`; the
/// `_superbatch_*` columns are filled from the receipt. The bytes depend on the contents only, and
/// not on how `rows` was assembled. So a client may resume a stream that another coordinator began.
///
/// # Errors
/// `Internal` if rows, receipt and schema do not fit each other.
pub fn rank_stream(
    schema: &SchemaRef,
    rows: &Table,
    receipt: &Receipt,
    indices: &[usize],
) -> Result<Vec<Bytes>> {
    let chosen = chosen_in_hand(rows, receipt, indices)?;
    let sizes = row_sizes(rows, &chosen, indices)?;
    stream(schema, &sizes, |name, range| {
        let own = own_column(name, &chosen[range.clone()]);
        own.map_or_else(|| rows.column(name, &indices[range]), Ok)
    })
}

/// As [`rank_stream`], of a run whose trainer reads its rows itself: `rows` have the data columns
/// without the images, and the columns of [`located`] are made of receipt and manifest.
///
/// # Errors
/// As [`rank_stream`].
pub fn located_stream(
    schema: &SchemaRef,
    (rows, manifest): (&Table, &Manifest),
    receipt: &Receipt,
    indices: &[usize],
) -> Result<Vec<Bytes>> {
    let chosen = chosen_in_hand(rows, receipt, indices)?;
    let sizes = row_sizes(rows, &chosen, indices)?;
    stream(schema, &sizes, |name, range| {
        let chosen = &chosen[range.clone()];
        if let Some(column) = own_column(name, chosen) {
            return Ok(column);
        }
        let located = located::column(name, manifest, chosen)?;
        located.map_or_else(|| rows.column(name, &indices[range]), Ok)
    })
}

/// Returns what the service adds to the rows that a rank fetches from workers: the own columns of
/// `schema`, and each row's content hash.
///
/// # Errors
/// As [`rank_stream`].
pub fn own_stream(schema: &SchemaRef, receipt: &Receipt, indices: &[usize]) -> Result<Vec<Bytes>> {
    let chosen = chosen(receipt, indices)?;
    let own = schema.fields().iter();
    let own = own.filter(|field| own_column(field.name(), &[]).is_some());
    let fields = own.cloned().chain([Arc::new(located::hash_field())]);
    let schema = Arc::new(Schema::new(fields.collect::<Vec<_>>()));
    let size = |row: &&ChosenRow| row.id.len() + OWN_BYTES + mask_bytes(row);
    let sizes: Vec<usize> = chosen.iter().map(size).collect();
    stream(&schema, &sizes, |name, range| {
        let rows = &chosen[range];
        match own_column(name, rows) {
            Some(column) => Ok(column),
            None => located::hash_column(rows.iter().copied()),
        }
    })
}

/// Returns the receipt's rows at `indices`.
///
/// # Errors
/// `Internal` if it has fewer.
fn chosen<'a>(receipt: &'a Receipt, indices: &[usize]) -> Result<Vec<&'a ChosenRow>> {
    let row = |index: &usize| {
        receipt.chosen.get(*index).ok_or_else(|| {
            let count = receipt.chosen.len();
            let message = format!("the receipt names {count} rows, and none of number {index}");
            Error::internal(message)
        })
    };
    indices.iter().map(row).collect()
}

/// As [`chosen`], of a receipt whose rows are in hand.
///
/// # Errors
/// As [`chosen`], and if others than its rows are in hand.
fn chosen_in_hand<'a>(
    rows: &Table,
    receipt: &'a Receipt,
    indices: &[usize],
) -> Result<Vec<&'a ChosenRow>> {
    let count = receipt.chosen.len();
    if rows.rows() != count {
        let message = format!(
            "the receipt names {count} rows, {} are in hand; cannot serve the step",
            rows.rows()
        );
        return Err(Error::internal(message));
    }
    chosen(receipt, indices)
}

fn row_sizes(rows: &Table, chosen: &[&ChosenRow], indices: &[usize]) -> Result<Vec<usize>> {
    let size = |(index, row): (&usize, &&ChosenRow)| -> Result<usize> {
        Ok(rows.row_bytes(*index)? + mask_bytes(row))
    };
    indices.iter().zip(chosen).map(size).collect()
}

fn mask_bytes(row: &ChosenRow) -> usize {
    row.token_mask.len().div_ceil(8)
}

/// Encodes rows of these sizes in record batches of at most [`RANK_BATCH_BYTES_MAX`]. `column`
/// makes a column of the rows of one batch.
fn stream(
    schema: &SchemaRef,
    sizes: &[usize],
    column: impl Fn(&str, Range<usize>) -> Result<ArrayRef>,
) -> Result<Vec<Bytes>> {
    let cuts = row_ranges(sizes, RANK_BATCH_BYTES_MAX).into_iter();
    let batches = cuts.map(|range| batch(schema, |name| column(name, range.clone())));
    write(schema, batches)
}

/// Returns the schema of a run's batches.
///
/// # Errors
/// Those of [`Manifest::data_schema`].
pub fn schema(manifest: &Manifest, spec: &RunSpec) -> Result<SchemaRef> {
    let schema = manifest.output_schema(&spec.columns)?;
    let mut fields: Vec<FieldRef> = schema.fields().iter().cloned().collect();
    if spec.delivery() == Delivery::Locators {
        // The image is the first column. Workers say where it lies.
        fields.remove(0);
        let places = manifest.image_place_fields().into_iter();
        fields.extend(places.chain(located::fields()).map(Arc::new));
    }
    if has_masks(&spec.phases) {
        let masks = Field::new(own::TOKEN_MASK, masks::data_type(), true);
        fields.push(Arc::new(masks));
    }
    Ok(Arc::new(Schema::new(fields)))
}

fn cannot(cause: ArrowError) -> Error {
    Error::internal("cannot encode a batch").because(cause)
}

/// Encodes batches one by one. A batch is made only after the one before it is encoded, so that the
/// gathered copies of two batches are never in memory together.
fn write(
    schema: &Schema,
    batches: impl IntoIterator<Item = Result<RecordBatch>>,
) -> Result<Vec<Bytes>> {
    let mut encoder = Encoder::new(schema).map_err(cannot)?;
    let mut parts = Vec::new();
    for batch in batches {
        parts.extend(encoder.encode(&batch?).map_err(cannot)?);
    }
    parts.extend(encoder.finish().map_err(cannot)?);
    Ok(parts)
}

/// Returns one record batch of the output schema.
fn batch(schema: &SchemaRef, column: impl Fn(&str) -> Result<ArrayRef>) -> Result<RecordBatch> {
    let columns = schema
        .fields()
        .iter()
        .map(|field| column(field.name()))
        .collect::<Result<Vec<_>>>()?;
    RecordBatch::try_new(schema.clone(), columns).map_err(cannot)
}

/// Returns a column that the receipt fills.
fn own_column(name: &str, rows: &[&ChosenRow]) -> Option<ArrayRef> {
    let each = || rows.iter().copied();
    let floats =
        |of: fn(&ChosenRow) -> f64| Arc::new(Float64Array::from_iter_values(each().map(of)));
    Some(match name {
        own::ID => Arc::new(StringArray::from_iter_values(each().map(|row| &row.id))),
        own::POSITION => Arc::new(UInt64Array::from_iter_values(
            each().map(|row| row.position),
        )),
        own::SCORE => floats(|row| row.score),
        own::WEIGHT => floats(|row| row.weight),
        own::TOKEN_MASK => masks::column(each()),
        own::FIDELITY => Arc::new(StringArray::from_iter_values(
            each().map(|row| fidelity_name(row.fidelity)),
        )),
        _ => return None,
    })
}

#[cfg(test)]
mod tests;
