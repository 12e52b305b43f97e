//! Embeddings as Parquet files, one a shard, for whoever wants them.
use crate::{
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
use parquet::arrow::ArrowWriter;
use serde::{Deserialize, Serialize};
use std::{collections::HashMap, sync::Arc};
use superbatch_proto::{ids::RowId, v1::EmbeddingDtype};

/// What the files hold; beside them, so that no folder holds a mixture.
const ABOUT: &str = "embeddings.json";

/// What embeddings were made of.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct About {
    pub manifest: String,
    pub model: String,
    pub resolution: Option<u32>,
    pub dtype: String,
}

/// The folder that files are written to.
pub struct Out {
    location: Location,
}

impl Out {
    /// # Errors
    /// `InvalidArgument` where the folder holds embeddings of something else.
    pub async fn open(location: Location, about: &About) -> Result<Self> {
        let own = serde_json::to_vec(about).expect("plain data encodes");
        if let Created::Theirs(bytes) = location.create(ABOUT, own.into()).await?
            && serde_json::from_slice::<About>(&bytes).ok().as_ref() != Some(about)
        {
            let message = format!(
                "{} holds embeddings of another model, data set, resolution or dtype ({ABOUT}); \
                 give another folder",
                location.uri()
            );
            return Err(Error::invalid("out", message));
        }
        Ok(Self { location })
    }

    /// A writer of one shard's file; `None` where the file is there. `source` where there are
    /// several.
    pub async fn shard(
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

/// One file on its way; a row group a block.
pub struct ShardWriter {
    location: Location,
    key: String,
    source: Option<u32>,
    path: String,
    dtype: EmbeddingDtype,
    /// From the first block on, which tells the embeddings' size.
    writer: Option<ArrowWriter<Vec<u8>>>,
}

impl ShardWriter {
    /// Appends a block whose first row has that number in the shard.
    pub fn push(&mut self, first_row: u64, rows: u32, block: EmbeddedBlock) -> Result<()> {
        let schema = schema(self.dtype, block.dim);
        let batch = self.batch(&schema, first_row, rows, &block)?;
        let writer = match &mut self.writer {
            Some(writer) => writer,
            empty => {
                empty.insert(ArrowWriter::try_new(Vec::new(), schema, None).map_err(encoding)?)
            }
        };
        writer.write(&batch).map_err(encoding)?;
        writer.flush().map_err(encoding)
    }

    /// Writes the file.
    pub async fn finish(self) -> Result<()> {
        let Some(writer) = self.writer else {
            return Ok(());
        };
        let bytes = writer.into_inner().map_err(encoding)?;
        self.location.put(&self.key, bytes.into()).await
    }

    fn batch(
        &self,
        schema: &SchemaRef,
        first_row: u64,
        rows: u32,
        block: &EmbeddedBlock,
    ) -> Result<RecordBatch> {
        let numbers = first_row..first_row + u64::from(rows);
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
