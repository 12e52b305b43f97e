//! Answers in JSON, also for failures.
use crate::{error::Error, metrics};
use axum::{
    http::{StatusCode, header},
    response::{IntoResponse, Response},
};
use bytes::Bytes;
use serde_json::{Value, json};
use superbatch_proto::{reflect::Word, v1::Reason};

/// The result of a handler.
pub(super) type Answer = Result<Json, Failed>;

/// An answer as text. A large one is written on a thread for blocking work.
#[derive(Clone)]
pub(super) struct Json(Bytes);

impl From<Value> for Json {
    fn from(value: Value) -> Self {
        Self(value.to_string().into())
    }
}

/// A failure that the reader sees.
pub(super) struct Failed(Error);

impl From<Error> for Failed {
    fn from(error: Error) -> Self {
        Self(error)
    }
}

impl IntoResponse for Json {
    fn into_response(self) -> Response {
        metrics::page_requests("ok").increment(1);
        json_response(StatusCode::OK, self)
    }
}

impl IntoResponse for Failed {
    fn into_response(self) -> Response {
        let reason = self.0.reason();
        let (status, outcome) = match reason {
            Reason::RunNotFound | Reason::StepNotCommitted | Reason::WeightsMissing => {
                (StatusCode::NOT_FOUND, "not_found")
            }
            Reason::InvalidArgument | Reason::RunSpecImpossible => {
                (StatusCode::BAD_REQUEST, "invalid")
            }
            Reason::Unimplemented => (StatusCode::NOT_IMPLEMENTED, "invalid"),
            Reason::Unauthenticated => (StatusCode::UNAUTHORIZED, "refused"),
            Reason::PermissionDenied => (StatusCode::FORBIDDEN, "refused"),
            Reason::Overloaded => (StatusCode::TOO_MANY_REQUESTS, "refused"),
            Reason::StorageUnreachable => (StatusCode::BAD_GATEWAY, "failed"),
            _ => (StatusCode::INTERNAL_SERVER_ERROR, "failed"),
        };
        metrics::page_requests(outcome).increment(1);
        if outcome == "failed" {
            tracing::warn!(error = self.0.chain(), "the run page could not answer");
        }
        let answer = json!({ "error": self.0.chain(), "reason": reason.word() });
        json_response(status, answer.into())
    }
}

fn json_response(status: StatusCode, text: Json) -> Response {
    let headers = [
        (header::CONTENT_TYPE, "application/json"),
        (header::CACHE_CONTROL, "no-store"),
    ];
    (status, headers, text.0).into_response()
}

/// Returns a number of the query, such as `?from=7`.
///
/// # Errors
/// `InvalidArgument` if the value is no number.
pub(super) fn number(query: Option<&str>, name: &str) -> Result<Option<u64>, Error> {
    let Some(text) = text(query, name) else {
        return Ok(None);
    };
    let number = text.parse();
    number
        .map(Some)
        .map_err(|_| Error::invalid(name, format!("{name} is '{text}'; give a whole number")))
}

/// Returns a value of the query.
pub(super) fn text(query: Option<&str>, name: &str) -> Option<String> {
    let mut pairs = url::form_urlencoded::parse(query.unwrap_or_default().as_bytes());
    pairs.find_map(|(key, value)| (key == name).then(|| value.into_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_query_is_read_by_name() {
        let query = Some("from=7&rows=0.0.1%2C0.0.2&to=x");
        assert_eq!(number(query, "from").unwrap(), Some(7));
        assert_eq!(number(query, "until").unwrap(), None);
        assert_eq!(number(None, "from").unwrap(), None);
        assert_eq!(text(query, "rows").as_deref(), Some("0.0.1,0.0.2"));
        assert_eq!(number(query, "to").unwrap_err().value("field"), Some("to"));
    }
}
