use super::{
    export::{MESSAGE_SPANS, WAITING_MAX},
    *,
};
use metrics_exporter_prometheus::PrometheusBuilder;
use tokio::net::TcpListener;
use tonic::transport::Endpoint;
use tracing_subscriber::layer::SubscriberExt;

#[test]
fn headers_are_read_as_w3c_writes_them() {
    let known = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
    let found = parsed(known).unwrap();
    assert_eq!(
        found.trace_id().to_string(),
        "4bf92f3577b34da6a3ce929d0e0e4736"
    );
    assert_eq!(found.span_id().to_string(), "00f067aa0ba902b7");
    assert!(found.is_sampled() && found.is_remote());
    for wrong in [
        "",
        "00",
        "ff-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
        "00-00000000000000000000000000000000-00f067aa0ba902b7-01",
        "00-4bf92f3577b34da6a3ce929d0e0e4736-0000000000000000-01",
        "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-zz",
        "00-4bf9-00f067aa0ba902b7-01",
    ] {
        assert!(parsed(wrong).is_none(), "{wrong}");
    }
}

#[test]
fn nothing_is_carried_if_nothing_is_traced() {
    let span = step("run", 0, 7);
    assert!(span.is_disabled());
    let _inside = span.enter();
    assert!(carrying(()).metadata().get(HEADER).is_none());
    assert_eq!(ids(), (String::new(), String::new()));
}

/// Accepts connections and never answers.
async fn silent(share: f64) -> (TcpListener, Traces) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = format!("http://{}", listener.local_addr().unwrap());
    let channel = Endpoint::from_shared(address).unwrap().connect_lazy();
    (listener, Traces::start(channel, share, "test").unwrap())
}

#[tokio::test(flavor = "multi_thread")]
async fn spans_beyond_the_queue_are_dropped_and_counted() {
    let (_listener, traces) = silent(1.0).await;
    let recorder = PrometheusBuilder::new().build_recorder();
    let subscriber = tracing_subscriber::registry().with(traces.layer());
    let made = WAITING_MAX + 2 * MESSAGE_SPANS;
    metrics::with_local_recorder(&recorder, || {
        tracing::subscriber::with_default(subscriber, || {
            (0..made).for_each(|n| drop(step("run", 0, n as u64)));
        });
    });
    let shown = recorder.handle().render();
    let full = "superbatch_trace_spans_total{outcome=\"queue_full\"} ";
    let line = shown.lines().find(|line| line.starts_with(full)).unwrap();
    let dropped: usize = line[full.len()..].parse().unwrap();
    // One message may be under way beside those that wait.
    assert!(
        (MESSAGE_SPANS..=2 * MESSAGE_SPANS).contains(&dropped),
        "{dropped}"
    );
    tokio::task::spawn_blocking(|| traces.stop()).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn only_steps_begin_traces_and_calls_carry_them() {
    let (_listener, traces) = silent(1.0).await;
    let subscriber = tracing_subscriber::registry().with(traces.layer());
    tracing::subscriber::with_default(subscriber, || {
        stage!("slice").in_scope(|| {
            assert_eq!(ids(), (String::new(), String::new()), "of no step");
        });
        let (trace, of_step) = step("run", 0, 7).in_scope(ids);
        assert_eq!((trace.len(), of_step.len()), (32, 16));
        let receipt = ReceiptSummary {
            trace_id: trace.clone(),
            span_id: of_step.clone(),
            ..Default::default()
        };
        let call = serve(&receipt, 0, 0.5).in_scope(|| {
            let (same, own) = ids();
            assert_eq!(same, trace, "a batch is served in the trace of its step");
            assert_ne!(own, of_step);
            carrying(())
        });
        let (same, _) = continued(stage!("score"), &call).in_scope(ids);
        assert_eq!(same, trace, "over the wire");
        assert!(serve(&ReceiptSummary::default(), 0, 0.5).is_none());
    });
    tokio::task::spawn_blocking(|| traces.stop()).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn workers_are_told_of_a_step_that_is_not_traced() {
    let (_listener, traces) = silent(0.0).await;
    let subscriber = tracing_subscriber::registry().with(traces.layer());
    tracing::subscriber::with_default(subscriber, || {
        let call = step("run", 0, 7).in_scope(|| {
            assert_eq!(ids(), (String::new(), String::new()));
            carrying(())
        });
        let header = call.metadata().get(HEADER).unwrap().to_str().unwrap();
        assert!(header.ends_with("-00"), "{header}");
        let on_worker = continued(stage!("score"), &call).in_scope(ids);
        assert_eq!(on_worker, (String::new(), String::new()));
    });
    tokio::task::spawn_blocking(|| traces.stop()).await.unwrap();
}
