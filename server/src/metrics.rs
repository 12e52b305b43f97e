//! Every metric, declared once: a documented function with typed labels. Only this file spells metric names;
//! `docs/metrics.md` is generated from it.
use metrics::{Counter, Gauge, Histogram, Unit};
use metrics_exporter_prometheus::{Matcher, PrometheusBuilder, PrometheusHandle};
use std::{sync::OnceLock, time::Duration};

/// What a metric is, as the generated reference and the exporter's descriptions need it.
pub struct Declared {
    pub name: &'static str,
    pub kind: &'static str,
    pub unit: Unit,
    pub labels: &'static [&'static str],
    pub help: &'static str,
    /// Upper bounds of a histogram's buckets.
    pub bounds: Option<&'static [f64]>,
}

macro_rules! declare {
    ($($(#[doc = $help:literal])+ $kind:ident $function:ident ($($label:ident),*) = $name:literal, $unit:ident $(, $bounds:ident)?;)+) => {
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
    counter select_requests(outcome) = "superbatch_select_requests_total", Count;
    /// Seconds from a SelectBatch call to the last byte of its batch.
    histogram select_duration() = "superbatch_select_duration_seconds", Seconds, SECONDS;
    /// Seconds that a step spent in one stage: `plan`, `fetch`, `decode`, `embed_reference`, `embed_learner`, `wait_weights`,
    /// `select`, `commit`, `send`.
    histogram stage_duration(stage) = "superbatch_stage_duration_seconds", Seconds, SECONDS;
    /// Seconds that the trainer stood still for a batch (calls under NEED, until the header).
    histogram trainer_wait() = "superbatch_trainer_wait_seconds", Seconds, SECONDS;
    /// Candidates scanned.
    counter candidates() = "superbatch_candidates_total", Count;
    /// Examples selected.
    counter selected() = "superbatch_selected_total", Count;
    /// Rows that could not be used, by reason. A step that is decided again counts its rows again.
    counter skipped(reason) = "superbatch_skipped_total", Count;
    /// Candidates that a rule of a phase's tuning left out of a committed step, by rule: `clip_score_at_least`,
    /// `neg_clip_loss_keep`, `duplicates_above`.
    counter left_out(rule) = "superbatch_left_out_total", Count;
    /// Steps committed, by mode: `normal`, `stale`, `uniform`, `reference_only`.
    counter steps_committed(mode) = "superbatch_steps_committed_total", Count;
    /// Steps that are chosen and wait for their trainer.
    gauge ready_batches() = "superbatch_ready_batches", Count;
    /// Runs that this coordinator owns and has in memory. Of more than `coordinator.max_runs`, the one that has been idle
    /// longest is put to sleep.
    gauge open_runs() = "superbatch_open_runs", Count;
    /// The newest published weights version, of the run that published last.
    gauge learner_version() = "superbatch_learner_version", Count;
    /// Steps between the weights that a step was scored with and the step before it.
    histogram learner_staleness() = "superbatch_learner_staleness_steps", Count, STEPS;
    /// Seconds from the first byte of a push to its publication.
    histogram weight_push_duration() = "superbatch_weight_push_duration_seconds", Seconds, SECONDS;
    /// Bytes of weights received.
    counter weight_push_bytes() = "superbatch_weight_push_bytes_total", Bytes;
    /// Pushes refused or broken off, by reason.
    counter weight_push_failures(reason) = "superbatch_weight_push_failures_total", Count;
    /// Object store requests, by operation and outcome (`ok`, `not_found`, `exists`, `throttled`, `error`).
    counter object_store_requests(operation, outcome) = "superbatch_object_store_requests_total", Count;
    /// Bytes read from object stores.
    counter object_store_bytes_read() = "superbatch_object_store_bytes_read_total", Bytes;
    /// Object store requests that were told to slow down.
    counter object_store_throttled() = "superbatch_object_store_throttled_total", Count;
    /// Mean conditional score per example of each chosen sub-batch.
    histogram batch_score() = "superbatch_batch_score", Count, SCORES;
    /// Mean score of the examples of each step, each by its own pair alone: of the `chosen` ones, and of all `candidates`. The
    /// policies that draw by these scores hold the first above the second. Joint selection need not: its goal is the score of
    /// the whole batch, `superbatch_batch_score`.
    histogram mean_score(of) = "superbatch_mean_score", Count, SCORES;
    /// Rows whose reference embeddings were found in the sidecar.
    counter reference_rows_cached() = "superbatch_reference_rows_cached_total", Count;
    /// Rows whose reference embeddings were computed.
    counter reference_rows_computed() = "superbatch_reference_rows_computed_total", Count;
    /// Scoring workers that hold a lease.
    gauge workers() = "superbatch_workers", Count;
    /// Workers with which the trainers of all open runs would not wait for their batches, as far as more workers help:
    /// estimated from what stages take and from the trainers' own time for a step. 0 while no trainer has
    /// been seen to take a few steps.
    gauge optimal_workers() = "superbatch_optimal_workers", Count;
    /// Slices that had to be scored again because their worker was lost.
    counter slices_rescored() = "superbatch_slices_rescored_total", Count;
    /// Floating-point operations spent on scoring, by stage: `reference`, `learner`, `selection`. A slice that is scored again
    /// counts again. Stage `discarded` is the part of them whose result no step used: do not add it.
    counter flops(stage) = "superbatch_flops_total", Count;
    /// Always 1; the labels say which build this is.
    gauge build_info(version, device) = "superbatch_build_info", Count;
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

/// The reference page `docs/metrics.md`.
pub fn reference() -> String {
    let mut page = String::from(
        "# Metrics\n\nServed at `/metrics` in the Prometheus text format. Generated from `server/src/metrics.rs` by `make docs`.\n\n\
         | metric | type | labels | meaning |\n|---|---|---|---|\n",
    );
    for metric in ALL {
        let labels: Vec<String> = metric.labels.iter().map(|label| format!("`{label}`")).collect();
        let help = metric.help.split_whitespace().collect::<Vec<_>>().join(" ");
        page.push_str(&format!("| `{}` | {} | {} | {} |\n", metric.name, metric.kind, labels.join(", "), help));
    }
    page
}

/// Upper bounds of seconds histograms: 1 ms to 10 min.
const SECONDS: &[f64] = &[0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 60.0, 180.0, 600.0];
/// Upper bounds of staleness, in steps.
const STEPS: &[f64] = &[0.0, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0, 32.0, 64.0, 128.0];
/// Upper bounds of scores, on both sides of nothing to learn.
const SCORES: &[f64] = &[-256.0, -64.0, -16.0, -4.0, -1.0, -0.25, 0.0, 0.25, 1.0, 4.0, 16.0, 64.0, 256.0];

/// How often histograms are folded.
const UPKEEP: Duration = Duration::from_secs(5);

/// Installs the recorder, once a process, and gives what renders it.
pub fn install() -> PrometheusHandle {
    static INSTALLED: OnceLock<PrometheusHandle> = OnceLock::new();
    INSTALLED
        .get_or_init(|| {
            let bounded = ALL.iter().filter_map(|metric| Some((metric.name, metric.bounds?)));
            let builder = bounded.fold(PrometheusBuilder::new(), |builder, (name, bounds)| {
                let matcher = Matcher::Full(name.to_owned());
                builder.set_buckets_for_metric(matcher, bounds).expect("bounds are not empty")
            });
            let handle = builder.install_recorder().expect("no other recorder is installed in this program");
            describe();
            let kept = handle.clone();
            let upkeep = move || {
                loop {
                    std::thread::sleep(UPKEEP);
                    kept.run_upkeep();
                }
            };
            // Where nobody scrapes, samples of histograms would pile up for the life of the process.
            let thread = std::thread::Builder::new().name("metrics".into()).spawn(upkeep);
            thread.expect("a process that cannot start one thread cannot serve");
            handle
        })
        .clone()
}
