//! Encodes the Arrow IPC stream of a rank's rows.
use crate::coordinator::score::table::Table;
use crate::{
    batches::row_ranges,
    coordinator::receipts::json::fidelity_name,
    error::{Error, Result},
    ipc::Encoder,
};
use arrow::{
    array::{ArrayRef, Float64Array, RecordBatch, StringArray, UInt64Array},
    datatypes::{Schema, SchemaRef},
    error::ArrowError,
};
use bytes::Bytes;
use std::sync::Arc;
use superbatch_proto::v1::{ChosenRow, Receipt};

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
    let count = receipt.chosen.len();
    if rows.rows() != count || indices.iter().any(|index| *index >= count) {
        let message = format!(
            "the receipt names {count} rows, {} are in hand; cannot serve the step",
            rows.rows()
        );
        return Err(Error::internal(message));
    }
    let sizes = indices
        .iter()
        .map(|index| rows.row_bytes(*index))
        .collect::<Result<Vec<_>>>()?;
    let cuts = row_ranges(&sizes);
    let batches = cuts
        .into_iter()
        .map(|range| batch(schema, rows, receipt, &indices[range]));
    write(schema, batches)
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

/// One record batch of the output schema.
fn batch(
    schema: &SchemaRef,
    rows: &Table,
    receipt: &Receipt,
    indices: &[usize],
) -> Result<RecordBatch> {
    let column = |name: &str| {
        own_column(name, receipt, indices).map_or_else(|| rows.column(name, indices), Ok)
    };
    let columns = schema
        .fields()
        .iter()
        .map(|field| column(field.name()))
        .collect::<Result<Vec<_>>>()?;
    RecordBatch::try_new(schema.clone(), columns).map_err(cannot)
}

/// Returns a column that the receipt fills.
fn own_column(name: &str, receipt: &Receipt, indices: &[usize]) -> Option<ArrayRef> {
    let rows = || indices.iter().map(|index| &receipt.chosen[*index]);
    let floats =
        |of: fn(&ChosenRow) -> f64| Arc::new(Float64Array::from_iter_values(rows().map(of)));
    Some(match name {
        "_superbatch_id" => Arc::new(StringArray::from_iter_values(rows().map(|row| &row.id))),
        "_superbatch_position" => Arc::new(UInt64Array::from_iter_values(
            rows().map(|row| row.position),
        )),
        "_superbatch_score" => floats(|row| row.score),
        "_superbatch_weight" => floats(|row| row.weight),
        "_superbatch_fidelity" => Arc::new(StringArray::from_iter_values(
            rows().map(|row| fidelity_name(row.fidelity)),
        )),
        _ => return None,
    })
}

#[cfg(test)]
mod tests;
