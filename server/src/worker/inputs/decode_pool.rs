//! Decodes on a bounded pool of threads, and gives up if the caller has gone. A pool of its own,
//! since decoding occupies threads for seconds: on tokio's threads it would delay gRPC, and on its
//! blocking pool there would be up to 512 decoders for a few cores.
use super::{
    model_inputs::Inputs,
    preprocess::{ImageLimits, RowFault},
    row::{PreparedRow, Row},
};
use crate::error::{Error, Result};
use rayon::prelude::*;
use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    sync::Arc,
};
use superbatch_proto::v1::BadRowReason;
use tokio::{sync::oneshot, time::Instant};

/// The threads that decode.
pub struct Pool {
    threads: rayon::ThreadPool,
    limits: ImageLimits,
}

impl Pool {
    pub fn new(threads: usize, limits: ImageLimits) -> Result<Self> {
        let threads = rayon::ThreadPoolBuilder::new()
            .num_threads(threads)
            .thread_name(|n| format!("decode-{n}"))
            .build()
            .map_err(|e| {
                Error::internal("cannot start the decode threads; lower worker.threads").because(e)
            })?;
        Ok(Self { threads, limits })
    }

    pub fn limits(&self) -> ImageLimits {
        self.limits
    }

    /// Decodes, resizes and tokenises rows, in order. Returns them with the seconds that it took.
    pub async fn prepare(
        &self,
        rows: Vec<Row>,
        inputs: Arc<Inputs>,
    ) -> Result<(Vec<PreparedRow>, f64)> {
        let limits = self.limits;
        let started = Instant::now();
        let prepared = self
            .run(move |gone| {
                let one = |row: &Row| {
                    // Checked for each row, since a group is many seconds of work: after a rewind
                    // or a lost connection the pool must be free for live calls at once. The row's
                    // fault is never seen, because its caller has gone.
                    if gone() {
                        Err(abandoned_fault())
                    } else {
                        prepare_safely(row, &inputs, &limits)
                    }
                };
                rows.par_iter().map(one).collect()
            })
            .await?;
        Ok((prepared, started.elapsed().as_secs_f64()))
    }

    /// Runs `work` on the pool. `work` may check whether its caller has gone, and may then return
    /// anything.
    pub async fn run<T: Send + 'static>(
        &self,
        work: impl FnOnce(&(dyn Fn() -> bool + Sync)) -> T + Send + 'static,
    ) -> Result<T> {
        let (answer, answered) = oneshot::channel();
        self.threads.spawn(move || {
            if answer.is_closed() {
                return;
            }
            // rayon aborts the process if a spawned closure panics. After a caught panic `answer`
            // is dropped unsent, which the caller sees as an error.
            if let Ok(done) = catch_unwind(AssertUnwindSafe(|| work(&|| answer.is_closed()))) {
                drop(answer.send(done));
            }
        });
        answered.await.map_err(|e| {
            Error::internal("a decode thread panicked; the log has its message").because(e)
        })
    }
}

/// Prepares a row, and treats a panic as a fault of its image. Decoders are foreign code that reads
/// untrusted bytes: a panic may cost the row, never the process.
fn prepare_safely(row: &Row, inputs: &Inputs, limits: &ImageLimits) -> PreparedRow {
    catch_unwind(AssertUnwindSafe(|| prepare(row, inputs, limits))).unwrap_or_else(|_| {
        Err(RowFault::new(
            BadRowReason::ImageUndecodable,
            "the decoder panicked",
        ))
    })
}

fn prepare(row: &Row, inputs: &Inputs, limits: &ImageLimits) -> PreparedRow {
    let image = row
        .image()
        .ok_or_else(|| RowFault::new(BadRowReason::ImageNull, "the image is null"))?;
    let caption = row
        .caption()
        .ok_or_else(|| match row.caption_is_invalid() {
            true => RowFault::new(BadRowReason::CaptionInvalid, "the caption is not UTF-8"),
            false => RowFault::new(BadRowReason::CaptionNull, "the caption is null"),
        })?;
    inputs.prepare(image, caption, limits).map(Arc::new)
}

fn abandoned_fault() -> RowFault {
    RowFault::new(BadRowReason::Unspecified, "the caller has gone")
}
