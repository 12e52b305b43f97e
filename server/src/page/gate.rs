//! Admission of requests, and the headers of every answer.
use axum::{
    extract::{Request, State},
    http::{HeaderMap, HeaderValue, Method, StatusCode, Uri, header, uri::Authority},
    middleware::Next,
    response::{IntoResponse, Response},
};
use std::{net::IpAddr, sync::Arc};

/// Allows scripts, styles and pictures of this address only, and nothing inline. Captions are text
/// from the internet: if one ever got into the page as markup, the browser would still not run it.
const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; \
                      img-src 'self'; connect-src 'self'; base-uri 'none'; form-action 'none'; \
                      frame-ancestors 'none'";

/// Decides about every request.
#[derive(Debug, Clone)]
pub struct Gate {
    /// Whether the page listens on this machine only.
    loopback: bool,
}

impl Gate {
    pub fn new(listens_on: IpAddr) -> Self {
        Self {
            loopback: listens_on.is_loopback(),
        }
    }

    /// Admits or refuses a request. This is the only place that does.
    ///
    /// On loopback the host name in the request must be this machine's. An attacker's web page can
    /// point its own host name at 127.0.0.1 (DNS rebinding); the browser then takes this server for
    /// the attacker's own and lets the page read its answers.
    fn admit(
        &self,
        method: &Method,
        uri: &Uri,
        headers: &HeaderMap,
    ) -> Result<(), (StatusCode, &'static str)> {
        if method != Method::GET && method != Method::HEAD {
            return Err((StatusCode::METHOD_NOT_ALLOWED, "the run page only reads"));
        }
        let named = headers
            .get(header::HOST)
            .and_then(|host| host.to_str().ok()?.parse().ok());
        let named: Option<Authority> = named.or_else(|| uri.authority().cloned());
        if self.loopback && !named.is_some_and(|named| is_this_machine(named.host())) {
            return Err((
                StatusCode::MISDIRECTED_REQUEST,
                "the run page is served to this machine only, as localhost",
            ));
        }
        Ok(())
    }
}

fn is_this_machine(host: &str) -> bool {
    let bare = host.trim_start_matches('[').trim_end_matches(']');
    host.eq_ignore_ascii_case("localhost")
        || bare.parse::<IpAddr>().is_ok_and(|ip| ip.is_loopback())
}

/// Admits a request, and adds the protective headers to the answer.
pub(super) async fn pass(State(gate): State<Arc<Gate>>, request: Request, next: Next) -> Response {
    let admitted = gate.admit(request.method(), request.uri(), request.headers());
    let mut response = match admitted {
        Ok(()) => next.run(request).await,
        Err(refused) => refused.into_response(),
    };
    let headers = response.headers_mut();
    for (name, value) in [
        (header::CONTENT_SECURITY_POLICY, POLICY),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (header::REFERRER_POLICY, "no-referrer"),
        (header::X_FRAME_OPTIONS, "DENY"),
    ] {
        headers.insert(name, HeaderValue::from_static(value));
    }
    headers.insert(
        "cross-origin-resource-policy",
        HeaderValue::from_static("same-origin"),
    );
    response
}

#[cfg(test)]
mod tests {
    use super::*;

    fn admit(listens_on: &str, method: Method, host: Option<&str>) -> Option<u16> {
        let mut headers = HeaderMap::new();
        if let Some(host) = host {
            headers.insert(header::HOST, host.parse().unwrap());
        }
        let gate = Gate::new(listens_on.parse().unwrap());
        gate.admit(&method, &Uri::from_static("/"), &headers)
            .err()
            .map(|(status, _)| status.as_u16())
    }

    #[test]
    fn on_loopback_only_this_machines_names_are_served() {
        for host in [
            "localhost:9465",
            "LOCALHOST",
            "127.0.0.1:9465",
            "127.9.9.9",
            "[::1]:9465",
        ] {
            assert_eq!(admit("127.0.0.1", Method::GET, Some(host)), None, "{host}");
        }
        for host in [
            "evil.example",
            "127.0.0.1.evil.example",
            "10.0.0.1:9465",
            "localhost.evil.example:9465",
        ] {
            assert_eq!(
                admit("127.0.0.1", Method::GET, Some(host)),
                Some(421),
                "{host}"
            );
        }
        assert_eq!(admit("127.0.0.1", Method::GET, None), Some(421));
        assert_eq!(
            admit("0.0.0.0", Method::GET, Some("superbatch.example")),
            None
        );
    }

    #[test]
    fn nothing_is_written() {
        for method in [
            Method::POST,
            Method::PUT,
            Method::DELETE,
            Method::PATCH,
            Method::OPTIONS,
        ] {
            assert_eq!(admit("127.0.0.1", method, Some("localhost")), Some(405));
        }
    }
}
