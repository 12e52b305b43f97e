//! Settings of traces.
use crate::error::{Error, Result};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use url::Url;

/// Traces of steps for an OpenTelemetry collector.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct TracesConfig {
    /// Collector to which traces of steps are sent (OTLP over gRPC), such as
    /// `http://127.0.0.1:4317`. `https://` is verified by `tls.ca`. `null` makes no traces.
    pub otlp_endpoint: Option<String>,
    /// The share of steps that a coordinator traces, from 0 to 1. Workers follow it.
    pub sample_ratio: f64,
}

impl Default for TracesConfig {
    fn default() -> Self {
        Self {
            otlp_endpoint: None,
            sample_ratio: 1.0,
        }
    }
}

impl TracesConfig {
    /// # Errors
    /// `InvalidArgument`, with the field.
    pub(super) fn validate(&self) -> Result<()> {
        let ratio = self.sample_ratio;
        if !(0.0..=1.0).contains(&ratio) {
            let message = format!("traces.sample_ratio is {ratio}; give a share from 0 to 1");
            return Err(Error::invalid("traces.sample_ratio", message));
        }
        let is_collector = |endpoint: &&String| {
            Url::parse(endpoint).is_ok_and(|url| {
                ["http", "https"].contains(&url.scheme()) && url.has_host() && url.path() == "/"
            })
        };
        match self.otlp_endpoint.as_ref().filter(|e| !is_collector(e)) {
            None => Ok(()),
            Some(endpoint) => {
                let message = format!(
                    "traces.otlp_endpoint is {endpoint:?}; give http://host:port or \
                    https://host:port of a collector that takes OTLP over gRPC"
                );
                Err(Error::invalid("traces.otlp_endpoint", message))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn endpoints_and_shares_that_cannot_work_are_refused() {
        let field = |endpoint: &str, sample_ratio| {
            let otlp_endpoint = Some(endpoint.to_owned());
            let config = TracesConfig {
                otlp_endpoint,
                sample_ratio,
            };
            let refused = config.validate().err()?;
            refused.value("field").map(str::to_owned)
        };
        for endpoint in ["http://127.0.0.1:4317", "https://collector.example:4317/"] {
            assert_eq!(field(endpoint, 0.5), None, "{endpoint}");
        }
        for endpoint in [
            "",
            "127.0.0.1:4317",
            "grpc://host:4317",
            "http://host/v1/traces",
        ] {
            let refused = field(endpoint, 0.5);
            assert_eq!(
                refused.as_deref(),
                Some("traces.otlp_endpoint"),
                "{endpoint}"
            );
        }
        for share in [-0.1, 1.1, f64::NAN] {
            let refused = field("http://127.0.0.1:4317", share);
            assert_eq!(refused.as_deref(), Some("traces.sample_ratio"), "{share}");
        }
    }
}
