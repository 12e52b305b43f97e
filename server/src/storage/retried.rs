//! Logs failed requests that a store's client will retry. The client is silent about them, so a run
//! that stands still for minutes would look as if nothing happened. And keeps the client from
//! retrying requests whose caller has a budget of its own.
use crate::error::chain;
use async_trait::async_trait;
use object_store::{
    ClientOptions, Result,
    client::{
        HttpClient, HttpConnector, HttpError, HttpErrorKind, HttpRequest, HttpResponse,
        HttpService, ReqwestConnector,
    },
};
use std::{
    collections::HashMap,
    sync::Mutex,
    time::{Duration, Instant},
};

/// Least time between two warnings about the same kind of event, such as a failed GET. A throttled
/// store refuses hundreds of requests a second.
const EACH: Duration = Duration::from_secs(10);

/// Among the extensions of a request: its caller tries again by itself, so the client makes one
/// attempt.
///
/// The client's retries cannot be set by request. Without this mark each attempt of a budget would
/// be up to eleven requests over three minutes, and the budget would count one.
#[derive(Debug, Clone, Copy)]
pub(super) struct OneAttempt;

/// Makes HTTP clients that log failed requests.
#[derive(Debug)]
pub(super) struct LoggingConnector(Box<dyn HttpConnector>);

impl Default for LoggingConnector {
    fn default() -> Self {
        Self::over(ReqwestConnector::default())
    }
}

impl LoggingConnector {
    /// Wraps the clients that `connector` makes.
    pub(super) fn over(connector: impl HttpConnector) -> Self {
        Self(Box::new(connector))
    }
}

impl HttpConnector for LoggingConnector {
    fn connect(&self, options: &ClientOptions) -> Result<HttpClient> {
        let client = self.0.connect(options)?;
        Ok(HttpClient::new(LoggingService {
            client,
            last_logged: LastLogged::default(),
        }))
    }
}

#[derive(Debug)]
struct LoggingService {
    client: HttpClient,
    last_logged: LastLogged,
}

#[async_trait]
impl HttpService for LoggingService {
    async fn call(&self, request: HttpRequest) -> Result<HttpResponse, HttpError> {
        let (method, uri) = (request.method().to_string(), request.uri().clone());
        let is_only = request.extensions().get::<OneAttempt>().is_some();
        let answer = self.client.execute(request).await;
        let failure = match &answer {
            Ok(answer) if is_retried(answer.status().as_u16()) => answer.status().to_string(),
            Ok(_) => return answer,
            Err(error) => chain(error),
        };
        if self.last_logged.is_due(&method, Instant::now()) {
            // The query is left out: it may hold a signature.
            let (scheme, host) = (
                uri.scheme_str().unwrap_or_default(),
                uri.authority().map_or("", |a| a.as_str()),
            );
            let url = format!("{scheme}://{host}{}", uri.path());
            tracing::warn!(
                method,
                url,
                error = failure,
                "a request to object storage failed; it may be tried again"
            );
        }
        match answer {
            // Of a kind that the client passes on at once.
            Ok(_) if is_only => Err(HttpError::new(HttpErrorKind::Unknown, Failed(failure))),
            Err(error) if is_only => Err(HttpError::new(HttpErrorKind::Unknown, error)),
            answer => answer,
        }
    }
}

/// Returns whether the client makes a request again that got this status.
fn is_retried(status: u16) -> bool {
    status >= 500 || status == 429 || status == 408
}

#[derive(Debug, thiserror::Error)]
#[error("the store answered {0}")]
struct Failed(String);

/// When each kind of event was last logged.
#[derive(Debug, Default)]
pub(super) struct LastLogged(Mutex<HashMap<String, Instant>>);

impl LastLogged {
    /// Returns whether to log at `now`, and if so notes the time.
    pub(super) fn is_due(&self, kind: &str, now: Instant) -> bool {
        let mut last_logged = self.0.lock().expect("no panic while held");
        let due = last_logged
            .get(kind)
            .is_none_or(|last| now.duration_since(*last) >= EACH);
        if due {
            last_logged.insert(kind.to_owned(), now);
        }
        due
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::{Budget, tests::answering::answering};
    use std::sync::atomic::Ordering;
    use superbatch_proto::v1::Reason;

    /// The client's own retries would make eleven of each.
    #[tokio::test]
    async fn attempts_of_a_budget_are_requests() {
        let options = [
            ("aws_endpoint", "{}"),
            ("aws_region", "us-east-1"),
            ("aws_allow_http", "true"),
            ("aws_access_key_id", "a"),
            ("aws_secret_access_key", "b"),
        ];
        let (state, asked) = answering("s3://b/p", &options, "503 Slow Down", "").await;
        let budget = Budget::of(Duration::from_secs(300), Duration::from_micros(1));
        let refused = state
            .create_once("k", "x".into(), &budget)
            .await
            .unwrap_err();
        assert_eq!(refused.reason(), Reason::StorageUnreachable);
        assert!(refused.chain().contains("503"), "{}", refused.chain());
        let one = asked.swap(0, Ordering::Relaxed);
        assert_eq!(one, 2, "the create, and the read that decides");
        let refused = state
            .create_within("k", "x".into(), budget)
            .await
            .unwrap_err();
        assert_eq!(asked.load(Ordering::Relaxed), one * Budget::ATTEMPTS_MAX);
        assert!(refused.value("retried_seconds").is_some());
    }

    #[test]
    fn each_kind_of_request_is_logged_at_intervals() {
        let (last_logged, start) = (LastLogged::default(), Instant::now());
        let told = |kind, seconds| last_logged.is_due(kind, start + Duration::from_secs(seconds));
        assert_eq!(
            [
                told("GET", 0),
                told("GET", 1),
                told("PUT", 1),
                told("GET", 9),
                told("GET", 10)
            ],
            [true, false, true, false, true]
        );
    }
}
