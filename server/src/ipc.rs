//! Encodes Arrow IPC streams in parts that share the memory of the arrays.
use arrow::{
    array::RecordBatch, buffer::Buffer, datatypes::Schema, error::ArrowError,
    ipc::writer::StreamEncoder,
};
use bytes::Bytes;
use superbatch_proto::PART_BYTES;

/// Buffers from this size on become parts of their own without a copy. Smaller ones are joined: a
/// message of a few bytes costs as much as the copy.
const SHARED_BYTES_MIN: usize = 64 << 10;

/// Encodes record batches as an Arrow IPC stream.
pub(crate) struct Encoder(StreamEncoder);

/// The memory of an array as the owner of [`Bytes`].
struct Owned(Buffer);

impl AsRef<[u8]> for Owned {
    fn as_ref(&self) -> &[u8] {
        self.0.as_slice()
    }
}

impl Encoder {
    /// # Errors
    /// Arrow's, for a schema that cannot be in a stream.
    pub(crate) fn new(schema: &Schema) -> Result<Self, ArrowError> {
        StreamEncoder::try_new(schema).map(Self)
    }

    /// Encodes a batch. Returns the next bytes of the stream, in parts of at most [`PART_BYTES`].
    ///
    /// # Errors
    /// Arrow's, for a batch of another schema.
    pub(crate) fn encode(&mut self, batch: &RecordBatch) -> Result<Vec<Bytes>, ArrowError> {
        self.0.encode(batch).map(parts)
    }

    /// Returns the end of the stream.
    ///
    /// # Errors
    /// Arrow's, for a schema that cannot be encoded.
    pub(crate) fn finish(self) -> Result<Vec<Bytes>, ArrowError> {
        self.0.finish().map(parts)
    }
}

/// Joins small buffers, and cuts large ones.
fn parts(buffers: Vec<Buffer>) -> Vec<Bytes> {
    let (mut parts, mut joined) = (Vec::new(), Vec::new());
    for buffer in buffers {
        if buffer.len() < SHARED_BYTES_MIN {
            joined.extend_from_slice(&buffer);
            continue;
        }
        cut(Bytes::from(std::mem::take(&mut joined)), &mut parts);
        cut(Bytes::from_owner(Owned(buffer)), &mut parts);
    }
    cut(Bytes::from(joined), &mut parts);
    parts
}

fn cut(bytes: Bytes, parts: &mut Vec<Bytes>) {
    parts.extend(
        (0..bytes.len())
            .step_by(PART_BYTES)
            .map(|at| bytes.slice(at..(at + PART_BYTES).min(bytes.len()))),
    );
}

/// Returns the rest of a stream from a byte on.
pub(crate) fn from_offset(parts: Vec<Bytes>, mut offset: u64) -> impl Iterator<Item = Bytes> {
    parts.into_iter().filter_map(move |part| {
        let skipped = offset.min(part.len() as u64);
        offset -= skipped;
        (skipped < part.len() as u64).then(|| part.slice(skipped as usize..))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use arrow::{
        array::{ArrayRef, BinaryArray, StringArray},
        ipc::{reader::StreamReader, writer::StreamWriter},
    };
    use std::sync::Arc;

    fn batch(rows: usize, bytes: usize) -> RecordBatch {
        let columns: [(&str, ArrayRef); 2] = [
            (
                "image",
                Arc::new(BinaryArray::from_iter_values(
                    (0..rows).map(|row| vec![row as u8; bytes]),
                )),
            ),
            (
                "caption",
                Arc::new(StringArray::from_iter_values(
                    (0..rows).map(|row| format!("caption {row}")),
                )),
            ),
        ];
        RecordBatch::try_from_iter(columns).unwrap()
    }

    #[test]
    fn parts_are_the_stream_that_arrow_writes_and_large_ones_share_its_memory() {
        let batches = [
            batch(3, 10),
            batch(40, 100_000),
            batch(0, 0),
            batch(9, 60_000).slice(2, 5),
        ];
        let (mut encoder, mut writer) = (
            Encoder::new(&batches[0].schema()).unwrap(),
            StreamWriter::try_new(Vec::new(), &batches[0].schema()).unwrap(),
        );
        let mut parts = Vec::new();
        for batch in &batches {
            let new = encoder.encode(batch).unwrap();
            let image = batch["image"].to_data().buffers()[1].clone();
            let inside = |part: &Bytes| image.as_ptr_range().contains(&part.as_ptr());
            assert_eq!(new.iter().any(inside), batch.num_rows() > 3);
            parts.extend(new);
            writer.write(batch).unwrap();
        }
        parts.extend(encoder.finish().unwrap());
        assert!(
            parts
                .iter()
                .all(|part| (1..=PART_BYTES).contains(&part.len()))
        );
        let whole = parts.concat();
        assert!(whole == writer.into_inner().unwrap());
        let rows = StreamReader::try_new(&whole[..], None)
            .unwrap()
            .map(|batch| batch.unwrap().num_rows());
        assert_eq!(rows.collect::<Vec<_>>(), [3, 40, 0, 5]);
        for offset in [
            0,
            1,
            parts[0].len(),
            PART_BYTES + 7,
            whole.len() - 1,
            whole.len(),
        ] {
            let rest = from_offset(parts.clone(), offset as u64)
                .collect::<Vec<_>>()
                .concat();
            assert!(rest == whole[offset..], "{offset}");
        }
    }
}
