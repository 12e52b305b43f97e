//! Embeddings of consecutive rows, made in micro-batches of one fixed shape.
use super::{
    device::{self, MicroBatch},
    engine::Engine,
    models::Loaded,
    pool::PreparedRow,
};
use crate::error::{Error, Result};
use bytes::Bytes;
use std::ops::Range;
use superbatch_proto::{
    PART_BYTES,
    v1::{EmbeddingDtype, EmbeddingPart, Reason, Tower},
};

/// Image and text embeddings, `[rows, dim]` each, little endian; rows that cannot be used are zero.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Embeddings {
    pub dim: usize,
    /// Bytes of one element.
    pub width: usize,
    pub image: Vec<u8>,
    pub text: Vec<u8>,
}

/// How rows are put through a model: the shape fixes what is computed for a row, down to the last bit.
#[derive(Debug, Clone, Copy)]
pub(super) struct Shape {
    pub micro_batch_rows: usize,
    pub dtype: EmbeddingDtype,
}

/// What one micro-batch gave beside its embeddings.
pub(super) struct Embedded {
    pub seconds: f64,
    /// Rows, within the micro-batch, whose embedding is not finite.
    pub not_finite: Vec<usize>,
}

impl Embeddings {
    pub fn zeros(rows: usize, dim: usize, dtype: EmbeddingDtype) -> Self {
        let width = if dtype == EmbeddingDtype::F32 { 4 } else { 2 };
        let bytes = rows * dim * width;
        Self { dim, width, image: vec![0; bytes], text: vec![0; bytes] }
    }

    pub fn rows(&self) -> usize {
        self.image.len() / self.row_bytes()
    }

    pub fn bytes(&self) -> usize {
        self.image.len() + self.text.len()
    }

    /// Makes row `to` what row `row` of `from` is.
    pub fn copy_row(&mut self, to: usize, from: &Self, row: usize) {
        let (to, from_range) = (self.range(to..to + 1), from.range(row..row + 1));
        self.image[to.clone()].copy_from_slice(&from.image[from_range.clone()]);
        self.text[to].copy_from_slice(&from.text[from_range]);
    }

    /// Cut into messages of at most [`PART_BYTES`] (or one row), in order; the first row is candidate `from`.
    pub fn parts(self, tower: Tower, from: usize) -> impl Iterator<Item = EmbeddingPart> {
        let rows = self.rows();
        let rows_max = (PART_BYTES / (2 * self.row_bytes())).max(1);
        let row_bytes = self.row_bytes();
        let (dim, image, text) = (self.dim as u32, Bytes::from(self.image), Bytes::from(self.text));
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

    fn range(&self, rows: Range<usize>) -> Range<usize> {
        rows.start * self.row_bytes()..rows.end * self.row_bytes()
    }
}

impl Shape {
    /// `rows` rows as the ranges of its micro-batches; the last is padded when it is computed.
    pub fn micro_batches(&self, rows: usize) -> impl Iterator<Item = Range<usize>> + use<> {
        let step = self.micro_batch_rows;
        (0..rows).step_by(step).map(move |first| first..(first + step).min(rows))
    }

    /// Rows that are computed for `rows`, padding included.
    pub fn padded(&self, rows: usize) -> usize {
        rows.div_ceil(self.micro_batch_rows) * self.micro_batch_rows
    }

    /// Puts one micro-batch through `model` and writes its usable rows into `out` from row `first` on.
    pub async fn embed(
        &self,
        engine: &Engine,
        model: &Loaded,
        rows: &[PreparedRow],
        out: &mut Embeddings,
        first: usize,
    ) -> Result<Embedded> {
        let embedded = self.compute(engine, model, rows).await?;
        let is_used = |row: &usize| rows.get(*row).is_some_and(Result::is_ok);
        let not_finite: Vec<usize> = embedded.not_finite.iter().map(|row| *row as usize).filter(is_used).collect();
        for row in (0..rows.len()).filter(|row| rows[*row].is_ok() && !not_finite.contains(row)) {
            let (to, from) = (out.range(first + row..first + row + 1), out.range(row..row + 1));
            out.image[to.clone()].copy_from_slice(&embedded.image[from.clone()]);
            out.text[to].copy_from_slice(&embedded.text[from]);
        }
        Ok(Embedded { seconds: embedded.seconds, not_finite })
    }

    /// Where the model has left the device it is loaded again; where others push it off once more before its turn comes, it is
    /// loaded for this micro-batch alone.
    async fn compute(&self, engine: &Engine, model: &Loaded, rows: &[PreparedRow]) -> Result<device::Embedded> {
        let is_missing = |done: &Result<_>| done.as_ref().is_err_and(|e: &Error| e.reason() == Reason::WeightsMissing);
        let mut done = engine.device.embed(self.assemble(model, rows)).await;
        if is_missing(&done) {
            engine.models.reload(model).await?;
            done = engine.device.embed(self.assemble(model, rows)).await;
        }
        if is_missing(&done) {
            tracing::warn!(
                "models push each other off the device, so each micro-batch loads one; raise worker.models_max"
            );
            done = engine.models.embed_reloading(model, self.assemble(model, rows)).await;
        }
        done
    }

    /// Rows that cannot be used, and those that pad, are black and without tokens.
    fn assemble(&self, model: &Loaded, rows: &[PreparedRow]) -> MicroBatch {
        let (pixel_bytes, length) = (model.info.image_size.pow(2) * 3, model.info.text_length);
        let mut pixels = vec![0; self.micro_batch_rows * pixel_bytes];
        let mut ids = vec![0; self.micro_batch_rows * length];
        for (n, row) in rows.iter().enumerate() {
            if let Ok(row) = row {
                // Loading made sure that the folder's preprocessing and tokenizer give these sizes.
                pixels[n * pixel_bytes..(n + 1) * pixel_bytes].copy_from_slice(&row.pixels);
                ids[n * length..(n + 1) * length].copy_from_slice(&row.ids);
            }
        }
        MicroBatch {
            model: model.info.key.clone(),
            rows: self.micro_batch_rows,
            pixels,
            normalisation: model.inputs.normalisation(),
            ids,
            dtype: self.dtype,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_cover_the_rows_in_messages_of_bounded_size() {
        let (rows, dim) = (5000, 512);
        let mut all = Embeddings::zeros(rows, dim, EmbeddingDtype::F16);
        all.image.iter_mut().enumerate().for_each(|(n, byte)| *byte = n as u8);
        let image = all.image.clone();
        let parts: Vec<EmbeddingPart> = all.parts(Tower::Learner, 7).collect();
        assert!(parts.iter().all(|part| part.image.len() + part.text.len() <= PART_BYTES));
        assert_eq!(parts.iter().map(|part| part.rows).sum::<u32>(), rows as u32);
        assert_eq!(parts[0].first, 7);
        assert!(parts.windows(2).all(|two| two[0].first + two[0].rows == two[1].first));
        assert_eq!(parts.iter().flat_map(|part| part.image.iter().copied()).collect::<Vec<u8>>(), image);
    }

    #[test]
    fn micro_batches_are_padded_to_one_shape() {
        let shape = Shape { micro_batch_rows: 4, dtype: EmbeddingDtype::F32 };
        assert_eq!(shape.micro_batches(9).collect::<Vec<_>>(), [0..4, 4..8, 8..9]);
        assert_eq!((shape.padded(0), shape.padded(8), shape.padded(9)), (0, 8, 12));
    }
}
