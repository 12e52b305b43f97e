//! Traces of steps for an OpenTelemetry collector: one trace a step, across coordinator and
//! workers.
//!
//! Spans have a target of their own, so that logs do not show them and traces hold nothing else. A
//! call to a worker carries its span in the header `traceparent` (W3C Trace Context). Without an
//! endpoint no span is made.
mod export;
#[cfg(test)]
mod tests;

use crate::error::Error;
pub use export::{EXPORT_MAX, Traces};
use opentelemetry::{
    Context,
    trace::{SpanContext, SpanId, Status, TraceContextExt, TraceFlags, TraceId, TraceState},
};
use superbatch_proto::v1::ReceiptSummary;
use tonic::{Request, metadata::MetadataValue};
use tracing::Span;
use tracing_opentelemetry::OpenTelemetrySpanExt;

/// The target of spans that are exported.
pub(crate) const TARGET: &str = "step_traces";
/// The name of the span at the root of a trace.
const STEP: &str = "step";
const HEADER: &str = "traceparent";

/// Returns the span of a stage of a step, on a coordinator or a worker, below the current span.
/// Numbers are exported as such if they are `i64` or `f64`.
macro_rules! stage {
    ($name:literal $(, $field:ident = $value:expr)* $(,)?) => {
        tracing::info_span!(target: $crate::traces::TARGET, $name $(, $field = $value)*)
    };
}
pub(crate) use stage;

/// Returns the span of a step, the root of its trace.
pub(crate) fn step(run: &str, generation: u32, step: u64) -> Span {
    let (generation, step) = (i64::from(generation), step as i64);
    tracing::info_span!(target: TARGET, parent: None, STEP, run, generation, step)
}

/// Marks a span as failed.
pub(crate) fn failed(span: &Span, error: &Error) {
    if !span.is_disabled() {
        let reason = superbatch_proto::reason_name(error.reason());
        span.set_status(Status::error(reason));
    }
}

/// Returns the span of sending a rank its batch, in the trace of the step that chose it.
pub(crate) fn serve(receipt: &ReceiptSummary, rank: u32, waited_seconds: f64) -> Span {
    let of_step = context(&receipt.trace_id, &receipt.span_id, TraceFlags::SAMPLED);
    of_step.map_or_else(Span::none, |of_step| {
        below(
            of_step,
            stage!(
                "serve",
                rank = i64::from(rank),
                waited_seconds = waited_seconds
            ),
        )
    })
}

/// Returns the ids of the current span's trace and of the span, in hex, for a receipt; empty if
/// they are not exported.
pub(crate) fn ids() -> (String, String) {
    match current() {
        Some(known) if known.is_sampled() => {
            (known.trace_id().to_string(), known.span_id().to_string())
        }
        _ => Default::default(),
    }
}

/// Returns a call that carries the current span.
pub(crate) fn carrying<T>(message: T) -> Request<T> {
    let mut request = Request::new(message);
    if let Some(known) = current() {
        let flags = known.trace_flags().to_u8();
        let header = format!("00-{}-{}-{flags:02x}", known.trace_id(), known.span_id());
        if let Ok(value) = MetadataValue::try_from(header) {
            request.metadata_mut().insert(HEADER, value);
        }
    }
    request
}

/// Makes `span` a child of the span that a call carries, if it carries one.
pub(crate) fn continued<T>(span: Span, request: &Request<T>) -> Span {
    let header = request.metadata().get(HEADER);
    let parent = header.and_then(|value| parsed(value.to_str().ok()?));
    match parent {
        Some(parent) => below(parent, span),
        None => span,
    }
}

fn current() -> Option<SpanContext> {
    let span = Span::current();
    if span.is_disabled() {
        return None;
    }
    let known = span.context().span().span_context().clone();
    known.is_valid().then_some(known)
}

fn below(parent: SpanContext, span: Span) -> Span {
    if !span.is_disabled() {
        let parent = Context::new().with_remote_span_context(parent);
        // It fails only if nothing is traced.
        drop(span.set_parent(parent));
    }
    span
}

fn parsed(header: &str) -> Option<SpanContext> {
    let mut parts = header.split('-');
    let (version, trace, span) = (parts.next()?, parts.next()?, parts.next()?);
    let flags = u8::from_str_radix(parts.next()?, 16).ok()?;
    if version.len() != 2 || version == "ff" {
        return None;
    }
    context(trace, span, TraceFlags::new(flags))
}

/// Returns the span of these ids in hex, `None` if they are none.
fn context(trace: &str, span: &str, flags: TraceFlags) -> Option<SpanContext> {
    if trace.len() != 32 || span.len() != 16 {
        return None;
    }
    let (trace, span) = (TraceId::from_hex(trace).ok()?, SpanId::from_hex(span).ok()?);
    let context = SpanContext::new(trace, span, flags, true, TraceState::default());
    context.is_valid().then_some(context)
}
