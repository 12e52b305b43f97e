//! TLS, tokens and the audit log.
use crate::error::{Error, Result};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// Certificates and keys: paths of PEM files, which are read again when they change. TLS 1.2 is the
/// oldest version.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct TlsConfig {
    /// Certificate chain that this process shows to callers. With it, `listen`
    /// (`worker_role.listen` of a worker) accepts TLS only.
    pub cert: Option<PathBuf>,
    /// Key of `tls.cert`.
    pub key: Option<PathBuf>,
    /// Certificate authorities of clients. With it, every client must show a certificate of one of
    /// them (mTLS).
    pub client_ca: Option<PathBuf>,
    /// Certificate authorities of the coordinators and workers to which this process connects.
    /// `null` means those of the system.
    pub ca: Option<PathBuf>,
    /// Certificate chain that this process shows to servers that ask for one. `null` means
    /// `tls.cert`.
    pub client_cert: Option<PathBuf>,
    /// Key of `tls.client_cert`. `null` means `tls.key`.
    pub client_key: Option<PathBuf>,
    /// Name in the certificates of all workers. `null` means the host of each worker's address.
    pub worker_name: Option<String>,
}

impl TlsConfig {
    pub fn is_on(&self) -> bool {
        self.cert.is_some()
    }

    /// # Errors
    /// `InvalidArgument` for a certificate without its key, or the reverse.
    pub fn validate(&self) -> Result<()> {
        let pairs = [
            ("tls.cert", &self.cert, "tls.key", &self.key),
            (
                "tls.client_cert",
                &self.client_cert,
                "tls.client_key",
                &self.client_key,
            ),
        ];
        for (cert, has_cert, key, has_key) in pairs {
            if has_cert.is_some() != has_key.is_some() {
                let missing = if has_cert.is_some() { key } else { cert };
                let message = format!("{cert} and {key} belong together; set {missing}, too");
                return Err(Error::invalid(missing, message));
            }
        }
        if self.client_ca.is_some() && !self.is_on() {
            let message = "tls.client_ca asks clients for certificates, which needs TLS; set \
            tls.cert and tls.key";
            return Err(Error::invalid("tls.cert", message));
        }
        Ok(())
    }
}

/// Tokens of trainers, operators and workers.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct AuthConfig {
    /// File of hashed tokens, which `superbatch token` writes and which is read again when it
    /// changes. With it, every call to a coordinator needs a token.
    pub tokens_file: Option<PathBuf>,
    /// Whether `/metrics` needs a token of scope `admin` too. `/livez` and `/readyz` need none.
    pub metrics: bool,
}

/// Who did what to which run, as JSON lines.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct AuditConfig {
    /// File to which opened, changed and closed runs, pushes, refused calls and changed tokens are
    /// appended. `null` means no such log.
    pub file: Option<PathBuf>,
}
