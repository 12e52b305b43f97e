//! Decoding on a bounded pool of threads, given up where the caller has gone.
use super::{
    captions,
    models::Inputs,
    preprocess::{ImageLimits, RowFault},
};
use crate::error::{Error, Result};
use arrow::{
    array::{Array, AsArray, StringArray},
    record_batch::RecordBatch,
};
use rayon::prelude::*;
use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    sync::Arc,
};
use superbatch_proto::v1::BadRowReason;
use tokio::{sync::oneshot, time::Instant};

/// One row of a batch in the data schema.
#[derive(Clone)]
pub(super) struct Row {
    pub batch: Arc<RecordBatch>,
    pub row: usize,
}

/// What a model takes of one row: RGB pixels and token ids.
#[derive(Debug)]
pub(super) struct Prepared {
    pub pixels: Vec<u8>,
    pub ids: Vec<i64>,
}

/// A row as its model takes it, or what is wrong with it.
pub(super) type PreparedRow = Result<Arc<Prepared>, RowFault>;

/// The threads that decode.
pub(super) struct Pool {
    threads: rayon::ThreadPool,
    limits: ImageLimits,
}

impl Row {
    /// The encoded image, `None` where it is null.
    pub fn image(&self) -> Option<&[u8]> {
        let column = self.batch.column_by_name("image")?.as_binary_opt::<i32>()?;
        column.is_valid(self.row).then(|| column.value(self.row))
    }

    /// The caption, `None` where it is null or no text.
    pub fn caption(&self) -> Option<&str> {
        let column = self.captions()?;
        column.is_valid(self.row).then(|| column.value(self.row))
    }

    /// Whether the caption is null because it is no text. Known in a block as it was read, not in rows copied out of it.
    pub fn caption_is_invalid(&self) -> bool {
        self.captions().is_some_and(|captions| captions::is_invalid(captions, self.row))
    }

    fn captions(&self) -> Option<&StringArray> {
        self.batch.column_by_name("caption")?.as_string_opt::<i32>()
    }
}

impl Prepared {
    pub fn bytes(&self) -> usize {
        self.pixels.len() + size_of_val(self.ids.as_slice())
    }
}

impl Pool {
    pub fn new(threads: usize, limits: ImageLimits) -> Result<Self> {
        let threads = rayon::ThreadPoolBuilder::new()
            .num_threads(threads)
            .thread_name(|n| format!("decode-{n}"))
            .build()
            .map_err(|e| Error::internal("cannot start the decode threads; lower worker.threads").because(e))?;
        Ok(Self { threads, limits })
    }

    pub fn limits(&self) -> ImageLimits {
        self.limits
    }

    /// Decodes, resizes and tokenises rows, in order, and says how many seconds that took.
    pub async fn prepare(&self, rows: Vec<Row>, inputs: Arc<Inputs>) -> Result<(Vec<PreparedRow>, f64)> {
        let limits = self.limits;
        let started = Instant::now();
        let prepared = self
            .run(move |gone| {
                let one = |row: &Row| if gone() { Err(abandoned()) } else { prepare_safely(row, &inputs, &limits) };
                rows.par_iter().map(one).collect()
            })
            .await?;
        Ok((prepared, started.elapsed().as_secs_f64()))
    }

    /// Runs `work` on the pool. It may ask whether its caller has gone, and then return anything.
    pub async fn run<T: Send + 'static>(
        &self,
        work: impl FnOnce(&(dyn Fn() -> bool + Sync)) -> T + Send + 'static,
    ) -> Result<T> {
        let (answer, answered) = oneshot::channel();
        self.threads.spawn(move || {
            if answer.is_closed() {
                return;
            }
            // A panic would end the process; the caller learns of it because nobody answers.
            if let Ok(done) = catch_unwind(AssertUnwindSafe(|| work(&|| answer.is_closed()))) {
                drop(answer.send(done));
            }
        });
        answered.await.map_err(|e| Error::internal("a decode thread panicked; the log has its message").because(e))
    }
}

/// Decoders are other people's code and see anybody's bytes: where one panics, the image is at fault.
fn prepare_safely(row: &Row, inputs: &Inputs, limits: &ImageLimits) -> PreparedRow {
    catch_unwind(AssertUnwindSafe(|| prepare(row, inputs, limits)))
        .unwrap_or_else(|_| Err(RowFault::new(BadRowReason::ImageUndecodable, "the decoder panicked")))
}

fn prepare(row: &Row, inputs: &Inputs, limits: &ImageLimits) -> PreparedRow {
    let image = row.image().ok_or_else(|| RowFault::new(BadRowReason::ImageNull, "the image is null"))?;
    let caption = row.caption().ok_or_else(|| match row.caption_is_invalid() {
        true => RowFault::new(BadRowReason::CaptionInvalid, "the caption is not UTF-8"),
        false => RowFault::new(BadRowReason::CaptionNull, "the caption is null"),
    })?;
    inputs.prepare(image, caption, limits).map(Arc::new)
}

fn abandoned() -> RowFault {
    RowFault::new(BadRowReason::Unspecified, "the caller has gone")
}
