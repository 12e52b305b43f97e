//! Reference embeddings ahead of any run: a block's, by the pass that scoring makes.
use super::{
    embed::Shape,
    extent::Extent,
    slice::Slice,
    survey::{Task, survey},
};
use crate::{
    error::{Error, Result},
    fidelity::Fidelity,
    selection::{LOSSES_OF_TEXTS, TOKEN_LOSSES_OF_TEXTS},
    worker::{engine::Engine, inputs::preprocess::RowFault, loader::Loaded, model::Compute},
};
use std::sync::Arc;
use superbatch_proto::v1::{Approximation, BlockRows, EmbeddingDtype, ModelRef};

/// What the embeddings depend on beside the rows; a run finds those that were made with its own.
#[derive(Debug, Clone)]
pub struct Asked {
    /// Of the dataset manifest, which is in the state.
    pub manifest: String,
    pub model: ModelRef,
    pub approximation: Option<Approximation>,
    pub dtype: EmbeddingDtype,
    /// How many rows go through the model together.
    pub micro_batch_rows: usize,
}

/// A model that blocks are embedded with.
pub struct Embedder<'a> {
    engine: &'a Engine,
    asked: Asked,
    fidelity: Fidelity,
    model: Arc<Loaded>,
}

/// One block's embeddings, `[rows, dim]` each, little endian; rows that cannot be used are zero.
pub struct EmbeddedBlock {
    pub image: Vec<u8>,
    pub text: Vec<u8>,
    pub dim: usize,
    /// By rising row.
    pub faults: Vec<(u32, RowFault)>,
    /// Whether all of it was kept already.
    pub was_kept: bool,
    /// Spent here and now; none if the block was kept.
    pub flops: f64,
}

impl<'a> Embedder<'a> {
    /// # Errors
    /// Those of loading a model; `ModelInvalid` if it cannot be run at the fidelity.
    pub(in crate::worker) async fn open(engine: &'a Engine, asked: Asked) -> Result<Self> {
        let fidelity = Fidelity::of(asked.approximation.as_ref())?;
        let model = engine.models.load(&asked.model).await?.at(fidelity)?;
        Ok(Self {
            engine,
            asked,
            fidelity,
            model,
        })
    }

    /// Names the model as receipts do: BLAKE3 over its folder's files.
    pub fn digest(&self) -> &str {
        &self.model.info.digest
    }

    /// Returns whether the model gives losses instead of embeddings.
    pub fn gives_losses(&self) -> bool {
        self.model.info.gives_losses
    }

    /// Returns whether the model gives losses of texts in the place of images.
    pub fn reads_texts(&self) -> bool {
        let model_type = self.model.info.model_type.as_str();
        [LOSSES_OF_TEXTS, TOKEN_LOSSES_OF_TEXTS].contains(&model_type)
    }

    /// Names the fidelity, as `resolution=128`; the whole model is `full`.
    pub fn fidelity(&self) -> String {
        self.fidelity.to_string()
    }

    /// Names the arithmetic that the device and the model have settled on.
    pub fn compute_dtype(&self) -> &'static str {
        match self.model.info.key.compute {
            Compute::F32 => "f32",
            Compute::Bf16 => "bf16",
        }
    }

    /// Returns the embeddings of a whole block: those that are kept, or made and then kept.
    ///
    /// # Errors
    /// Those of reading, and of the device.
    pub async fn block(&self, block: BlockRows) -> Result<EmbeddedBlock> {
        let (manifest, micro_batch_rows) = (&self.asked.manifest, self.asked.micro_batch_rows);
        let slice = Slice::open(self.engine, manifest, vec![block], Vec::new()).await?;
        let task = Task {
            step: 0,
            shape: Shape {
                micro_batch_rows,
                dtype: self.asked.dtype,
            },
            fidelity: self.fidelity,
            reference: Some(self.model.clone()),
            extent: Extent::Whole,
            inputs: None,
            keep_ready: false,
        };
        let slot = self.engine.slot().await?;
        let surveyed = survey(self.engine, &slice, &task).await?.pop();
        drop(slot);
        let found =
            surveyed.and_then(|found| Some((found.reference?, found.spent, found.was_embedded)));
        let Some((kept, spent, was_embedded)) = found else {
            return Err(Error::internal(
                "a block was surveyed without its reference",
            ));
        };
        Ok(EmbeddedBlock {
            image: kept.embeddings.image.clone(),
            text: kept.embeddings.text.clone(),
            dim: kept.embeddings.dim,
            faults: kept.faults.clone(),
            was_kept: !was_embedded,
            flops: spent.rows_embedded as f64 * self.model.info.image_flops + spent.text_flops,
        })
    }
}
