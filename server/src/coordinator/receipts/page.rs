//! Cuts a receipt into pages that fit into messages.
use crate::error::{Error, Result};
use prost::Message;
use superbatch_proto::v1::{BadRow, ChosenRow, GetReceiptResponse, PassedRow, Receipt};

/// Largest page, in bytes on the wire. gRPC clients accept 4 MiB by default, and a client written
/// in another language has no reason to change that.
const PAGE_BYTES_MAX: usize = 3 << 20;
/// Bytes of a row in its message besides itself: a tag and a length of up to four bytes.
const ROW_OVERHEAD_BYTES: usize = 5;

/// Returns the page of `receipt` that begins with row `row_offset`. The chosen rows are counted
/// first, then the bad ones, then those passed over. A page has at most `rows_max` rows (0: as many
/// as fit) and at least one.
///
/// # Errors
/// `InvalidArgument` if the receipt ends before `row_offset`.
pub fn page(receipt: Receipt, row_offset: u64, rows_max: u64) -> Result<GetReceiptResponse> {
    let Receipt {
        summary,
        chosen,
        bad_rows,
        passed_over,
    } = receipt;
    let rows = chosen.len() + bad_rows.len() + passed_over.len();
    let first = usize::try_from(row_offset)
        .ok()
        .filter(|first| *first <= rows)
        .ok_or_else(|| {
            Error::invalid(
                "row_offset",
                format!("row_offset is {row_offset}, and the receipt has {rows} rows"),
            )
        })?;
    let sizes = chosen
        .iter()
        .map(ChosenRow::encoded_len)
        .chain(bad_rows.iter().map(BadRow::encoded_len))
        .chain(passed_over.iter().map(PassedRow::encoded_len));
    let count = fit(sizes.skip(first), rows_max);
    let (mut skip, mut take) = (first, count);
    let receipt = Receipt {
        summary,
        chosen: cut(chosen, &mut skip, &mut take),
        bad_rows: cut(bad_rows, &mut skip, &mut take),
        passed_over: cut(passed_over, &mut skip, &mut take),
    };
    let next = first + count;
    Ok(GetReceiptResponse {
        receipt: Some(receipt),
        next_row_offset: (next < rows).then_some(next as u64),
    })
}

/// Returns the part of one list of rows that belongs to a page. `skip` and `take` count over all
/// lists, and are reduced by this one.
fn cut<T>(rows: Vec<T>, skip: &mut usize, take: &mut usize) -> Vec<T> {
    let skipped = rows.len().min(*skip);
    let taken: Vec<T> = rows.into_iter().skip(skipped).take(*take).collect();
    *skip -= skipped;
    *take -= taken.len();
    taken
}

/// Returns how many rows of these sizes fit. The first always counts as fitting: a page of none
/// would never get past it.
fn fit(sizes: impl Iterator<Item = usize>, rows_max: u64) -> usize {
    let most = if rows_max == 0 {
        usize::MAX
    } else {
        usize::try_from(rows_max).unwrap_or(usize::MAX)
    };
    let mut bytes = 0;
    let fits = |(row, size): &(usize, usize)| {
        bytes += size + ROW_OVERHEAD_BYTES;
        *row == 0 || bytes <= PAGE_BYTES_MAX
    };
    sizes.enumerate().take(most).take_while(fits).count()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::coordinator::receipts::parquet::tests::sample;

    fn large(chosen: usize, bad: usize) -> Receipt {
        let sample = sample(3, 1, "n");
        let chosen = (0..chosen as u64).map(|position| ChosenRow {
            position,
            ..sample.chosen[0].clone()
        });
        let named = bad / 2;
        let bad = (0..bad as u64).map(|position| BadRow {
            position,
            ..sample.bad_rows[0].clone()
        });
        let passed = (0..named as u64).map(|position| PassedRow {
            position,
            id: "p".into(),
            ..Default::default()
        });
        Receipt {
            chosen: chosen.collect(),
            bad_rows: bad.collect(),
            passed_over: passed.collect(),
            ..sample
        }
    }

    /// All pages, as a client puts them together; how many there were.
    fn assembled(receipt: &Receipt, rows_max: u64) -> (Receipt, usize) {
        let (mut whole, mut next, mut pages) = (Receipt::default(), Some(0), 0);
        while let Some(offset) = next {
            let found = page(receipt.clone(), offset, rows_max).unwrap();
            assert!(found.encoded_len() < 4 << 20);
            let part = found.receipt.unwrap();
            let rows = [
                part.chosen.len(),
                part.bad_rows.len(),
                part.passed_over.len(),
            ];
            assert!(rows.iter().sum::<usize>() > 0);
            whole.summary = part.summary;
            whole.chosen.extend(part.chosen);
            whole.bad_rows.extend(part.bad_rows);
            whole.passed_over.extend(part.passed_over);
            (next, pages) = (found.next_row_offset, pages + 1);
        }
        (whole, pages)
    }

    #[test]
    fn a_receipt_of_any_size_comes_in_pages() {
        let receipt = large(120_000, 45_000);
        assert!(receipt.encoded_len() > superbatch_proto::MESSAGE_BYTES_MAX);
        let (whole, pages) = assembled(&receipt, 0);
        assert!(whole == receipt && pages > 2);
        let (whole, pages) = assembled(&large(5, 4), 2);
        assert!(whole == large(5, 4) && pages == 6);
        assert_eq!(
            assembled(&large(3, 1), 0).1,
            1,
            "a small one is one message"
        );
    }

    #[test]
    fn the_ends_are_told() {
        let empty = page(large(0, 0), 0, 0).unwrap();
        assert_eq!(
            (empty.receipt.unwrap().chosen.len(), empty.next_row_offset),
            (0, None)
        );
        assert_eq!(page(large(3, 1), 4, 0).unwrap().next_row_offset, None);
        assert_eq!(
            page(large(3, 1), 5, 0).unwrap_err().value("field"),
            Some("row_offset")
        );
        let huge = BadRow {
            detail: "x".repeat(2 * PAGE_BYTES_MAX),
            ..Default::default()
        };
        let receipt = Receipt {
            bad_rows: vec![huge.clone(), huge],
            ..Default::default()
        };
        assert_eq!(
            page(receipt, 0, 0).unwrap().next_row_offset,
            Some(1),
            "one row at least"
        );
    }
}
