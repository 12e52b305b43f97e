//! The device: one OS thread that owns it and every model on it.
//!
//! Work reaches the thread through a bounded queue; each piece has a reply channel. Work whose
//! caller has gone is skipped. Gradients are off for the whole thread.
//!
//! A thread cannot be ended from outside. If a piece of work does not end, the device is hung:
//! waiting callers get an error at the deadline, and later callers at once. The device is well
//! again if the work ends after all.
mod cuda;
mod job;
mod resident;

pub use self::job::{Embedded, LoadModel, MicroBatch, Weights};
use self::resident::Resident;
use super::model::{Compute, ModelInfo, ModelKey};
use crate::error::{Error, Result};
use std::{
    any::Any,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{Arc, mpsc as std_mpsc},
    thread,
    time::Duration,
};
use superbatch_proto::v1::{ComputeDtype, Reason};
use tokio::sync::{mpsc, oneshot, watch};

/// Work that may wait for the device: one piece runs, one is queued. Callers beyond that
/// wait at the queue, where they can still be cancelled; a longer queue would hold the pixels of
/// every waiting micro-batch in memory.
const QUEUE: usize = 1;
/// Default number of models on a device: a reference, two states of a learner, and one that is
/// being verified.
pub const MODELS_MAX: usize = 4;

/// Default limit for one piece of work.
const DEADLINE: Duration = Duration::from_secs(600);

type Job = Box<dyn FnOnce(&mut Resident) + Send>;

/// The state of the device's thread.
#[derive(Debug, Clone, Copy, Default)]
struct Status {
    /// Counts the pieces of work begun. A deadline that was started for one job must not declare
    /// the next one hung.
    job: u64,
    is_busy: bool,
    /// Whether the job has exceeded its deadline.
    is_hung: bool,
}

/// Shared by the thread and all handles.
#[derive(Debug)]
struct Watch {
    status: watch::Sender<Status>,
    /// Changed only inside of `status`'s closures, under its lock, so that both agree.
    is_well: watch::Sender<bool>,
}

/// A handle to the device's thread, which ends when the last one is dropped.
#[derive(Debug, Clone)]
pub struct Device {
    jobs: mpsc::Sender<Job>,
    name: Arc<str>,
    watch: Arc<Watch>,
    deadline: Duration,
}

impl Device {
    /// Starts the thread of `auto`, `cpu`, `cuda` or `cuda:N`, with `threads` CPU threads for each
    /// operation (0: as many as LibTorch likes). It keeps [`MODELS_MAX`] models.
    ///
    /// # Errors
    /// `DeviceUnavailable`, or `InvalidArgument` for another word.
    pub fn start(choice: &str, threads: usize) -> Result<Self> {
        Self::start_keeping(choice, threads, MODELS_MAX)
    }

    /// As [`Device::start`]; the model that was used least recently leaves when there are more than
    /// `models_max` (one more while it loads).
    pub fn start_keeping(choice: &str, threads: usize, models_max: usize) -> Result<Self> {
        let (jobs, queue) = mpsc::channel::<Job>(QUEUE);
        let (opened, answer) = std_mpsc::sync_channel(1);
        let choice = choice.to_owned();
        let watch = Arc::new(Watch {
            status: watch::Sender::default(),
            is_well: watch::Sender::new(true),
        });
        let watched = watch.clone();
        let run = move || {
            let device = match cuda::open(&choice) {
                Ok(device) => device,
                Err(error) => return drop(opened.send(Err(error))),
            };
            let _ = opened.send(Ok(cuda::name(device)));
            // Selection's kernels are compiled and checked now, and not while a step waits for
            // them.
            let _ = crate::cuda::backend(device);
            serve(queue, &watched, device, threads, models_max);
        };
        let spawned = thread::Builder::new().name("device".into()).spawn(run);
        spawned.map_err(|e| Error::internal("cannot start the device's thread").because(e))?;
        let name = answer.recv().map_err(|_| stopped())??;
        Ok(Self {
            jobs,
            name: name.into(),
            watch,
            deadline: DEADLINE,
        })
    }

    /// Returns the same device with another deadline for its work.
    #[must_use]
    pub fn with_deadline(self, deadline: Duration) -> Self {
        Self { deadline, ..self }
    }

    /// Returns whether the device works; `false` while it is hung.
    pub fn is_well(&self) -> watch::Receiver<bool> {
        self.watch.is_well.subscribe()
    }

    /// Returns `cpu` or `cuda:N`.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Returns the arithmetic for a request. Unspecified is bf16 on CUDA and f32 on a CPU.
    pub fn compute(&self, wanted: ComputeDtype) -> Compute {
        Compute::choose(wanted, self.name.starts_with("cuda"))
    }

    /// Loads a model onto the device and describes it. Weights that are there already are not read,
    /// checked or copied again.
    ///
    /// # Errors
    /// `WeightsRefused` (for a folder's own weights `ModelInvalid`) naming the first bad `tensor`;
    /// what [`ModelFolder::weights`] says; `Overloaded` if it does not fit the device.
    pub async fn load(&self, request: LoadModel) -> Result<ModelInfo> {
        let known = request.weights_digest().await?;
        let (compute, canary) = (request.compute, request.canary);
        if let Some(digest) = &known {
            let key = ModelKey {
                digest: request.folder.digest(digest),
                compute,
            };
            let (reason, source) = request.reason_and_name();
            let found = self
                .submit(move |models| models.find(&key, canary, reason, &source))
                .await?;
            if let Some(info) = found {
                return Ok(info);
            }
        }
        let source = request.read(known).await?;
        self.submit(move |models| models.insert(source, compute, canary))
            .await
    }

    /// Loads a model and embeds a micro-batch as one piece of work, so that no other model can push
    /// it off in between.
    ///
    /// # Errors
    /// As [`Device::load`] and [`Device::embed`]; `WeightsMissing` means that the weights are not
    /// those of `batch.model`.
    pub async fn load_and_embed(&self, request: LoadModel, batch: MicroBatch) -> Result<Embedded> {
        let known = request.weights_digest().await?;
        let (compute, canary) = (request.compute, request.canary);
        let source = request.read(known).await?;
        let work = move |models: &mut Resident| {
            models.insert(source, compute, canary)?;
            models.embed(&batch)
        };
        self.submit(work).await
    }

    /// Embeds a micro-batch.
    ///
    /// # Errors
    /// `WeightsMissing` if the model has left the device: load it again. `ModelInvalid` or
    /// `TokenizerMismatch` if pixels or ids do not fit the model; `Overloaded` if the
    /// device's memory is not enough.
    pub async fn embed(&self, batch: MicroBatch) -> Result<Embedded> {
        self.submit(move |models| models.embed(&batch)).await
    }

    /// Runs `work` on the device's thread, without gradients.
    ///
    /// # Errors
    /// `Internal` if it panics.
    pub async fn run<T: Send + 'static>(
        &self,
        work: impl FnOnce(tch::Device) -> T + Send + 'static,
    ) -> Result<T> {
        self.submit(move |models| Ok(work(models.device()))).await
    }

    async fn submit<T: Send + 'static>(
        &self,
        work: impl FnOnce(&mut Resident) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let (reply, answer) = oneshot::channel();
        let job = move |models: &mut Resident| {
            // The caller dropped its future while the job was queued: its step was cancelled or its
            // deadline passed. Running the job would make live callers wait for a result that no
            // one reads.
            if reply.is_closed() {
                return;
            }
            // A panic in LibTorch's bindings would end the thread, and with it every model and
            // every later call of this worker.
            let outcome = catch_unwind(AssertUnwindSafe(|| work(models)))
                .unwrap_or_else(|panic| Err(panicked(&*panic)));
            // Fails if the caller has gone in the meantime.
            let _ = reply.send(outcome);
        };
        let done = async {
            self.jobs.send(Box::new(job)).await.map_err(|_| stopped())?;
            answer.await.map_err(|_| stopped())?
        };
        tokio::select! {
            biased;
            // The queue is full while the device is hung, so the send would wait as long as the
            // hung job. Watching from the caller's side ends both waits, and needs no thread that
            // supervises the thread.
            () = self.wait_until_hung() => Err(self.hung()),
            done = done => done,
        }
    }

    /// Ends when the current work exceeds the deadline, and at once if it has done so already.
    async fn wait_until_hung(&self) {
        let mut status = self.watch.status.subscribe();
        loop {
            let Status {
                job,
                is_busy,
                is_hung,
            } = *status.borrow_and_update();
            if is_hung {
                return;
            }
            tokio::select! {
                // A change of `status` restarts the loop, and with it the sleep for the next job. A
                // caller that arrives in the middle of a job sleeps for a whole deadline too,
                // although the job began earlier: a job may be declared hung late, never early.
                // The sleep starts when this caller sees a job begin, which may be later than its
                // true start. So a job may run for up to twice the deadline before it counts as
                // hung, and never less than once. A change of `status` restarts the loop, and with
                // it the sleep for the next job.
                changed = status.changed() => if changed.is_err() { std::future::pending().await },
                () = tokio::time::sleep(self.deadline), if is_busy => self.watch.hung(job),
            }
        }
    }

    fn hung(&self) -> Error {
        let (name, seconds) = (&self.name, self.deadline.as_secs_f64());
        let message = format!(
            "the device {name} has not finished its work for {seconds} s \
            (worker.device_deadline_seconds); this worker does \
             nothing until it has: look at its driver's log, and start it anew; where one \
             micro-batch may take that long, raise \
             the deadline or lower micro_batch_rows"
        );
        Error::new(Reason::DeviceUnavailable, message).with("device", name)
    }
}

impl Watch {
    fn mark_begun(&self) {
        self.status.send_modify(|status| {
            *status = Status {
                job: status.job + 1,
                is_busy: true,
                is_hung: false,
            }
        });
    }

    fn ended(&self) {
        self.status.send_modify(|status| {
            if status.is_hung {
                tracing::warn!("the device has finished its work after all");
                self.is_well.send_replace(true);
            }
            *status = Status {
                job: status.job,
                is_busy: false,
                is_hung: false,
            };
        });
    }

    /// Marks the device as hung, if it is still at that job.
    fn hung(&self, job: u64) {
        self.status.send_if_modified(|status| {
            let hangs = status.is_busy && status.job == job && !status.is_hung;
            if hangs {
                tracing::error!("the device is hung; this worker scores nothing");
                status.is_hung = true;
                self.is_well.send_replace(false);
            }
            hangs
        });
    }
}

fn serve(
    mut queue: mpsc::Receiver<Job>,
    watch: &Watch,
    device: tch::Device,
    threads: usize,
    models_max: usize,
) {
    if let Ok(threads @ 1..) = i32::try_from(threads) {
        tch::set_num_threads(threads);
    }
    let _no_grad = tch::no_grad_guard();
    let mut resident = Resident::new(device, models_max);
    while let Some(job) = queue.blocking_recv() {
        watch.mark_begun();
        job(&mut resident);
        watch.ended();
    }
}

/// Runs CPU work off the async threads: verifying a snapshot hashes gigabytes.
async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T> {
    tokio::task::spawn_blocking(work)
        .await
        .map_err(|e| Error::internal("checking weights stopped").because(e))
}

fn stopped() -> Error {
    Error::internal("the device's thread has stopped")
}

fn panicked(panic: &(dyn Any + Send)) -> Error {
    let text = panic
        .downcast_ref::<String>()
        .map(String::as_str)
        .or_else(|| panic.downcast_ref::<&str>().copied());
    Error::internal(format!(
        "work on the device panicked: {}",
        text.unwrap_or("no message")
    ))
}

#[cfg(test)]
mod tests;
