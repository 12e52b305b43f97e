//! Logs failed requests that a store's client will retry. The client is silent about them, so a run
//! that stands still for minutes would look as if nothing happened.
use crate::error::chain;
use async_trait::async_trait;
use object_store::{
    ClientOptions, Result,
    client::{
        HttpClient, HttpConnector, HttpError, HttpRequest, HttpResponse, HttpService,
        ReqwestConnector,
    },
};
use std::{
    collections::HashMap,
    sync::Mutex,
    time::{Duration, Instant},
};

/// Least time between two warnings about the same HTTP method. A throttled store refuses hundreds
/// of requests a second.
const EACH: Duration = Duration::from_secs(10);

/// Makes HTTP clients that log failed requests.
#[derive(Debug)]
pub(super) struct Noticing(Box<dyn HttpConnector>);

impl Default for Noticing {
    fn default() -> Self {
        Self::over(ReqwestConnector::default())
    }
}

impl Noticing {
    /// Wraps the clients that `connector` makes.
    pub fn over(connector: impl HttpConnector) -> Self {
        Self(Box::new(connector))
    }
}

impl HttpConnector for Noticing {
    fn connect(&self, options: &ClientOptions) -> Result<HttpClient> {
        let client = self.0.connect(options)?;
        Ok(HttpClient::new(Noticed {
            client,
            said: Said::default(),
        }))
    }
}

#[derive(Debug)]
struct Noticed {
    client: HttpClient,
    said: Said,
}

#[async_trait]
impl HttpService for Noticed {
    async fn call(&self, request: HttpRequest) -> Result<HttpResponse, HttpError> {
        let (method, uri) = (request.method().to_string(), request.uri().clone());
        let answer = self.client.execute(request).await;
        let failure = match &answer {
            Ok(answer) if answer.status().is_server_error() || answer.status().as_u16() == 429 => {
                answer.status().to_string()
            }
            Ok(_) => return answer,
            Err(error) => chain(error),
        };
        if self.said.is_due(&method, Instant::now()) {
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
        answer
    }
}

/// When each kind of request was last logged.
#[derive(Debug, Default)]
struct Said(Mutex<HashMap<String, Instant>>);

impl Said {
    /// Returns whether to log at `now`, and if so notes the time.
    fn is_due(&self, kind: &str, now: Instant) -> bool {
        let mut said = self.0.lock().expect("no panic while held");
        let due = said
            .get(kind)
            .is_none_or(|last| now.duration_since(*last) >= EACH);
        if due {
            said.insert(kind.to_owned(), now);
        }
        due
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_kind_of_request_is_told_of_now_and_then() {
        let (said, start) = (Said::default(), Instant::now());
        let told = |kind, seconds| said.is_due(kind, start + Duration::from_secs(seconds));
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
