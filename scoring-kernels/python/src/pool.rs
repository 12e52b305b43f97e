//! The threads that selections run on.
use pyo3::{exceptions::PyRuntimeError, prelude::*};
use rayon::{ThreadPool, ThreadPoolBuilder};
use std::{
    mem, process,
    sync::{Arc, Mutex, PoisonError},
};

/// The threads of the last selection. Not rayon's global pool: a forked process (a DataLoader's
/// worker) would inherit that without its threads, and wait for them for ever.
static LAST: Mutex<Option<Pool>> = Mutex::new(None);

struct Pool {
    process: u32,
    threads: Option<usize>,
    pool: Arc<ThreadPool>,
}

/// So many threads, or one a core; those of the call before if they fit.
///
/// Called with the GIL held, as `os.fork` is: no other thread can hold the lock in a process that
/// forks.
pub fn pool(_py: Python<'_>, threads: Option<usize>) -> PyResult<Arc<ThreadPool>> {
    let mut last = LAST.lock().unwrap_or_else(PoisonError::into_inner);
    let process = process::id();
    if let Some(found) = last
        .as_ref()
        .filter(|last| last.process == process && last.threads == threads)
    {
        return Ok(found.pool.clone());
    }
    let built = ThreadPoolBuilder::new()
        .num_threads(threads.unwrap_or(0))
        .thread_name(|k| format!("superbatch-{k}"));
    let built = built
        .build()
        .map_err(|error| PyRuntimeError::new_err(format!("cannot start threads: {error}")))?;
    let pool = Arc::new(built);
    let before = last.replace(Pool {
        process,
        threads,
        pool: pool.clone(),
    });
    // A parent's threads are not ours to end.
    if let Some(before) = before.filter(|before| before.process != process) {
        mem::forget(before);
    }
    Ok(pool)
}
