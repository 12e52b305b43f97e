//! Reads blocks: the needed columns of one row group, by byte ranges, checked against the manifest
//! and kept while there is room. Images that lie beside the file are read by row.
mod beside;
mod wanted;

use self::{
    beside::{Beside, ImageReads, WithImages},
    wanted::{Decoded, Part, Wanted},
};
use super::cache::Cache;
use crate::{
    buffers::Buffers,
    dataset::{
        Format, Manifest, Mask, Shard, ShardFile, SourceManifest, Survey, TarBlock, survey_kept,
    },
    error::{Error, Result},
    storage::{Location, Stores},
    worker::inputs::images,
};
use arrow::{array::RecordBatch, error::ArrowError};
use parquet::arrow::arrow_reader::ArrowReaderMetadata;
use std::{fmt, ops::Range, sync::Arc};

/// Memory for parsed footers, and as much again for indexes of tars. Every block of a shard needs
/// its shard's footer or index, and a footer of a wide file takes megabytes.
const FOOTERS_BYTES: usize = 64 << 20;
/// What [`BlockReader::reading_images`] sets, where it is not called.
const IMAGE_BYTES_MAX: u64 = 64 << 20;
const IMAGES_AT_ONCE: usize = 8;

/// Reads whole blocks. Concurrent reads of one block share one read. The blocks used last are kept,
/// up to a number of bytes.
pub struct BlockReader {
    stores: Stores,
    blocks: Cache<BlockKey, ReadBlock>,
    footers: Cache<ShardKey, ArrowReaderMetadata>,
    surveys: Cache<ShardKey, Arc<Survey>>,
    /// The state, which holds the indexes of tars.
    state: Option<Location>,
    images: ImageReads,
    keeps_views: bool,
    buffers: Buffers,
}

/// A block in memory, in the order of its rows.
#[derive(Debug, Clone)]
pub struct ReadBlock {
    /// All rows in the data schema. Images that lie beside the file are null. Others may be views:
    /// see [`BlockReader::keeping_views`].
    pub batch: Arc<RecordBatch>,
    beside: Option<Arc<Beside>>,
    /// Bytes of the file that views hold in memory: all that was read. 0 if there are no views.
    range_bytes: usize,
}

impl ReadBlock {
    /// Returns whether images lie beside the file, so that [`BlockReader::with_images`] reads them.
    pub fn has_images_beside(&self) -> bool {
        self.beside.is_some()
    }

    fn image_uris(&self) -> Vec<ImagePlace> {
        let uri = |row| self.beside.as_ref().and_then(|beside| beside.uri(row));
        let rows = 0..self.batch.num_rows();
        rows.map(|row| ImagePlace {
            bytes: None,
            uri: uri(row),
        })
        .collect()
    }

    /// Returns the memory that it holds.
    pub(crate) fn bytes(&self) -> usize {
        let beside = self.beside.as_ref().map_or(0, |beside| beside.bytes());
        self.batch.get_array_memory_size().max(self.range_bytes) + beside
    }
}

/// Where an image lies: its bytes in a tar, or its URI beside the shards.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ImagePlace {
    pub bytes: Option<Range<u64>>,
    pub uri: Option<String>,
}

/// A shard in one state: root, path, size, ETag. A replaced shard has another key, so nothing
/// cached of the old one is served for it.
type ShardKey = (String, String, u64, Option<String>);
/// Shard, block, then the columns: image, caption, extra ones; then which rows, the seed of their
/// captions, and the root of their images.
type BlockKey = (
    ShardKey,
    u32,
    Vec<String>,
    Option<Mask>,
    Option<u64>,
    Option<String>,
);

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
        let footers = Cache::new(FOOTERS_BYTES, |footer: &ArrowReaderMetadata| {
            footer.metadata().memory_size()
        });
        Self {
            stores,
            blocks: Cache::new(cache_bytes, ReadBlock::bytes),
            footers,
            surveys: Cache::new(FOOTERS_BYTES, |survey: &Arc<Survey>| survey.bytes()),
            state: None,
            images: ImageReads::new(IMAGE_BYTES_MAX, IMAGES_AT_ONCE),
            keeps_views: false,
            buffers: Buffers::new(0),
        }
    }

    /// Reads local files into buffers that are used again.
    #[must_use]
    pub(crate) fn reusing(self, buffers: &Buffers) -> Self {
        Self {
            buffers: buffers.clone(),
            ..self
        }
    }

    /// Leaves images where they lie, if they lie uncompressed in a Parquet file and are most of the
    /// bytes that are read of a row group: these are kept, and the block's first column is of
    /// views. They are copied when rows leave the block.
    #[must_use]
    pub fn keeping_views(self) -> Self {
        Self {
            keeps_views: true,
            ..self
        }
    }

    /// Reads images that lie beside their file up to a number of bytes, and so many at a time.
    #[must_use]
    pub fn reading_images(self, bytes_max: u64, at_once: usize) -> Self {
        Self {
            images: ImageReads::new(bytes_max, at_once),
            ..self
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
    /// caption may be null. Images that lie beside the file are not read.
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
    ) -> Result<ReadBlock> {
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
        let (mask, seed) = (indexed.mask.clone(), source.layout.caption_seed);
        let root = source.layout.image_root.clone();
        let key = (shard_key.clone(), block, names, mask, seed, root);
        let wanted = Wanted {
            layout: source.layout.clone(),
            columns: columns.to_vec(),
            schema: manifest.data_schema(columns)?,
            keeps_views: self.keeps_views,
            number: block as usize,
            block: indexed.clone(),
        };
        self.blocks
            .get(&key, self.fetch(source, shard, &shard_key, wanted))
            .await
    }

    /// Returns a block with those images of some of its rows that lie beside the file, in pieces
    /// that hold the rows in their order; nothing of a block without such images.
    ///
    /// # Errors
    /// `StorageUnreachable`, after the store's own retries; `DatasetChanged` if the hub has lost
    /// their commit; `InvalidArgument` for more than 2 GiB. An image that is not there is a fault
    /// of its row, which lies behind the null in its place.
    pub async fn with_images(&self, block: &ReadBlock, rows: &[u32]) -> Result<Vec<WithImages>> {
        match &block.beside {
            Some(beside) => beside.rows(block.batch.clone(), rows, &self.images).await,
            None => Ok(Vec::new()),
        }
    }

    /// Returns where the images of a block lie, row by row: in a tar, or beside the shards; of
    /// images in Parquet files nothing. Reads no more than the tar's index, or the paths.
    ///
    /// # Errors
    /// As [`BlockReader::read`].
    pub async fn image_places(
        &self,
        manifest: &Manifest,
        source: u32,
        shard: u32,
        block: u32,
        columns: &[String],
    ) -> Result<Vec<ImagePlace>> {
        let found = manifest.sources.get(source as usize);
        let found = found.and_then(|found| Some((found, found.shards.get(shard as usize)?)));
        let Some((about, within)) = found else {
            return Err(Error::internal("the manifest has no such shard"));
        };
        let Some(indexed) = within.blocks.get(block as usize) else {
            return Err(Error::internal("the manifest has no such block"));
        };
        if about.layout.image_root.is_some() {
            let read = self.read(manifest, source, shard, block, columns).await?;
            return Ok(read.image_uris());
        }
        if about.layout.format == Format::Parquet {
            return Ok(Vec::new());
        }
        let file = ShardFile::new(self.shard(about, within)?, within.size, within.etag.clone());
        let survey = self.survey(&file, &shard_key(about, within)).await?;
        let rows = TarBlock::new(survey, &about.layout, &[], indexed, &file)?;
        let ranges = rows.image_ranges().into_iter();
        let place = |bytes| ImagePlace { bytes, uri: None };
        Ok(ranges.map(place).collect())
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
    ) -> Result<ReadBlock> {
        let location = self.shard(source, shard)?;
        let file = ShardFile::new(location, shard.size, shard.etag.clone())
            .cached_in(self.stores.disk_cache())
            .reusing(&self.buffers);
        let ((batch, paths), range_bytes) = match source.layout.format {
            Format::Parquet => self.row_group(&file, key, wanted).await?,
            Format::Tar => (self.samples(&file, shard, key, wanted).await?, 0),
        };
        let beside = match (&source.layout.image_root, paths) {
            (Some(root), Some(paths)) => {
                // As the shard's place: the manifest names it, and the call does not.
                let root = self.stores.open(root)?;
                Some(Arc::new(Beside { root, paths }))
            }
            _ => None,
        };
        let batch = Arc::new(batch);
        Ok(ReadBlock {
            batch,
            beside,
            range_bytes,
        })
    }

    /// Returns a block, and how many bytes of the file its views hold.
    async fn row_group(
        &self,
        file: &ShardFile,
        key: &ShardKey,
        wanted: Wanted,
    ) -> Result<(Decoded, usize)> {
        let footer = self.footers.get(key, file.footer()).await?;
        let groups = footer.metadata().row_groups();
        let Some(part) = Part::of(groups, &wanted) else {
            return Err(file.changed("its row groups are others"));
        };
        let mask = wanted.projection(&footer);
        let needed = groups[part.group]
            .columns()
            .iter()
            .enumerate()
            .filter(|(leaf, _)| mask.leaf_included(*leaf));
        let ranges = needed
            .map(|(_, column)| file.column(column))
            .collect::<Result<Vec<_>>>()?;
        let (bytes, block) = (file.ranges(&ranges).await?, wanted.number);
        let read = bytes.bytes();
        let decode = move || wanted.decode(&bytes, &footer, &mask, part);
        let (batch, paths) = decoded(file, block, decode).await?;
        let held = if images::are_views(&batch) { read } else { 0 };
        Ok(((batch, paths), held))
    }

    async fn samples(
        &self,
        file: &ShardFile,
        shard: &Shard,
        key: &ShardKey,
        wanted: Wanted,
    ) -> Result<Decoded> {
        let survey = self.survey(file, key).await?;
        let (block, indexed) = (wanted.number, &shard.blocks[wanted.number]);
        let rows = TarBlock::new(survey, &wanted.layout, &wanted.columns, indexed, file)?;
        let ranges = rows.ranges();
        let ranges = ranges.map_err(|cause| file.undecodable(block, cause))?;
        let bytes = file.ranges(&ranges).await?;
        decoded(file, block, move || {
            wanted.assemble(&rows.decode(&bytes)?, false)
        })
        .await
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
    decode: impl FnOnce() -> Result<Decoded, ArrowError> + Send + 'static,
) -> Result<Decoded> {
    let decoded = tokio::task::spawn_blocking(decode).await;
    let decoded = decoded
        .map_err(|e| Error::internal(format!("reading {} panicked", file.uri())).because(e))?;
    decoded.map_err(|cause| file.undecodable(block, cause))
}

#[cfg(test)]
pub(crate) mod tests;
