//! Every backend against a dense float64 oracle, cases made elsewhere, properties, policies and the
//! exact law of a draw.
#![allow(clippy::too_many_lines, clippy::unwrap_used)]
mod conformance;
mod cuda;
mod distribution;
mod emulation;
mod inputs;
mod oracle;
mod policies;
mod properties;
mod support;
mod terms;
