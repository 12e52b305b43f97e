//! Cuts rows into record batches. Coordinator and worker share it, so that a stream's cuts depend
//! on the rows only.
use arrow::{
    array::{Array, ArrayRef, AsArray, RecordBatch, UInt32Array},
    compute::take,
    datatypes::DataType,
    error::ArrowError,
};
use std::ops::Range;

/// Bytes of rows in a record batch between a worker and the coordinator, unless a single row is
/// larger.
pub(crate) const SENT_BATCH_BYTES_MAX: usize = 4 << 20;
/// Bytes of rows in one record batch of a rank's stream. Most ranks' rows fit, so that the client
/// takes their memory as it came and has nothing to put together.
pub(crate) const RANK_BATCH_BYTES_MAX: usize = 64 << 20;

/// Returns the bytes of a row's values over all columns.
///
/// # Errors
/// Arrow's, for a nested column of which it cannot take a row.
pub(crate) fn row_bytes(batch: &RecordBatch, row: usize) -> Result<usize, ArrowError> {
    batch
        .columns()
        .iter()
        .map(|column| value_bytes(column, row))
        .sum()
}

fn value_bytes(column: &ArrayRef, row: usize) -> Result<usize, ArrowError> {
    match column.data_type() {
        DataType::Binary => Ok(column.as_binary::<i32>().value_length(row) as usize),
        DataType::Utf8 => Ok(column.as_string::<i32>().value_length(row) as usize),
        DataType::LargeBinary => Ok(column.as_binary::<i64>().value_length(row) as usize),
        DataType::LargeUtf8 => Ok(column.as_string::<i64>().value_length(row) as usize),
        DataType::BinaryView if column.is_null(row) => Ok(0),
        DataType::BinaryView => Ok(column.as_binary_view().value(row).len()),
        DataType::Boolean => Ok(1),
        DataType::FixedSizeBinary(size) if column.nulls().is_none() => Ok(*size as usize),
        other => match other.primitive_width() {
            Some(width) => Ok(width),
            // A nested value's size is measured on a copy of the row: its children are shared with
            // other rows.
            None => take(column, &UInt32Array::from(vec![row as u32]), None)?
                .to_data()
                .get_slice_memory_size(),
        },
    }
}

/// Cuts rows of these sizes into runs of at most `bytes_max`, or of one row.
pub(crate) fn row_ranges(sizes: &[usize], bytes_max: usize) -> Vec<Range<usize>> {
    let (mut cuts, mut start, mut bytes) = (Vec::new(), 0, 0_usize);
    for (row, size) in sizes.iter().enumerate() {
        if row > start && bytes.saturating_add(*size) > bytes_max {
            cuts.push(start..row);
            (start, bytes) = (row, 0);
        }
        bytes = bytes.saturating_add(*size);
    }
    if start < sizes.len() {
        cuts.push(start..sizes.len());
    }
    cuts
}

#[cfg(test)]
mod tests {
    use super::*;
    use arrow::array::{BinaryArray, FixedSizeBinaryArray, StringArray};
    use proptest::prelude::*;
    use std::sync::Arc;

    #[test]
    fn every_column_of_a_row_counts() {
        let columns: [(&str, ArrayRef); 3] = [
            (
                "image",
                Arc::new(BinaryArray::from_vec(vec![b"12345", b""])),
            ),
            (
                "caption",
                Arc::new(StringArray::from(vec![Some("abc"), None])),
            ),
            ("n", Arc::new(UInt32Array::from(vec![1, 2]))),
        ];
        let hashes = FixedSizeBinaryArray::try_from_iter([[7_u8; 16], [8; 16]].iter()).unwrap();
        let columns = columns
            .into_iter()
            .chain([("hash", Arc::new(hashes) as ArrayRef)]);
        let batch = RecordBatch::try_from_iter_with_nullable(
            columns.map(|(name, column)| (name, column, true)),
        )
        .unwrap();
        assert_eq!(
            [0, 1].map(|row| row_bytes(&batch, row).unwrap()),
            [5 + 3 + 4 + 16, 4 + 16]
        );
    }

    proptest! {
        #[test]
        fn cuts_cover_all_rows(sizes in prop::collection::vec(0_usize..6 << 20, 0..60)) {
            let cuts = row_ranges(&sizes, SENT_BATCH_BYTES_MAX);
            let mut next = 0;
            for range in cuts {
                prop_assert_eq!(range.start, next);
                next = range.end;
                let bytes: usize = sizes[range.clone()].iter().sum();
                prop_assert!(range.len() == 1 || bytes <= SENT_BATCH_BYTES_MAX);
            }
            prop_assert_eq!(next, sizes.len());
        }
    }
}
