//! Reading blocks: one row group's needed columns, by ranges, checked against the manifest and kept while there is room.
use crate::{
    dataset::{Manifest, Ranges, Shard, ShardFile, SourceManifest},
    error::{Error, Result},
    storage::Stores,
};
use arrow::{
    array::{Array, ArrayRef, RecordBatch, RecordBatchOptions, RecordBatchReader, StructArray},
    compute::{cast, concat_batches},
    datatypes::SchemaRef,
};
use parquet::arrow::{
    ProjectionMask,
    arrow_reader::{ArrowReaderMetadata, ParquetRecordBatchReaderBuilder},
};
use std::{
    collections::HashMap,
    fmt,
    hash::Hash,
    sync::{Arc, Mutex},
};
use tokio::sync::OnceCell;

/// Room for parsed footers: each block of a shard needs its shard's.
const FOOTERS_BYTES: usize = 64 << 20;

/// Reads whole blocks. Concurrent reads of one block are one read; what was read last is kept, up to a number of bytes.
pub struct BlockReader {
    stores: Stores,
    blocks: Cache<BlockKey, Arc<RecordBatch>>,
    footers: Cache<ShardKey, ArrowReaderMetadata>,
}

/// A shard in one state: root, path, size, ETag.
type ShardKey = (String, String, u64, Option<String>);
/// Shard, block, then the columns: image, caption, extra ones.
type BlockKey = (ShardKey, u32, Vec<String>);

impl fmt::Debug for BlockReader {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("BlockReader").field("stores", &self.stores).finish_non_exhaustive()
    }
}

impl BlockReader {
    /// Keeps up to `cache_bytes` of blocks; 0 keeps none.
    pub fn new(stores: Stores, cache_bytes: usize) -> Self {
        Self { stores, blocks: Cache::new(cache_bytes), footers: Cache::new(FOOTERS_BYTES) }
    }

    /// The whole block, in row order, in [`Manifest::data_schema`] of `columns`. Image and caption may be null.
    ///
    /// # Errors
    /// `DatasetChanged` where the shard is not the object that was indexed; `StorageUnreachable`, after the store's own
    /// retries; those of [`Manifest::data_schema`].
    pub async fn read(
        &self,
        manifest: &Manifest,
        source: u32,
        shard: u32,
        block: u32,
        columns: &[String],
    ) -> Result<Arc<RecordBatch>> {
        let none = || Error::internal(format!("the manifest has no block {block} in shard {shard} of source {source}"));
        let source = manifest.sources.get(source as usize).ok_or_else(none)?;
        let shard = source.shards.get(shard as usize).ok_or_else(none)?;
        let rows = shard.blocks.get(block as usize).ok_or_else(none)?.rows as usize;
        let wanted = Wanted { source, columns, schema: manifest.data_schema(columns)?, block, rows };
        let shard_key = (source.root_uri.clone(), shard.path.clone(), shard.size, shard.etag.clone());
        let mut names = vec![source.layout.image_column.clone(), source.layout.caption_column.clone()];
        names.extend_from_slice(columns);
        let key = (shard_key.clone(), block, names);
        let fetch = || self.fetch(shard, shard_key, wanted);
        self.blocks.get(key, fetch, |batch| batch.get_array_memory_size()).await
    }

    async fn fetch(&self, shard: &Shard, key: ShardKey, wanted: Wanted<'_>) -> Result<Arc<RecordBatch>> {
        let location = self.stores.open(&wanted.source.root_uri)?.below(&shard.path);
        let file = ShardFile::new(location, shard.size, shard.etag.clone());
        let footer = self.footers.get(key, || file.footer(), |footer| footer.metadata().memory_size()).await?;
        let groups = footer.metadata().row_groups();
        let Some(group) = groups.get(wanted.block as usize).filter(|g| g.num_rows() as usize == wanted.rows) else {
            return Err(file.changed("its row groups are others"));
        };
        let mask = wanted.projection(&footer);
        let needed = group.columns().iter().enumerate().filter(|(leaf, _)| mask.leaf_included(*leaf));
        let ranges = needed.map(|(_, column)| file.column(column)).collect::<Result<Vec<_>>>()?;
        let bytes = file.ranges(&ranges).await?;
        let (block, rows) = (wanted.block as usize, wanted.rows);
        let decoded = tokio::task::spawn_blocking(move || decode(bytes, footer, block, rows, mask)).await;
        let batch = decoded.map_err(|e| Error::internal(format!("reading {} panicked", file.uri())).because(e))?;
        let damaged = |cause| file.changed("its content is damaged").because(cause);
        let batch = batch.map_err(damaged)?;
        Ok(Arc::new(wanted.assemble(&batch).map_err(|cause| file.changed("its columns are others").because(cause))?))
    }
}

fn decode(
    bytes: Ranges,
    footer: ArrowReaderMetadata,
    block: usize,
    rows: usize,
    mask: ProjectionMask,
) -> Result<RecordBatch, arrow::error::ArrowError> {
    let reader = ParquetRecordBatchReaderBuilder::new_with_metadata(bytes, footer)
        .with_row_groups(vec![block])
        .with_batch_size(rows.max(1))
        .with_projection(mask)
        .build()?;
    let schema = reader.schema();
    let batches = reader.collect::<Result<Vec<_>, _>>()?;
    concat_batches(&schema, &batches)
}

/// What is wanted of a block.
struct Wanted<'a> {
    source: &'a SourceManifest,
    columns: &'a [String],
    schema: SchemaRef,
    block: u32,
    rows: usize,
}

impl Wanted<'_> {
    /// Of a struct image only its bytes, of everything else the whole column.
    fn projection(&self, footer: &ArrowReaderMetadata) -> ProjectionMask {
        let schema = footer.parquet_schema();
        let layout = &self.source.layout;
        let wanted = |leaf: usize| {
            let parts = schema.column(leaf).path().parts().to_vec();
            let root = &parts[0];
            let image = *root == layout.image_column
                && (!layout.image_in_struct || parts.get(1).is_some_and(|part| part == "bytes"));
            image || *root == layout.caption_column || self.columns.contains(root)
        };
        ProjectionMask::leaves(schema, (0..schema.num_columns()).filter(|&leaf| wanted(leaf)))
    }

    /// The batch under the delivered names and types.
    fn assemble(&self, batch: &RecordBatch) -> Result<RecordBatch, arrow::error::ArrowError> {
        let layout = &self.source.layout;
        let column = |name: &str| {
            let missing = || arrow::error::ArrowError::SchemaError(format!("no column '{name}'"));
            batch.column_by_name(name).cloned().ok_or_else(missing)
        };
        let mut image = column(&layout.image_column)?;
        if layout.image_in_struct {
            image = bytes_of(&image)?;
        }
        let mut arrays = vec![image, column(&layout.caption_column)?];
        for name in self.columns {
            arrays.push(column(name)?);
        }
        let cast_to = |(array, field): (ArrayRef, &Arc<arrow::datatypes::Field>)| cast(&array, field.data_type());
        let arrays = arrays.into_iter().zip(self.schema.fields()).map(cast_to).collect::<Result<Vec<_>, _>>()?;
        let options = RecordBatchOptions::new().with_row_count(Some(self.rows));
        RecordBatch::try_new_with_options(self.schema.clone(), arrays, &options)
    }
}

/// The `bytes` of an image struct, null where the struct is.
fn bytes_of(image: &ArrayRef) -> Result<ArrayRef, arrow::error::ArrowError> {
    let missing = || arrow::error::ArrowError::SchemaError("the image is no struct with `bytes`".to_owned());
    let image = image.as_any().downcast_ref::<StructArray>().ok_or_else(missing)?;
    let bytes = image.column_by_name("bytes").ok_or_else(missing)?;
    match image.nulls() {
        None => Ok(bytes.clone()),
        Some(nulls) => arrow::compute::nullif(bytes, &arrow::array::BooleanArray::new(!nulls.inner(), None)),
    }
}

/// Values by key, the least recently used dropped first. A value is made once, however many ask for it at once; where
/// making it fails or is cancelled, the next who asks tries again.
struct Cache<K, V> {
    room: usize,
    held: Mutex<Held<K, V>>,
}

struct Held<K, V> {
    entries: HashMap<K, Entry<V>>,
    bytes: usize,
    clock: u64,
}

struct Entry<V> {
    cell: Arc<OnceCell<V>>,
    /// 0 until the value is there.
    bytes: usize,
    used: u64,
}

impl<K: Hash + Eq + Clone, V: Clone> Cache<K, V> {
    fn new(room: usize) -> Self {
        Self { room, held: Mutex::new(Held { entries: HashMap::new(), bytes: 0, clock: 0 }) }
    }

    async fn get<F: Future<Output = Result<V>>>(
        &self,
        key: K,
        make: impl FnOnce() -> F,
        size: impl FnOnce(&V) -> usize,
    ) -> Result<V> {
        let cell = self.held().cell(&key);
        let made = cell.get_or_try_init(make).await.cloned();
        let mut held = self.held();
        held.settle(&key, &cell, made.as_ref().ok().map(size));
        held.shrink(self.room);
        made
    }

    fn held(&self) -> std::sync::MutexGuard<'_, Held<K, V>> {
        self.held.lock().expect("no panic while held")
    }
}

impl<K: Hash + Eq + Clone, V> Held<K, V> {
    fn cell(&mut self, key: &K) -> Arc<OnceCell<V>> {
        self.clock += 1;
        let new = || Entry { cell: Arc::default(), bytes: 0, used: 0 };
        let entry = self.entries.entry(key.clone()).or_insert_with(new);
        entry.used = self.clock;
        entry.cell.clone()
    }

    /// Counts a value that is there now, and forgets one that could not be made.
    fn settle(&mut self, key: &K, cell: &Arc<OnceCell<V>>, size: Option<usize>) {
        let Some(entry) = self.entries.get_mut(key).filter(|entry| Arc::ptr_eq(&entry.cell, cell)) else { return };
        match size {
            Some(size) => {
                self.bytes = self.bytes - entry.bytes + size.max(1);
                entry.bytes = size.max(1);
            }
            // Two: the entry's and ours. Somebody else who waits may still make it.
            None if Arc::strong_count(cell) == 2 => drop(self.entries.remove(key)),
            None => {}
        }
    }

    fn shrink(&mut self, room: usize) {
        while self.bytes > room {
            let there = self.entries.iter().filter(|(_, entry)| entry.bytes > 0);
            let Some(oldest) = there.min_by_key(|(_, entry)| entry.used).map(|(key, _)| key.clone()) else { return };
            self.bytes -= self.entries.remove(&oldest).map_or(0, |entry| entry.bytes);
        }
    }
}

#[cfg(test)]
#[path = "read_tests.rs"]
pub(super) mod tests;
