//! The client's certificates and token. Only this module of the client reads the environment.
use crate::{Error, Result};
use std::{fmt, path::PathBuf};
use superbatch_transport::{Bearer, Dialer, Trust};
use tonic::transport::Uri;

/// TLS files and the token. Fields that are not given are taken from the environment:
/// `SUPERBATCH_CA`, `SUPERBATCH_CERT`, `SUPERBATCH_KEY`, `SUPERBATCH_SERVER_NAME`,
/// `SUPERBATCH_TOKEN`, `SUPERBATCH_TOKEN_FILE`.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Credentials {
    /// PEM file of the authorities that may sign the service's certificate. If absent, the
    /// system's.
    pub ca: Option<PathBuf>,
    /// PEM files of this client's own certificate and key, if the service asks for one (mTLS).
    pub cert: Option<PathBuf>,
    /// The key of `cert`.
    pub key: Option<PathBuf>,
    /// The name in the service's certificate, if it is not the host of its address.
    pub server_name: Option<String>,
    /// The bearer token itself.
    pub token: Option<String>,
    /// A file with the token, which may change while the client runs.
    pub token_file: Option<PathBuf>,
    /// Whether the token may be sent without TLS to another machine, so that every host on the way
    /// can read it.
    pub allow_insecure: bool,
}

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Credentials")
            .field("ca", &self.ca)
            .field("cert", &self.cert)
            .field("server_name", &self.server_name)
            .field("token", &self.token.as_ref().map(|_| "(hidden)"))
            .field("token_file", &self.token_file)
            .finish_non_exhaustive()
    }
}

impl Credentials {
    /// Fills in the fields that are not given from the environment of this process.
    #[must_use]
    pub fn or_environment(self) -> Self {
        self.or_from_environment(|name| std::env::var(name).ok())
    }

    fn or_from_environment(self, variable: impl Fn(&str) -> Option<String>) -> Self {
        let text = |name: &str| variable(name).filter(|value| !value.is_empty());
        let path = |name: &str| text(name).map(PathBuf::from);
        // A certificate and its key are taken from one source only: half a pair from each would
        // never fit. Likewise a given token in either form excludes both variables.
        let (has_cert, has_token) = (
            self.cert.is_some() || self.key.is_some(),
            self.token.is_some() || self.token_file.is_some(),
        );
        let unless = |given: bool, value: Option<PathBuf>| value.filter(|_| !given);
        let token = text("SUPERBATCH_TOKEN").filter(|_| !has_token);
        Self {
            ca: self.ca.or_else(|| path("SUPERBATCH_CA")),
            cert: self.cert.or(unless(has_cert, path("SUPERBATCH_CERT"))),
            key: self.key.or(unless(has_cert, path("SUPERBATCH_KEY"))),
            server_name: self.server_name.or_else(|| text("SUPERBATCH_SERVER_NAME")),
            token_file: self.token_file.or(unless(
                has_token || token.is_some(),
                path("SUPERBATCH_TOKEN_FILE"),
            )),
            token: self.token.or(token),
            allow_insecure: self.allow_insecure,
        }
    }

    /// Returns the dialer for `uri` and the token for its calls.
    ///
    /// # Errors
    /// [`Error::Invalid`], naming the argument.
    pub(crate) fn open(&self, uri: &str) -> Result<(Dialer, Bearer)> {
        let parsed: Uri = uri.parse().map_err(|_| malformed(uri))?;
        let is_tls = match parsed.scheme_str() {
            Some("https") => true,
            Some("http") => false,
            _ => return Err(malformed(uri)),
        };
        let host = parsed.host().ok_or_else(|| malformed(uri))?;
        let dialer = Dialer::new(Trust {
            ca: self.ca.clone(),
            cert: self.cert.clone(),
            key: self.key.clone(),
            server_name: self.server_name.clone(),
        });
        if is_tls {
            let unusable = |e: superbatch_transport::Error| Error::invalid("ca", e.to_string());
            dialer.check().map_err(unusable)?;
        }
        let bearer = match (&self.token, &self.token_file) {
            (Some(token), None) => Bearer::new(token),
            (None, Some(path)) => Bearer::file(path.clone()),
            (None, None) => return Ok((dialer, Bearer::default())),
            (Some(_), Some(_)) => {
                let message = "give a token or a file that holds it, not both";
                return Err(Error::invalid("token", message));
            }
        };
        let bearer = bearer.map_err(|e| Error::invalid("token", e.to_string()))?;
        if !is_tls && !self.allow_insecure && !is_this_machine(host) {
            let message = format!(
                "it would be sent to {host} without TLS, where everybody between can read it; \
                connect to https://, or say \
                 allow_insecure on a network that you trust whole"
            );
            return Err(Error::invalid("token", message));
        }
        Ok((dialer, bearer))
    }

    /// Returns whether workers of the service at `uri` may send rows without TLS from other
    /// machines. A plain service on this machine may stand behind a process that ends TLS for it,
    /// so it does not tell that the network is trusted.
    pub(crate) fn allows_plain_workers(&self, uri: &str) -> bool {
        let parsed: Option<Uri> = uri.parse().ok();
        let is_plain_elsewhere = parsed.is_some_and(|uri| {
            uri.scheme_str() == Some("http")
                && uri.host().is_some_and(|host| !is_this_machine(host))
        });
        self.allow_insecure || is_plain_elsewhere
    }
}

fn malformed(uri: &str) -> Error {
    let hint = "write it as http://HOST:PORT or https://HOST:PORT";
    Error::invalid("uri", format!("cannot connect to {uri:?}: {hint}"))
}

pub(crate) fn is_this_machine(host: &str) -> bool {
    let address = host.trim_start_matches('[').trim_end_matches(']');
    host == "localhost"
        || address
            .parse::<std::net::IpAddr>()
            .is_ok_and(|address| address.is_loopback())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn environment(name: &str) -> Option<String> {
        Some(format!("/env/{}", name.trim_start_matches("SUPERBATCH_")))
    }

    #[test]
    fn what_is_given_comes_before_the_environment() {
        let found = Credentials::default().or_from_environment(environment);
        assert_eq!(found.ca, Some("/env/CA".into()));
        assert_eq!(found.key, Some("/env/KEY".into()));
        assert_eq!(found.token.as_deref(), Some("/env/TOKEN"));
        assert_eq!(found.token_file, None, "the token itself counts");
        let given = Credentials {
            cert: Some("mine".into()),
            token_file: Some("file".into()),
            ..Credentials::default()
        };
        let found = given.or_from_environment(environment);
        assert_eq!(
            found.key, None,
            "another's key does not fit this certificate"
        );
        assert_eq!((found.token, found.token_file), (None, Some("file".into())));
        let empty = Credentials::default().or_from_environment(|_| Some(String::new()));
        assert_eq!(empty, Credentials::default());
    }

    #[test]
    fn plain_workers_are_trusted_as_the_coordinator_is() {
        let credentials = Credentials::default();
        for (uri, expected) in [
            ("http://10.0.0.1:1", true),
            ("https://10.0.0.1:1", false),
            ("http://127.0.0.1:1", false),
            ("http://localhost:1", false),
            ("http://[::1]:1", false),
            ("HTTPS://10.0.0.1:1", false),
            ("", false),
        ] {
            assert_eq!(credentials.allows_plain_workers(uri), expected, "{uri}");
            let trusting = Credentials {
                allow_insecure: true,
                ..Credentials::default()
            };
            assert!(trusting.allows_plain_workers(uri), "{uri}");
        }
    }

    #[test]
    fn a_token_is_not_sent_in_the_clear() {
        let credentials = Credentials {
            token: Some("sbt_secret".into()),
            ..Credentials::default()
        };
        for uri in ["http://127.0.0.1:1", "http://localhost:1", "http://[::1]:1"] {
            assert!(credentials.open(uri).is_ok(), "{uri}");
        }
        let refused = credentials.open("http://10.0.0.1:1").map(drop).unwrap_err();
        let said = refused.to_string();
        assert!(
            said.contains("without TLS") && !said.contains("sbt_"),
            "{said}"
        );
        let allowed = Credentials {
            allow_insecure: true,
            ..credentials.clone()
        };
        assert!(allowed.open("http://10.0.0.1:1").is_ok());
        assert!(!format!("{credentials:?}").contains("sbt_"));
        for uri in ["ftp://x", "localhost:50051", "/path", ""] {
            assert!(credentials.open(uri).is_err(), "{uri}");
        }
    }
}
