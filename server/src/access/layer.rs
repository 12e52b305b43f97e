//! The layer in front of all services: checks each call's token, and refuses a call before its
//! message is read.
use super::{
    Caller, Peer,
    audit::Audit,
    decide::{bearer, decide},
    failures::{Failures, Verdict},
    reload::Reloading,
    scope::{Need, needed},
    tokens::{Tokens, hash},
};
use crate::{
    error::{Error, Result},
    metrics,
};
use futures::future::{Either, Ready, ready};
use serde_json::json;
use std::{
    sync::Arc,
    task::{Context, Poll},
    time::{Instant, SystemTime},
};
use subtle::ConstantTimeEq;
use superbatch_proto::v1::Reason;
use tonic::{
    Status,
    body::Body,
    codegen::http::{Request, Response, header::AUTHORIZATION},
};
use tower::{Layer, Service};

/// Who may call a process. Cheap to clone.
#[derive(Clone)]
pub struct Access(Arc<Inner>);

struct Inner {
    rule: Rule,
    audit: Audit,
    failures: Failures,
}

enum Rule {
    /// Every caller that reaches the port.
    Everybody,
    Tokens(Arc<Reloading<Tokens>>),
    /// The holder of the secret with this hash.
    Holder(String),
}

impl Access {
    /// Admits every call. Used on loopback, and elsewhere if the operator allows it.
    pub fn allow_everybody(audit: Audit) -> Self {
        Self::with_rule(Rule::Everybody, audit)
    }

    pub fn tokens(tokens: Arc<Reloading<Tokens>>, audit: Audit) -> Self {
        Self::with_rule(Rule::Tokens(tokens), audit)
    }

    /// Admits the holder of `secret` only: a worker's own coordinator.
    pub fn require_secret(secret: &str) -> Self {
        Self::with_rule(Rule::Holder(hash(secret)), Audit::default())
    }

    fn with_rule(rule: Rule, audit: Audit) -> Self {
        Self(Arc::new(Inner {
            rule,
            audit,
            failures: Failures::default(),
        }))
    }

    pub fn layer(&self) -> AccessLayer {
        AccessLayer(self.clone())
    }

    /// Returns the caller, by the header `authorization`.
    ///
    /// # Errors
    /// `Unauthenticated`, `PermissionDenied`; `Overloaded` after many of them from one address.
    pub fn admit(&self, need: Need, header: Option<&str>, peer: Peer) -> Result<Caller> {
        let inner = &*self.0;
        let caller = |token| Caller {
            peer,
            token,
            audit: inner.audit.clone(),
        };
        let shown = header.and_then(bearer);
        let decided = match &inner.rule {
            Rule::Everybody => return Ok(caller(None)),
            Rule::Tokens(tokens) => {
                let tokens = tokens.get();
                decide(&tokens, shown, need, SystemTime::now())
                    .map(|entry| caller(entry.cloned().map(Arc::new)))
            }
            Rule::Holder(known) => check_secret(known, shown, need).map(|()| caller(None)),
        };
        decided.map_err(|error| self.refused(error, peer))
    }

    /// Counts a refusal, and replaces its message if the address has had too many.
    fn refused(&self, error: Error, peer: Peer) -> Error {
        let reason = superbatch_proto::reason_name(error.reason());
        metrics::access_refused(reason).increment(1);
        let Some(address) = peer.address.map(|address| address.ip()) else {
            return error;
        };
        match self.0.failures.record(address, Instant::now()) {
            Verdict::Told => {
                let outcome = Err::<(), _>(error.repeat());
                self.0
                    .audit
                    .record("denied", None, peer, None, &outcome, json!(null));
                return error;
            }
            Verdict::Limited { first: true } => {
                tracing::warn!(%address, "many calls are refused for their token; this address is \
                told to wait");
            }
            Verdict::Limited { first: false } => {}
        }
        let message =
            "too many calls from this address were refused for their token; wait a minute";
        Error::new(Reason::Overloaded, message)
    }
}

fn check_secret(known: &str, shown: Option<&str>, need: Need) -> Result<()> {
    let is_known = |shown: &str| bool::from(hash(shown).as_bytes().ct_eq(known.as_bytes()));
    // Reflection (`Token`) reveals the protocol only, which is public. A worker has no file of
    // tokens to check it by.
    if matches!(need, Need::Nothing | Need::Token) || shown.is_some_and(is_known) {
        return Ok(());
    }
    let message = "a worker answers the coordinator that it registered with, and nobody else";
    Err(Error::new(Reason::Unauthenticated, message))
}

/// See [`Access::layer`].
#[derive(Clone)]
pub struct AccessLayer(Access);

impl<S> Layer<S> for AccessLayer {
    type Service = Checked<S>;

    fn layer(&self, inner: S) -> Checked<S> {
        Checked {
            access: self.0.clone(),
            inner,
        }
    }
}

/// A service behind a check of each call by [`Access`].
#[derive(Clone)]
pub struct Checked<S> {
    access: Access,
    inner: S,
}

impl<S, B> Service<Request<B>> for Checked<S>
where
    S: Service<Request<B>, Response = Response<Body>>,
{
    type Response = S::Response;
    type Error = S::Error;
    type Future = Either<S::Future, Ready<Result<S::Response, S::Error>>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, mut request: Request<B>) -> Self::Future {
        let peer = request.extensions().get::<Peer>().copied();
        let header = request.headers().get(AUTHORIZATION);
        let header = header.and_then(|value| value.to_str().ok());
        let need = needed(request.uri().path());
        match self.access.admit(need, header, peer.unwrap_or_default()) {
            Ok(caller) => {
                // The services do not need the token. Without it in the headers, no log or error
                // behind this layer can leak it.
                request.headers_mut().remove(AUTHORIZATION);
                request.extensions_mut().insert(caller);
                Either::Left(self.inner.call(request))
            }
            Err(error) => Either::Right(ready(Ok(Status::from(error).into_http()))),
        }
    }
}
