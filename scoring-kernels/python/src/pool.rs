//! The threads that selections run on.
use pyo3::{exceptions::PyRuntimeError, prelude::*};
use rayon::{ThreadPool, ThreadPoolBuilder};
use std::{
    mem, process,
    sync::{Arc, Mutex, PoisonError},
};

/// The thread pool of the last selection. It is not rayon's global pool: a forked process (a
/// DataLoader's worker) would inherit that pool without its threads, and wait for them for ever.
static LAST: Mutex<Option<Pool>> = Mutex::new(None);

struct Pool {
    process: u32,
    threads: Option<usize>,
    pool: Arc<ThreadPool>,
}

/// Returns a pool of so many threads, or of one for each core. The pool of the last call is used
/// again if it fits.
///
/// Called with the GIL held, as `os.fork` is: no other thread can hold the lock in a process that
/// forks.
pub(crate) fn pool(_py: Python<'_>, threads: Option<usize>) -> PyResult<Arc<ThreadPool>> {
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
    // After a fork, this pool's threads exist only in the parent, and its locks are as they were at
    // the fork. Dropping the pool would signal those threads through these locks, and might hang.
    if let Some(before) = before.filter(|before| before.process != process) {
        mem::forget(before);
    }
    Ok(pool)
}
