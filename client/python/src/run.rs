//! A run, its batches and its pushes, as Python sees them.
use crate::{
    call::{self, Call},
    errors,
    process::Process,
    show, spec,
};
use arrow::pyarrow::ToPyArrow;
use futures::StreamExt;
use pyo3::{
    buffer::PyBuffer,
    exceptions::PyRuntimeError,
    prelude::*,
    types::{PyDict, PyMemoryView, PySlice},
};
use std::{
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};
use superbatch_client::{self as client, Batch, BatchesConfig, Part, Push, Pusher};
use tokio::sync::OwnedMutexGuard;

/// Pushes that wait beside the one under way. Each is a copy of the weights.
const QUEUED_MAX: usize = 1;

/// Bytes copied with the GIL held: a millisecond's worth.
const COPIED_BYTES: usize = 4 << 20;

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

    /// The uploader, which starts with the first push.
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

    /// The first step for which other weights were pushed than those that are published, or None.
    #[getter]
    fn dropped_push(&self) -> Option<i64> {
        self.run.dropped_push()
    }

    /// Dataset manifest digest, rows of the data set, and steps until its end (0: without end), as
    /// a dict.
    #[getter]
    fn dataset(&self, py: Python<'_>) -> PyResult<Py<PyAny>> {
        show::dataset(py, self.run.opened())
    }

    /// The spec in force, defaults filled, as a dict.
    #[getter]
    fn spec(&self, py: Python<'_>) -> PyResult<Py<PyAny>> {
        show::run_spec(py, &self.run.spec())
    }

    /// The schema of every batch, as a `pyarrow.Schema`.
    #[getter]
    fn schema(&self, py: Python<'_>) -> PyResult<Py<PyAny>> {
        Ok(self.run.schema().to_pyarrow(py)?.unbind())
    }

    /// One step; the call's result is a tuple (record batch, receipt, step, rank, world size).
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

    /// Every `stride`-th step from `start_step` on.
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
            Ok(Reserved {
                slot,
                step,
                rank,
                parts: Vec::new(),
            })
        };
        Call::start(reserving, |py, reserved| {
            let state = Mutex::new(Some(reserved));
            Ok(Py::new(py, Slot { state })?.into_any())
        })
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

    /// The call's result is a dict.
    fn get_run(&self) -> PyResult<Call> {
        let run = self.run_of_this_process()?;
        Call::start(async move { run.get_run().await }, |py, info| {
            show::run_info(py, &info)
        })
    }

    /// The call's result is a list of steps.
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

    /// The call's result is the new generation.
    fn rewind(&self, py: Python<'_>, to_step: u64, mode: &str) -> PyResult<Call> {
        let (run, mode) = (self.run_of_this_process()?, spec::rewind_mode(py, mode)?);
        Call::start(
            async move { run.rewind(to_step, mode).await },
            |py, generation| Ok(generation.into_pyobject(py)?.into_any().unbind()),
        )
    }

    /// The call's result is the spec in force, as a dict.
    fn append_phases(&self, phases: Vec<Bound<'_, PyDict>>) -> PyResult<Call> {
        let (run, phases) = (self.run_of_this_process()?, spec::phases(phases)?);
        Call::start(
            async move { run.append_phases(phases).await },
            |py, spec| show::run_spec(py, &spec),
        )
    }

    /// The call's result is a dict.
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
    /// The next step; the call's result is as that of `Run.select`, or None at the end. A call that
    /// is cancelled, or whose result is never taken, loses nothing: the next one yields the same
    /// step.
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

/// Room for one push, which is filled part by part.
#[pyclass(frozen, module = "superbatch._superbatch")]
pub struct Slot {
    state: Mutex<Option<Reserved>>,
}

/// What a push is made of.
struct Reserved {
    slot: client::Slot,
    step: i64,
    rank: u32,
    parts: Vec<Part>,
}

#[pymethods]
impl Slot {
    /// Copies a block of a tensor: `data` is a buffer of bytes in one dimension, little endian.
    #[expect(clippy::too_many_arguments, reason = "the parts of one header")]
    fn add(
        &self,
        py: Python<'_>,
        name: String,
        dtype: &str,
        global_shape: Vec<u64>,
        start: Vec<u64>,
        extent: Vec<u64>,
        data: &Bound<'_, PyAny>,
    ) -> PyResult<()> {
        let dtype = spec::tensor_dtype(py, dtype)?;
        let part = Part::block(name, dtype, &global_shape, &start, &extent, copied(data)?)
            .map_err(|error| errors::exception(py, &error))?;
        match &mut *self.state.lock().unwrap_or_else(PoisonError::into_inner) {
            Some(reserved) => reserved.parts.push(part),
            None => return Err(is_submitted_error()),
        }
        Ok(())
    }

    /// Queues the push, and returns without waiting for it. Nothing more can be added.
    fn submit(&self, push_id: Option<String>, expected_parts: u32) -> PyResult<()> {
        let state = self
            .state
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        let Reserved {
            slot,
            step,
            rank,
            parts,
        } = state.ok_or_else(is_submitted_error)?;
        slot.push(Push {
            step,
            parts,
            push_id,
            expected_parts,
            rank,
        });
        Ok(())
    }
}

/// A copy of a buffer of bytes. Weights are gigabytes, so other threads of Python run between its
/// pieces.
fn copied(data: &Bound<'_, PyAny>) -> PyResult<Vec<u8>> {
    let py = data.py();
    let view = PyMemoryView::from(data)?;
    let mut bytes = vec![0; view.len()?];
    let mut start = 0;
    for piece in bytes.chunks_mut(COPIED_BYTES) {
        let end = start + piece.len();
        let part = view.get_item(PySlice::new(py, start as isize, end as isize, 1))?;
        PyBuffer::<u8>::get(&part)?.copy_to_slice(py, piece)?;
        start = end;
        py.detach(|| ());
    }
    Ok(bytes)
}

fn is_submitted_error() -> PyErr {
    PyRuntimeError::new_err("this push was submitted already")
}
