//! Every metric, declared once: a documented function with typed labels. Only this file spells
//! metric names; `docs/metrics.md` is generated from it.
mod begin;
mod reference;

pub use begin::begin;
use metrics::{Counter, Gauge, Histogram, Unit};
use metrics_exporter_prometheus::{Matcher, PrometheusBuilder, PrometheusHandle};
pub use reference::reference;
use std::{sync::OnceLock, time::Duration};

/// The declaration of a metric, for the generated reference and the exporter's descriptions.
pub struct Declared {
    pub name: &'static str,
    pub kind: &'static str,
    pub unit: Unit,
    pub labels: &'static [&'static str],
    /// The process that serves it.
    pub process: Process,
    pub help: &'static str,
    /// Upper bounds of a histogram's buckets.
    pub bounds: Option<&'static [f64]>,
}

/// The process that measures. A coordinator with an embedded worker is both in one process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Process {
    Coordinator,
    Worker,
    Both,
}

impl Process {
    fn name(self) -> &'static str {
        match self {
            Self::Coordinator => "coordinator",
            Self::Worker => "worker",
            Self::Both => "both",
        }
    }
}

macro_rules! declare {
    ($(
        $(#[doc = $help:literal])+
        $kind:ident $function:ident ($($label:ident),*) on $process:ident =
            $name:literal, $unit:ident $(, $bounds:ident)?;
    )+) => {
        $($(#[doc = $help])+
        pub fn $function($($label: &'static str),*) -> declare!(@type $kind) {
            metrics::$kind!($name $(, stringify!($label) => $label)*)
        })+

        /// All metrics, in the order of this file.
        pub static ALL: &[Declared] = &[$(Declared {
            name: $name,
            kind: stringify!($kind),
            unit: Unit::$unit,
            labels: &[$(stringify!($label)),*],
            process: Process::$process,
            help: concat!($($help),+),
            bounds: declare!(@bounds $($bounds)?),
        }),+];
    };
    (@bounds) => { None };
    (@bounds $bounds:ident) => { Some($bounds) };
    (@type counter) => { Counter };
    (@type gauge) => { Gauge };
    (@type histogram) => { Histogram };
}

declare! {
    /// SelectBatch calls ended, by outcome: `ok`, `cancelled`, or the error's reason.
    counter select_requests(outcome) on Coordinator = "superbatch_select_requests_total", Count;
    /// Seconds from a SelectBatch call to the last byte of its batch.
    histogram select_duration() on Coordinator = "superbatch_select_duration_seconds", Seconds,
        SECONDS;
    /// Seconds spent in one stage. Once a step on the coordinator: `plan`, `wait_weights`,
    /// `select`, `commit`, and `probe` if one is due; once a rank: `send`. Once a slice on its
    /// worker: `fetch`, `decode`, `embed_reference`, `embed_learner`; `decode` once more if images
    /// had to be decoded again
    /// for the learner.
    histogram stage_duration(stage) on Both = "superbatch_stage_duration_seconds", Seconds, SECONDS;
    /// Seconds that the trainer stood still for a batch (calls under NEED, until the header).
    histogram trainer_wait() on Coordinator = "superbatch_trainer_wait_seconds", Seconds, SECONDS;
    /// The longest of those waits of each step, over its ranks: the time that the trainer lost. It
    /// is told once a step, when all ranks have consumed it.
    histogram step_wait() on Coordinator = "superbatch_step_wait_seconds", Seconds, SECONDS;
    /// Bytes of batches that this coordinator streamed, by delivery: `coordinator`, `direct` (only
    /// what the service adds to the rows), `locators`.
    counter sent_bytes(delivery) on Coordinator = "superbatch_sent_bytes_total", Bytes;
    /// Batches of runs with direct delivery that the coordinator streamed whole, by cause: `asked`
    /// (a rank asked for it, mostly since a worker had failed it), `not_held` (the workers had no
    /// room for the rows), `no_address` (a worker has no address for trainers).
    counter direct_fallbacks(cause) on Coordinator = "superbatch_direct_fallbacks_total", Count;
    /// Bytes of rows that this worker streamed to trainers.
    counter direct_bytes() on Worker = "superbatch_direct_bytes_total", Bytes;
    /// Tickets that trainers showed, by outcome: `ok`, or the error's reason.
    counter tickets(outcome) on Worker = "superbatch_tickets_total", Count;
    /// Candidates scanned.
    counter candidates() on Coordinator = "superbatch_candidates_total", Count;
    /// Examples selected.
    counter selected() on Coordinator = "superbatch_selected_total", Count;
    /// Selected examples that are to be trained at their phase's approximation.
    counter selected_approximate() on Coordinator = "superbatch_selected_approximate_total", Count;
    /// Candidates scanned, by the number of their source in its run. Sources of several runs share
    /// numbers; those from 32 on share `more`.
    counter source_candidates(source) on Coordinator = "superbatch_source_candidates_total", Count;
    /// Examples selected, by source as `superbatch_source_candidates_total` counts. A source that
    /// is scanned and never chosen costs its scoring and gives nothing.
    counter source_selected(source) on Coordinator = "superbatch_source_selected_total", Count;
    /// Rows that could not be used, by reason. A step that is decided again counts its rows again.
    counter skipped(reason) on Coordinator = "superbatch_skipped_total", Count;
    /// Candidates that a rule of a phase's tuning left out of a committed step, by rule:
    /// `clip_score_at_least`, `neg_clip_loss_keep`, `duplicates_above`, `score_columns`.
    counter left_out(rule) on Coordinator = "superbatch_left_out_total", Count;
    /// Steps committed, by mode: `normal`, `stale`, `uniform`, `reference_only`.
    counter steps_committed(mode) on Coordinator = "superbatch_steps_committed_total", Count;
    /// Committed steps whose rows wait in memory for their trainer.
    gauge ready_batches() on Coordinator = "superbatch_ready_batches", Count;
    /// Runs that this coordinator owns and has in memory. If there are more than
    /// `coordinator.max_runs`, the run that has been idle longest is put to sleep.
    gauge open_runs() on Coordinator = "superbatch_open_runs", Count;
    /// Requests to the run page's JSON, by outcome: `ok`, `not_found`, `invalid`, `refused`
    /// for its token, `failed`.
    counter page_requests(outcome) on Coordinator = "superbatch_page_requests_total", Count;
    /// The newest published weights version, of the run that published last.
    gauge learner_version() on Coordinator = "superbatch_learner_version", Count;
    /// Steps between the weights that a step was scored with and the step before it.
    histogram learner_staleness() on Coordinator = "superbatch_learner_staleness_steps", Count,
        STEPS;
    /// Seconds from the first byte of a push to its publication.
    histogram weight_push_duration() on Coordinator = "superbatch_weight_push_duration_seconds",
        Seconds, SECONDS;
    /// Bytes of weights received.
    counter weight_push_bytes() on Coordinator = "superbatch_weight_push_bytes_total", Bytes;
    /// Pushes refused or broken off, by reason.
    counter weight_push_failures(reason) on Coordinator = "superbatch_weight_push_failures_total",
        Count;
    /// Shards of which most rows cannot be used, each counted once a run and process.
    counter rotten_shards() on Coordinator = "superbatch_rotten_shards_total", Count;
    /// Losses of examples that trainers reported.
    counter losses_reported() on Coordinator = "superbatch_losses_reported_total", Count;
    /// Times that weights were rolled back by hand.
    counter weights_rolled_back() on Coordinator = "superbatch_weights_rolled_back_total", Count;
    /// Object store requests, by operation and outcome (`ok`, `not_found`, `exists`, `throttled`,
    /// `error`).
    counter object_store_requests(operation,
        outcome) on Both = "superbatch_object_store_requests_total", Count;
    /// Bytes read from object stores.
    counter object_store_bytes_read() on Both = "superbatch_object_store_bytes_read_total", Bytes;
    /// Object store requests that were refused with "slow down".
    counter object_store_throttled() on Both = "superbatch_object_store_throttled_total", Count;
    /// Reads of remote shards that asked the disk cache (`worker.disk_cache_dir`), by outcome:
    /// `hit`, `miss`.
    counter disk_cache_reads(outcome) on Worker = "superbatch_disk_cache_reads_total", Count;
    /// Bytes that came from the disk cache, and not from their store.
    counter disk_cache_bytes_read() on Worker = "superbatch_disk_cache_bytes_read_total", Bytes;
    /// Bytes that left the disk cache to make room.
    counter disk_cache_evicted_bytes() on Worker = "superbatch_disk_cache_evicted_bytes_total",
        Bytes;
    /// What failed in the disk cache, by operation: `read` (the file was damaged and is removed, or
    /// the disk did not answer in time), `write`, `remove`, `busy` (a block was not kept, since too
    /// many wait for the disk). The blocks are read from their stores.
    counter disk_cache_failures(operation) on Worker = "superbatch_disk_cache_failures_total",
        Count;
    /// Bytes that the disk cache holds.
    gauge disk_cache_bytes() on Worker = "superbatch_disk_cache_bytes", Bytes;
    /// Bytes that the disk cache may hold.
    gauge disk_cache_bytes_max() on Worker = "superbatch_disk_cache_limit_bytes", Bytes;
    /// Mean conditional score per example of each chosen sub-batch.
    histogram batch_score() on Coordinator = "superbatch_batch_score", Count, SCORES;
    /// Mean score of the examples of each step, each by its own pair only: of the `chosen` ones,
    /// and of all `candidates`. Policies that draw by these scores keep the first above the second.
    /// Joint selection need not: its goal is the score of the whole batch,
    /// `superbatch_batch_score`.
    histogram mean_score(of) on Coordinator = "superbatch_mean_score", Count, SCORES;
    /// Fidelity probes that were due, by outcome: `ok`, in a committed step; `failed`, as the log
    /// says, while the step went on.
    counter probes(outcome) on Coordinator = "superbatch_probes_total", Count;
    /// Spearman's rank correlation of candidates' own scores at full fidelity and at the phase's
    /// approximation, as the newest probe of any run found it.
    gauge probe_rank_correlation() on Coordinator = "superbatch_probe_rank_correlation", Count;
    /// The share of the draws at both fidelities that is the same, by the newest probe of any run.
    gauge probe_overlap() on Coordinator = "superbatch_probe_overlap", Count;
    /// Of the batch score that a draw at full fidelity has beyond a uniform draw's, the share that
    /// the draw at the approximation keeps, by the newest probe of any run: 1 is all of it, 0 is
    /// none, below 0 is worse than a uniform draw.
    gauge probe_kept_gain() on Coordinator = "superbatch_probe_kept_gain", Count;
    /// Rows whose reference embeddings were found in the sidecar.
    counter reference_rows_cached() on Worker = "superbatch_reference_rows_cached_total", Count;
    /// Rows whose reference embeddings were computed.
    counter reference_rows_computed() on Worker = "superbatch_reference_rows_computed_total", Count;
    /// Scoring workers that hold a lease.
    gauge workers() on Coordinator = "superbatch_workers", Count;
    /// Estimated number of workers with which the trainers of all open runs would not wait for
    /// their batches, as far as more workers help. Estimated from the time of the stages and the
    /// trainers' own time for a step. 0 until a trainer has taken a few steps, and when none has
    /// asked for a batch, or stands still for one, for five minutes and ten of its steps.
    gauge optimal_workers() on Coordinator = "superbatch_optimal_workers", Count;
    /// Slices that went to another worker because the first one was lost or could not read them.
    counter slices_rescored() on Coordinator = "superbatch_slices_rescored_total", Count;
    /// Floating-point operations spent on scoring, by stage: `reference`, `learner`, `selection`. A
    /// slice that is scored again counts again. Stage `discarded` is the part of them whose result
    /// no step used: do not add it.
    counter flops(stage) on Both = "superbatch_flops_total", Count;
    /// Calls refused for their token, by reason: `UNAUTHENTICATED`; `PERMISSION_DENIED`, for its
    /// scopes or its runs.
    counter access_refused(reason) on Both = "superbatch_access_refused_total", Count;
    /// Connections closed before their first call, by reason: `limit` (too many are open),
    /// `handshake` (TLS), `silent` (nothing arrived in time).
    counter connections_refused(reason) on Both = "superbatch_connections_refused_total", Count;
    /// Open connections of gRPC.
    gauge connections() on Both = "superbatch_connections", Count;
    /// Files that changed and were read again (`tokens`, `certificates`), by outcome: `ok`, or
    /// `error` if the earlier content stays in force.
    counter reloads(what, outcome) on Both = "superbatch_reloads_total", Count;
    /// Lines of the audit log that could not be written.
    counter audit_lost() on Both = "superbatch_audit_lost_total", Count;
    /// Spans of traced steps, by outcome: `exported` to the collector, `failed` (the collector did
    /// not take them), `queue_full` (dropped, since too many waited for the collector).
    counter trace_spans(outcome) on Both = "superbatch_trace_spans_total", Count;
    /// Bytes held of each budget of memory: `ready` (chosen batches) on the coordinator; `blocks`,
    /// `rows`, `images`, `held` (chosen rows for direct delivery), `embeddings` and `buffers`
    /// (free, to be used again) on a worker.
    gauge budget(budget) on Both = "superbatch_budget_bytes", Bytes;
    /// Bytes that each budget of memory may hold.
    gauge budget_limit(budget) on Both = "superbatch_budget_limit_bytes", Bytes;
    /// Processor time of this process, in seconds, user and system.
    gauge process_cpu() on Both = "process_cpu_seconds_total", Seconds;
    /// Memory of this process that is resident, in bytes.
    gauge process_memory() on Both = "process_resident_memory_bytes", Bytes;
    /// Threads of this process.
    gauge process_threads() on Both = "process_threads", Count;
    /// Seconds in which the threads of the runtime, which serve calls and move data, were busy, all
    /// together. Its rate by `superbatch_runtime_threads` is the share of their time.
    gauge runtime_busy() on Both = "superbatch_runtime_busy_seconds_total", Seconds;
    /// Threads of the runtime.
    gauge runtime_threads() on Both = "superbatch_runtime_threads", Count;
    /// Open files and sockets of this process.
    gauge process_files() on Both = "process_open_fds", Count;
    /// Open files and sockets that this process may have.
    gauge process_files_max() on Both = "process_max_fds", Count;
    /// When this process started to serve metrics, in seconds since 1970.
    gauge process_start() on Both = "process_start_time_seconds", Seconds;
    /// Always 1; the labels say which build this is.
    gauge build_info(version, device) on Both = "superbatch_build_info", Count;
}

/// Series that `superbatch top` reads.
pub mod names {
    pub const WAITS: &str = "superbatch_trainer_wait_seconds_count";
    pub const WAIT_SECONDS: &str = "superbatch_trainer_wait_seconds_sum";
    pub const WORKERS: &str = "superbatch_workers";
    pub const OPTIMAL_WORKERS: &str = "superbatch_optimal_workers";
    pub const STEPS: &str = "superbatch_steps_committed_total";
    pub const CANDIDATES: &str = "superbatch_candidates_total";
    pub const READY: &str = "superbatch_ready_batches";
    pub const STAGE_SECONDS: &str = "superbatch_stage_duration_seconds_sum";
}

/// Registers descriptions with the installed recorder.
pub fn describe() {
    for metric in ALL {
        let (name, unit, help) = (metric.name, metric.unit, metric.help.trim());
        match metric.kind {
            "counter" => metrics::describe_counter!(name, unit, help),
            "gauge" => metrics::describe_gauge!(name, unit, help),
            _ => metrics::describe_histogram!(name, unit, help),
        }
    }
}

/// Upper bounds of seconds histograms: 1 ms to 10 min.
const SECONDS: &[f64] = &[
    0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 60.0, 180.0, 600.0,
];
/// Upper bounds of staleness, in steps.
const STEPS: &[f64] = &[
    0.0, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0, 32.0, 64.0, 128.0,
];
/// Upper bounds of scores, on both sides of 0, which means nothing to learn.
const SCORES: &[f64] = &[
    -256.0, -64.0, -16.0, -4.0, -1.0, -0.25, 0.0, 0.25, 1.0, 4.0, 16.0, 64.0, 256.0,
];

/// How often histograms are compacted.
const UPKEEP: Duration = Duration::from_secs(5);

/// Installs the recorder, once in each process. Returns the handle that renders it.
pub fn install() -> PrometheusHandle {
    static INSTALLED: OnceLock<PrometheusHandle> = OnceLock::new();
    INSTALLED
        .get_or_init(|| {
            let bounded = ALL
                .iter()
                .filter_map(|metric| Some((metric.name, metric.bounds?)));
            let builder = bounded.fold(PrometheusBuilder::new(), |builder, (name, bounds)| {
                let matcher = Matcher::Full(name.to_owned());
                builder
                    .set_buckets_for_metric(matcher, bounds)
                    .expect("bounds are not empty")
            });
            let handle = builder
                .install_recorder()
                .expect("no other recorder is installed in this program");
            describe();
            let kept = handle.clone();
            let upkeep = move || {
                loop {
                    std::thread::sleep(UPKEEP);
                    kept.run_upkeep();
                }
            };
            // The recorder keeps the samples of histograms until they are scraped or compacted.
            // Without this thread an unscraped process would grow until it is killed.
            let thread = std::thread::Builder::new()
                .name("metrics".into())
                .spawn(upkeep);
            thread.expect("a process that cannot start one thread cannot serve");
            handle
        })
        .clone()
}
