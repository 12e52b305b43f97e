//! Decodes on a bounded pool of threads, and gives up if the caller has gone. A pool of its own,
//! since decoding occupies threads for seconds: on tokio's threads it would delay gRPC, and on its
//! blocking pool there would be up to 512 decoders for a few cores.
use super::{
    model_inputs::Inputs,
    preprocess::{ImageLimits, RowFault},
    row::{PreparedRow, Row},
};
use crate::error::{Error, Result};
use rayon::ThreadPool;
use rayon::prelude::*;
use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    pin::pin,
    sync::{Arc, Mutex, OnceLock},
    time::Duration,
};
use superbatch_proto::v1::BadRowReason;
use tokio::{sync::oneshot, time::Instant};

/// The deadline of pools for which none is set.
const DEADLINE: Duration = Duration::from_secs(120);

/// The threads that decode.
pub struct Pool {
    /// Other ones take their place if a decoder does not come back.
    threads: Mutex<Arc<ThreadPool>>,
    count: usize,
    limits: ImageLimits,
    /// How long one row may take.
    deadline: Duration,
}

/// The progress of the rows of one call.
struct Progress {
    /// When each row's decoder began.
    begun: Vec<OnceLock<Instant>>,
    prepared: Vec<OnceLock<PreparedRow>>,
}

impl Progress {
    fn of(rows: usize) -> Self {
        Self {
            begun: (0..rows).map(|_| OnceLock::new()).collect(),
            prepared: (0..rows).map(|_| OnceLock::new()).collect(),
        }
    }

    /// Ends the rows whose decoders began before `since` and have not come back. Returns whether
    /// there are any.
    fn give_up(&self, since: Instant, deadline: Duration) -> bool {
        let mut any = false;
        for (begun, prepared) in self.begun.iter().zip(&self.prepared) {
            if begun.get().is_some_and(|begun| *begun <= since) {
                // The first to come fills the place: a row that comes back just now is kept.
                any |= prepared.set(Err(endless(deadline))).is_ok();
            }
        }
        any
    }
}

impl Pool {
    pub fn new(threads: usize, limits: ImageLimits) -> Result<Self> {
        Ok(Self {
            threads: Mutex::new(started(threads)?),
            count: threads,
            limits,
            deadline: DEADLINE,
        })
    }

    /// Returns the same threads; a row whose decoder takes longer is given up.
    pub fn with_deadline(self, deadline: Duration) -> Self {
        Self { deadline, ..self }
    }

    fn threads(&self) -> Arc<ThreadPool> {
        self.threads.lock().expect("no panic while held").clone()
    }

    /// Puts fresh threads in the place of `stuck` ones, unless another call has. Those of them that
    /// come back end by themselves.
    fn replace(&self, stuck: &Arc<ThreadPool>) -> Result<()> {
        let mut threads = self.threads.lock().expect("no panic while held");
        if Arc::ptr_eq(&threads, stuck) {
            *threads = started(self.count)?;
        }
        Ok(())
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
        let one = move |row: &Row| prepare_safely(row, &inputs, &limits);
        let prepared = self.each(rows, Arc::new(one)).await?;
        Ok((prepared, started.elapsed().as_secs_f64()))
    }

    /// Returns what `one` makes of each row. A row with which it does not come back within the
    /// deadline is a bad one. A thread cannot be ended, so fresh ones take the place of all, and
    /// the rest of the rows goes to them. Without that, as many such images as there are threads
    /// would end all decoding on this worker.
    async fn each(
        &self,
        rows: Vec<Row>,
        one: Arc<dyn Fn(&Row) -> PreparedRow + Send + Sync>,
    ) -> Result<Vec<PreparedRow>> {
        let progress = Arc::new(Progress::of(rows.len()));
        let rows = Arc::new(rows);
        loop {
            let threads = self.threads();
            let mut done = pin!(on(&threads, {
                let (rows, progress, one) = (rows.clone(), progress.clone(), one.clone());
                move |gone| fill(&rows, &progress, &*one, gone)
            }));
            loop {
                match tokio::time::timeout(self.deadline, &mut done).await {
                    Ok(done) => {
                        done?;
                        self.rest(&progress).await;
                        return progress.prepared.iter().map(taken).collect();
                    }
                    Err(_) => {
                        let since = Instant::now() - self.deadline;
                        if progress.give_up(since, self.deadline) {
                            tracing::warn!("a decoder did not come back; its row is left out");
                            self.replace(&threads)?;
                        }
                        if !Arc::ptr_eq(&threads, &self.threads()) {
                            break;
                        }
                    }
                }
            }
        }
    }

    /// Waits for rows that threads which were replaced had begun.
    async fn rest(&self, progress: &Progress) {
        while progress.prepared.iter().any(|place| place.get().is_none()) {
            tokio::time::sleep(self.deadline / 8).await;
            progress.give_up(Instant::now() - self.deadline, self.deadline);
        }
    }

    /// Runs `work` on the pool. `work` may check whether its caller has gone, and may then return
    /// anything.
    pub async fn run<T: Send + 'static>(
        &self,
        work: impl FnOnce(&(dyn Fn() -> bool + Sync)) -> T + Send + 'static,
    ) -> Result<T> {
        on(&self.threads(), work).await
    }
}

fn started(threads: usize) -> Result<Arc<ThreadPool>> {
    let threads = rayon::ThreadPoolBuilder::new()
        .num_threads(threads)
        .thread_name(|n| format!("decode-{n}"))
        .build();
    threads.map(Arc::new).map_err(|e| {
        Error::internal("cannot start the decode threads; lower worker.threads").because(e)
    })
}

async fn on<T: Send + 'static>(
    threads: &ThreadPool,
    work: impl FnOnce(&(dyn Fn() -> bool + Sync)) -> T + Send + 'static,
) -> Result<T> {
    let (answer, answered) = oneshot::channel();
    threads.spawn(move || {
        if answer.is_closed() {
            return;
        }
        // rayon aborts the process if a spawned closure panics. After a caught panic `answer` is
        // dropped unsent, which the caller sees as an error.
        if let Ok(done) = catch_unwind(AssertUnwindSafe(|| work(&|| answer.is_closed()))) {
            drop(answer.send(done));
        }
    });
    answered.await.map_err(|e| {
        Error::internal("a decode thread panicked; the log has its message").because(e)
    })
}

/// Fills the places of rows that no thread has begun.
fn fill(
    rows: &[Row],
    progress: &Progress,
    one: &(dyn Fn(&Row) -> PreparedRow + Send + Sync),
    gone: &(dyn Fn() -> bool + Sync),
) {
    rows.par_iter().enumerate().for_each(|(n, row)| {
        // Checked for each row, since a group is many seconds of work: after a rewind or a lost
        // connection the pool must be free for live calls at once.
        if !gone() && progress.begun[n].set(Instant::now()).is_ok() {
            // The place may be filled already if this row was given up.
            drop(progress.prepared[n].set(one(row)));
        }
    });
}

fn taken(place: &OnceLock<PreparedRow>) -> Result<PreparedRow> {
    let prepared = place.get().cloned();
    prepared.ok_or_else(|| Error::internal("a row was neither decoded nor given up"))
}

fn endless(deadline: Duration) -> RowFault {
    RowFault::passing(
        BadRowReason::ImageUndecodable,
        format!(
            "decoding did not end within {} s (worker.decode_deadline_seconds)",
            deadline.as_secs_f64()
        ),
    )
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

#[cfg(test)]
mod tests;
