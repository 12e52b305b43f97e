//! The end of a service's process: within a stated time, whatever it waits for.
use std::{
    sync::mpsc::channel,
    thread::{self, Builder},
    time::Duration,
};

/// How long a process may take after the grace period of its calls: for the last lines of the audit
/// log, the last traces, the threads of its runtime, and a second to spare.
pub const REST_MAX: Duration = Duration::from_secs(6);
/// How long the threads of the runtime may take to end.
pub const RUNTIME_MAX: Duration = Duration::from_secs(2);
/// How long the log may take for its last line.
const LAST_WORDS_MAX: Duration = Duration::from_millis(500);

/// Ends when the process is asked to stop: SIGTERM or Ctrl-C. From then on it has `grace` and
/// [`REST_MAX`], as [`end_within`] says.
pub async fn terminated(grace: Duration) {
    asked_to_stop().await;
    end_within(grace.saturating_add(REST_MAX));
}

async fn asked_to_stop() {
    use tokio::signal::unix::{SignalKind, signal};
    let Ok(mut terminate) = signal(SignalKind::terminate()) else {
        tracing::error!("cannot listen for SIGTERM");
        return std::future::pending().await;
    };
    tokio::select! {
        _ = terminate.recv() => {}
        _ = tokio::signal::ctrl_c() => {}
    }
}

/// Ends this process after `most`, unless it has ended by itself. What is committed is in the
/// state, and nothing that is left is worth waiting for: a call that ignores its end, a disk, a
/// device or a terminal that does not answer.
///
/// It is no task of the runtime, whose threads may all be what hangs.
pub fn end_within(most: Duration) {
    let watch = move || {
        thread::sleep(most);
        end(most);
    };
    if let Err(error) = Builder::new().name("ending".into()).spawn(watch) {
        tracing::error!(%error, "cannot watch the end of this process");
    }
}

fn end(after: Duration) {
    // By another thread: the log may be what the process waits for.
    let (logging, logged) = channel::<()>();
    let last_words = move || {
        let seconds = after.as_secs_f64();
        tracing::error!(seconds, "something holds this process; it ends without it");
        drop(logging);
    };
    drop(Builder::new().spawn(last_words));
    let _ = logged.recv_timeout(LAST_WORDS_MAX);
    // SAFETY: it ends the process, and runs no more of its code.
    unsafe { libc::_exit(1) }
}
