//! Embeds consecutive rows in micro-batches of one fixed shape.
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

/// How rows are put through a model. Kernels choose their order of summation by the shape of the
/// batch, so a row's embedding depends on that shape, to the last bit. With one shape for all
/// micro-batches it depends on the row alone.
#[derive(Debug, Clone, Copy)]
pub struct Shape {
    pub micro_batch_rows: usize,
    pub dtype: EmbeddingDtype,
}

/// What a micro-batch returns besides its embeddings.
pub struct Embedded {
    pub seconds: f64,
    /// Operations of its captions, padding included.
    pub text_flops: f64,
    /// Rows, within the micro-batch, whose embedding is not finite.
    pub not_finite: Vec<usize>,
}

impl Shape {
    /// Returns the micro-batches of `rows` rows as ranges. The last one is padded when it is
    /// computed.
    pub fn micro_batches(&self, rows: usize) -> impl Iterator<Item = Range<usize>> + use<> {
        let step = self.micro_batch_rows;
        (0..rows)
            .step_by(step)
            .map(move |first| first..(first + step).min(rows))
    }

    /// Returns how many rows are computed for `rows`, padding included: these cost FLOPs.
    pub fn padded(&self, rows: usize) -> usize {
        rows.div_ceil(self.micro_batch_rows) * self.micro_batch_rows
    }

    /// Puts one micro-batch through `model` and writes its usable rows into `out` from row `first`
    /// on.
    pub async fn embed(
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
            text_flops: self.micro_batch_rows as f64
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
            side: model.info.image_size,
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
    fn micro_batches_are_padded_to_one_shape() {
        let shape = Shape {
            micro_batch_rows: 4,
            dtype: EmbeddingDtype::F32,
        };
        assert_eq!(
            shape.micro_batches(9).collect::<Vec<_>>(),
            [0..4, 4..8, 8..9]
        );
        assert_eq!(
            (shape.padded(0), shape.padded(8), shape.padded(9)),
            (0, 8, 12)
        );
    }
}
