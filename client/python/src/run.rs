//! A run, its batches and its pushes, as Python sees them.
use crate::{
    call::{self, Call},
    errors,
    process::Process,
    show,
    slot::{Reserved, Slot},
    spec, weights,
};
use arrow::pyarrow::ToPyArrow;
use futures::StreamExt;
use pyo3::{prelude::*, types::PyDict};
use std::{
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};
use superbatch_client::{self as client, Batch, BatchesConfig, Pusher};
use tokio::sync::OwnedMutexGuard;

/// Pushes that wait beside the one under way. Each is a copy of the weights.
const QUEUED_MAX: usize = 1;

/// An open run.
#[pyclass(frozen, module = "superbatch._superbatch")]
pub struct Run {
    run: client::Run,
    pusher: Mutex<Option<Arc<Pusher>>>,
    process: Process,
}

impl Run {
    pub fn new(run: client::Run) -> Self {
        Self {
            run,
            pusher: Mutex::new(None),
            process: Process::this(),
        }
    }

    fn run_of_this_process(&self) -> PyResult<client::Run> {
        self.process.check()?;
        Ok(self.run.clone())
    }

    /// Returns the uploader, which starts with the first push.
    fn pusher(&self) -> PyResult<Arc<Pusher>> {
        self.process.check()?;
        let mut pusher = self.pusher.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(pusher) = &*pusher {
            return Ok(pusher.clone());
        }
        let runtime = call::runtime()?;
        let _inside = runtime.enter();
        Ok(pusher
            .insert(Arc::new(Pusher::start(&self.run, QUEUED_MAX)))
            .clone())
    }
}

#[pymethods]
impl Run {
    #[getter]
    fn run_id(&self) -> &str {
        self.run.run_id()
    }

    #[getter]
    fn generation(&self) -> u32 {
        self.run.generation()
    }

    #[getter]
    fn next_step(&self) -> u64 {
        self.run.next_step()
    }

    /// Returns the first step for which other weights were pushed than those that are published, or
    /// None.
    #[getter]
    fn dropped_push(&self) -> Option<i64> {
        self.run.dropped_push()
    }

    /// Returns the dataset manifest's digest, rows of the data set, and steps until its end (0:
    /// without end), as a dict.
    #[getter]
    fn dataset(&self, py: Python<'_>) -> PyResult<Py<PyAny>> {
        show::dataset(py, self.run.opened())
    }

    /// Returns the spec in force, defaults filled, as a dict.
    #[getter]
    fn spec(&self, py: Python<'_>) -> PyResult<Py<PyAny>> {
        show::run_spec(py, &self.run.spec())
    }

    /// Returns the schema of every batch, as a `pyarrow.Schema`.
    #[getter]
    fn schema(&self, py: Python<'_>) -> PyResult<Py<PyAny>> {
        Ok(self.run.schema().to_pyarrow(py)?.unbind())
    }

    /// Asks for one step; the call's result is a tuple (record batch, receipt, step, rank, world
    /// size).
    fn select(
        &self,
        py: Python<'_>,
        step: u64,
        rank: u32,
        world_size: u32,
        intent: &str,
    ) -> PyResult<Call> {
        let (run, intent) = (self.run_of_this_process()?, spec::intent(py, intent)?);
        Call::start(
            async move { run.select(step, rank, world_size, intent).await },
            |py, batch| show::batch(py, &batch),
        )
    }

    /// Returns an iterator over every `stride`-th step from `start_step` on.
    #[expect(clippy::too_many_arguments, reason = "they are keywords in Python")]
    fn batches(
        &self,
        py: Python<'_>,
        rank: u32,
        world_size: u32,
        start_step: u64,
        end_step: Option<u64>,
        stride: u64,
        prefetch: u64,
        read_ahead: u64,
        need_after: f64,
    ) -> PyResult<Batches> {
        let need_after = Duration::try_from_secs_f64(need_after)
            .map_err(|_| errors::invalid(py, "need_after", "not a number of seconds"))?;
        let config = BatchesConfig {
            rank,
            world_size,
            start_step,
            end_step,
            stride,
            prefetch,
            read_ahead,
            need_after,
        };
        let batches = self
            .run_of_this_process()?
            .batches(config)
            .map_err(|error| errors::exception(py, &error))?;
        let source = Source {
            batches,
            untaken: None,
        };
        Ok(Batches {
            source: Arc::new(tokio::sync::Mutex::new(source)),
            process: self.process,
        })
    }

    /// Announces one push, and waits for room for it; the call's result is a `Slot`.
    fn reserve_push(&self, step: i64, rank: u32) -> PyResult<Call> {
        let pusher = self.pusher()?;
        let reserving = async move {
            let slot = pusher.reserve(step, rank).await?;
            Ok(Reserved::new(slot, step, rank))
        };
        Call::start(reserving, |py, reserved| {
            Ok(Py::new(py, Slot::of(reserved))?.into_any())
        })
    }

    /// Has the service read a file of weights; the call's result is the version, as a dict.
    fn push_uri(
        &self,
        py: Python<'_>,
        uri: String,
        step: i64,
        blake3: Option<&str>,
    ) -> PyResult<Call> {
        weights::push_uri(py, self.run_of_this_process()?, uri, step, blake3)
    }

    /// Returns a list of dicts, the newest version first.
    fn weights(&self, newest: u32) -> PyResult<Call> {
        weights::list(self.run_of_this_process()?, newest)
    }

    /// Returns a version and a list of digests, as dicts.
    fn weights_digests(&self, version: Option<u64>) -> PyResult<Call> {
        weights::digests(self.run_of_this_process()?, version)
    }

    /// Returns the version that serves, as a dict.
    fn roll_back_weights(&self, version: u64) -> PyResult<Call> {
        weights::roll_back(self.run_of_this_process()?, version)
    }

    /// Reports losses of a step's examples.
    fn report_losses(&self, step: u64, ids: Vec<String>, losses: Vec<f32>) -> PyResult<Call> {
        let run = self.run_of_this_process()?;
        Call::start_unit(async move { run.report_losses(step, ids, losses).await })
    }

    /// Waits until all pushes are published; the call's result is the newest version as a dict, or
    /// None.
    fn flush(&self) -> PyResult<Call> {
        let pusher = self.pusher()?;
        Call::start(
            async move { pusher.flush().await },
            |py, version| match version {
                Some(version) => show::weights_version(py, &version),
                None => Ok(py.None()),
            },
        )
    }

    /// Returns a dict.
    fn get_run(&self) -> PyResult<Call> {
        let run = self.run_of_this_process()?;
        Call::start(async move { run.get_run().await }, |py, info| {
            show::run_info(py, &info)
        })
    }

    /// Returns a list of steps.
    fn missing_pushes(&self, resume_step: u64) -> PyResult<Call> {
        let run = self.run_of_this_process()?;
        Call::start(
            async move { run.missing_pushes(resume_step).await },
            |py, steps| Ok(steps.into_pyobject(py)?.into_any().unbind()),
        )
    }

    /// Ends the run for all ranks.
    fn close_run(&self) -> PyResult<Call> {
        let run = self.run_of_this_process()?;
        Call::start_unit(async move { run.close_run().await })
    }

    /// Returns the new generation.
    fn rewind(&self, py: Python<'_>, to_step: u64, mode: &str) -> PyResult<Call> {
        let (run, mode) = (self.run_of_this_process()?, spec::rewind_mode(py, mode)?);
        Call::start(
            async move { run.rewind(to_step, mode).await },
            |py, generation| Ok(generation.into_pyobject(py)?.into_any().unbind()),
        )
    }

    /// Returns the spec in force, as a dict.
    fn append_phases(&self, phases: Vec<Bound<'_, PyDict>>) -> PyResult<Call> {
        let (run, phases) = (self.run_of_this_process()?, spec::phases(phases)?);
        Call::start(
            async move { run.append_phases(phases).await },
            |py, spec| show::run_spec(py, &spec),
        )
    }

    /// Returns a dict.
    fn receipt(&self, step: u64, generation: Option<u32>) -> PyResult<Call> {
        let run = self.run_of_this_process()?;
        Call::start(
            async move { run.receipt(step, generation).await },
            |py, receipt| show::receipt(py, &receipt),
        )
    }
}

/// Steps in order, asked for ahead.
#[pyclass(frozen, module = "superbatch._superbatch")]
pub struct Batches {
    source: Arc<tokio::sync::Mutex<Source>>,
    process: Process,
}

/// Where the next batch comes from.
struct Source {
    batches: client::Batches,
    /// A batch that came for a call which ended before Python took it.
    untaken: Option<Batch>,
}

/// A batch on its way to Python. If Python does not take it, it goes back, and the next call, which
/// waits for the guard until then, finds it.
struct Handover {
    source: OwnedMutexGuard<Source>,
    batch: Option<Batch>,
}

impl Drop for Handover {
    fn drop(&mut self) {
        self.source.untaken = self.batch.take();
    }
}

#[pymethods]
impl Batches {
    /// Returns the next step; the call's result is as that of `Run.select`, or None at the end. A
    /// call that is cancelled, or whose result is never taken, loses nothing: the next one yields
    /// the same step.
    fn next(&self) -> PyResult<Call> {
        self.process.check()?;
        let source = self.source.clone();
        let next = async move {
            let mut source = source.lock_owned().await;
            let batch = match source.untaken.take() {
                Some(batch) => Some(batch),
                None => source.batches.next().await.transpose()?,
            };
            Ok(Handover { source, batch })
        };
        Call::start(next, |py, mut handover| {
            let Some(batch) = &handover.batch else {
                return Ok(py.None());
            };
            let shown = show::batch(py, batch)?;
            handover.batch = None;
            Ok(shown)
        })
    }
}
