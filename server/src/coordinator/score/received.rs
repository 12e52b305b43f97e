//! Embeddings of one slice as they arrive. No memory is sized by an unchecked number, and a slice
//! counts as complete only after every row was counted.
use super::slice::{Embeddings, Part};
use crate::{
    bounds::EMBEDDING_DIM_MAX,
    coordinator::workers::replies::{check_done, unsound},
    error::Result,
};
use std::ops::Range;
use superbatch_proto::v1::{EmbedDone, EmbeddingDtype, EmbeddingPart};

/// Embeddings of some rows of a slice that a worker must send.
pub(crate) struct Received {
    /// The rows, numbered within the slice.
    rows: Range<usize>,
    /// Bytes of one number.
    element: usize,
    /// Length of the model's embeddings; `None` if the run does not know it.
    dim: Option<u32>,
    found: Embeddings,
    seen: Vec<bool>,
}

impl Received {
    pub(crate) fn new(rows: Range<usize>, dtype: EmbeddingDtype, dim: Option<u32>) -> Self {
        let element = if dtype == EmbeddingDtype::F32 { 4 } else { 2 };
        Self {
            seen: vec![false; rows.len()],
            rows,
            element,
            dim,
            found: Embeddings::default(),
        }
    }

    /// Copies a part to its place.
    ///
    /// # Errors
    /// `Internal` for a part of other rows, of rows that came before, or out of shape.
    pub(crate) fn place(&mut self, part: &EmbeddingPart) -> Result<()> {
        let dim = *self.dim.get_or_insert(part.dim);
        if part.dim != dim || !(1..=EMBEDDING_DIM_MAX).contains(&dim) {
            let wrong = part.dim;
            return Err(unsound(format_args!(
                "embeddings of {wrong} numbers where the model has {dim}"
            )));
        }
        let (first, count) = (part.first as usize, part.rows as usize);
        let places = first
            .checked_sub(self.rows.start)
            .and_then(|first| Some(first..first.checked_add(count)?))
            .filter(|places| count > 0 && places.end <= self.rows.len());
        let row_bytes = dim as usize * self.element;
        let whole = |bytes: usize| bytes == count * row_bytes;
        let Some(places) = places.filter(|_| whole(part.image.len()) && whole(part.text.len()))
        else {
            return Err(unsound(format_args!(
                "embeddings of rows {first}+{count} out of shape, where {:?} are due",
                self.rows
            )));
        };
        if self.seen[places.clone()].contains(&true) {
            return Err(unsound(format_args!(
                "embeddings of rows {first}+{count} twice"
            )));
        }
        self.seen[places.clone()].fill(true);
        self.found.dim = dim as usize;
        // Copied to memory of their own: a part as it came may hold a larger buffer of the
        // connection. The copies are put together later one by one, so that a whole model's
        // embeddings are never in memory twice.
        self.found.parts.push(Part {
            first: places.start,
            image: part.image.to_vec().into(),
            text: part.text.to_vec().into(),
        });
        Ok(())
    }

    /// Returns the complete embeddings. `may_be_empty` returns whether a candidate of the slice has
    /// no embedding.
    ///
    /// # Errors
    /// `Internal`, naming the first missing row. Without this check missing rows would stay zero
    /// and be scored as if they resembled nothing, and no error would show it.
    pub(crate) fn finish(
        mut self,
        done: EmbedDone,
        candidates: usize,
        may_be_empty: impl Fn(u32) -> bool,
    ) -> Result<Embeddings> {
        check_done(&done, candidates)?;
        let missing = self.seen.iter().filter(|seen| !**seen).count();
        if let Some(first) = self.seen.iter().position(|seen| !seen) {
            let (first, rows) = (self.rows.start + first, self.rows.len());
            return Err(unsound(format_args!(
                "an incomplete slice: the embeddings of {missing} of {rows} rows are missing, \
                candidate {first} is the first"
            )));
        }
        self.found.parts.sort_unstable_by_key(|part| part.first);
        let row_bytes = (self.found.dim * self.element).max(1);
        let is_zero = |row: &[u8]| row.iter().all(|byte| *byte == 0);
        let empty = |part: &Part| {
            let rows = part
                .image
                .chunks(row_bytes)
                .zip(part.text.chunks(row_bytes));
            let mut numbered = (self.rows.start + part.first..).zip(rows);
            let empty = numbered.find(|(candidate, (image, text))| {
                let candidate = *candidate as u32;
                (is_zero(image) || is_zero(text))
                    && !done.not_finite.contains(&candidate)
                    && !may_be_empty(candidate)
            });
            empty.map(|(candidate, _)| candidate)
        };
        // A real embedding has length one. Zeros for a row that is no hole mean that the worker
        // sent the frame but not the content.
        if let Some(candidate) = self.found.parts.iter().find_map(empty) {
            return Err(unsound(format_args!(
                "zeros for an embedding of candidate {candidate}, which is no hole"
            )));
        }
        self.found.done = done;
        Ok(self.found)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn part(first: u32, rows: u32, dim: u32, value: u8) -> EmbeddingPart {
        let bytes = vec![value; (rows * dim * 2) as usize];
        EmbeddingPart {
            first,
            rows,
            dim,
            image: bytes.clone().into(),
            text: bytes.into(),
            ..Default::default()
        }
    }

    fn due(dim: Option<u32>) -> Received {
        Received::new(2..6, EmbeddingDtype::F16, dim)
    }

    fn message<T>(result: Result<T>) -> String {
        result
            .err()
            .map_or_else(String::new, |error| error.to_string())
    }

    #[test]
    fn parts_in_any_order_make_a_whole() {
        let mut received = due(Some(3));
        received.place(&part(4, 2, 3, 2)).unwrap();
        received.place(&part(2, 2, 3, 1)).unwrap();
        let found = received.finish(EmbedDone::default(), 6, |_| false).unwrap();
        assert_eq!(found.dim, 3);
        let image: Vec<u8> = found.parts.iter().flat_map(|p| p.image.to_vec()).collect();
        assert_eq!(image, [[1; 12], [2; 12]].concat());
    }

    #[test]
    fn a_size_is_checked_before_it_is_used() {
        let huge = EmbeddingPart {
            first: 2,
            rows: 1,
            dim: u32::MAX,
            ..Default::default()
        };
        for dim in [None, Some(3)] {
            assert!(message(due(dim).place(&huge)).contains("4294967295 numbers"));
        }
        let wrong: [EmbeddingPart; 7] = [
            part(2, 1, 4, 1),
            part(2, 1, 0, 1),
            part(1, 1, 3, 1),
            part(5, 2, 3, 1),
            part(2, 0, 3, 1),
            EmbeddingPart {
                rows: u32::MAX,
                ..part(2, 1, 3, 1)
            },
            EmbeddingPart {
                text: Default::default(),
                ..part(2, 1, 3, 1)
            },
        ];
        for part in wrong {
            assert!(due(Some(3)).place(&part).is_err(), "{part:?}");
        }
    }

    #[test]
    fn rows_without_end_end_with_the_first_that_came_before() {
        let mut received = due(Some(3));
        received.place(&part(2, 4, 3, 1)).unwrap();
        assert!(message(received.place(&part(5, 1, 3, 1))).contains("twice"));
    }

    #[test]
    fn an_incomplete_slice_is_refused_with_the_first_row_that_is_missing() {
        let mut received = due(Some(3));
        received.place(&part(2, 1, 3, 1)).unwrap();
        received.place(&part(5, 1, 3, 1)).unwrap();
        let refused = message(received.finish(EmbedDone::default(), 6, |_| true));
        assert!(
            refused.contains("2 of 4 rows are missing, candidate 3 is the first"),
            "{refused}"
        );
        assert!(due(None).finish(EmbedDone::default(), 6, |_| true).is_err());
    }

    #[test]
    fn zeros_stand_for_holes_alone() {
        let whole = || {
            let mut received = due(Some(3));
            received.place(&part(2, 3, 3, 1)).unwrap();
            received.place(&part(5, 1, 3, 0)).unwrap();
            received
        };
        let refused = message(whole().finish(EmbedDone::default(), 6, |_| false));
        assert!(refused.contains("candidate 5"), "{refused}");
        whole().finish(EmbedDone::default(), 6, |c| c == 5).unwrap();
        let done = EmbedDone {
            not_finite: vec![5],
            ..Default::default()
        };
        whole().finish(done, 6, |_| false).unwrap();
    }
}
