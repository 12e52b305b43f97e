//! The counters with which a process begins.
use super::{
    ALL, Declared, Process, disk_cache_failures, disk_cache_reads, flops, left_out,
    losses_reported, page_requests, probes, rotten_shards, select_requests, skipped,
    steps_committed, weight_push_failures, weights_rolled_back,
};
use superbatch_proto::v1::{BadRowReason, Reason};

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
        ["reference", "learner"]
            .into_iter()
            .for_each(|stage| flops(stage).increment(0));
        ["hit", "miss"]
            .into_iter()
            .for_each(|outcome| disk_cache_reads(outcome).increment(0));
        ["read", "write", "remove", "busy"]
            .into_iter()
            .for_each(|operation| disk_cache_failures(operation).increment(0));
        return;
    }
    ["selection", "discarded"]
        .into_iter()
        .for_each(|stage| flops(stage).increment(0));
    ["ok", "cancelled"]
        .into_iter()
        .for_each(|outcome| select_requests(outcome).increment(0));
    ["ok", "not_found", "invalid", "refused", "failed"]
        .into_iter()
        .for_each(|outcome| page_requests(outcome).increment(0));
    ["normal", "stale", "uniform", "reference_only"]
        .into_iter()
        .for_each(|mode| steps_committed(mode).increment(0));
    ["ok", "failed"]
        .into_iter()
        .for_each(|outcome| probes(outcome).increment(0));
    let rules = [
        "clip_score_at_least",
        "neg_clip_loss_keep",
        "duplicates_above",
        "score_columns",
    ];
    rules
        .into_iter()
        .for_each(|rule| left_out(rule).increment(0));
    let bad_rows = (1..).map_while(|number| BadRowReason::try_from(number).ok());
    bad_rows.for_each(|why| {
        skipped(why.as_str_name().trim_start_matches("BAD_ROW_REASON_")).increment(0)
    });
    weight_push_failures("BROKEN").increment(0);
    weights_rolled_back().increment(0);
    losses_reported().increment(0);
    rotten_shards().increment(0);
    PUSH_FAILURES.iter().for_each(|reason| {
        weight_push_failures(superbatch_proto::reason_name(*reason)).increment(0)
    });
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
