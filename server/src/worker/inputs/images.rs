//! Columns of images: the first of a batch. In a block as it was read they may be views of the
//! file's bytes, which are copied into one array when rows leave the block; and a null may tell why
//! it is one, which rows that are copied lose.
use crate::buffers::Buffers;
use arrow::{
    array::{Array, ArrayRef, AsArray, BinaryArray, RecordBatch},
    buffer::{Buffer, NullBuffer, OffsetBuffer},
    datatypes::{DataType, Field, Fields, Schema, SchemaRef},
    error::ArrowError,
};
use std::sync::Arc;
use superbatch_proto::v1::BadRowReason;

/// What the bytes behind such a null begin with. Nulls of a file may have any bytes behind them.
const MARK: &[u8] = b"\0superbatch fault\0";

/// One image, or why there is none.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Image<'a> {
    Bytes(&'a [u8]),
    Null,
    Fault(BadRowReason, &'a str),
}

/// Returns a column of images. Faults are nulls, with the fault behind them.
///
/// # Errors
/// If one array cannot hold them.
pub(crate) fn column<'a>(
    images: impl Iterator<Item = Image<'a>>,
) -> Result<Arc<BinaryArray>, ArrowError> {
    let (mut bytes, mut lengths, mut valid) = (Vec::new(), Vec::new(), Vec::new());
    for image in images {
        let start = bytes.len();
        match image {
            Image::Bytes(image) => bytes.extend_from_slice(image),
            Image::Null => {}
            Image::Fault(reason, detail) => {
                bytes.extend_from_slice(MARK);
                bytes.push(u8::try_from(i32::from(reason)).unwrap_or_default());
                bytes.extend_from_slice(detail.as_bytes());
            }
        }
        lengths.push(bytes.len() - start);
        valid.push(matches!(image, Image::Bytes(_)));
    }
    check_bytes(bytes.len() as u64)?;
    let offsets = OffsetBuffer::from_lengths(lengths);
    let nulls = Some(NullBuffer::from(valid));
    BinaryArray::try_new(offsets, Buffer::from_vec(bytes), nulls).map(Arc::new)
}

/// Returns a schema with another type of images.
pub(crate) fn typed(schema: &Schema, images: DataType) -> SchemaRef {
    let typed = |(n, field): (usize, &Arc<Field>)| match n {
        0 => Arc::new(Field::clone(field).with_data_type(images.clone())),
        _ => field.clone(),
    };
    let fields: Fields = schema.fields().iter().enumerate().map(typed).collect();
    Arc::new(Schema::new_with_metadata(fields, schema.metadata().clone()))
}

/// Returns whether the images of a batch are views of other memory.
pub(crate) fn are_views(batch: &RecordBatch) -> bool {
    let images = batch.columns().first();
    images.is_some_and(|images| *images.data_type() == DataType::BinaryView)
}

/// Returns whether the images of a batch are bytes, in an array or as views.
pub(crate) fn are_bytes(batch: &RecordBatch) -> bool {
    let images = batch.columns().first().map(|images| images.data_type());
    matches!(images, Some(DataType::Binary | DataType::BinaryView))
}

/// Returns views of images as one array, of their size; other arrays as they are.
///
/// # Errors
/// If one array cannot hold them.
pub(crate) fn joined(images: &ArrayRef) -> Result<ArrayRef, ArrowError> {
    let Some(views) = images.as_binary_view_opt() else {
        return Ok(images.clone());
    };
    // Arrow's cast makes room for what lies behind nulls, and panics if one array cannot hold all.
    let image = |row| views.is_valid(row).then(|| views.value(row));
    gathered((0..views.len()).map(image), &Buffers::new(0))
}

/// Returns rows without views: their images are copied into one array, if they are views.
///
/// # Errors
/// As [`joined`].
pub(crate) fn without_views(batch: &RecordBatch) -> Result<RecordBatch, ArrowError> {
    if !are_views(batch) {
        return Ok(batch.clone());
    }
    let mut columns = batch.columns().to_vec();
    columns[0] = joined(&columns[0])?;
    RecordBatch::try_new(typed(batch.schema_ref(), DataType::Binary), columns)
}

/// Returns images as one array, of their size, in a buffer that may be used again.
///
/// # Errors
/// If one array cannot hold them.
pub(crate) fn gathered<'a>(
    images: impl Iterator<Item = Option<&'a [u8]>> + Clone,
    buffers: &Buffers,
) -> Result<ArrayRef, ArrowError> {
    let lengths = images.clone().map(|image| image.map_or(0, <[u8]>::len));
    let bytes: usize = lengths.clone().sum();
    check_bytes(bytes as u64)?;
    let mut values = buffers.take(bytes);
    let mut left = values.as_mut();
    for image in images.clone().flatten() {
        let (place, others) = left.split_at_mut(image.len());
        place.copy_from_slice(image);
        left = others;
    }
    let valid: Vec<bool> = images.map(|image| image.is_some()).collect();
    let nulls = valid.contains(&false).then(|| NullBuffer::from(valid));
    let offsets = OffsetBuffer::from_lengths(lengths);
    let array = BinaryArray::try_new(offsets, Buffer::from(values.into_bytes()), nulls)?;
    Ok(Arc::new(array))
}

fn check_bytes(bytes: u64) -> Result<(), ArrowError> {
    if i32::try_from(bytes).is_ok() {
        return Ok(());
    }
    let message = "a batch has over 2 GiB of images";
    Err(ArrowError::InvalidArgumentError(message.to_owned()))
}

/// Returns why an image is null; `None` if that is not known, or it is there.
pub(crate) fn fault(images: &BinaryArray, row: usize) -> Option<(BadRowReason, &str)> {
    if images.is_valid(row) {
        return None;
    }
    let (reason, detail) = images.value(row).strip_prefix(MARK)?.split_first()?;
    let reason = BadRowReason::try_from(i32::from(*reason)).ok()?;
    Some((reason, std::str::from_utf8(detail).ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn views_become_one_array_of_their_size() {
        use arrow::array::{BinaryViewArray, Int32Array};
        let long = [7; 100];
        let images = || {
            [
                Some(&long[..]),
                None,
                Some(&b"short"[..]),
                Some(&long[..50]),
            ]
            .into_iter()
        };
        let views: ArrayRef = Arc::new(BinaryViewArray::from_iter(images()));
        let plain: ArrayRef = Arc::new(BinaryArray::from_iter(images()));
        assert_eq!(&joined(&views).unwrap(), &plain);
        assert_eq!(&joined(&plain).unwrap(), &plain);
        let none = Buffers::new(0);
        assert_eq!(&gathered(images(), &none).unwrap(), &plain);
        let valid = gathered(images().skip(2), &none).unwrap();
        assert!(valid.nulls().is_none());
        let numbers: ArrayRef = Arc::new(Int32Array::from(vec![1, 2, 3, 4]));
        let [viewed, whole] = [views, plain].map(|images| {
            let columns = [("image", images), ("n", numbers.clone())];
            let columns = columns.map(|(name, column)| (name, column, true));
            RecordBatch::try_from_iter_with_nullable(columns).unwrap()
        });
        assert!(are_views(&viewed) && !are_views(&whole));
        assert_eq!(without_views(&viewed).unwrap(), whole);
        assert_eq!(
            without_views(&viewed.slice(2, 2)).unwrap(),
            whole.slice(2, 2)
        );
        assert_eq!(
            typed(&whole.schema(), DataType::BinaryView),
            viewed.schema()
        );
    }

    #[test]
    fn a_fault_is_found_behind_its_null() {
        let missing = Image::Fault(BadRowReason::ImageMissing, "there is no a.jpg");
        let images = [Image::Bytes(b"i"), Image::Null, missing, Image::Bytes(b"")];
        let column = column(images.into_iter()).unwrap();
        let valid: Vec<bool> = (0..4).map(|row| column.is_valid(row)).collect();
        assert_eq!(valid, [true, false, false, true]);
        let found: Vec<_> = (0..4).map(|row| fault(&column, row)).collect();
        let expected = Some((BadRowReason::ImageMissing, "there is no a.jpg"));
        assert_eq!(found, [None, None, expected, None]);
        // Bytes of a file behind a null are not taken for a fault.
        let nulls = Some(NullBuffer::from(vec![false, false]));
        let offsets = OffsetBuffer::from_lengths([3, MARK.len() + 1]);
        let bytes = [&b"jpg"[..], MARK, &[200]].concat();
        let foreign = BinaryArray::new(offsets, Buffer::from_vec(bytes), nulls);
        assert_eq!([fault(&foreign, 0), fault(&foreign, 1)], [None, None]);
    }
}
