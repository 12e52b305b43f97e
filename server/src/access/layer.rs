//! The layer in front of all services: checks each call's token, and refuses a call before its
//! message is read.
use super::{
    Caller, Peer,
    audit::Audit,
    decide::{Refused, bearer, decide},
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
        let caller = |token| Caller {
            peer,
            token,
            access: self.clone(),
        };
        let shown = header.and_then(bearer);
        match &self.0.rule {
            Rule::Everybody => Ok(caller(None)),
            Rule::Tokens(tokens) => match decide(&tokens.get(), shown, need, SystemTime::now()) {
                Ok(entry) => Ok(caller(entry.cloned().map(Arc::new))),
                Err(Refused { error, entry }) => {
                    let who = entry.map(|entry| entry.name.as_str());
                    Err(self.refused(error, peer, who, None))
                }
            },
            Rule::Holder(known) => check_secret(known, shown, need)
                .map(|()| caller(None))
                .map_err(|error| self.refused(error, peer, None, None)),
        }
    }

    pub(super) fn audit(&self) -> &Audit {
        &self.0.audit
    }

    /// Notes a refusal of the caller at `peer`, whose token is called `who`, on `run` if that is
    /// what it was refused. Returns what the caller hears: after many refusals, another message.
    pub(super) fn refused(
        &self,
        error: Error,
        peer: Peer,
        who: Option<&str>,
        run: Option<&str>,
    ) -> Error {
        let reason = superbatch_proto::reason_name(error.reason());
        metrics::access_refused(reason).increment(1);
        let address = peer.address.map(|address| address.ip());
        let verdict = self.0.failures.record(address, who, Instant::now());
        let detail = match verdict {
            Verdict::Explained => json!(null),
            Verdict::Limited { first: true } => {
                let address = address.map(|address| address.to_string());
                tracing::warn!(
                    address,
                    who,
                    "a caller is refused again and again; it has to wait"
                );
                // The last line for a minute, so that readers know what is left out.
                json!({"limited": true})
            }
            Verdict::Limited { first: false } => return limited(),
        };
        let outcome = Err::<(), _>(error.repeat());
        let audit = &self.0.audit;
        audit.record("denied", who, peer, run, &outcome, detail);
        if verdict == Verdict::Explained {
            error
        } else {
            limited()
        }
    }
}

fn limited() -> Error {
    let message = "too many calls of this caller were refused for its token; wait a minute";
    Error::new(Reason::Overloaded, message)
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::access::{failures::FAILURES_MAX, scope::Scope, tokens::Entry};
    use metrics_exporter_prometheus::PrometheusBuilder;
    use serde_json::Value;
    use std::path::Path;

    const TEAM: Option<&str> = Some("Bearer sbt_team");

    /// Access with one token, `team`, that may take batches of the runs `a-*`.
    fn access(folder: &Path) -> Access {
        let file = folder.join("tokens.yaml");
        let team = Entry {
            name: "team".into(),
            sha256: hash("sbt_team"),
            scopes: vec![Scope::Select],
            runs: vec!["a-*".into()],
            expires: None,
        };
        Tokens { tokens: vec![team] }.write(&file).unwrap();
        let files = vec![file.clone()];
        let tokens = Reloading::start("tokens", files, move || Tokens::read(&file)).unwrap();
        Access::tokens(
            tokens,
            Audit::open(Some(&folder.join("audit.jsonl"))).unwrap(),
        )
    }

    fn audited(folder: &Path) -> Vec<Value> {
        let text = std::fs::read_to_string(folder.join("audit.jsonl")).unwrap();
        let lines = text.lines().map(serde_json::from_str);
        lines.collect::<Result<_, _>>().unwrap()
    }

    #[tokio::test]
    async fn refusals_for_a_run_are_counted_and_limited() {
        let (folder, recorder) = (
            tempfile::tempdir().unwrap(),
            PrometheusBuilder::new().build_recorder(),
        );
        let access = access(folder.path());
        let peer = Peer {
            address: Some("10.0.0.7:4711".parse().unwrap()),
        };
        ::metrics::with_local_recorder(&recorder, || {
            let caller = access.admit(Need::Scope(Scope::Select), TEAM, peer);
            let caller = caller.ok().unwrap();
            for n in 0..2 * FAILURES_MAX {
                let heard = caller.check_run("b-1").unwrap_err().reason();
                let (told, limited) = (Reason::PermissionDenied, Reason::Overloaded);
                assert_eq!(heard, if n < FAILURES_MAX { told } else { limited }, "{n}");
                assert!(
                    caller.check_run("a-1").is_ok(),
                    "its own runs stay open to it"
                );
            }
            let unknown = access.admit(Need::Token, Some("Bearer sbt_guess"), peer);
            let heard = unknown.err().map(|error| error.reason());
            assert_eq!(heard, Some(Reason::Unauthenticated), "counted apart");
        });
        drop(access);
        let page = recorder.handle().render();
        let counted = format!("{{reason=\"PERMISSION_DENIED\"}} {}", 2 * FAILURES_MAX);
        assert!(page.contains(&counted), "{page}");
        let lines = audited(folder.path());
        let of_run: Vec<_> = lines.iter().filter(|line| line["run"] == "b-1").collect();
        assert_eq!(of_run.len(), FAILURES_MAX as usize + 1);
        assert!(of_run.iter().all(|line| line["who"] == "team"));
        assert_eq!(of_run[FAILURES_MAX as usize]["detail"]["limited"], true);
    }

    #[tokio::test]
    async fn a_refusal_for_a_scope_names_its_token() {
        let folder = tempfile::tempdir().unwrap();
        let access = access(folder.path());
        for (shown, scope) in [(TEAM, Scope::Push), (Some("Bearer sbt_x"), Scope::Select)] {
            assert!(
                access
                    .admit(Need::Scope(scope), shown, Peer::default())
                    .is_err()
            );
        }
        drop(access);
        let lines = audited(folder.path());
        let told: Vec<_> = lines
            .iter()
            .map(|line| (line["who"].as_str(), line["reason"].as_str()))
            .collect();
        let expected = [
            (Some("team"), Some("PERMISSION_DENIED")),
            (None, Some("UNAUTHENTICATED")),
        ];
        assert_eq!(told, expected);
    }
}
