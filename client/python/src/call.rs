//! A call to the service that is under way, and the runtime it runs on.
use crate::errors;
use pyo3::{exceptions::PyRuntimeError, prelude::*};
use std::{
    future::Future,
    mem,
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    time::Duration,
};
use superbatch_client::Error;
use tokio::{runtime::Runtime, task::AbortHandle};

/// How long a wait may keep a signal (Ctrl-C) waiting.
const SIGNAL_SLICE: Duration = Duration::from_millis(50);

/// The runtime of this process. Threads do not survive a fork, so a child makes its own, and the
/// parent's is left alone.
static RUNTIME: Mutex<Option<(u32, Arc<Runtime>)>> = Mutex::new(None);

/// Returns the runtime of this process, made on first use.
pub(crate) fn runtime() -> PyResult<Arc<Runtime>> {
    let mut known = RUNTIME.lock().unwrap_or_else(PoisonError::into_inner);
    let pid = std::process::id();
    if let Some((owner, runtime)) = &*known
        && *owner == pid
    {
        return Ok(runtime.clone());
    }
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .thread_name("superbatch")
        .enable_all()
        .build()
        .map_err(|error| {
            PyRuntimeError::new_err(format!("cannot start the threads of the client: {error}"))
        })?;
    let runtime = Arc::new(runtime);
    // Dropping the parent's runtime would wait for threads that are not there.
    mem::forget(known.replace((pid, runtime.clone())));
    Ok(runtime)
}

/// What a call ends with, made when Python takes it.
type Outcome = Box<dyn FnOnce(Python<'_>) -> PyResult<Py<PyAny>> + Send>;

enum State {
    Running {
        callbacks: Vec<Py<PyAny>>,
    },
    Done(Option<Outcome>),
    /// The caller will not take the result: what the call has made, or still makes, is dropped at
    /// once.
    Cancelled,
}

struct Shared {
    state: Mutex<State>,
    done: Condvar,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn finish(&self, outcome: Outcome) {
        let callbacks = {
            let mut state = self.lock();
            let State::Running { callbacks } = &mut *state else {
                drop(state);
                // It may have something to put back, which must not wait for this lock.
                drop(outcome);
                return;
            };
            let callbacks = mem::take(callbacks);
            *state = State::Done(Some(outcome));
            callbacks
        };
        self.done.notify_all();
        if callbacks.is_empty() {
            return;
        }
        // The interpreter is shutting down, so no Python code is left that waits for the result.
        Python::try_attach(|py| {
            for callback in callbacks {
                if let Err(error) = callback.call0(py) {
                    error.write_unraisable(py, None);
                }
            }
        });
    }

    /// Drops the result that was not taken, now or when it comes.
    fn cancel(&self) {
        let before = mem::replace(&mut *self.lock(), State::Cancelled);
        drop(before);
        self.done.notify_all();
    }

    /// Returns whether it is done or cancelled, after a wait of at most `longest`.
    fn wait(&self, longest: Duration) -> bool {
        let running = |state: &mut State| matches!(state, State::Running { .. });
        let waited = self.done.wait_timeout_while(self.lock(), longest, running);
        let (state, _) = waited.unwrap_or_else(PoisonError::into_inner);
        !matches!(*state, State::Running { .. })
    }
}

/// A call that is under way. Dropping it cancels it.
#[pyclass(frozen, module = "superbatch._superbatch")]
pub struct Call {
    shared: Arc<Shared>,
    task: AbortHandle,
}

impl Call {
    /// Starts a call; `show` turns its result into a Python object.
    pub fn start<T: Send + 'static>(
        call: impl Future<Output = Result<T, Error>> + Send + 'static,
        show: impl FnOnce(Python<'_>, T) -> PyResult<Py<PyAny>> + Send + 'static,
    ) -> PyResult<Self> {
        let runtime = runtime()?;
        let shared = Arc::new(Shared {
            state: Mutex::new(State::Running {
                callbacks: Vec::new(),
            }),
            done: Condvar::new(),
        });
        let work = runtime.spawn(call);
        let task = work.abort_handle();
        let finished = shared.clone();
        runtime.spawn(async move {
            let outcome = work.await.unwrap_or(Err(Error::Stopped));
            finished.finish(Box::new(move |py| match outcome {
                Ok(value) => show(py, value),
                Err(error) => Err(errors::exception(py, &error)),
            }));
        });
        Ok(Self { shared, task })
    }

    /// Does [`Call::start`] for calls whose result says nothing.
    pub fn start_unit(
        call: impl Future<Output = Result<(), Error>> + Send + 'static,
    ) -> PyResult<Self> {
        Self::start(call, |py, ()| Ok(py.None()))
    }
}

impl Drop for Call {
    fn drop(&mut self) {
        self.cancel();
    }
}

#[pymethods]
impl Call {
    /// Waits for the result with the GIL released. A signal whose handler raises (Ctrl-C) cancels
    /// the call.
    fn wait(&self, py: Python<'_>) -> PyResult<Py<PyAny>> {
        loop {
            let done = py.detach(|| self.shared.wait(SIGNAL_SLICE));
            // Also when it is done: Python would raise as soon as this returns, and the result
            // would be lost.
            if let Err(signal) = py.check_signals() {
                self.cancel();
                return Err(signal);
            }
            if done {
                return self.result(py);
            }
        }
    }

    /// Returns the result of a call that is done. It can be taken once.
    fn result(&self, py: Python<'_>) -> PyResult<Py<PyAny>> {
        let outcome = match &mut *self.shared.lock() {
            State::Done(outcome) => outcome.take(),
            State::Cancelled => return Err(errors::exception(py, &Error::Stopped)),
            State::Running { .. } => None,
        };
        match outcome {
            Some(outcome) => outcome(py),
            None => Err(PyRuntimeError::new_err(
                "the call is not done, or its result was taken",
            )),
        }
    }

    /// Calls `callback` without arguments when the call is done, from a thread of the client; at
    /// once if it is.
    fn on_done(&self, py: Python<'_>, callback: Py<PyAny>) -> PyResult<()> {
        if let State::Running { callbacks } = &mut *self.shared.lock() {
            callbacks.push(callback);
            return Ok(());
        }
        callback.call0(py).map(|_| ())
    }

    /// Cancels the call, and drops its result if that is there and was not taken.
    fn cancel(&self) {
        self.task.abort();
        self.shared.cancel();
    }
}
