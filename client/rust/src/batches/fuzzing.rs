//! Entrances for fuzzing: each function takes bytes from anywhere through the code that reads what
//! a service sends, and panics if that breaks a promise. Hidden, and no part of the client.
use super::{
    assemble::{Assembly, decode},
    direct::{Received, join},
};
use crate::Error;
use arrow::array::{Array, RecordBatch};
use bytes::Bytes;
use superbatch_proto::{
    Checksum,
    v1::{BatchHeader, BatchTrailer, ReceiptSummary, TicketDone},
};

/// A batch of a coordinator: an Arrow stream, in two parts.
pub fn batch(bytes: &[u8]) {
    // Counted by a decoder of its own, since only a batch of so many rows as were announced is
    // taken.
    let counted = decode(bytes.to_vec()).map(|batch| batch.num_rows() as u64);
    let rows = counted.as_ref().copied().unwrap_or(1);
    let mut assembly = Assembly::new(3);
    let header = BatchHeader {
        stream_bytes: bytes.len() as u64,
        rows: u32::try_from(rows).unwrap_or(u32::MAX),
        receipt: Some(ReceiptSummary::default()),
        ..Default::default()
    };
    let trailer = BatchTrailer {
        rows: header.rows,
        xxh3: checksum(bytes),
    };
    assembly.begin(header).expect("the first stream begins");
    let (first, second) = bytes.split_at(bytes.len() / 2);
    assembly.extend(first).expect("no more than announced");
    assembly.extend(second).expect("no more than announced");
    match assembly.finish(&trailer) {
        Ok((batch, tickets)) => {
            assert!(tickets.is_empty() && batch.record_batch.num_rows() as u64 == rows);
            check(&batch.record_batch);
        }
        Err(error) => {
            let is_corrupt = matches!(error, Error::Corrupt { step: 3, .. });
            assert!(is_corrupt && assembly.received() == 0, "{error}");
        }
    }
}

/// Rows of a worker, beside what the coordinator sent: two Arrow streams, the first of which has
/// the length in two bytes before it.
pub fn rows(bytes: &[u8]) {
    let Some((length, rest)) = bytes.split_first_chunk::<2>() else {
        return;
    };
    let (own, theirs) = rest.split_at(rest.len().min(u16::from_le_bytes(*length).into()));
    let Ok(own) = decode(own.to_vec()) else {
        return;
    };
    let wanted = own.num_rows();
    let part = Bytes::copy_from_slice(theirs);
    let mut received = Received::new(theirs.len() as u64);
    let pushed = received.push(part.clone());
    pushed.expect("no more than announced");
    assert!(part.is_empty() || received.push(part.clone()).is_err());
    let mut received = Received::new(theirs.len() as u64);
    let pushed = received.push(part);
    pushed.expect("no more than announced");
    let done = TicketDone {
        rows: u32::try_from(wanted).unwrap_or(u32::MAX),
        stream_bytes: theirs.len() as u64,
        xxh3: checksum(theirs),
    };
    let Ok(batches) = received.finish(&done, wanted) else {
        return;
    };
    // A message names no more of them.
    let count = u32::try_from(wanted).unwrap_or(u32::MAX).min(1 << 20);
    if let Ok(batch) = join(&own, vec![batches], &[(0..count).rev().collect()]) {
        assert_eq!(batch.num_rows(), wanted);
        check(&batch);
    }
}

fn checksum(bytes: &[u8]) -> Bytes {
    Bytes::copy_from_slice(&Checksum::of(bytes))
}

/// Arrays whose offsets, nulls or texts are not what Arrow promises would be read out of bounds.
fn check(batch: &RecordBatch) {
    for column in batch.columns() {
        let valid = column.to_data().validate_full();
        valid.expect("an array that was read is a valid one");
    }
}
