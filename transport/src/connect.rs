//! Connections to `http://` and `https://` addresses.
use crate::{
    fault::{LastFault, Noted},
    files::{Error, Trust},
};
use hyper_util::rt::TokioIo;
use std::{
    future::Future,
    io,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};
use tokio::net::TcpStream;
use tokio_rustls::{TlsConnector, client::TlsStream, rustls::pki_types::ServerName};
use tonic::transport::{self, Channel, Endpoint, Uri};
use tower::Service;

/// How long a handshake may take.
const HANDSHAKE: Duration = Duration::from_secs(10);
const HTTPS_PORT: u16 = 443;

/// Opens connections by the certificates and keys of one [`Trust`]. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub struct Dialer {
    trust: Arc<Trust>,
    fault: LastFault,
}

impl Dialer {
    pub fn new(trust: Trust) -> Self {
        Self {
            trust: Arc::new(trust),
            fault: LastFault::default(),
        }
    }

    /// Returns a dialer that expects `name` in the other side's certificate, whatever the address
    /// is.
    #[must_use]
    pub fn named(&self, name: &str) -> Self {
        Self::new(Trust {
            server_name: Some(name.to_owned()),
            ..(*self.trust).clone()
        })
    }

    /// Returns a dialer that expects the host of the address in the other side's certificate.
    #[must_use]
    pub fn unnamed(&self) -> Self {
        Self::new(Trust {
            server_name: None,
            ..(*self.trust).clone()
        })
    }

    /// Returns the name that is expected in the other side's certificate, if it is not the host of
    /// the address.
    pub fn server_name(&self) -> Option<&str> {
        self.trust.server_name.as_deref()
    }

    /// Returns why reading from a TLS connection of this dialer failed last, such as the alert of a
    /// service that refused its certificate. `None` if none failed.
    pub fn last_fault(&self) -> Option<String> {
        self.fault.get()
    }

    /// Reads the files once, so that a fault in them is reported before the first connection.
    ///
    /// # Errors
    /// Those of [`Trust::config`].
    pub fn check(&self) -> Result<(), Error> {
        self.trust.config().map(drop)
    }

    /// Connects to `uri`, with TLS if that is `https://`; `tune` sets what else the connection
    /// needs.
    ///
    /// # Errors
    /// If `uri` is no URI, no process answers there, or the TLS handshake fails.
    pub async fn connect(
        &self,
        uri: &str,
        tune: impl FnOnce(Endpoint) -> Endpoint,
    ) -> Result<Channel, transport::Error> {
        let (endpoint, tls) = self.target(uri)?;
        let endpoint = tune(endpoint);
        match tls {
            Some(connector) => endpoint.connect_with_connector(connector).await,
            None => endpoint.connect().await,
        }
    }

    /// As [`Dialer::connect`], but the connection is made by the first call.
    ///
    /// # Errors
    /// If `uri` is no URI.
    pub fn connect_lazy(
        &self,
        uri: &str,
        tune: impl FnOnce(Endpoint) -> Endpoint,
    ) -> Result<Channel, transport::Error> {
        let (endpoint, tls) = self.target(uri)?;
        let endpoint = tune(endpoint);
        Ok(match tls {
            Some(connector) => endpoint.connect_with_connector_lazy(connector),
            None => endpoint.connect_lazy(),
        })
    }

    /// Returns the endpoint for tonic and, for `https://`, the connector that opens the connection.
    fn target(&self, uri: &str) -> Result<(Endpoint, Option<Tls>), transport::Error> {
        let endpoint = Endpoint::from_shared(uri.to_owned())?;
        let origin = endpoint.uri().clone();
        if origin.scheme_str() != Some("https") {
            return Ok((endpoint, None));
        }
        // tonic's own TLS reads certificates once, when the endpoint is built: after a rotation
        // every reconnect would show the old certificate. [`Tls`] reads the files at each
        // connection instead. tonic refuses an `https://` endpoint without its own TLS, so the
        // endpoint pretends to be plain and carries the true address as its origin.
        let endpoint = Endpoint::from_static("http://tls").origin(origin.clone());
        let tls = Tls {
            dialer: self.clone(),
            to: origin,
        };
        Ok((endpoint, Some(tls)))
    }
}

/// Makes TLS connections to one address.
#[derive(Clone)]
struct Tls {
    dialer: Dialer,
    to: Uri,
}

impl Service<Uri> for Tls {
    type Response = TokioIo<Noted<TlsStream<TcpStream>>>;
    type Error = io::Error;
    type Future = Pin<Box<dyn Future<Output = io::Result<Self::Response>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, _: Uri) -> Self::Future {
        let this = self.clone();
        Box::pin(async move {
            let stream = this.open().await?;
            Ok(TokioIo::new(Noted::new(stream, this.dialer.fault.clone())))
        })
    }
}

impl Tls {
    async fn open(&self) -> io::Result<TlsStream<TcpStream>> {
        let trust = &self.dialer.trust;
        let unusable = |e: Error| io::Error::new(io::ErrorKind::InvalidInput, e);
        let connector = TlsConnector::from(Arc::new(trust.config().map_err(unusable)?));
        let host = self.to.host().unwrap_or_default();
        // An IPv6 host comes in brackets, which neither a certificate nor a socket address has.
        let host = host.trim_start_matches('[').trim_end_matches(']');
        let name = trust.server_name.as_deref().unwrap_or(host).to_owned();
        let server = ServerName::try_from(name.clone()).map_err(|_| {
            unusable(Error::Unusable(format!(
                "{name:?} is no name that a certificate can hold"
            )))
        })?;
        let port = self.to.port_u16().unwrap_or(HTTPS_PORT);
        let stream = TcpStream::connect((host, port)).await?;
        // As tonic sets it for plain connections. Without it, Nagle's algorithm holds back the
        // small frames that end a message.
        stream.set_nodelay(true)?;
        let handshake = connector.connect(server, stream);
        use io::ErrorKind::{
            BrokenPipe, ConnectionAborted, ConnectionReset, InvalidData, UnexpectedEof,
        };
        let refused = |e: io::Error| {
            let text = format!("the TLS handshake with {} failed: {e}", self.to);
            // A peer that goes away, as a proxy does while its service restarts, may be back soon.
            // All else is a matter of certificates and settings.
            let kind = match e.kind() {
                kind @ (ConnectionReset | ConnectionAborted | BrokenPipe | UnexpectedEof) => kind,
                _ => InvalidData,
            };
            io::Error::new(kind, text)
        };
        // `connect_timeout` of the endpoint ends with the TCP connection. A peer that accepts and
        // then says nothing would hold the call for ever.
        match tokio::time::timeout(HANDSHAKE, handshake).await {
            Ok(stream) => stream.map_err(refused),
            Err(_) => Err(refused(io::ErrorKind::TimedOut.into())),
        }
    }
}
