//! Sends spans to the collector, from a thread of its own.
//!
//! A step only puts its spans into a queue. If the collector is slow or away, the queue fills and
//! further spans are dropped and counted: no step waits for it, and none fails.
use super::{STEP, TARGET};
use crate::{
    error::{Error, Result},
    metrics,
};
use opentelemetry::{
    Context, KeyValue,
    trace::{Link, SpanKind, TraceContextExt, TraceId, TraceState, TracerProvider},
};
use opentelemetry_otlp::{SpanExporter as Otlp, WithExportConfig, WithTonicConfig};
use opentelemetry_sdk::{
    Resource,
    error::OTelSdkResult,
    trace::{
        BatchConfigBuilder, BatchSpanProcessor, Sampler, SamplingDecision, SamplingResult,
        SdkTracerProvider, ShouldSample, Span, SpanData, SpanExporter, SpanProcessor,
    },
};
use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::Duration,
};
use tonic::transport::Channel;
use tracing_subscriber::{
    Layer, Registry,
    filter::{LevelFilter, filter_fn},
};

/// Spans that may wait for the exporter: those of some ten steps of a hundred workers.
pub(super) const WAITING_MAX: usize = 8192;
/// Spans of one message to the collector.
pub(super) const MESSAGE_SPANS: usize = 512;
/// How long a span waits for others of its message.
const DELAY: Duration = Duration::from_secs(1);
/// How long the collector may take for a message, with repetitions.
pub const EXPORT_MAX: Duration = Duration::from_secs(5);
/// How long the last spans may take when the process ends.
const FLUSH_MAX: Duration = Duration::from_secs(2);

/// The exporter of a process.
pub struct Traces(SdkTracerProvider);

impl Traces {
    /// Starts exporting to the collector behind `channel`, for the given share of steps.
    ///
    /// # Errors
    /// `InvalidArgument` if the exporter's environment variables make no sense.
    pub fn start(channel: Channel, share: f64, process: &'static str) -> Result<Self> {
        let exporter = Otlp::builder()
            .with_tonic()
            .with_channel(channel)
            .with_timeout(EXPORT_MAX)
            .build();
        let exporter = exporter.map_err(|e| {
            let message = "traces cannot be exported by the OTEL_EXPORTER_OTLP_* variables of this \
            process";
            Error::invalid("traces.otlp_endpoint", message).because(e)
        })?;
        let waiting = Arc::new(AtomicUsize::new(0));
        let counted = Counted {
            exporter,
            waiting: waiting.clone(),
            is_failing: AtomicBool::new(false),
        };
        let sizes = BatchConfigBuilder::default()
            .with_max_queue_size(WAITING_MAX)
            .with_max_export_batch_size(MESSAGE_SPANS)
            .with_scheduled_delay(DELAY);
        let processor = BatchSpanProcessor::builder(counted)
            .with_batch_config(sizes.build())
            .build();
        let resource = Resource::builder()
            .with_service_name(process)
            .with_attribute(KeyValue::new("service.version", env!("CARGO_PKG_VERSION")))
            .build();
        let provider = SdkTracerProvider::builder()
            .with_span_processor(Bounded { processor, waiting })
            // A worker follows what the coordinator decided for the step.
            .with_sampler(Sampler::ParentBased(Box::new(Steps(share))))
            .with_resource(resource)
            .build();
        Ok(Self(provider))
    }

    /// Returns the layer that hands spans over to the exporter.
    pub fn layer(&self) -> Box<dyn Layer<Registry> + Send + Sync> {
        tracing_opentelemetry::layer()
            .with_tracer(self.0.tracer("superbatch"))
            .with_location(false)
            .with_threads(false)
            .with_target(false)
            .with_tracked_inactivity(false)
            .with_context_activation(false)
            .with_filter(
                filter_fn(|metadata| metadata.target() == TARGET)
                    .with_max_level_hint(LevelFilter::INFO),
            )
            .boxed()
    }

    /// Exports what is left, for two seconds at most. Not to be called on a thread of the runtime.
    pub fn stop(self) {
        if let Err(error) = self.0.shutdown_with_timeout(FLUSH_MAX) {
            tracing::warn!(%error, "the last traces could not be exported");
        }
    }
}

/// Traces a share of steps, and nothing that belongs to no step.
#[derive(Debug, Clone)]
struct Steps(f64);

impl ShouldSample for Steps {
    fn should_sample(
        &self,
        parent: Option<&Context>,
        trace: TraceId,
        name: &str,
        kind: &SpanKind,
        attributes: &[KeyValue],
        links: &[Link],
    ) -> SamplingResult {
        if name == STEP {
            let ratio = Sampler::TraceIdRatioBased(self.0);
            return ratio.should_sample(parent, trace, name, kind, attributes, links);
        }
        SamplingResult {
            decision: SamplingDecision::Drop,
            attributes: Vec::new(),
            trace_state: parent.map_or_else(TraceState::default, |parent| {
                parent.span().span_context().trace_state().clone()
            }),
        }
    }
}

/// Keeps the exporter's queue within its bound, and counts what it leaves out. The library's own
/// bound would drop spans without telling.
#[derive(Debug)]
struct Bounded {
    processor: BatchSpanProcessor,
    waiting: Arc<AtomicUsize>,
}

impl SpanProcessor for Bounded {
    fn on_start(&self, span: &mut Span, context: &Context) {
        self.processor.on_start(span, context);
    }

    fn on_end(&self, span: SpanData) {
        if !span.span_context.is_sampled() {
            return;
        }
        if self.waiting.fetch_add(1, Ordering::Relaxed) < WAITING_MAX {
            self.processor.on_end(span);
        } else {
            self.waiting.fetch_sub(1, Ordering::Relaxed);
            metrics::trace_spans("queue_full").increment(1);
        }
    }

    fn force_flush(&self) -> OTelSdkResult {
        self.processor.force_flush()
    }

    fn shutdown_with_timeout(&self, timeout: Duration) -> OTelSdkResult {
        self.processor.shutdown_with_timeout(timeout)
    }

    fn set_resource(&mut self, resource: &Resource) {
        self.processor.set_resource(resource);
    }
}

/// Counts what the collector took and what it did not, and logs the first failure of several.
#[derive(Debug)]
struct Counted<E> {
    exporter: E,
    waiting: Arc<AtomicUsize>,
    is_failing: AtomicBool,
}

impl<E: SpanExporter> SpanExporter for Counted<E> {
    async fn export(&self, batch: Vec<SpanData>) -> OTelSdkResult {
        let spans = batch.len();
        self.waiting.fetch_sub(spans, Ordering::Relaxed);
        let exported = self.exporter.export(batch).await;
        let outcome = if exported.is_ok() {
            "exported"
        } else {
            "failed"
        };
        metrics::trace_spans(outcome).increment(spans as u64);
        let was_failing = self.is_failing.swap(exported.is_err(), Ordering::Relaxed);
        match &exported {
            Err(error) if !was_failing => {
                tracing::warn!(%error, "traces cannot be exported; steps go on without them");
            }
            Ok(()) if was_failing => tracing::info!("traces are exported again"),
            _ => {}
        }
        exported
    }

    fn shutdown_with_timeout(&self, timeout: Duration) -> OTelSdkResult {
        self.exporter.shutdown_with_timeout(timeout)
    }

    fn force_flush(&self) -> OTelSdkResult {
        self.exporter.force_flush()
    }

    fn set_resource(&mut self, resource: &Resource) {
        self.exporter.set_resource(resource);
    }
}
