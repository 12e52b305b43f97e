//! One file in object storage, read by ranges. Every read is checked against the size and ETag with
//! which the file was listed.
mod cached;

use crate::{
    buffers::Buffers,
    caught::caught,
    error::{Error, Result},
    storage::{DiskCache, Location},
};
use arrow::error::ArrowError;
use bytes::{Buf, Bytes};
use futures::{StreamExt, TryStreamExt};
use object_store::{GetOptions, GetRange, ObjectMeta};
use parquet::{
    arrow::arrow_reader::{ArrowReaderMetadata, ArrowReaderOptions},
    errors::ParquetError,
    file::{
        metadata::{ColumnChunkMetaData, ParquetMetaData, ParquetMetaDataReader, RowGroupMetaData},
        reader::{ChunkReader, Length},
    },
};
use std::{ops::Range, sync::Arc};
use superbatch_proto::v1::Reason;

/// Bytes read at once from a file's end. Most footers fit, and then cost one request instead of
/// two.
const FOOTER_BYTES: u64 = 64 << 10;
/// The end of a Parquet file with an encrypted footer.
const ENCRYPTED: &[u8] = b"PARE";
/// Ranges closer than this are read by one request: on object storage a request costs as much time
/// as a megabyte of data.
pub(super) const GAP_BYTES: u64 = 1 << 20;
/// Most rows that a file may say it has, and how many more for each of its bytes: a row takes a
/// bit at least, where its values do not all repeat. What is kept of a row takes memory whatever
/// it takes in the file.
const ROWS_MAX: u64 = 1 << 20;
const ROWS_OF_BYTE_MAX: u64 = 8;
/// Requests for one block at the same time.
const RANGES_AT_ONCE: usize = 8;

/// A file at `location`, of `size` bytes.
#[derive(Debug, Clone)]
pub struct ShardFile {
    location: Location,
    size: u64,
    etag: Option<String>,
    cache: Option<DiskCache>,
    buffers: Option<Buffers>,
}

/// Returns the ETag of an object below `root` in the form that is compared: listings and reads of
/// one store quote it differently.
pub(super) fn etag(root: &Location, meta: &ObjectMeta) -> Option<String> {
    let tag = meta
        .e_tag
        .as_deref()?
        .trim_start_matches("W/")
        .trim_matches('"');
    Some(
        if is_local(root) {
            without_inode(tag)
        } else {
            tag
        }
        .to_owned(),
    )
}

fn is_local(location: &Location) -> bool {
    location.uri().starts_with("file:")
}

/// Removes the inode from a local file's ETag, which consists of inode, modification time and size.
/// Workers on other machines may read a copy of the file on their own disk, where the inode
/// differs.
fn without_inode(tag: &str) -> &str {
    match tag.split_once('-') {
        Some((_, rest)) if rest.contains('-') => rest,
        _ => tag,
    }
}

impl ShardFile {
    pub fn new(location: Location, size: u64, etag: Option<String>) -> Self {
        Self {
            location,
            size,
            etag,
            cache: None,
            buffers: None,
        }
    }

    /// Reads local files into buffers that are used again.
    #[must_use]
    pub(crate) fn reusing(self, buffers: &Buffers) -> Self {
        Self {
            buffers: Some(buffers.clone()),
            ..self
        }
    }

    pub fn uri(&self) -> &str {
        self.location.uri()
    }

    pub(super) fn size(&self) -> u64 {
        self.size
    }

    pub(super) fn etag(&self) -> Option<&str> {
        self.etag.as_deref()
    }

    /// Reads the footer and the schema.
    ///
    /// # Errors
    /// `InvalidArgument` if it is no Parquet file, or says that it has more rows than its bytes can
    /// hold; `DatasetChanged`, `StorageUnreachable`.
    pub async fn footer(&self) -> Result<ArrowReaderMetadata> {
        let mut reader = ParquetMetaDataReader::new();
        let mut wanted = FOOTER_BYTES.min(self.size);
        // The last 8 bytes hold the footer's length, so at most one more read is needed.
        for _ in 0..2 {
            let tail = if wanted == 0 {
                Bytes::new()
            } else {
                self.fetch(self.size - wanted..self.size).await?
            };
            if tail.ends_with(ENCRYPTED) {
                return Err(
                    self.refused("is an encrypted Parquet file, which is not read; decrypt it")
                );
            }
            match reader.try_parse_sized(&tail, self.size) {
                Err(ParquetError::NeedMoreData(needed)) => wanted = (needed as u64).min(self.size),
                Err(cause) => return Err(self.no_parquet(cause)),
                Ok(()) => break,
            }
        }
        let metadata = reader.finish().map_err(|e| self.no_parquet(e))?;
        self.check_rows(&metadata)?;
        let metadata = without_false_dictionaries(metadata).map_err(|e| self.no_parquet(e))?;
        // The schema that its writer had may be anything.
        let read = || ArrowReaderMetadata::try_new(Arc::new(metadata), ArrowReaderOptions::new());
        caught(ParquetError::General, read).map_err(|e| self.no_parquet(e))
    }

    fn check_rows(&self, metadata: &ParquetMetaData) -> Result<()> {
        let rows = metadata.row_groups().iter().map(RowGroupMetaData::num_rows);
        let rows = rows.map(|rows| u64::try_from(rows).unwrap_or_default());
        let rows = rows.fold(0, u64::saturating_add);
        if rows <= ROWS_MAX.saturating_add(self.size.saturating_mul(ROWS_OF_BYTE_MAX)) {
            return Ok(());
        }
        let size = self.size;
        let why = format!("says that it has {rows} rows, which {size} bytes cannot hold");
        Err(self.refused(format_args!("{why}; it is damaged, so write it anew")))
    }

    /// Returns the error `InvalidArgument` for a file that is not read.
    pub(super) fn refused(&self, why: impl std::fmt::Display) -> Error {
        let message = format!("{} {why}", self.uri());
        Error::invalid("sources", message).with("shard", self.uri())
    }

    fn no_parquet(&self, cause: ParquetError) -> Error {
        let message = format!(
            "{} is no Parquet file; let the source name Parquet files only",
            self.uri()
        );
        Error::invalid("sources", message)
            .with("shard", self.uri())
            .because(cause)
    }

    /// Returns the byte range of a column of a row group.
    ///
    /// # Errors
    /// `InvalidArgument` if the range is outside the file.
    pub fn column(&self, column: &ColumnChunkMetaData) -> Result<Range<u64>> {
        let start = column
            .dictionary_page_offset()
            .unwrap_or(column.data_page_offset())
            .min(column.data_page_offset());
        let range = u64::try_from(start)
            .ok()
            .zip(u64::try_from(column.compressed_size()).ok());
        match range.and_then(|(start, length)| Some(start..start.checked_add(length)?)) {
            Some(range) if range.end <= self.size => Ok(range),
            _ => Err(self.no_parquet(ParquetError::General(
                "a column lies outside the file".to_owned(),
            ))),
        }
    }

    /// Reads byte ranges, by several requests at the same time.
    pub async fn ranges(&self, ranges: &[Range<u64>]) -> Result<Ranges> {
        let fetches = merge(ranges).into_iter().map(|range| async move {
            let bytes = self.fetch(range.clone()).await?;
            Ok::<_, Error>((range.start, bytes))
        });
        let parts = futures::stream::iter(fetches)
            .buffered(RANGES_AT_ONCE)
            .try_collect()
            .await?;
        Ok(Ranges {
            size: self.size,
            parts,
        })
    }

    /// Reads a range, and checks that it comes from the listed object. A shard that was replaced in
    /// between would give bytes that may decode, as rows that were never indexed. Returns also
    /// whether the store said by an ETag which state it is, as not all do.
    async fn read(&self, range: Range<u64>) -> Result<(Bytes, bool)> {
        let mut options = GetOptions {
            range: Some(GetRange::Bounded(range.clone())),
            ..Default::default()
        };
        // What reads local files finds them there.
        if let Some(buffers) = &self.buffers {
            options.extensions.insert(buffers.clone());
        }
        let (store, path) = (self.location.store(), self.location.path(""));
        let read = async {
            let result = store.get_opts(&path, options).await?;
            let meta = result.meta.clone();
            Ok((meta, result.bytes().await?))
        };
        match read.await {
            Ok((meta, bytes)) => {
                self.check_unchanged_file(&meta)?;
                let whole = bytes.len() as u64 == range.end - range.start;
                if whole {
                    Ok((bytes, meta.e_tag.is_some()))
                } else {
                    Err(self.changed("it is shorter"))
                }
            }
            Err(object_store::Error::NotFound { .. }) => Err(self.changed("it is gone")),
            // A range beyond the end of an object that shrank fails like any other request, so the
            // object's size is looked up to tell the two apart.
            Err(cause) => match self.location.head("").await {
                Ok(Some(meta)) => self
                    .check_unchanged_file(&meta)
                    .and(Err(self.location.error("read", "", cause))),
                _ => Err(self.location.error("read", "", cause)),
            },
        }
    }

    fn check_unchanged_file(&self, meta: &ObjectMeta) -> Result<()> {
        if meta.size != self.size {
            return Err(self.changed(&format!("it has {} bytes, not {}", meta.size, self.size)));
        }
        let (local, new) = (is_local(&self.location), etag(&self.location, meta));
        match (&self.etag, new) {
            (Some(old), Some(new)) if local && without_inode(old) != new => Err(self.changed(
                "it was written at another time (a copy keeps its time with `cp -p` or `rsync -t`)",
            )),
            (Some(old), Some(new)) if !local && *old != new => {
                Err(self.changed("its ETag is another"))
            }
            _ => Ok(()),
        }
    }

    /// Returns the error `InvalidArgument`: this is the indexed object, but a block of it cannot be
    /// decoded.
    pub fn undecodable(&self, block: usize, cause: ArrowError) -> Error {
        let uri = self.uri();
        let message = format!(
            "block {block} of {uri} cannot be decoded, though the file is the one that was \
             indexed; write the file anew, \
             or leave it out of the sources"
        );
        Error::invalid("sources", message)
            .with("shard", uri)
            .because(cause)
    }

    /// Returns the error `DatasetChanged`: this is not the indexed object.
    pub fn changed(&self, how: &str) -> Error {
        let message = format!(
            "{} is not the file that was indexed: {how}; put the indexed file back, or start a \
            new run on the new data",
            self.uri()
        );
        Error::new(Reason::DatasetChanged, message).with("shard", self.uri())
    }
}

/// Removes false dictionary offsets: parquet-mr 1.8 writes byte 0 for a column without a
/// dictionary, and the reader would then look for one at the start of the file.
fn without_false_dictionaries(metadata: ParquetMetaData) -> Result<ParquetMetaData, ParquetError> {
    let is_false = |column: &ColumnChunkMetaData| column.dictionary_page_offset() == Some(0);
    let groups = metadata.row_groups();
    if !groups
        .iter()
        .flat_map(RowGroupMetaData::columns)
        .any(is_false)
    {
        return Ok(metadata);
    }
    let mended = groups.iter().map(|group| {
        let columns = group.columns().iter().map(|column| {
            if is_false(column) {
                column
                    .clone()
                    .into_builder()
                    .set_dictionary_page_offset(None)
                    .build()
            } else {
                Ok(column.clone())
            }
        });
        let columns = columns.collect::<Result<_, ParquetError>>()?;
        group
            .clone()
            .into_builder()
            .set_column_metadata(columns)
            .build()
    });
    let mended = mended.collect::<Result<_, ParquetError>>()?;
    Ok(metadata.into_builder().set_row_groups(mended).build())
}

/// Sorts ranges, and joins those that are close together.
fn merge(ranges: &[Range<u64>]) -> Vec<Range<u64>> {
    let mut sorted = ranges.to_vec();
    sorted.sort_by_key(|range| range.start);
    let mut merged: Vec<Range<u64>> = Vec::with_capacity(sorted.len());
    for range in sorted {
        match merged.last_mut() {
            Some(last) if range.start <= last.end + GAP_BYTES => last.end = last.end.max(range.end),
            _ => merged.push(range),
        }
    }
    merged
}

/// Parts of a file in memory, which the Parquet reader uses as the file. Clones share the bytes.
#[derive(Debug, Clone)]
pub struct Ranges {
    size: u64,
    parts: Vec<(u64, Bytes)>,
}

impl Ranges {
    /// Makes the file of `size` bytes of which `bytes` are in memory, those from `start` on.
    pub fn one(size: u64, start: u64, bytes: Bytes) -> Self {
        Self {
            size,
            parts: vec![(start, bytes)],
        }
    }

    /// Returns how many bytes are in memory.
    pub fn bytes(&self) -> usize {
        self.parts.iter().map(|(_, bytes)| bytes.len()).sum()
    }

    /// Returns the bytes in memory from `start` on.
    fn from(&self, start: u64) -> Result<Bytes, ParquetError> {
        let holds =
            |(first, bytes): &&(u64, Bytes)| (*first..first + bytes.len() as u64).contains(&start);
        match self.parts.iter().find(holds) {
            Some((first, bytes)) => Ok(bytes.slice((start - first) as usize..)),
            None => Err(ParquetError::EOF(format!(
                "byte {start} lies outside the ranges of its columns"
            ))),
        }
    }
}

impl Length for Ranges {
    fn len(&self) -> u64 {
        self.size
    }
}

impl ChunkReader for Ranges {
    type T = bytes::buf::Reader<Bytes>;

    fn get_read(&self, start: u64) -> Result<Self::T, ParquetError> {
        Ok(self.from(start)?.reader())
    }

    fn get_bytes(&self, start: u64, length: usize) -> Result<Bytes, ParquetError> {
        let bytes = self.from(start)?;
        if bytes.len() < length {
            return Err(ParquetError::EOF(format!(
                "{length} bytes at {start} reach beyond their column"
            )));
        }
        Ok(bytes.slice(..length))
    }
}
