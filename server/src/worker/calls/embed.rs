//! Embeds consecutive rows in micro-batches of few fixed shapes.
use crate::{
    error::{Error, Result},
    worker::{
        device::{self, MicroBatch},
        engine::Engine,
        inputs::row::PreparedRow,
        kept::embeddings::Embeddings,
        loader::Loaded,
    },
};
use std::ops::Range;
use superbatch_proto::v1::{EmbeddingDtype, Reason};

/// The smallest shape of a micro-batch: what fewer rows are padded to.
const ROWS_MIN: usize = 4;

/// How rows are put through a model. Kernels choose their order of summation by the shape of the
/// batch, so a row's embedding depends on that shape, to the last bit. All micro-batches have one
/// shape, except for the rows that are left at the end: those go in powers of two, since padding
/// them to a whole micro-batch would cost a quarter of the work for row groups of 100 rows. Which
/// rows are at the end depends on the block or the super-batch alone, so their shapes do, too.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Shape {
    pub micro_batch_rows: usize,
    pub dtype: EmbeddingDtype,
}

/// What a micro-batch returns besides its embeddings.
pub(crate) struct Embedded {
    pub seconds: f64,
    /// Operations of its captions, padding included.
    pub text_flops: f64,
    /// Rows, within the micro-batch, whose embedding is not finite.
    pub not_finite: Vec<usize>,
}

impl Shape {
    /// Returns the micro-batches of `rows` rows as ranges. Only the last one may be padded when it
    /// is computed.
    pub(crate) fn micro_batches(&self, rows: usize) -> impl Iterator<Item = Range<usize>> + use<> {
        let most = self.micro_batch_rows.max(1);
        let mut first = 0;
        std::iter::from_fn(move || {
            let left = rows - first;
            let size = match left {
                0 => return None,
                _ if left >= most => most,
                _ if left <= ROWS_MIN => left,
                _ => 1 << left.ilog2(),
            };
            let range = first..first + size;
            first = range.end;
            Some(range)
        })
    }

    /// Returns how many rows are computed for one micro-batch of `rows`.
    pub(crate) fn computed(&self, rows: usize) -> usize {
        rows.max(ROWS_MIN).min(self.micro_batch_rows.max(rows))
    }

    /// Returns how many rows are computed for `rows`, padding included: these cost FLOPs.
    pub(crate) fn padded(&self, rows: usize) -> usize {
        self.micro_batches(rows)
            .map(|range| self.computed(range.len()))
            .sum()
    }

    /// Puts one micro-batch through `model` and writes its usable rows into `out` from row `first`
    /// on.
    pub(crate) async fn embed(
        &self,
        engine: &Engine,
        model: &Loaded,
        rows: &[PreparedRow],
        out: &mut Embeddings,
        first: usize,
    ) -> Result<Embedded> {
        let embedded = self.compute(engine, model, rows).await?;
        // Padding and unusable rows are black images with no tokens. Some models give NaN for
        // those; they must not be reported as faults of the data.
        let is_used = |row: &usize| rows.get(*row).is_some_and(Result::is_ok);
        let not_finite: Vec<usize> = embedded
            .not_finite
            .iter()
            .map(|row| *row as usize)
            .filter(is_used)
            .collect();
        for row in (0..rows.len()).filter(|row| rows[*row].is_ok() && !not_finite.contains(row)) {
            let (to, from) = (
                out.range(first + row..first + row + 1),
                out.range(row..row + 1),
            );
            out.image[to.clone()].copy_from_slice(&embedded.image[from.clone()]);
            out.text[to].copy_from_slice(&embedded.text[from]);
        }
        Ok(Embedded {
            seconds: embedded.seconds,
            text_flops: self.computed(rows.len()) as f64
                * model.info.text_tower.flops(embedded.text_length),
            not_finite,
        })
    }

    /// Embeds one micro-batch, and loads the model again if it has left the device.
    async fn compute(
        &self,
        engine: &Engine,
        model: &Loaded,
        rows: &[PreparedRow],
    ) -> Result<device::Embedded> {
        let is_missing = |done: &Result<_>| {
            done.as_ref()
                .is_err_and(|e: &Error| e.reason() == Reason::WeightsMissing)
        };
        // Between loading a model and using it other calls may load theirs, and the device keeps
        // only `models_max`. One reload is enough in most cases. With more models in use than fit,
        // calls could push each other's models off without end and none would embed anything. So
        // the third attempt loads and embeds as one job of the device, which no other call can
        // interrupt.
        let mut done = engine.device.embed(self.assemble(model, rows)).await;
        if is_missing(&done) {
            engine.models.reload(model).await?;
            done = engine.device.embed(self.assemble(model, rows)).await;
        }
        if is_missing(&done) {
            tracing::warn!(
                "models push each other off the device, so each micro-batch loads one; raise \
                worker.models_max"
            );
            done = engine
                .models
                .embed_reloading(model, self.assemble(model, rows))
                .await;
        }
        done
    }

    /// Puts rows side by side. Unusable rows and padding are black images without tokens.
    fn assemble(&self, model: &Loaded, rows: &[PreparedRow]) -> MicroBatch {
        let (tower, length) = (&model.info.image_tower, model.info.text_length);
        let pixel_bytes = tower.pixels(model.fidelity) * 3;
        let count = self.computed(rows.len());
        let mut pixels = vec![0; count * pixel_bytes];
        // A grid is at least one patch.
        let mut grids = vec![[1, 1]; if tower.max_patches > 0 { count } else { 0 }];
        let mut ids = vec![0; count * length];
        let mut keys = vec![0; count];
        for (n, row) in rows.iter().enumerate() {
            if let Ok(row) = row {
                // Loading made sure that the folder's preprocessing and tokenizer give these sizes.
                let place = &mut pixels[n * pixel_bytes..(n + 1) * pixel_bytes];
                place[..row.pixels.len()].copy_from_slice(&row.pixels);
                if let (Some(place), Some(grid)) = (grids.get_mut(n), row.grid) {
                    *place = grid;
                }
                ids[n * length..(n + 1) * length].copy_from_slice(&row.ids);
                keys[n] = row.key;
            }
        }
        MicroBatch {
            model: model.info.key.clone(),
            fidelity: model.fidelity,
            keys,
            pixels,
            grids,
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
    fn rows_at_the_end_go_in_powers_of_two() {
        let shape = |micro_batch_rows| Shape {
            micro_batch_rows,
            dtype: EmbeddingDtype::F32,
        };
        let of = |most, rows| shape(most).micro_batches(rows).collect::<Vec<_>>();
        assert_eq!(of(4, 9), [0..4, 4..8, 8..9]);
        assert_eq!(of(64, 100), [0..64, 64..96, 96..100]);
        assert_eq!(of(48, 45), [0..32, 32..40, 40..44, 44..45]);
        assert!(of(64, 0).is_empty());
        let padded = |most, rows| shape(most).padded(rows);
        assert_eq!([padded(4, 0), padded(4, 8), padded(4, 9)], [0, 8, 12]);
        assert_eq!((padded(2, 3), padded(1, 3)), (4, 3));
    }

    #[test]
    fn row_groups_of_a_hundred_rows_are_hardly_padded() {
        for most in [16, 64, 100, 256] {
            let shape = Shape {
                micro_batch_rows: most,
                dtype: EmbeddingDtype::F32,
            };
            let rows: usize = (90..=110).sum();
            let computed: usize = (90..=110).map(|rows| shape.padded(rows)).sum();
            assert!(
                (computed as f64) < 1.03 * rows as f64,
                "{most}: {computed} of {rows}"
            );
            assert_eq!(shape.padded(100), 100);
        }
    }
}
