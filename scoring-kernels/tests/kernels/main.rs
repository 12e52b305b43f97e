//! Every backend against a dense float64 oracle, cases made elsewhere, properties and the exact law of a draw.
mod conformance;
mod distribution;
mod inputs;
mod oracle;
mod properties;
mod support;
