//! Embeddings of rows, as bytes.
use bytes::Bytes;
use std::ops::Range;
use superbatch_proto::{
    PART_BYTES,
    v1::{EmbeddingDtype, EmbeddingPart, Tower},
};

/// Image and text embeddings, `[rows, dim]` each, little endian; rows that cannot be used are zero.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Embeddings {
    pub dim: usize,
    /// Bytes of one element.
    pub width: usize,
    pub image: Vec<u8>,
    pub text: Vec<u8>,
}

impl Embeddings {
    pub(crate) fn zeros(rows: usize, dim: usize, dtype: EmbeddingDtype) -> Self {
        let width = if dtype == EmbeddingDtype::F32 { 4 } else { 2 };
        let bytes = rows * dim * width;
        Self {
            dim,
            width,
            image: vec![0; bytes],
            text: vec![0; bytes],
        }
    }

    pub(crate) fn rows(&self) -> usize {
        self.image.len() / self.row_bytes()
    }

    pub(crate) fn bytes(&self) -> usize {
        self.image.len() + self.text.len()
    }

    /// Copies row `row` of `from` to row `to`.
    pub(crate) fn copy_row(&mut self, to: usize, from: &Self, row: usize) {
        let (to, from_range) = (self.range(to..to + 1), from.range(row..row + 1));
        self.image[to.clone()].copy_from_slice(&from.image[from_range.clone()]);
        self.text[to].copy_from_slice(&from.text[from_range]);
    }

    /// Cuts the embeddings into messages of at most [`PART_BYTES`] (or one row), in order. The
    /// first row is candidate `from`.
    pub(crate) fn parts(self, tower: Tower, from: usize) -> impl Iterator<Item = EmbeddingPart> {
        let rows = self.rows();
        let rows_max = (PART_BYTES / (2 * self.row_bytes())).max(1);
        let row_bytes = self.row_bytes();
        let (dim, image, text) = (
            self.dim as u32,
            Bytes::from(self.image),
            Bytes::from(self.text),
        );
        (0..rows).step_by(rows_max).map(move |first| {
            let end = (first + rows_max).min(rows);
            let bytes = first * row_bytes..end * row_bytes;
            EmbeddingPart {
                tower: tower.into(),
                first: (from + first) as u32,
                rows: (end - first) as u32,
                dim,
                image: image.slice(bytes.clone()),
                text: text.slice(bytes),
            }
        })
    }

    fn row_bytes(&self) -> usize {
        (self.dim * self.width).max(1)
    }

    pub(crate) fn range(&self, rows: Range<usize>) -> Range<usize> {
        rows.start * self.row_bytes()..rows.end * self.row_bytes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_cover_the_rows_in_messages_of_bounded_size() {
        let (rows, dim) = (5000, 512);
        let mut all = Embeddings::zeros(rows, dim, EmbeddingDtype::F16);
        all.image
            .iter_mut()
            .enumerate()
            .for_each(|(n, byte)| *byte = n as u8);
        let image = all.image.clone();
        let parts: Vec<EmbeddingPart> = all.parts(Tower::Learner, 7).collect();
        assert!(
            parts
                .iter()
                .all(|part| part.image.len() + part.text.len() <= PART_BYTES)
        );
        assert_eq!(parts.iter().map(|part| part.rows).sum::<u32>(), rows as u32);
        assert_eq!(parts[0].first, 7);
        assert!(
            parts
                .windows(2)
                .all(|two| two[0].first + two[0].rows == two[1].first)
        );
        assert_eq!(
            parts
                .iter()
                .flat_map(|part| part.image.iter().copied())
                .collect::<Vec<u8>>(),
            image
        );
    }
}
