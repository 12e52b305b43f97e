//! The counters with which a process begins.
use super::{
    ALL, Declared, Process, disk_cache_failures, disk_cache_reads, flops, left_out, page_requests,
    probes, select_requests, skipped, steps_committed, weight_push_failures,
};
use metrics::Counter;
use superbatch_proto::{
    reason_name,
    v1::{BadRowReason, Reason},
};

/// Makes the counters of `process` begin at 0, as far as their labels are known. A series that
/// first appears with the value 1 has no increase to Prometheus, so a rate would miss the first
/// event.
pub fn begin(process: Process) {
    let is_served = |metric: &&Declared| [process, Process::Both].contains(&metric.process);
    for metric in ALL
        .iter()
        .filter(is_served)
        .filter(|metric| metric.kind == "counter" && metric.labels.is_empty())
    {
        metrics::counter!(metric.name).increment(0);
    }
    if process == Process::Worker {
        begin_each(flops, ["reference", "learner"]);
        begin_each(disk_cache_reads, ["hit", "miss"]);
        begin_each(disk_cache_failures, ["read", "write", "remove", "busy"]);
        return;
    }
    begin_each(flops, ["selection", "discarded"]);
    begin_each(select_requests, ["ok", "cancelled"]);
    let answers = ["ok", "not_found", "invalid", "refused", "failed"];
    begin_each(page_requests, answers);
    let modes = ["normal", "stale", "uniform", "reference_only"];
    begin_each(steps_committed, modes);
    begin_each(probes, ["ok", "failed"]);
    let rules = [
        "clip_score_at_least",
        "neg_clip_loss_keep",
        "duplicates_above",
        "score_columns",
    ];
    begin_each(left_out, rules);
    let bad_rows = (1..).map_while(|number| BadRowReason::try_from(number).ok());
    let bad_rows = bad_rows.map(|why| why.as_str_name().trim_start_matches("BAD_ROW_REASON_"));
    begin_each(skipped, bad_rows);
    let reasons = PUSH_FAILURES.iter().map(|reason| reason_name(*reason));
    begin_each(weight_push_failures, reasons.chain(["BROKEN"]));
}

/// Makes a counter begin with each of these values of its label.
fn begin_each(
    counter: fn(&'static str) -> Counter,
    values: impl IntoIterator<Item = &'static str>,
) {
    values
        .into_iter()
        .for_each(|value| counter(value).increment(0));
}

/// The usual reasons of failed pushes.
const PUSH_FAILURES: &[Reason] = &[
    Reason::InvalidArgument,
    Reason::MessageTooLarge,
    Reason::GenerationStale,
    Reason::StorageUnreachable,
    Reason::WeightsRefused,
    Reason::PushConflict,
    Reason::PushOffCadence,
    Reason::NoWorkers,
    Reason::Overloaded,
    Reason::ShuttingDown,
    Reason::Internal,
];

#[cfg(test)]
mod tests {
    use super::*;
    use metrics_exporter_prometheus::PrometheusBuilder;

    /// What a process of these kinds serves at its start.
    fn page(processes: &[Process]) -> String {
        let recorder = PrometheusBuilder::new().build_recorder();
        ::metrics::with_local_recorder(&recorder, || {
            processes.iter().for_each(|process| begin(*process))
        });
        recorder.handle().render()
    }

    #[test]
    fn counters_begin_at_zero_where_they_are_served() {
        let coordinator = page(&[Process::Coordinator]);
        for line in [
            "superbatch_slices_rescored_total 0",
            "superbatch_object_store_throttled_total 0",
            "superbatch_weight_push_failures_total{reason=\"WEIGHTS_REFUSED\"} 0",
            "superbatch_left_out_total{rule=\"duplicates_above\"} 0",
            "superbatch_skipped_total{reason=\"EMBEDDING_NOT_FINITE\"} 0",
            "superbatch_steps_committed_total{mode=\"normal\"} 0",
        ] {
            assert!(
                coordinator.lines().any(|found| found == line),
                "{line} in {coordinator}"
            );
        }
        assert!(
            !coordinator.contains("superbatch_reference_rows_cached_total"),
            "that is a worker's"
        );
        let worker = page(&[Process::Worker]);
        assert!(
            worker.contains("superbatch_reference_rows_cached_total 0")
                && !worker.contains("slices_rescored")
        );
        let both = page(&[Process::Coordinator, Process::Worker]);
        let declared = ALL
            .iter()
            .filter(|metric| metric.kind == "counter" && metric.labels.is_empty());
        declared.for_each(|metric| {
            assert!(
                both.contains(&format!("{} 0", metric.name)),
                "{}",
                metric.name
            )
        });
    }
}
