//! Reads blocks: the needed columns of one row group, by byte ranges, checked against the manifest
//! and kept while there is room.
use super::cache::Cache;
use crate::{
    dataset::{
        Format, Layout, Manifest, Mask, Ranges, Shard, ShardFile, SourceManifest, Survey, TarBlock,
        survey_kept,
    },
    error::{Error, Result},
    storage::{Location, Stores},
    worker::inputs::captions,
};
use arrow::{
    array::{
        Array, ArrayRef, AsArray, BooleanArray, RecordBatch, RecordBatchOptions, RecordBatchReader,
        StructArray,
    },
    compute::{cast, concat_batches},
    datatypes::{DataType, FieldRef, SchemaRef},
    error::ArrowError,
};
use parquet::arrow::{
    ProjectionMask,
    arrow_reader::{ArrowReaderMetadata, ParquetRecordBatchReaderBuilder, RowSelection},
};
use std::{fmt, ops::Range, sync::Arc};

/// Memory for parsed footers, and as much again for indexes of tars. Every block of a shard needs
/// its shard's footer or index, and a footer of a wide file takes megabytes.
const FOOTERS_BYTES: usize = 64 << 20;

/// Reads whole blocks. Concurrent reads of one block share one read. The blocks used last are kept,
/// up to a number of bytes.
pub struct BlockReader {
    stores: Stores,
    blocks: Cache<BlockKey, Arc<RecordBatch>>,
    footers: Cache<ShardKey, ArrowReaderMetadata>,
    surveys: Cache<ShardKey, Arc<Survey>>,
    /// The state, which holds the indexes of tars.
    state: Option<Location>,
}

/// A shard in one state: root, path, size, ETag. A replaced shard has another key, so nothing
/// cached of the old one is served for it.
type ShardKey = (String, String, u64, Option<String>);
/// Shard, block, then the columns: image, caption, extra ones; then which rows, and the seed of
/// their captions.
type BlockKey = (ShardKey, u32, Vec<String>, Option<Mask>, Option<u64>);

impl fmt::Debug for BlockReader {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("BlockReader")
            .field("stores", &self.stores)
            .finish_non_exhaustive()
    }
}

impl BlockReader {
    /// Makes a reader that keeps up to `cache_bytes` of blocks; 0 keeps none.
    pub fn new(stores: Stores, cache_bytes: usize) -> Self {
        let blocks = Cache::new(cache_bytes, |batch: &Arc<RecordBatch>| {
            batch.get_array_memory_size()
        });
        let footers = Cache::new(FOOTERS_BYTES, |footer: &ArrowReaderMetadata| {
            footer.metadata().memory_size()
        });
        Self {
            stores,
            blocks,
            footers,
            surveys: Cache::new(FOOTERS_BYTES, |survey: &Arc<Survey>| survey.bytes()),
            state: None,
        }
    }

    /// Reads the indexes of tars from `state`, and writes new ones there.
    #[must_use]
    pub fn keeping(self, state: Location) -> Self {
        Self {
            state: Some(state),
            ..self
        }
    }

    /// Returns the bytes of blocks in memory.
    pub fn cached_bytes(&self) -> usize {
        self.blocks.used()
    }

    /// Reads a whole block, in row order, in [`Manifest::data_schema`] of `columns`. Image and
    /// caption may be null.
    ///
    /// # Errors
    /// `DatasetChanged` if the shard is not the object that was indexed; `InvalidArgument`
    /// naming the shard if it is and cannot be decoded; `StorageUnreachable`, after the store's
    /// own retries; those of [`Manifest::data_schema`].
    pub async fn read(
        &self,
        manifest: &Manifest,
        source: u32,
        shard: u32,
        block: u32,
        columns: &[String],
    ) -> Result<Arc<RecordBatch>> {
        let none = || {
            Error::internal(format!(
                "the manifest has no block {block} in shard {shard} of source {source}"
            ))
        };
        let source = manifest.sources.get(source as usize).ok_or_else(none)?;
        let shard = source.shards.get(shard as usize).ok_or_else(none)?;
        let indexed = shard.blocks.get(block as usize).ok_or_else(none)?;
        let shard_key = shard_key(source, shard);
        let mut names = vec![
            source.layout.image_column.clone(),
            source.layout.caption_column.clone(),
        ];
        names.extend_from_slice(columns);
        let seed = source.layout.caption_seed;
        let key = (shard_key.clone(), block, names, indexed.mask.clone(), seed);
        let wanted = Wanted {
            layout: source.layout.clone(),
            columns: columns.to_vec(),
            schema: manifest.data_schema(columns)?,
            block: block as usize,
            rows: indexed.rows as usize,
            stored_rows: indexed.stored_rows(),
            mask: indexed.mask.clone(),
        };
        self.blocks
            .get(&key, self.fetch(source, shard, &shard_key, wanted))
            .await
    }

    /// Returns where the images of a tar's block lie in their shard, row by row; of a Parquet file
    /// nothing. Reads no more than the tar's index.
    ///
    /// # Errors
    /// As [`BlockReader::read`].
    pub async fn image_places(
        &self,
        manifest: &Manifest,
        source: u32,
        shard: u32,
        block: u32,
    ) -> Result<Vec<Option<Range<u64>>>> {
        let source = manifest.sources.get(source as usize);
        let shard = source.and_then(|source| source.shards.get(shard as usize));
        let (Some(source), Some(shard)) = (source, shard) else {
            return Err(Error::internal("the manifest has no such shard"));
        };
        let Some(indexed) = shard.blocks.get(block as usize) else {
            return Err(Error::internal("the manifest has no such block"));
        };
        if source.layout.format == Format::Parquet {
            return Ok(Vec::new());
        }
        let location = self.shard(source, shard)?;
        let file = ShardFile::new(location, shard.size, shard.etag.clone());
        let survey = self.survey(&file, &shard_key(source, shard)).await?;
        let rows = TarBlock::new(survey, &source.layout, &[], indexed, &file)?;
        Ok(rows.image_ranges())
    }

    /// Returns the place of a shard. The allow-list is not asked: a call names a manifest by its
    /// digest, and not this URI. The manifest lies in the state, which only the operator and
    /// coordinators write. What it names was allowed when it was indexed.
    fn shard(&self, source: &SourceManifest, shard: &Shard) -> Result<Location> {
        Ok(self.stores.open(&source.root_uri)?.below(&shard.path))
    }

    async fn survey(&self, file: &ShardFile, key: &ShardKey) -> Result<Arc<Survey>> {
        let state = self.state.as_ref();
        let survey = async { survey_kept(state, file).await.map(Arc::new) };
        self.surveys.get(key, survey).await
    }

    async fn fetch(
        &self,
        source: &SourceManifest,
        shard: &Shard,
        key: &ShardKey,
        wanted: Wanted,
    ) -> Result<Arc<RecordBatch>> {
        let location = self.shard(source, shard)?;
        let file = ShardFile::new(location, shard.size, shard.etag.clone());
        match source.layout.format {
            Format::Parquet => self.row_group(&file, key, wanted).await,
            Format::Tar => self.samples(&file, shard, key, wanted).await,
        }
    }

    async fn row_group(
        &self,
        file: &ShardFile,
        key: &ShardKey,
        wanted: Wanted,
    ) -> Result<Arc<RecordBatch>> {
        let footer = self.footers.get(key, file.footer()).await?;
        let groups = footer.metadata().row_groups();
        let Some(group) = groups
            .get(wanted.block)
            .filter(|g| g.num_rows() == i64::from(wanted.stored_rows))
        else {
            return Err(file.changed("its row groups are others"));
        };
        let mask = wanted.projection(&footer);
        let needed = group
            .columns()
            .iter()
            .enumerate()
            .filter(|(leaf, _)| mask.leaf_included(*leaf));
        let ranges = needed
            .map(|(_, column)| file.column(column))
            .collect::<Result<Vec<_>>>()?;
        let (bytes, block) = (file.ranges(&ranges).await?, wanted.block);
        decoded(file, block, move || wanted.decode(&bytes, &footer, &mask)).await
    }

    async fn samples(
        &self,
        file: &ShardFile,
        shard: &Shard,
        key: &ShardKey,
        wanted: Wanted,
    ) -> Result<Arc<RecordBatch>> {
        let survey = self.survey(file, key).await?;
        let (block, indexed) = (wanted.block, &shard.blocks[wanted.block]);
        let rows = TarBlock::new(survey, &wanted.layout, &wanted.columns, indexed, file)?;
        let ranges = rows.ranges();
        let ranges = ranges.map_err(|cause| file.undecodable(block, cause))?;
        let bytes = file.ranges(&ranges).await?;
        decoded(file, block, move || wanted.assemble(&rows.decode(&bytes)?)).await
    }
}

fn shard_key(source: &SourceManifest, shard: &Shard) -> ShardKey {
    (
        source.root_uri.clone(),
        shard.path.clone(),
        shard.size,
        shard.etag.clone(),
    )
}

/// Decodes a block off the async threads.
async fn decoded(
    file: &ShardFile,
    block: usize,
    decode: impl FnOnce() -> Result<RecordBatch, ArrowError> + Send + 'static,
) -> Result<Arc<RecordBatch>> {
    let batch = tokio::task::spawn_blocking(decode).await;
    let batch = batch
        .map_err(|e| Error::internal(format!("reading {} panicked", file.uri())).because(e))?;
    batch
        .map(Arc::new)
        .map_err(|cause| file.undecodable(block, cause))
}

/// The columns and types to read of a block.
struct Wanted {
    layout: Layout,
    columns: Vec<String>,
    schema: SchemaRef,
    block: usize,
    rows: usize,
    /// Rows of the block in the file, of which `mask` keeps some.
    stored_rows: u32,
    mask: Option<Mask>,
}

impl Wanted {
    fn decode(
        &self,
        bytes: &Ranges,
        footer: &ArrowReaderMetadata,
        mask: &ProjectionMask,
    ) -> Result<RecordBatch, ArrowError> {
        let cause = match self.read(bytes, footer.clone(), mask) {
            Ok(batch) => return self.assemble(&batch),
            Err(cause) => cause,
        };
        // Arrow's reader checks text columns as a whole, so one text that is not UTF-8 fails the
        // block. The second pass reads them as bytes, so that the bad text costs its row only. It
        // runs only after a failure, because it copies every text once more. Its own error is
        // dropped for the first one, which names the true cause.
        let fields = self.schema.fields().iter().skip(2).zip(&self.columns);
        let texts = fields.filter(|(field, _)| *field.data_type() == DataType::Utf8);
        let texts = texts.map(|(_, column)| column.as_str());
        let texts: Vec<&str> = texts.chain([self.layout.caption_column.as_str()]).collect();
        let as_bytes = captions::as_bytes(footer, &texts)?;
        let batch = self.read(bytes, as_bytes, mask).map_err(|_| cause)?;
        self.assemble(&batch)
    }

    fn read(
        &self,
        bytes: &Ranges,
        footer: ArrowReaderMetadata,
        mask: &ProjectionMask,
    ) -> Result<RecordBatch, ArrowError> {
        let mut builder = ParquetRecordBatchReaderBuilder::new_with_metadata(bytes.clone(), footer)
            .with_row_groups(vec![self.block])
            .with_batch_size(self.rows.max(1))
            .with_projection(mask.clone());
        if let Some(kept) = &self.mask {
            let kept: Vec<bool> = kept.rows().collect();
            let kept = RowSelection::from_filters(&[BooleanArray::from(kept)]);
            builder = builder.with_row_selection(kept);
        }
        let reader = builder.build()?;
        let schema = reader.schema();
        let batches = reader.collect::<Result<Vec<_>, _>>()?;
        concat_batches(&schema, &batches)
    }

    /// Returns the leaves to read: only the bytes of an image struct, and the whole of all other
    /// columns.
    fn projection(&self, footer: &ArrowReaderMetadata) -> ProjectionMask {
        let schema = footer.parquet_schema();
        let layout = &self.layout;
        let wanted = |leaf: usize| {
            let parts = schema.column(leaf).path().parts().to_vec();
            let root = &parts[0];
            let image = *root == layout.image_column
                && (!layout.image_in_struct || parts.get(1).is_some_and(|part| part == "bytes"));
            image || *root == layout.caption_column || self.columns.contains(root)
        };
        ProjectionMask::leaves(
            schema,
            (0..schema.num_columns()).filter(|&leaf| wanted(leaf)),
        )
    }

    /// Returns the batch with the delivered names and types.
    fn assemble(&self, batch: &RecordBatch) -> Result<RecordBatch, ArrowError> {
        let layout = &self.layout;
        let column = |name: &str| {
            let missing = || ArrowError::SchemaError(format!("no column '{name}'"));
            batch.column_by_name(name).cloned().ok_or_else(missing)
        };
        let mut image = column(&layout.image_column)?;
        if layout.image_in_struct {
            image = bytes_of(&image)?;
        }
        let lists = batch.column_by_name(TarBlock::CAPTIONS).cloned();
        let mut caption = lists.map_or_else(|| column(&layout.caption_column), Ok)?;
        if let Some(seed) = layout.caption_seed {
            caption = captions::drawn(&caption, seed)?;
        }
        let mut arrays = vec![image, caption];
        for name in &self.columns {
            arrays.push(column(name)?);
        }
        let cast_to = |(array, field): (ArrayRef, &FieldRef)| {
            let is_bytes = matches!(
                array.data_type(),
                DataType::Binary | DataType::LargeBinary | DataType::BinaryView
            );
            if *field.data_type() == DataType::Utf8 && is_bytes {
                return captions::from_bytes(cast(&array, &DataType::Binary)?.as_binary());
            }
            cast(&array, field.data_type())
        };
        let arrays = arrays
            .into_iter()
            .zip(self.schema.fields())
            .map(cast_to)
            .collect::<Result<Vec<_>, _>>()?;
        let options = RecordBatchOptions::new().with_row_count(Some(self.rows));
        RecordBatch::try_new_with_options(self.schema.clone(), arrays, &options)
    }
}

/// Returns the `bytes` of an image struct. A null struct may have bytes in its child, so its nulls
/// are applied.
fn bytes_of(image: &ArrayRef) -> Result<ArrayRef, ArrowError> {
    let missing = || ArrowError::SchemaError("the image is no struct with `bytes`".to_owned());
    let image = image
        .as_any()
        .downcast_ref::<StructArray>()
        .ok_or_else(missing)?;
    let bytes = image.column_by_name("bytes").ok_or_else(missing)?;
    match image.nulls() {
        None => Ok(bytes.clone()),
        Some(nulls) => arrow::compute::nullif(bytes, &BooleanArray::new(!nulls.inner(), None)),
    }
}

#[cfg(test)]
pub(crate) mod tests;
