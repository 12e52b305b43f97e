//! Single requests to the hub: who asks, and how far a redirect is followed. The hub answers a
//! request for a large file with a signed address of its CDN.
use super::{CommitLost, Refused, account::Account};
use crate::storage::guard::{self, REDIRECTS_MAX};
use async_trait::async_trait;
use bytes::Bytes;
use hyper::Uri;
use object_store::{
    ClientOptions, Result,
    client::{
        HttpClient, HttpConnector, HttpError, HttpErrorKind, HttpRequest, HttpResponse, HttpService,
    },
};
use reqwest::{
    Method, StatusCode,
    header::{
        ACCEPT_ENCODING, AUTHORIZATION, CONTENT_LENGTH, ETAG, HeaderMap, HeaderValue, LOCATION,
        RETRY_AFTER, USER_AGENT,
    },
    redirect::Policy,
};
use std::{sync::Arc, time::Duration};
use url::Url;

/// Longest that one request waits because the hub says so. Several waits may follow each other.
const PAUSE_MAX: Duration = Duration::from_secs(60);
/// Most letters of what the hub says that are repeated.
const SAID_MAX: usize = 200;

/// Makes clients of the hub.
#[derive(Debug)]
pub(super) struct HubConnector {
    pub account: Arc<Account>,
    pub allow: Vec<String>,
}

impl HttpConnector for HubConnector {
    fn connect(&self, options: &ClientOptions) -> Result<HttpClient> {
        Ok(HttpClient::new(HubService {
            client: HttpClient::new(guard::client(options, Policy::none())?),
            account: self.account.clone(),
            allow: self.allow.clone(),
        }))
    }
}

#[derive(Debug)]
struct HubService {
    client: HttpClient,
    account: Arc<Account>,
    allow: Vec<String>,
}

#[async_trait]
impl HttpService for HubService {
    async fn call(&self, request: HttpRequest) -> Result<HttpResponse, HttpError> {
        let mut url = parsed(&request.uri().to_string())?;
        let mut linked = Linked::default();
        // The token is sent no more once a redirect has left the hub, wherever the next one leads.
        let mut at_hub = true;
        for _ in 0..=REDIRECTS_MAX {
            at_hub &= self.account.is_at(&url);
            let answer = self
                .client
                .execute(self.hop(&request, &url, at_hub)?)
                .await?;
            if at_hub {
                linked.note(answer.headers());
            }
            let Some(target) = target(&url, &answer)? else {
                return self.ended(&url, at_hub, answer, linked);
            };
            // The CDN's addresses are signed for reading, and the hub has said what there is.
            let leaves = !self.account.is_at(&target);
            if let Some(found) = linked
                .head()
                .filter(|_| leaves && request.method() == Method::HEAD)
            {
                return Ok(found);
            }
            self.check(&target)?;
            url = target;
        }
        Err(refused("it was redirected too often"))
    }
}

impl HubService {
    /// Returns the request for one URL of a row of redirects.
    fn hop(
        &self,
        request: &HttpRequest,
        url: &Url,
        at_hub: bool,
    ) -> Result<HttpRequest, HttpError> {
        let mut hop = request.clone();
        let uri = url.as_str().parse::<Uri>();
        *hop.uri_mut() = uri.map_err(|e| HttpError::new(HttpErrorKind::Unknown, e))?;
        let headers = hop.headers_mut();
        headers.remove(AUTHORIZATION);
        // Sizes and ranges are those of the file.
        headers.insert(ACCEPT_ENCODING, HeaderValue::from_static("identity"));
        let agent = concat!("superbatch/", env!("CARGO_PKG_VERSION"));
        headers.insert(USER_AGENT, HeaderValue::from_static(agent));
        if let Some(token) = self.account.token.as_ref().filter(|_| at_hub) {
            headers.insert(AUTHORIZATION, token.clone());
        }
        Ok(hop)
    }

    fn check(&self, target: &Url) -> Result<(), HttpError> {
        if self.account.endpoint.scheme() == "https" && target.scheme() != "https" {
            return Err(refused("it was redirected to plain HTTP"));
        }
        match guard::refusal(target, &self.allow, self.account.trusts(target)) {
            Some(why) => Err(refused(why)),
            None => Ok(()),
        }
    }

    fn ended(
        &self,
        url: &Url,
        at_hub: bool,
        mut answer: HttpResponse,
        linked: Linked,
    ) -> Result<HttpResponse, HttpError> {
        if answer.status().is_success() {
            match linked.etag {
                Some(etag) => drop(answer.headers_mut().insert(ETAG, etag)),
                // A CDN's own is another than the one that the hub lists.
                None if !at_hub => drop(answer.headers_mut().remove(ETAG)),
                None => {}
            }
            return Ok(answer);
        }
        if !at_hub {
            // The hub has said that the file is there.
            if answer.status() == StatusCode::NOT_FOUND {
                return Err(HttpError::new(HttpErrorKind::Unknown, Unexplained));
            }
            // What a CDN says of a request that it refuses may quote the signature.
            return Ok(HttpResponse::from_parts(
                answer.into_parts().0,
                Bytes::new().into(),
            ));
        }
        let has_token = self.account.token.is_some();
        match denial(answer.status(), answer.headers(), url, has_token) {
            Some(why) => Err(refused(why)),
            None => explained(answer, url),
        }
    }
}

/// A file is not found, and not because its commit lacks it.
#[derive(Debug, thiserror::Error)]
#[error("404 Not Found, without a word that the file is missing")]
struct Unexplained;

/// Returns an answer, unless it is of a file that is not found for another reason than that its
/// commit lacks it: a missing image is a fault of its row, which is kept for good.
fn explained(answer: HttpResponse, url: &Url) -> Result<HttpResponse, HttpError> {
    let mut of_files = ["/resolve/", "/resolve-cache/"].iter();
    let is_file = of_files.any(|route| url.path().contains(route));
    if answer.status() != StatusCode::NOT_FOUND || !is_file {
        return Ok(answer);
    }
    let code = answer.headers().get("x-error-code");
    match code.map(HeaderValue::as_bytes) {
        Some(b"EntryNotFound") => Ok(answer),
        Some(b"RevisionNotFound") => Err(HttpError::new(HttpErrorKind::Unknown, CommitLost)),
        _ => Err(HttpError::new(HttpErrorKind::Unknown, Unexplained)),
    }
}

/// What the hub says of a large file beside the address of its bytes.
#[derive(Debug, Default)]
struct Linked {
    etag: Option<HeaderValue>,
    size: Option<HeaderValue>,
}

impl Linked {
    fn note(&mut self, headers: &HeaderMap) {
        let of = |name: &str| headers.get(name).cloned();
        self.etag = of("x-linked-etag").or(self.etag.take());
        self.size = of("x-linked-size").or(self.size.take());
    }

    /// Returns the answer to a HEAD request.
    fn head(&self) -> Option<HttpResponse> {
        let (etag, size) = (self.etag.clone()?, self.size.clone()?);
        let mut found = HttpResponse::new(Bytes::new().into());
        found.headers_mut().insert(ETAG, etag);
        found.headers_mut().insert(CONTENT_LENGTH, size);
        Some(found)
    }
}

fn parsed(uri: &str) -> Result<Url, HttpError> {
    Url::parse(uri).map_err(|e| HttpError::new(HttpErrorKind::Unknown, e))
}

fn refused(why: impl Into<String>) -> HttpError {
    HttpError::new(HttpErrorKind::Unknown, Refused(why.into()))
}

/// Returns where an answer redirects to, if it does.
fn target(url: &Url, answer: &HttpResponse) -> Result<Option<Url>, HttpError> {
    let is_redirect = matches!(answer.status().as_u16(), 301 | 302 | 303 | 307 | 308);
    let Some(location) = answer.headers().get(LOCATION).filter(|_| is_redirect) else {
        return Ok(None);
    };
    let target = location.to_str().ok().and_then(|to| url.join(to).ok());
    let target = target.ok_or_else(|| refused("it was redirected to what is no address"))?;
    Ok(Some(target))
}

/// Returns why the hub gives no access, and what to do about it; `None` for other answers.
fn denial(status: StatusCode, headers: &HeaderMap, url: &Url, has_token: bool) -> Option<String> {
    let of = |name: &str| headers.get(name).and_then(|value| value.to_str().ok());
    let (code, said) = (
        of("x-error-code"),
        of("x-error-message").unwrap_or_default(),
    );
    let is_denied = matches!(status, StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN);
    let said: String = said.chars().take(SAID_MAX).collect();
    let page = page(url);
    let token = if has_token {
        "the token of this process (HF_TOKEN, or the file of a log-in)"
    } else {
        "this process has no token (HF_TOKEN, or the file of a log-in), and without one"
    };
    match code {
        Some("GatedRepo") if has_token => Some(format!(
            "who reads it must accept its terms first; open {page} with the account of {token} \
             and accept them"
        )),
        Some("GatedRepo") => Some(format!(
            "who reads it must accept its terms first: {token} it is not given; accept them at \
             {page} and set HF_TOKEN to a token of that account"
        )),
        _ if said.starts_with("Invalid credentials") => Some(format!(
            "the hub does not know {token}; make a new one, or unset it for public data"
        )),
        Some("RepoNotFound") if has_token => Some(format!(
            "there is no {page}, or it is private and {token} may not read it; correct the name, \
             or give a token that may"
        )),
        Some("RepoNotFound") => Some(format!(
            "there is no {page}, or it is private: {token} it is not given; correct the name, or \
             set HF_TOKEN"
        )),
        _ if is_denied && !said.is_empty() => Some(format!("the hub denies it: {said}")),
        _ if is_denied => Some(format!(
            "the hub denies {page} ({status}); look at HF_TOKEN"
        )),
        _ => None,
    }
}

/// Returns the page of the data set that a request is for.
fn page(url: &Url) -> String {
    let mut page = url.clone();
    page.set_query(None);
    let path = url.path().split("/resolve/").next().unwrap_or_default();
    let path = path.replacen("/api/datasets/", "/datasets/", 1);
    let (before, below) = path.split_once("/datasets/").unwrap_or(("", path.as_str()));
    let id: Vec<&str> = below.split('/').take(2).collect();
    page.set_path(&format!("{before}/datasets/{}", id.join("/")));
    page.into()
}

/// Waits, after a refusal of too many requests, for as long as the hub says. Its limits count over
/// minutes, and what tries again at once only gets more refusals.
#[derive(Debug)]
pub(super) struct Patient(pub HttpClient);

#[async_trait]
impl HttpService for Patient {
    async fn call(&self, request: HttpRequest) -> Result<HttpResponse, HttpError> {
        let answer = self.0.execute(request).await?;
        if let Some(pause) = pause(answer.status(), answer.headers()) {
            tokio::time::sleep(pause).await;
        }
        Ok(answer)
    }
}

/// Returns how long to wait before the next attempt: as `Retry-After` says, or `t` of `RateLimit`.
fn pause(status: StatusCode, headers: &HeaderMap) -> Option<Duration> {
    let is_asked = matches!(
        status,
        StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE
    );
    let of = |name: &str| headers.get(name).and_then(|value| value.to_str().ok());
    let reset = || {
        of("ratelimit")?
            .split(';')
            .find_map(|p| p.trim().strip_prefix("t="))
    };
    let seconds = of(RETRY_AFTER.as_str())
        .or_else(reset)
        .filter(|_| is_asked)?;
    let seconds = seconds.trim().parse().ok()?;
    Some(Duration::from_secs(seconds).min(PAUSE_MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(pairs: &[(&'static str, &'static str)]) -> HeaderMap {
        let pairs = pairs.iter();
        let pair = |&(name, value): &(&'static str, &'static str)| {
            let name = reqwest::header::HeaderName::from_static(name);
            (name, HeaderValue::from_static(value))
        };
        pairs.map(pair).collect()
    }

    #[test]
    fn a_denial_says_what_to_do() {
        let url = "https://hub.example/hf/api/datasets/o/n/tree/main/a?recursive=true";
        let at = "https://hub.example/hf/datasets/o/n";
        let url = parsed(url).unwrap();
        assert_eq!(page(&url), at);
        assert_eq!(
            page(&parsed(&format!("{at}/resolve/c/datasets/x/y")).unwrap()),
            at
        );
        let denied = |status: u16, pairs: &[_], has_token| {
            let status = StatusCode::from_u16(status).unwrap();
            denial(status, &headers(pairs), &url, has_token)
        };
        let gated = [("x-error-code", "GatedRepo")];
        let missing = [("x-error-code", "RepoNotFound")];
        let wrong = [(
            "x-error-message",
            "Invalid credentials in Authorization header",
        )];
        let off = [("x-error-message", "Access to this resource is disabled.")];
        for (status, pairs, has_token, says) in [
            (
                401,
                &gated[..],
                false,
                "accept them at https://hub.example/hf/datasets/o/n and set",
            ),
            (403, &gated[..], true, "with the account of the token"),
            (
                401,
                &missing[..],
                false,
                "or it is private: this process has no token",
            ),
            (404, &missing[..], true, "may not read it"),
            (
                401,
                &wrong[..],
                true,
                "the hub does not know the token of this process",
            ),
            (
                403,
                &off[..],
                false,
                "the hub denies it: Access to this resource is disabled.",
            ),
            (403, &[][..], true, "(403 Forbidden); look at HF_TOKEN"),
        ] {
            let said = denied(status, pairs, has_token).unwrap();
            assert!(said.contains(says), "{status} {pairs:?}: {said}");
        }
        for (status, code) in [(404, "EntryNotFound"), (404, "RevisionNotFound"), (500, "")] {
            assert_eq!(denied(status, &[("x-error-code", code)], true), None);
        }
    }

    #[test]
    fn the_hub_says_how_long_to_wait() {
        let asked = |status: u16, pairs: &[_]| {
            let pause = pause(StatusCode::from_u16(status).unwrap(), &headers(pairs));
            pause.map(|pause| pause.as_secs())
        };
        let limit = ("ratelimit", "\"resolvers\";r=0;t=55");
        assert_eq!(asked(429, &[("retry-after", "7"), limit]), Some(7));
        assert_eq!(asked(429, &[limit]), Some(55));
        assert_eq!(asked(503, &[("retry-after", "900")]), Some(60));
        assert_eq!(
            asked(429, &[("retry-after", "Wed, 21 Oct 2015 07:28:00 GMT")]),
            None
        );
        assert_eq!(asked(429, &[]), None);
        assert_eq!(asked(200, &[limit]), None);
    }
}
