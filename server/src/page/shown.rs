//! Numbers and names in the form of the page's JSON.
use crate::coordinator::receipts::parquet::has_scores;
use serde_json::{Value, json};
use superbatch_proto::v1::{ReceiptSummary, RunSpec, lag};

/// Returns a run's lag in words.
pub(super) fn lag(spec: &RunSpec) -> String {
    match spec.lag.and_then(|lag| lag.bound) {
        Some(lag::Bound::AtMost(steps)) => format!("at most {steps}"),
        Some(lag::Bound::Exact(steps)) => format!("exactly {steps}"),
        None => "exactly 1".to_owned(),
    }
}

/// Returns a score, or null if the step was not scored.
pub(super) fn scored(summary: &ReceiptSummary, score: f64) -> Value {
    if has_scores(summary) {
        json!(score)
    } else {
        Value::Null
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use superbatch_proto::v1::{Lag, Mode, Policy};

    #[test]
    fn a_step_without_scores_shows_none() {
        let joint = ReceiptSummary {
            policy: Policy::Joint.into(),
            ..Default::default()
        };
        assert_eq!(scored(&joint, 0.5), json!(0.5));
        assert_eq!(
            scored(
                &ReceiptSummary {
                    mode: Mode::Uniform.into(),
                    ..joint
                },
                0.0
            ),
            Value::Null
        );
    }

    #[test]
    fn lag_is_told_in_words() {
        let spec = |bound| RunSpec {
            lag: Some(Lag { bound: Some(bound) }),
            ..Default::default()
        };
        assert_eq!(lag(&spec(lag::Bound::Exact(0))), "exactly 0");
        assert_eq!(lag(&spec(lag::Bound::AtMost(3))), "at most 3");
        assert_eq!(lag(&RunSpec::default()), "exactly 1");
    }
}
