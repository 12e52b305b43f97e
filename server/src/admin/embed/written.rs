//! Embeddings as Parquet files, one a shard, for other programs.
use crate::{
    dataset::Block,
    error::{Error, Result},
    storage::{Created, Location},
    worker::EmbeddedBlock,
};
use arrow::{
    array::{ArrayRef, FixedSizeListArray, Float16Array, Float32Array, StringArray, UInt64Array},
    datatypes::{DataType, Field, Schema, SchemaRef},
    record_batch::RecordBatch,
};
use half::f16;
use object_store::buffered::BufWriter;
use parquet::{arrow::AsyncArrowWriter, errors::ParquetError};
use serde::{Deserialize, Serialize};
use std::{collections::HashMap, sync::Arc};
use superbatch_proto::{ids::RowId, v1::EmbeddingDtype};

/// What the files hold; beside them, so that no folder holds a mixture.
const ABOUT: &str = "embeddings.json";

/// What embeddings were made of.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct About {
    pub manifest: String,
    pub model: String,
    pub resolution: Option<u32>,
    pub dtype: String,
    /// Absent in files of earlier versions, which knew of resolutions alone.
    #[serde(default)]
    pub fidelity: Option<String>,
    /// Absent in files of earlier versions.
    #[serde(default)]
    pub compute_dtype: Option<String>,
}

impl About {
    /// Returns the first thing in which files of `known` are others: its name, what they have, and
    /// what is asked for. What `known` does not say is none.
    fn differs(&self, known: &Self) -> Option<(&'static str, String, String)> {
        let side = |side: u32| format!("resolution={side}");
        let full = || known.resolution.map_or("full".to_owned(), side);
        let fidelity = known.fidelity.clone().unwrap_or_else(full);
        let own = self.fidelity.clone().unwrap_or_default();
        let arithmetic = self.compute_dtype.clone().unwrap_or_default();
        let their_arithmetic = known.compute_dtype.clone();
        let pairs = [
            ("manifest", known.manifest.clone(), self.manifest.clone()),
            ("model", known.model.clone(), self.model.clone()),
            ("fidelity", fidelity, own),
            ("embedding_dtype", known.dtype.clone(), self.dtype.clone()),
            (
                "compute_dtype",
                their_arithmetic.unwrap_or_else(|| arithmetic.clone()),
                arithmetic,
            ),
        ];
        pairs.into_iter().find(|(_, theirs, own)| theirs != own)
    }
}

/// The folder that files are written to.
pub(super) struct Out {
    location: Location,
}

impl Out {
    /// # Errors
    /// `InvalidArgument` if the folder holds embeddings of something else.
    pub(super) async fn open(location: Location, about: &About) -> Result<Self> {
        let own = serde_json::to_vec(about).expect("plain data encodes");
        if let Created::Theirs(bytes) = location.create(ABOUT, own.into()).await? {
            let known = serde_json::from_slice::<About>(&bytes).map_err(|e| {
                let uri = location.uri();
                let message = format!("{ABOUT} in {uri} cannot be read; give another folder");
                Error::invalid("out", message).because(e)
            })?;
            if let Some((what, theirs, own)) = about.differs(&known) {
                let message = format!(
                    "{} holds embeddings of {what} {theirs}, and these are of {own} ({ABOUT}); \
                     give another folder",
                    location.uri()
                );
                return Err(Error::invalid("out", message));
            }
        }
        Ok(Self { location })
    }

    /// Makes a writer of one shard's file; `None` if the file is there. `source` if there are
    /// several.
    pub(super) async fn shard(
        &self,
        source: Option<u32>,
        path: &str,
        dtype: EmbeddingDtype,
    ) -> Result<Option<ShardWriter>> {
        let folder = source.map_or_else(String::new, |source| format!("{source}/"));
        let key = format!("{folder}{path}.embeddings.parquet");
        if self.location.head(&key).await?.is_some() {
            return Ok(None);
        }
        Ok(Some(ShardWriter {
            location: self.location.clone(),
            key,
            source,
            path: path.to_owned(),
            dtype,
            writer: None,
        }))
    }
}

/// One file on its way; a row group a block. It is uploaded in parts as it is written: the
/// embeddings of a shard of a million rows take gigabytes. The file is there once it is whole.
pub(super) struct ShardWriter {
    location: Location,
    key: String,
    source: Option<u32>,
    path: String,
    dtype: EmbeddingDtype,
    /// From the first block on, which has the embeddings' size.
    writer: Option<AsyncArrowWriter<BufWriter>>,
}

impl ShardWriter {
    /// Appends the rows of a block.
    pub(super) async fn push(&mut self, about: &Block, block: EmbeddedBlock) -> Result<()> {
        let schema = schema(self.dtype, block.dim);
        let batch = self.batch(&schema, about, &block)?;
        let writer = match &mut self.writer {
            Some(writer) => writer,
            empty => {
                let (store, path) = (self.location.store(), self.location.path(&self.key));
                let parts = BufWriter::new(store.clone(), path);
                empty.insert(AsyncArrowWriter::try_new(parts, schema, None).map_err(encoding)?)
            }
        };
        let written = async {
            writer.write(&batch).await?;
            writer.flush().await
        };
        let written = written.await;
        written.map_err(|e| self.error(e))
    }

    /// Ends the file, which is there from now on.
    pub(super) async fn finish(mut self) -> Result<()> {
        let Some(writer) = self.writer.take() else {
            return Ok(());
        };
        let closed = writer.close().await;
        closed.map(drop).map_err(|e| self.error(e))
    }

    fn error(&self, cause: ParquetError) -> Error {
        // The writer of the parts speaks as a file does.
        let cause = match cause {
            ParquetError::External(cause) => match cause.downcast::<std::io::Error>() {
                Ok(cause) => cause,
                Err(cause) => return encoding(ParquetError::External(cause)),
            },
            cause => return encoding(cause),
        };
        let cause = object_store::Error::Generic {
            store: "object store",
            source: cause,
        };
        self.location.error("write", &self.key, cause)
    }

    fn batch(
        &self,
        schema: &SchemaRef,
        about: &Block,
        block: &EmbeddedBlock,
    ) -> Result<RecordBatch> {
        let rows = about.rows;
        let numbers = (0..rows).map(|row| about.row_in_shard(row));
        let id = |row: u64| RowId {
            source: self.source,
            shard: &self.path,
            row,
        };
        let ids = numbers.clone().map(|row| id(row).to_string());
        let faults: HashMap<u32, &str> = block
            .faults
            .iter()
            .map(|(row, fault)| (*row, fault.reason.as_str_name()))
            .collect();
        let fault = |row: u32| {
            let name = faults.get(&row)?;
            Some(name.trim_start_matches("BAD_ROW_REASON_"))
        };
        let columns: Vec<ArrayRef> = vec![
            Arc::new(StringArray::from_iter_values(ids)),
            Arc::new(UInt64Array::from_iter_values(numbers)),
            Arc::new(StringArray::from_iter((0..rows).map(fault))),
            Arc::new(self.vectors(&block.image, block.dim)?),
            Arc::new(self.vectors(&block.text, block.dim)?),
        ];
        RecordBatch::try_new(schema.clone(), columns).map_err(encoding)
    }

    fn vectors(&self, bytes: &[u8], dim: usize) -> Result<FixedSizeListArray> {
        let values: ArrayRef = match self.dtype {
            EmbeddingDtype::F32 => Arc::new(Float32Array::from_iter_values(
                bytes.as_chunks().0.iter().map(|v| f32::from_le_bytes(*v)),
            )),
            _ => Arc::new(Float16Array::from_iter_values(
                bytes.as_chunks().0.iter().map(|v| f16::from_le_bytes(*v)),
            )),
        };
        FixedSizeListArray::try_new(item(self.dtype), dim as i32, values, None).map_err(encoding)
    }
}

fn item(dtype: EmbeddingDtype) -> Arc<Field> {
    let kind = match dtype {
        EmbeddingDtype::F32 => DataType::Float32,
        _ => DataType::Float16,
    };
    Arc::new(Field::new("item", kind, false))
}

fn schema(dtype: EmbeddingDtype, dim: usize) -> SchemaRef {
    let vector = DataType::FixedSizeList(item(dtype), dim as i32);
    Arc::new(Schema::new(vec![
        Field::new("id", DataType::Utf8, false),
        Field::new("row", DataType::UInt64, false),
        Field::new("fault", DataType::Utf8, true),
        Field::new("image_embedding", vector.clone(), false),
        Field::new("text_embedding", vector, false),
    ]))
}

fn encoding(cause: impl std::error::Error + Send + Sync + 'static) -> Error {
    Error::internal("cannot encode embeddings as Parquet").because(cause)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn about(json: &str) -> About {
        serde_json::from_str(json).unwrap()
    }

    #[test]
    fn a_folder_keeps_apart_what_differs_in_any_of_it() {
        let full = about(
            r#"{"manifest": "d", "model": "m", "resolution": null, "dtype": "F16",
            "fidelity": "full", "compute_dtype": "f32"}"#,
        );
        let with = |change: fn(&mut About)| {
            let mut changed = full.clone();
            change(&mut changed);
            full.differs(&changed).map(|(what, ..)| what)
        };
        assert_eq!(full.differs(&full), None);
        assert_eq!(with(|of| of.model = "n".into()), Some("model"));
        let patch = |of: &mut About| of.fidelity = Some("patch=32".into());
        assert_eq!(with(patch), Some("fidelity"));
        let bf16 = |of: &mut About| of.compute_dtype = Some("bf16".into());
        assert_eq!(with(bf16), Some("compute_dtype"));
    }

    #[test]
    fn what_an_earlier_version_wrote_is_added_to() {
        let old = r#"{"manifest": "d", "model": "m", "resolution": 8, "dtype": "F16"}"#;
        let old = about(old);
        let of = |fidelity: &str| About {
            fidelity: Some(fidelity.into()),
            compute_dtype: Some("f32".into()),
            ..old.clone()
        };
        assert_eq!(of("resolution=8").differs(&old), None);
        let layers = of("layers=2").differs(&old).unwrap();
        assert_eq!(layers.0, "fidelity");
        assert_eq!(layers.1, "resolution=8");
    }
}
