//! Checks of how a process may be reached from other machines.
use super::Config;
use crate::error::{Error, Result};
use std::net::SocketAddr;
use superbatch_proto::v1::Reason;
use url::Url;

impl Config {
    /// Checks that a process is safe to reach: beyond loopback it needs TLS and tokens, unless the
    /// operator has set `allow_insecure`, and an allow-list of data.
    pub(super) fn validate_reach(&self) -> Result<()> {
        self.tls.validate()?;
        let role = self.worker_role.listen;
        let nowhere = SocketAddr::from(([127, 0, 0, 1], 0));
        let shown = |listen: Option<SocketAddr>| listen.unwrap_or(nowhere);
        let (has_tls, has_tokens) = (self.tls.is_on(), self.auth.tokens_file.is_some());
        let needs = [
            ("listen", self.listen, "tls.cert", has_tls),
            ("listen", self.listen, "auth.tokens_file", has_tokens),
            ("worker_role.listen", role, "tls.cert", has_tls),
            // The metrics port is plain and shows only figures. It may be reachable if the other
            // ports are secured.
            (
                "metrics_listen",
                shown(self.metrics_listen),
                "tls.cert",
                has_tls,
            ),
            (
                "worker_role.metrics_listen",
                shown(self.worker_role.metrics_listen),
                "tls.cert",
                has_tls,
            ),
            ("page_listen", shown(self.page_listen), "tls.cert", has_tls),
            (
                "page_listen",
                shown(self.page_listen),
                "auth.tokens_file",
                has_tokens,
            ),
        ];
        let lacking = needs
            .into_iter()
            .find(|(_, address, _, is_set)| !address.ip().is_loopback() && !is_set);
        if let Some((field, address, missing, _)) = lacking.filter(|_| !self.allow_insecure) {
            let message = format!(
                "{field} is {address}, which others can reach, and {missing} is not set: set it \
                 (docs/security.md says how), listen on 127.0.0.1, or say allow_insecure: true on \
                 a network that you trust whole"
            );
            return Err(Error::invalid(field, message));
        }
        if self.auth.metrics && !has_tokens {
            let message = "auth.metrics asks for tokens, and auth.tokens_file is not set";
            return Err(Error::invalid("auth.tokens_file", message));
        }
        if self.is_reachable() && self.storage.allow_uris.is_empty() {
            let message = format!(
                "listen is {}, and storage.allow_uris is empty; list the URI prefixes that \
                 requests may name, such as s3://bucket/data",
                self.listen
            );
            return Err(
                Error::new(Reason::UriNotAllowed, message).with("field", "storage.allow_uris")
            );
        }
        Ok(())
    }

    /// Returns whether other machines can reach a coordinator of these settings.
    pub fn is_reachable(&self) -> bool {
        !self.listen.ip().is_loopback()
    }

    /// Checks that advertised addresses can be reached at all: `0.0.0.0` means "every address here"
    /// to this machine and nothing to others.
    pub(super) fn validate_advertised(&self) -> Result<()> {
        let role = &self.worker_role;
        let uris = [
            (
                "coordinator.advertise_address",
                self.coordinator.advertise_address.as_ref(),
            ),
            (
                "worker_role.advertise_address",
                role.advertise_address.as_ref(),
            ),
            ("worker_role.coordinator", Some(&role.coordinator)),
        ];
        let is_reachable = |uri: &str| {
            Url::parse(uri)
                .is_ok_and(|url| url.has_host() && ["http", "https"].contains(&url.scheme()))
        };
        let unusable = |(field, uri): (&'static str, Option<&String>)| {
            Some((field, uri.filter(|u| !is_reachable(u))?.clone()))
        };
        if let Some((field, uri)) = uris.into_iter().find_map(unusable) {
            return Err(Error::invalid(
                field,
                format!("{field} is {uri:?}; give http://host:port"),
            ));
        }
        let advertised = [
            (
                "listen",
                self.listen,
                "coordinator.advertise_address",
                &self.coordinator.advertise_address,
            ),
            (
                "worker_role.listen",
                role.listen,
                "worker_role.advertise_address",
                &role.advertise_address,
            ),
        ];
        let nowhere = advertised
            .into_iter()
            .find(|(_, at, _, advertised)| at.ip().is_unspecified() && advertised.is_none());
        if let Some((field, address, missing, _)) = nowhere {
            let message = format!(
                "{field} is {address}, which other machines cannot reach; set {missing} to the \
                URI that others use, such as http://host:{}",
                address.port()
            );
            return Err(Error::invalid(missing, message));
        }
        Ok(())
    }
}
