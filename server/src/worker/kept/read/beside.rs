//! Images that lie beside their rows' file, read by path: only those of rows that are asked for.
use crate::{
    batches::row_ranges,
    blocking::blocking,
    dataset::{image_key, quoted},
    error::{Error, Result},
    storage::{Found, Location},
    worker::inputs::{
        captions,
        images::{self, Image},
    },
};
use arrow::{
    array::{Array, AsArray, RecordBatch, StringArray},
    error::ArrowError,
};
use bytes::Bytes;
use futures::{FutureExt, StreamExt, TryStreamExt, stream};
use std::sync::Arc;
use superbatch_proto::v1::BadRowReason;
use tokio::sync::Semaphore;
use tokio_util::task::AbortOnDropHandle;

/// Bytes of images in one batch: an array's offsets have 32 bits.
const BATCH_BYTES_MAX: usize = 256 << 20;

/// Most bytes of images that one read holds together: those of a micro-batch's rows, or of the rows
/// chosen of a block. Of images in a Parquet file as much may be in a block.
const TOGETHER_BYTES_MAX: usize = i32::MAX as usize;

/// How images are read.
#[derive(Debug, Clone)]
pub(super) struct ImageReads {
    /// A larger image is not read.
    pub bytes_max: u64,
    /// More than this of one read are refused.
    pub together_bytes_max: usize,
    /// Requests under way, of all calls.
    pub at_once: Arc<Semaphore>,
    pub at_once_max: usize,
}

impl ImageReads {
    pub(super) fn new(bytes_max: u64, at_once: usize) -> Self {
        Self {
            bytes_max,
            together_bytes_max: TOGETHER_BYTES_MAX,
            at_once: Arc::new(Semaphore::new(at_once)),
            at_once_max: at_once,
        }
    }
}

/// The images of a block that lie beside its file.
#[derive(Debug)]
pub(super) struct Beside {
    pub root: Location,
    /// By row. Null if the image is in the file, or there is none.
    pub paths: StringArray,
}

/// A block with the images of some of its rows.
#[derive(Debug)]
pub struct WithImages {
    /// All rows. They are not copied: which captions are null for want of UTF-8 would be lost. The
    /// images of other rows than `rows` are null.
    pub batch: Arc<RecordBatch>,
    /// The rows, each with the hash of its image; `None` without an image. Some servers' ETags, and
    /// times of writing, differ though the image is the same.
    pub rows: Vec<(u32, Option<blake3::Hash>)>,
}

/// The image at a path.
enum Read {
    Whole(Bytes),
    Fault(BadRowReason, String),
    /// The row has no path.
    InFile,
}

impl Beside {
    pub(super) fn bytes(&self) -> usize {
        self.paths.get_array_memory_size()
    }

    /// Returns the URI of a row's image, if it lies below the root.
    pub(super) fn uri(&self, row: usize) -> Option<String> {
        let path = self.paths.is_valid(row).then(|| self.paths.value(row))?;
        Some(self.root.uri_of(&image_key(path).ok()?))
    }

    /// Returns `block`, which is without these images, with those of some rows: in pieces, so that
    /// no array has too many bytes.
    ///
    /// # Errors
    /// Those of the store; `InvalidArgument` if the images are too many bytes. A path that is none,
    /// or at which there is nothing, is a fault of its row.
    pub(super) async fn rows(
        self: &Arc<Self>,
        block: Arc<RecordBatch>,
        rows: &[u32],
        reads: &ImageReads,
    ) -> Result<Vec<WithImages>> {
        let (this, wanted, reads) = (self.clone(), rows.to_vec(), reads.clone());
        // A task of its own: requests go on while the caller waits for the device.
        let read = tokio::spawn(async move { this.read(&wanted, &reads).await });
        let read = AbortOnDropHandle::new(read).await;
        let read = read.map_err(|e| Error::internal("reading images panicked").because(e))??;
        let rows = rows.to_vec();
        let assemble = move || {
            let sizes: Vec<usize> = read.iter().map(Read::bytes).collect();
            let cuts = row_ranges(&sizes, BATCH_BYTES_MAX).into_iter();
            let mut read = read.into_iter();
            let batches = cuts.map(|range| {
                // They are copied, and let go piece by piece, so as not to be held twice.
                let these: Vec<Read> = read.by_ref().take(range.len()).collect();
                with(&block, &rows[range], &these)
            });
            let batches = batches.collect::<Result<_, ArrowError>>();
            batches.map_err(|e| Error::internal("cannot join rows and images").because(e))
        };
        blocking("joining rows and images", assemble).await
    }

    async fn read(&self, rows: &[u32], reads: &ImageReads) -> Result<Vec<Read>> {
        let each: Vec<_> = rows
            .iter()
            .map(|row| self.image(*row as usize, reads).boxed())
            .collect();
        let mut each = stream::iter(each).buffered(reads.at_once_max);
        let (mut read, mut bytes) = (Vec::with_capacity(rows.len()), 0);
        while let Some(one) = each.try_next().await? {
            bytes += one.bytes();
            if bytes > reads.together_bytes_max {
                return Err(self.too_large(rows.len(), reads.together_bytes_max));
            }
            read.push(one);
        }
        Ok(read)
    }

    fn too_large(&self, rows: usize, limit: usize) -> Error {
        let uri = self.root.uri();
        let message = format!(
            "the images of {rows} rows in {uri} have more than the {limit} bytes that are held \
             together; lower the run's micro_batch_rows and sub_batch_size, or make the images \
             smaller (one larger than worker.image_bytes_max costs its row alone)"
        );
        Error::invalid("sources", message).with("uri", uri)
    }

    async fn image(&self, row: usize, reads: &ImageReads) -> Result<Read> {
        let invalid = |why| Ok(Read::Fault(BadRowReason::ImagePathInvalid, why));
        if self.paths.is_null(row) {
            if captions::is_invalid(&self.paths, row) {
                return invalid("the image's path is not UTF-8".to_owned());
            }
            return Ok(Read::InFile);
        }
        let path = self.paths.value(row);
        let key = match image_key(path) {
            Ok(key) => key,
            Err(why) => return invalid(why),
        };
        let stopped = |e| Error::internal("no more images are read").because(e);
        let _permit = reads.at_once.acquire().await.map_err(stopped)?;
        let (reason, detail) = match self.root.find_at_most(&key, reads.bytes_max).await? {
            Found::Whole(bytes) => return Ok(Read::Whole(bytes)),
            Found::Nothing => {
                let detail = format!("there is no {} in {}", quoted(path), self.root.uri());
                (BadRowReason::ImageMissing, detail)
            }
            Found::TooLarge(bytes) => {
                let limit = reads.bytes_max;
                let detail = format!("{} has {bytes} bytes, the limit is {limit}", quoted(path));
                (BadRowReason::ImageTooLarge, detail)
            }
        };
        Ok(Read::Fault(reason, detail))
    }
}

impl Read {
    fn bytes(&self) -> usize {
        match self {
            Self::Whole(bytes) => bytes.len(),
            Self::Fault(_, detail) => detail.len(),
            Self::InFile => 0,
        }
    }
}

fn with(block: &RecordBatch, rows: &[u32], read: &[Read]) -> Result<WithImages, ArrowError> {
    let in_file = block.column(0).as_binary::<i32>();
    let mut images = vec![Image::Null; block.num_rows()];
    for (row, read) in rows.iter().zip(read) {
        let row = *row as usize;
        images[row] = match read {
            Read::Whole(bytes) => Image::Bytes(bytes),
            Read::Fault(reason, detail) => Image::Fault(*reason, detail),
            Read::InFile if in_file.is_valid(row) => Image::Bytes(in_file.value(row)),
            Read::InFile => Image::Null,
        };
    }
    let mut columns = block.columns().to_vec();
    columns[0] = images::column(images.into_iter())?;
    let hashes = read.iter().map(|read| match read {
        Read::Whole(bytes) => Some(blake3::hash(bytes)),
        Read::Fault(..) | Read::InFile => None,
    });
    Ok(WithImages {
        rows: rows.iter().copied().zip(hashes).collect(),
        batch: Arc::new(RecordBatch::try_new(block.schema(), columns)?),
    })
}
