//! Decodes on a bounded number of threads. They are threads of its own, since decoding occupies
//! them for seconds: on tokio's threads it would delay gRPC, and on its blocking pool there would
//! be up to 512 decoders for a few cores.
mod threads;

use self::threads::{Call, Threads};
use super::{
    model_inputs::Inputs,
    preprocess::{ImageLimits, RowFault},
    row::{PreparedRow, Row},
};
use crate::error::{Error, Result};
use rayon::ThreadPool;
use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    sync::Arc,
    time::Duration,
};
use superbatch_proto::v1::BadRowReason;
use tokio::{sync::oneshot, time::Instant};

/// The threads of a worker's CPU work.
pub struct DecodePool {
    decoders: Threads,
    /// For work that always ends: cutting rows out of blocks, draws on the CPU. It has threads of
    /// its own, since a decoder that hangs occupies its thread up to the deadline. A draw in that
    /// queue would wait as long, and a step with it, although its candidates are all embedded.
    work: ThreadPool,
    limits: ImageLimits,
}

impl DecodePool {
    /// Starts `threads` threads for decoding and as many for other work. A row whose decoder takes
    /// longer than `deadline` is given up.
    pub fn new(threads: usize, limits: ImageLimits, deadline: Duration) -> Result<Self> {
        let work = rayon::ThreadPoolBuilder::new()
            .num_threads(threads)
            .thread_name(|n| format!("work-{n}"))
            .build()
            .map_err(|e| {
                Error::internal("cannot start the work threads; lower worker.threads").because(e)
            })?;
        Ok(Self {
            decoders: Threads::start(threads, deadline)?,
            work,
            limits,
        })
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
        let one = move |row: &Row| prepare(row, &inputs, &limits);
        let prepared = self.each(rows, one).await?;
        Ok((prepared, started.elapsed().as_secs_f64()))
    }

    /// Returns what `one` makes of each row. A row with which it does not come back within the
    /// deadline, or over which it panics, is a bad one.
    async fn each(
        &self,
        rows: Vec<Row>,
        one: impl Fn(&Row) -> PreparedRow + Send + Sync + 'static,
    ) -> Result<Vec<PreparedRow>> {
        let call = Arc::new(Call::new(rows, one));
        // After a rewind or a lost connection the threads must be free for live calls at once. The
        // rows of a call whose future was dropped are skipped.
        let _ended_on_drop = call.clone().ended_on_drop();
        self.decoders.add(call.clone());
        call.wait().await
    }

    /// Runs `work`, which ends by itself, on threads that no decoder occupies.
    pub async fn run<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T> {
        let (answer, answered) = oneshot::channel();
        self.work.spawn(move || {
            if answer.is_closed() {
                return;
            }
            // rayon aborts the process if a spawned closure panics. After a caught panic `answer`
            // is dropped unsent, which the caller sees as an error.
            if let Ok(done) = catch_unwind(AssertUnwindSafe(work)) {
                drop(answer.send(done));
            }
        });
        answered.await.map_err(|e| {
            Error::internal("a work thread panicked; the log has its message").because(e)
        })
    }
}

fn prepare(row: &Row, inputs: &Inputs, limits: &ImageLimits) -> PreparedRow {
    let image = row.image().ok_or_else(|| {
        if inputs.has_texts() {
            RowFault::new(BadRowReason::CaptionNull, "the text is null")
        } else {
            row.image_fault()
        }
    })?;
    let caption = row.caption().ok_or_else(|| {
        if row.caption_is_invalid() {
            RowFault::new(BadRowReason::CaptionInvalid, "the caption is not UTF-8")
        } else if row.has_no_caption() {
            let detail = "its list of captions is empty or all null";
            RowFault::new(BadRowReason::CaptionNull, detail)
        } else {
            RowFault::new(BadRowReason::CaptionNull, "the caption is null")
        }
    })?;
    inputs.prepare(image, caption, limits).map(Arc::new)
}

#[cfg(test)]
mod tests;
