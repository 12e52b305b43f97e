//! Decides whether a token may do what a call needs.
use super::{
    scope::{Need, Scope},
    tokens::{Entry, Tokens},
};
use crate::error::{Error, Result};
use std::time::SystemTime;
use superbatch_proto::v1::Reason;

/// A refusal, with the entry of the token if that is valid.
#[derive(Debug)]
pub(super) struct Refused<'a> {
    pub error: Error,
    pub entry: Option<&'a Entry>,
}

/// Returns the entry of the token that a call shows; `None` if the call needs no token.
///
/// # Errors
/// `Unauthenticated` without a valid token, `PermissionDenied` with one of other scopes. Both name
/// the missing scope, and no run or token that exists.
pub(super) fn decide<'a>(
    tokens: &'a Tokens,
    shown: Option<&str>,
    need: Need,
    now: SystemTime,
) -> Result<Option<&'a Entry>, Refused<'a>> {
    let scope = match need {
        Need::Nothing => return Ok(None),
        Need::Token => None,
        Need::Scope(scope) => Some(scope),
        // Only a worker serves such calls, to its own coordinator, and this process is no worker:
        // so the widest scope is required.
        Need::Coordinator => Some(Scope::Admin),
    };
    let wanted = scope.map_or(String::new(), |scope| format!(" with scope `{scope}`"));
    let unknown = |what: &str| {
        let message = format!(
            "{what}; this call needs one{wanted}: superbatch.connect(…, token=…), or the header \
            authorization: Bearer TOKEN"
        );
        let error = Error::new(Reason::Unauthenticated, message);
        let error = match scope {
            Some(scope) => error.with("scope", scope),
            None => error,
        };
        Refused { error, entry: None }
    };
    let shown = shown.ok_or_else(|| unknown("no token was sent"))?;
    // An expired token gets the same answer as an unknown one. Another answer would confirm to an
    // attacker that a leaked token was real.
    let entry = tokens.find(shown).filter(|entry| !entry.is_expired(now));
    let entry =
        entry.ok_or_else(|| unknown("the token is not valid (unknown, revoked or expired)"))?;
    match scope.filter(|scope| !entry.may(*scope)) {
        None => Ok(Some(entry)),
        Some(missing) => {
            let message = format!(
                "this token lacks the scope `{missing}`; ask the operator for one that has it"
            );
            let error = Error::new(Reason::PermissionDenied, message).with("scope", missing);
            Err(Refused {
                error,
                entry: Some(entry),
            })
        }
    }
}

/// Returns the token of a header `authorization: Bearer …`.
pub(super) fn bearer(header: &str) -> Option<&str> {
    let (scheme, token) = header.trim().split_once(' ')?;
    let token = token.trim();
    (scheme.eq_ignore_ascii_case("bearer") && !token.is_empty()).then_some(token)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::access::tokens::hash;

    fn tokens() -> Tokens {
        let entry = |name: &str, scopes: &[Scope], expires: Option<&str>| Entry {
            name: name.into(),
            sha256: hash(&format!("sbt_{name}")),
            scopes: scopes.to_vec(),
            runs: vec!["*".into()],
            expires: expires.map(str::to_owned),
        };
        let trainer = [Scope::Open, Scope::Select, Scope::Push, Scope::Read];
        Tokens {
            tokens: vec![
                entry("trainer", &trainer, None),
                entry("reader", &[Scope::Read], None),
                entry("admin", &[Scope::Admin], None),
                entry("worker", &[Scope::Worker], None),
                entry("old", &trainer, Some("2026-01-01T00:00:00Z")),
            ],
        }
    }

    #[test]
    fn each_token_may_what_it_is_for() {
        use Reason::{PermissionDenied as Denied, Unauthenticated as Unknown};
        let tokens = tokens();
        let now = humantime::parse_rfc3339("2026-11-28T00:00:00Z").unwrap();
        // For nothing, any token, open, select, push, read, admin, worker, and a worker's own
        // calls.
        let needs = [
            Need::Nothing,
            Need::Token,
            Need::Scope(Scope::Open),
            Need::Scope(Scope::Select),
            Need::Scope(Scope::Push),
            Need::Scope(Scope::Read),
            Need::Scope(Scope::Admin),
            Need::Scope(Scope::Worker),
            Need::Coordinator,
        ];
        let (y, d, u) = (None, Some(Denied), Some(Unknown));
        for (shown, expected) in [
            (None, [y, u, u, u, u, u, u, u, u]),
            (Some("sbt_nobody"), [y, u, u, u, u, u, u, u, u]),
            (Some("sbt_old"), [y, u, u, u, u, u, u, u, u]),
            (Some("sbt_trainer"), [y, y, y, y, y, y, d, d, d]),
            (Some("sbt_reader"), [y, y, d, d, d, y, d, d, d]),
            (Some("sbt_admin"), [y, y, y, y, y, y, y, d, y]),
            (Some("sbt_worker"), [y, y, d, d, d, d, d, y, d]),
        ] {
            for (need, expected) in needs.into_iter().zip(expected) {
                let found = decide(&tokens, shown, need, now);
                let reason = found.as_ref().err().map(|refused| refused.error.reason());
                assert_eq!(reason, expected, "{shown:?} for {need:?}");
                if let (Err(Refused { error, entry }), Need::Scope(scope)) = (found, need) {
                    let named = entry.map(|entry| format!("sbt_{}", entry.name));
                    let is_known = reason == Some(Denied);
                    assert_eq!(named.as_deref(), shown.filter(|_| is_known));
                    assert_eq!(error.value("scope"), Some(scope.name()));
                    assert!(error.chain().contains(scope.name()));
                    assert!(!error.chain().contains("sbt_"), "{}", error.chain());
                }
            }
        }
    }

    #[test]
    fn unknown_and_expired_tokens_are_told_the_same() {
        let told = |shown| {
            let need = Need::Scope(Scope::Push);
            let tokens = tokens();
            let refused = decide(&tokens, Some(shown), need, SystemTime::now());
            refused.unwrap_err().error.chain()
        };
        assert_eq!(told("sbt_old"), told("sbt_nobody"));
    }

    #[test]
    fn a_header_is_read_as_others_write_it() {
        for (header, expected) in [
            ("Bearer abc", Some("abc")),
            ("bearer  abc ", Some("abc")),
            ("Bearer", None),
            ("Bearer ", None),
            ("Basic abc", None),
        ] {
            assert_eq!(bearer(header), expected, "{header:?}");
        }
    }
}
