//! Certificates and keys, from PEM files.
use std::{
    path::{Path, PathBuf},
    sync::Arc,
};
use tokio_rustls::rustls::{
    self, ClientConfig, RootCertStore, SupportedProtocolVersion,
    crypto::CryptoProvider,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject},
    version::{TLS12, TLS13},
};

/// Why TLS cannot be used on this side.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("cannot read {}: {source}", path.display())]
    Unreadable {
        path: PathBuf,
        source: std::io::Error,
    },
    #[error("{} holds no {what} in PEM form", path.display())]
    Empty { path: PathBuf, what: &'static str },
    #[error("{what}: {source}")]
    Refused { what: String, source: rustls::Error },
    #[error("{0}")]
    Unusable(String),
}

/// The authorities that this side trusts and the certificate that it shows. Paths are PEM files.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Trust {
    /// Certificates of the authorities that may sign the other side's certificate. `None`: the
    /// system's authorities.
    pub ca: Option<PathBuf>,
    /// This side's own certificate chain and key, for servers that ask for one (mTLS).
    pub cert: Option<PathBuf>,
    pub key: Option<PathBuf>,
    /// The name expected in the other side's certificate, if it is not the host of the address.
    pub server_name: Option<String>,
}

impl Trust {
    /// Reads the files.
    ///
    /// # Errors
    /// If a file is missing or no PEM; the error names its path.
    pub fn config(&self) -> Result<ClientConfig, Error> {
        let builder = ClientConfig::builder_with_provider(provider())
            .with_protocol_versions(VERSIONS)
            .map_err(|source| Error::Refused {
                what: "TLS 1.2 and 1.3".into(),
                source,
            })?;
        let builder = builder.with_root_certificates(match &self.ca {
            Some(path) => roots(path)?,
            None => system_roots()?,
        });
        let mut config = match (&self.cert, &self.key) {
            (Some(cert), Some(key)) => builder
                .with_client_auth_cert(certificates(cert)?, private_key(key)?)
                .map_err(|source| pair(cert, key, source))?,
            (None, None) => builder.with_no_client_auth(),
            _ => {
                let message = "a certificate and its key belong together; give both or neither";
                return Err(Error::Unusable(message.into()));
            }
        };
        config.alpn_protocols = vec![b"h2".to_vec()];
        Ok(config)
    }
}

/// TLS 1.0 and 1.1 have known weaknesses (RFC 8996), and every peer of this service can do better.
static VERSIONS: &[&SupportedProtocolVersion] = &[&TLS13, &TLS12];

/// Begins a server's settings with TLS 1.2 and 1.3 only.
///
/// # Errors
/// If the cryptography provider supports neither.
pub fn pinned() -> Result<rustls::ConfigBuilder<rustls::ServerConfig, rustls::WantsVerifier>, Error>
{
    rustls::ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(VERSIONS)
        .map_err(|source| Error::Refused {
            what: "TLS 1.2 and 1.3".into(),
            source,
        })
}

/// Returns the provider of all cryptography. rustls takes a process-wide default only if exactly
/// one provider is linked; if a dependency links a second one, the default becomes an error at run
/// time.
pub fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}

/// Returns the error for a certificate and a key that cannot be used together.
fn pair(cert: &Path, key: &Path, source: rustls::Error) -> Error {
    Error::Refused {
        what: format!("cannot use {} with {}", cert.display(), key.display()),
        source,
    }
}

/// Reads a certificate chain, this side's own certificate first.
///
/// # Errors
/// With the path.
pub fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, Error> {
    let bytes = read(path)?;
    let found: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&bytes).collect();
    match found {
        Ok(found) if !found.is_empty() => Ok(found),
        _ => Err(Error::Empty {
            path: path.to_owned(),
            what: "certificate",
        }),
    }
}

/// # Errors
/// With the path, never with what is in it.
pub fn private_key(path: &Path) -> Result<PrivateKeyDer<'static>, Error> {
    PrivateKeyDer::from_pem_slice(&read(path)?).map_err(|_| Error::Empty {
        path: path.to_owned(),
        what: "private key",
    })
}

/// Reads the certificates of the authorities to trust.
///
/// # Errors
/// With the path.
pub fn roots(path: &Path) -> Result<RootCertStore, Error> {
    let mut roots = RootCertStore::empty();
    for certificate in certificates(path)? {
        roots.add(certificate).map_err(|source| Error::Refused {
            what: format!("cannot trust {}", path.display()),
            source,
        })?;
    }
    Ok(roots)
}

fn system_roots() -> Result<RootCertStore, Error> {
    let mut roots = RootCertStore::empty();
    // System stores hold old certificates that rustls cannot parse. One of them must not make every
    // connection fail, so they are left out, as other programs do.
    roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
    if roots.is_empty() {
        let message = "this system trusts no certificate authority; give a CA file";
        return Err(Error::Unusable(message.into()));
    }
    Ok(roots)
}

fn read(path: &Path) -> Result<Vec<u8>, Error> {
    std::fs::read(path).map_err(|source| Error::Unreadable {
        path: path.to_owned(),
        source,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_missing_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let empty = folder.path().join("ca.pem");
        std::fs::write(&empty, "no certificate").unwrap();
        let of = |trust: Trust| trust.config().unwrap_err().to_string();
        let missing = folder.path().join("nope.pem");
        let trust = |ca: &Path| Trust {
            ca: Some(ca.to_owned()),
            ..Trust::default()
        };
        assert!(
            of(trust(&missing)).contains("cannot read") && of(trust(&missing)).contains("nope.pem")
        );
        assert!(of(trust(&empty)).contains("ca.pem holds no certificate"));
    }
}
