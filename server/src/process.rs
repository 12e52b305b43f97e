//! The operating system's figures of this process, for `/metrics`. None if there is no `/proc`.
use crate::metrics;
use std::{
    fs,
    sync::{Mutex, OnceLock, PoisonError},
    time::{Duration, SystemTime},
};
use tokio::runtime::Handle;

/// Clock ticks a second in `/proc/self/stat`: the kernel's interface has had this value for decades
/// on all its platforms.
const TICKS: f64 = 100.0;
const KIB: f64 = 1024.0;

/// A budget of memory, with a function that returns the bytes held; `None` if its owner is gone.
struct Budget {
    name: &'static str,
    held: Box<dyn Fn() -> Option<u64> + Send>,
}

static BUDGETS: Mutex<Vec<Budget>> = Mutex::new(Vec::new());

/// Shows a budget of `limit` bytes in the metrics, for as long as `held` returns a value.
pub fn budget(name: &'static str, limit: u64, held: impl Fn() -> Option<u64> + Send + 'static) {
    metrics::budget_limit(name).set(limit as f64);
    let held = Box::new(held);
    let mut budgets = BUDGETS.lock().unwrap_or_else(PoisonError::into_inner);
    budgets.push(Budget { name, held });
}

fn observe_budgets() {
    let mut budgets = BUDGETS.lock().unwrap_or_else(PoisonError::into_inner);
    budgets.retain(|budget| {
        let held = (budget.held)();
        metrics::budget(budget.name).set(held.unwrap_or(0) as f64);
        held.is_some()
    });
}

/// Shows how busy the threads of the runtime are on which this is called, if it is.
fn observe_runtime() {
    let Ok(runtime) = Handle::try_current() else {
        return;
    };
    let runtime = runtime.metrics();
    let threads = runtime.num_workers();
    let busy = (0..threads).map(|thread| runtime.worker_total_busy_duration(thread));
    metrics::runtime_busy().set(busy.sum::<Duration>().as_secs_f64());
    metrics::runtime_threads().set(threads as f64);
}

/// Sets the gauges to the current values.
pub fn observe() {
    observe_budgets();
    observe_runtime();
    metrics::process_start().set(started());
    if let Some(seconds) = fs::read_to_string("/proc/self/stat")
        .ok()
        .as_deref()
        .and_then(cpu_seconds)
    {
        metrics::process_cpu().set(seconds);
    }
    if let Ok(status) = fs::read_to_string("/proc/self/status") {
        if let Some(kib) = field(&status, "VmRSS:") {
            metrics::process_memory().set(kib * KIB);
        }
        if let Some(threads) = field(&status, "Threads:") {
            metrics::process_threads().set(threads);
        }
    }
    if let Ok(open) = fs::read_dir("/proc/self/fd") {
        metrics::process_files().set(open.count() as f64);
    }
    if let Some(most) = fs::read_to_string("/proc/self/limits")
        .ok()
        .as_deref()
        .and_then(|limits| field(limits, "Max open files"))
    {
        metrics::process_files_max().set(most);
    }
}

/// Returns the time of the first call, in seconds since 1970.
fn started() -> f64 {
    static STARTED: OnceLock<f64> = OnceLock::new();
    *STARTED.get_or_init(|| {
        let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
        since.map_or(0.0, |since| since.as_secs_f64())
    })
}

/// Returns user and system time from the line of `/proc/self/stat`. The program's name in it may
/// contain spaces and brackets, so fields are counted from the last bracket.
fn cpu_seconds(stat: &str) -> Option<f64> {
    let (_, after) = stat.rsplit_once(')')?;
    let fields: Vec<&str> = after.split_whitespace().collect();
    // The 14th and 15th of the line; the name was the second.
    let ticks = |at: usize| fields.get(at)?.parse::<f64>().ok();
    Some((ticks(11)? + ticks(12)?) / TICKS)
}

/// Returns the first number after a line's name.
fn field(text: &str, name: &str) -> Option<f64> {
    let line = text.lines().find_map(|line| line.strip_prefix(name))?;
    line.split_whitespace().next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_budget_is_asked_for_as_long_as_it_is_there() {
        let recorder = metrics_exporter_prometheus::PrometheusBuilder::new().build_recorder();
        let held = std::sync::Arc::new(7_u64);
        let weak = std::sync::Arc::downgrade(&held);
        ::metrics::with_local_recorder(&recorder, || {
            budget("test", 10, move || weak.upgrade().map(|held| *held));
            observe();
            let page = recorder.handle().render();
            assert!(page.contains("superbatch_budget_bytes{budget=\"test\"} 7"));
            assert!(page.contains("superbatch_budget_limit_bytes{budget=\"test\"} 10"));
            assert!(page.contains("process_resident_memory_bytes"));
            drop(held);
            observe();
            let page = recorder.handle().render();
            assert!(page.contains("superbatch_budget_bytes{budget=\"test\"} 0"));
        });
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn the_runtimes_threads_are_seen_at_work() {
        let recorder = metrics_exporter_prometheus::PrometheusBuilder::new().build_recorder();
        let look = || {
            ::metrics::with_local_recorder(&recorder, observe_runtime);
            recorder.handle().render()
        };
        assert!(look().contains("superbatch_runtime_threads 2"));
        let busy = |page: String| {
            let name = "superbatch_runtime_busy_seconds_total ";
            let seconds = page.lines().find_map(|line| line.strip_prefix(name));
            seconds.unwrap().parse::<f64>().unwrap()
        };
        // A thread tells of its work when it rests.
        while busy(look()) == 0.0 {
            tokio::spawn(std::future::ready(())).await.unwrap();
        }
    }

    #[test]
    fn proc_is_read() {
        let stat = "42 (a) b) S 1 42 42 0 -1 4194304 1 0 0 0 250 50 0 0 20 0 9 0 1 2 3";
        assert_eq!(cpu_seconds(stat), Some(3.0));
        let status = "Name:\tx\nVmHWM:\t  2048 kB\nVmRSS:\t  1024 kB\nThreads:\t9\n";
        assert_eq!(field(status, "VmRSS:"), Some(1024.0));
        assert_eq!(field(status, "Threads:"), Some(9.0));
        let limits = "Max open files            1024                 524288               files\n";
        assert_eq!(field(limits, "Max open files"), Some(1024.0));
        assert_eq!(field(status, "VmSwap:"), None);
    }
}
