//! TLS of this process's own port, and of its connections to others.
use super::listen::Certificates;
use crate::{
    access::reload::Reloading,
    config::TlsConfig,
    error::{Error, Result},
};
use std::{
    path::{Path, PathBuf},
    sync::Arc,
};
use superbatch_transport::{Dialer, Trust, certificates, pinned, private_key, roots};
use tokio_rustls::rustls::{ServerConfig, server::WebPkiClientVerifier};

/// Returns the TLS settings of connections to this process. They are read again when a file
/// changes. `None` if no certificate is set.
///
/// `protocols` are those that callers may choose from (ALPN): `h2` of gRPC, `http/1.1` of browsers.
///
/// # Errors
/// `InvalidArgument` if a file cannot be used.
pub(super) fn listening(
    config: &TlsConfig,
    protocols: &'static [&'static [u8]],
) -> Result<Certificates> {
    let (Some(cert), Some(key)) = (config.cert.clone(), config.key.clone()) else {
        return Ok(None);
    };
    let client_ca = config.client_ca.clone();
    let files = [Some(cert.clone()), Some(key.clone()), client_ca.clone()];
    let build = move || -> Result<Arc<ServerConfig>> {
        let mut built = build(&cert, &key, client_ca.as_ref())?;
        built.alpn_protocols = protocols.iter().map(|name| name.to_vec()).collect();
        Ok(Arc::new(built))
    };
    let files = files.into_iter().flatten().collect();
    Reloading::start("certificates", files, build).map(Some)
}

fn build(cert: &Path, key: &Path, client_ca: Option<&PathBuf>) -> Result<ServerConfig> {
    let unusable = |field: &'static str| {
        move |e: superbatch_transport::Error| Error::invalid(field, e.to_string()).because(e)
    };
    let builder = pinned().map_err(unusable("tls"))?;
    let builder = match client_ca {
        None => builder.with_no_client_auth(),
        Some(ca) => {
            let roots = Arc::new(roots(ca).map_err(unusable("tls.client_ca"))?);
            let provider = superbatch_transport::provider();
            let verifier = WebPkiClientVerifier::builder_with_provider(roots, provider).build();
            let verifier = verifier.map_err(|e| {
                let message = format!("cannot verify clients by {}", ca.display());
                Error::invalid("tls.client_ca", message).because(e)
            })?;
            builder.with_client_cert_verifier(verifier)
        }
    };
    let chain = certificates(cert).map_err(unusable("tls.cert"))?;
    let secret = private_key(key).map_err(unusable("tls.key"))?;
    builder.with_single_cert(chain, secret).map_err(|e| {
        let message = format!("cannot use {} with {}", cert.display(), key.display());
        Error::invalid("tls.cert", message).because(e)
    })
}

/// Returns the dialer for connections to other processes.
///
/// # Errors
/// `InvalidArgument` if a file that is set cannot be used.
pub(super) fn dialer_towards_processes(config: &TlsConfig) -> Result<Dialer> {
    let shown = |own: &Option<PathBuf>, other: &Option<PathBuf>| own.clone().or(other.clone());
    let dialer = Dialer::new(Trust {
        ca: config.ca.clone(),
        cert: shown(&config.client_cert, &config.cert),
        key: shown(&config.client_key, &config.key),
        server_name: None,
    });
    if config.ca.is_some() || config.client_cert.is_some() {
        let unusable = |e: superbatch_transport::Error| Error::invalid("tls", e.to_string());
        dialer.check().map_err(unusable)?;
    }
    Ok(dialer)
}

/// As [`towards`], for workers. All of them may be verified by one name: they are reached by
/// addresses of pods, which no certificate can list.
///
/// # Errors
/// As [`towards`].
pub(super) fn towards_workers(config: &TlsConfig) -> Result<Dialer> {
    let dialer = dialer_towards_processes(config)?;
    Ok(match &config.worker_name {
        Some(name) => dialer.named(name),
        None => dialer,
    })
}
