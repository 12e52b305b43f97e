//! Admission of requests, and the headers of every answer.
use super::answer::Failed;
use crate::{
    access::{
        Access, Caller, Peer,
        scope::{Need, Scope},
    },
    error::Error,
};
use axum::{
    Extension,
    extract::{RawPathParams, Request, State},
    http::{HeaderMap, HeaderValue, Method, StatusCode, Uri, header, uri::Authority},
    middleware::Next,
    response::{IntoResponse, Response},
};
use base64::{Engine, prelude::BASE64_STANDARD};
use std::{net::IpAddr, sync::Arc};
use superbatch_proto::v1::Reason;

/// Browsers ask for a name and a password. The name may be any; the password is the token.
const CHALLENGE: &str = "Basic realm=\"superbatch, with a token as the password\"";

/// Allows scripts, styles and pictures of this address only, and nothing inline. Captions are text
/// from the internet: if one ever got into the page as markup, the browser would still not run it.
const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; \
                      img-src 'self'; connect-src 'self'; base-uri 'none'; form-action 'none'; \
                      frame-ancestors 'none'";

/// Decides about every request.
#[derive(Clone)]
pub struct Gate {
    /// Whether the page listens on this machine only.
    loopback: bool,
    /// Who may look: all, or holders of tokens with the scope `read`.
    access: Access,
}

impl Gate {
    pub fn new(listens_on: IpAddr, access: Access) -> Self {
        Self {
            loopback: listens_on.is_loopback(),
            access,
        }
    }

    /// Returns who asks, by the token in the request.
    fn caller(&self, headers: &HeaderMap, peer: Peer) -> Result<Caller, Error> {
        let header = headers.get(header::AUTHORIZATION);
        let header = header.and_then(|value| value.to_str().ok());
        let basic = header
            .and_then(password)
            .map(|token| format!("Bearer {token}"));
        self.access
            .admit(Need::Scope(Scope::Read), basic.as_deref().or(header), peer)
    }

    /// Checks the method, host and origin of a request, before its token.
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
        // A page elsewhere cannot read an answer, but it could have this page work for nothing.
        let from = headers.get("sec-fetch-site").map(HeaderValue::as_bytes);
        if uri.path().starts_with("/api/") && from == Some(b"cross-site") {
            return Err((
                StatusCode::FORBIDDEN,
                "the run page's data is for the run page",
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

/// Returns the password of a header `authorization: Basic …`.
fn password(header: &str) -> Option<String> {
    let (scheme, encoded) = header.trim().split_once(' ')?;
    if !scheme.eq_ignore_ascii_case("basic") {
        return None;
    }
    let pair = String::from_utf8(BASE64_STANDARD.decode(encoded.trim()).ok()?).ok()?;
    pair.split_once(':')
        .map(|(_, password)| password.to_owned())
}

/// Refuses a run that the caller's token is not for, whether or not the run exists.
pub(super) async fn check_run(
    params: RawPathParams,
    Extension(caller): Extension<Caller>,
    request: Request,
    next: Next,
) -> Response {
    let run = params.iter().find(|(name, _)| *name == "run");
    match run.map_or(Ok(()), |(_, run)| caller.check_run(run)) {
        Ok(()) => next.run(request).await,
        Err(refused) => Failed::from(refused).into_response(),
    }
}

/// Admits a request, and adds the protective headers to the answer.
pub(super) async fn pass(
    State(gate): State<Arc<Gate>>,
    mut request: Request,
    next: Next,
) -> Response {
    let peer = request.extensions().get::<Peer>().copied();
    let admitted = gate.admit(request.method(), request.uri(), request.headers());
    let caller = admitted.map(|()| gate.caller(request.headers(), peer.unwrap_or_default()));
    let mut response = match caller {
        Ok(Ok(caller)) => {
            request.headers_mut().remove(header::AUTHORIZATION);
            request.extensions_mut().insert(caller);
            next.run(request).await
        }
        Ok(Err(refused)) => {
            let asks = refused.reason() == Reason::Unauthenticated;
            let mut response = Failed::from(refused).into_response();
            if asks {
                let headers = response.headers_mut();
                headers.insert(
                    header::WWW_AUTHENTICATE,
                    HeaderValue::from_static(CHALLENGE),
                );
            }
            response
        }
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
    use crate::access::audit::Audit;

    #[test]
    fn a_browsers_password_is_the_token() {
        let header = |pair: &str| format!("basic {}", BASE64_STANDARD.encode(pair));
        assert_eq!(password(&header("me:sbt_1")).as_deref(), Some("sbt_1"));
        assert_eq!(password(&header(":a:b")).as_deref(), Some("a:b"));
        assert_eq!(password(&header("sbt_1")), None);
        assert_eq!(password("Basic !!"), None);
        assert_eq!(password("Bearer sbt_1"), None);
    }

    #[test]
    fn who_may_look_is_asked_of_the_token() {
        let gate = Gate::new(
            "127.0.0.1".parse().unwrap(),
            Access::require_secret("secret"),
        );
        let asks = |value: Option<String>| {
            let mut headers = HeaderMap::new();
            if let Some(value) = value {
                headers.insert(header::AUTHORIZATION, value.parse().unwrap());
            }
            gate.caller(&headers, Peer::default())
                .err()
                .map(|e| e.reason())
        };
        let basic = |pair: &str| Some(format!("Basic {}", BASE64_STANDARD.encode(pair)));
        assert_eq!(asks(basic("me:secret")), None);
        assert_eq!(asks(Some("Bearer secret".into())), None);
        for refused in [None, basic("secret:"), Some("Bearer guess".into())] {
            assert_eq!(asks(refused), Some(Reason::Unauthenticated));
        }
    }

    fn admit(listens_on: &str, method: Method, host: Option<&str>) -> Option<u16> {
        let mut headers = HeaderMap::new();
        if let Some(host) = host {
            headers.insert(header::HOST, host.parse().unwrap());
        }
        let everybody = Access::allow_everybody(Audit::default());
        let gate = Gate::new(listens_on.parse().unwrap(), everybody);
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
