//! The models on a device. Everything here runs on the device's thread.
use super::job::{Embedded, MicroBatch, Source};
use crate::{
    error::{Error, Result},
    fidelity::ImageTower,
    worker::model::{Compute, Encoder, ModelInfo, ModelKey},
};
use bytes::Bytes;
use std::time::Instant;
use superbatch_proto::v1::{EmbeddingDtype, Reason};
use tch::{Device, Kind, TchError, Tensor};

/// Models by key, least recently used first.
pub(super) struct Resident {
    device: Device,
    models_max: usize,
    loaded: Vec<(Encoder, ModelInfo)>,
}

impl Resident {
    pub(super) fn new(device: Device, models_max: usize) -> Self {
        Self {
            device,
            models_max: models_max.max(1),
            loaded: Vec::new(),
        }
    }

    pub(super) fn device(&self) -> Device {
        self.device
    }

    /// Returns the model of that key if it is on the device, and makes it the most recently used.
    fn touch(&mut self, key: &ModelKey) -> Option<&(Encoder, ModelInfo)> {
        let at = self.loaded.iter().position(|(_, info)| info.key == *key)?;
        let model = self.loaded.remove(at);
        self.loaded.push(model);
        self.loaded.last()
    }

    pub(super) fn find(
        &mut self,
        key: &ModelKey,
        canary: bool,
        reason: Reason,
        source: &str,
    ) -> Result<Option<ModelInfo>> {
        let Some((encoder, info)) = self.touch(key) else {
            return Ok(None);
        };
        if canary {
            check(encoder, reason, source)?;
        }
        Ok(Some(info.clone()))
    }

    pub(super) fn insert(
        &mut self,
        source: Source,
        compute: Compute,
        canary: bool,
    ) -> Result<ModelInfo> {
        let Source {
            folder,
            snapshot,
            weights_digest,
            name,
            reason,
        } = source;
        let digest = folder.digest(&weights_digest);
        let key = ModelKey {
            digest: digest.clone(),
            compute,
        };
        if let Some(info) = self.find(&key, canary, reason, &name)? {
            return Ok(info);
        }
        let encoder = Encoder::load(&folder.config, &snapshot, compute, self.device)
            .map_err(|cause| failed(&format!("cannot load {name}"), cause))?;
        if canary {
            check(&encoder, reason, &name)?;
        }
        let info = encoder.info(digest, weights_digest, folder.file_digests());
        // The new model takes its place only now, after its checks: refused weights must not push a
        // good model off. The price is that one model more than `models_max` is on the device for a
        // moment.
        self.loaded.push((encoder, info.clone()));
        while self.loaded.len() > self.models_max {
            self.loaded.remove(0);
        }
        Ok(info)
    }

    pub(super) fn embed(&mut self, batch: &MicroBatch) -> Result<Embedded> {
        let start = Instant::now();
        let Some((encoder, info)) = self.touch(&batch.model) else {
            let message = format!(
                "model {} is not on this device (any more); load it again",
                batch.model.digest
            );
            return Err(
                Error::new(Reason::WeightsMissing, message).with("model", &batch.model.digest)
            );
        };
        fits(encoder, batch)?;
        let dim = info.embedding_dim;
        let embed = || -> Result<_, TchError> {
            let (image, text) = encoder.both(
                &batch.images(),
                batch.fidelity,
                &batch.normalisation,
                &batch.ids,
            )?;
            let finite = image
                .f_isfinite()?
                .f_all_dim(1, true)?
                .f_logical_and(&text.f_isfinite()?.f_all_dim(1, true)?)?;
            let kept = |x: &Tensor| {
                let kind = if batch.dtype == EmbeddingDtype::F32 {
                    Kind::Float
                } else {
                    Kind::Half
                };
                bytes(
                    // Values that are not finite become zero and the row is reported. A NaN that
                    // reached the selection would poison every score that compares with this row.
                    &x.f_masked_fill(&finite.f_logical_not()?, 0.0)?
                        .f_to_kind(kind)?,
                )
            };
            Ok((
                kept(&image)?,
                kept(&text)?,
                bytes(&finite.f_to_kind(Kind::Uint8)?)?,
            ))
        };
        let (image, text, finite) =
            embed().map_err(|cause| failed("cannot embed a micro-batch", cause))?;
        let not_finite = (0..)
            .zip(&finite)
            .filter(|(_, finite)| **finite == 0)
            .map(|(row, _)| row)
            .collect();
        Ok(Embedded {
            image,
            text,
            dim,
            text_length: encoder.text_seen(&batch.ids),
            seconds: start.elapsed().as_secs_f64(),
            not_finite,
        })
    }
}

fn check(encoder: &Encoder, reason: Reason, source: &str) -> Result<()> {
    let verdict = encoder
        .canary()
        .map_err(|cause| failed("cannot embed a canary batch", cause))?;
    verdict.map_err(|refusal| refusal.into_error(reason, source))
}

/// Refuses a batch that would read past a buffer. On CUDA an id without an embedding trips a
/// device-side assertion, after which the CUDA context is unusable until the process restarts; so
/// ids are compared here, for every batch.
fn fits(encoder: &Encoder, batch: &MicroBatch) -> Result<()> {
    let (config, tower, rows) = (encoder.config(), encoder.image_tower(), batch.rows());
    let (length, vocab) = (config.text.max_position_embeddings, config.text.vocab_size);
    if let Some(problem) = tower.refuses(batch.fidelity) {
        let message = format!(
            "the model cannot be run at {}: it {problem}",
            batch.fidelity
        );
        let error = Error::new(Reason::ModelInvalid, message);
        return Err(error.with("field", batch.fidelity.field()));
    }
    if rows == 0 {
        return Err(Error::invalid("rows", "a micro-batch has at least one row"));
    }
    images_fit(tower, batch)?;
    let mismatch = |message: String| Err(Error::new(Reason::TokenizerMismatch, message));
    if rows.checked_mul(length) != Some(batch.ids.len()) {
        return mismatch(format!(
            "{} ids for {rows} rows; the model takes {length} a caption",
            batch.ids.len()
        ));
    }
    match batch
        .ids
        .iter()
        .find(|id| !usize::try_from(**id).is_ok_and(|id| id < vocab))
    {
        Some(id) => mismatch(format!(
            "token id {id} is not below the model's vocab_size of {vocab}; is it its tokenizer?"
        )),
        None => Ok(()),
    }
}

/// Refuses images of other sizes than the model takes.
fn images_fit(tower: &ImageTower, batch: &MicroBatch) -> Result<()> {
    let (rows, bytes, most) = (batch.rows(), batch.pixels.len(), tower.max_patches);
    let size = tower.side(batch.fidelity);
    let takes = match most {
        0 => format!("{size}x{size} RGB (image_size in config.json)"),
        _ => format!("at most {most} patches of {} pixels", tower.patch_size),
    };
    let is_grid = |[rows, columns]: &[u32; 2]| {
        let patches = u64::from(*rows) * u64::from(*columns);
        (1..=u64::from(most)).contains(&patches)
    };
    let has_grids = match most {
        0 => batch.grids.is_empty(),
        _ => batch.grids.len() == rows && batch.grids.iter().all(is_grid),
    };
    if rows.checked_mul(tower.pixels(batch.fidelity) * 3) == Some(bytes) && has_grids {
        return Ok(());
    }
    let message = format!(
        "{bytes} bytes of pixels for {rows} rows; the model takes {takes}, so its \
         preprocessor_config.json must make that size"
    );
    Err(Error::new(Reason::ModelInvalid, message).with("file", "preprocessor_config.json"))
}

/// Copies a tensor's elements: row-major, little endian.
fn bytes(x: &Tensor) -> Result<Bytes, TchError> {
    let x = x.f_to_device(Device::Cpu)?.f_contiguous()?;
    let count = x.numel();
    let mut bytes = vec![0; count * x.f_kind()?.elt_size_in_bytes()];
    x.f_copy_data_u8(&mut bytes, count)?;
    Ok(bytes.into())
}

fn failed(what: &str, cause: TchError) -> Error {
    if crate::cuda::torch_lacks_memory(&cause) {
        let message = format!(
            "{what}: the device's memory is not enough; lower micro_batch_rows, or keep fewer \
            models"
        );
        return Error::new(Reason::Overloaded, message).because(cause);
    }
    Error::internal(what).because(cause)
}
