//! Why the image of a row is null, where that is known. Only a batch as it was read tells; rows
//! that are copied out of it lose it.
use arrow::{
    array::{Array, BinaryArray},
    buffer::{Buffer, NullBuffer, OffsetBuffer},
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
    if i32::try_from(bytes.len()).is_err() {
        let message = "a batch has over 2 GiB of images";
        return Err(ArrowError::InvalidArgumentError(message.to_owned()));
    }
    let offsets = OffsetBuffer::from_lengths(lengths);
    let nulls = Some(NullBuffer::from(valid));
    BinaryArray::try_new(offsets, Buffer::from_vec(bytes), nulls).map(Arc::new)
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
