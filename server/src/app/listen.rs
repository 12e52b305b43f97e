//! Turns a listener into the connections that the services see: TLS, a limit on their number, and a
//! limit on how long a new one may be silent.
use crate::{
    access::{Peer, reload::Reloading},
    metrics,
};
use std::{
    io,
    net::SocketAddr,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
    time::Duration,
};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadBuf},
    net::{TcpListener, TcpStream},
    sync::{OwnedSemaphorePermit, Semaphore, mpsc},
    time::{Sleep, sleep, timeout},
};
use tokio_rustls::{TlsAcceptor, rustls::ServerConfig, server::TlsStream};
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::server::Connected;

/// See [`Bounds::greeting`].
const GREETING: Duration = Duration::from_secs(10);
/// Length of the client preface, with which every HTTP/2 connection begins (RFC 9113, 3.4).
const PREFACE_BYTES: usize = 24;
/// How long, and for how many bytes, a connection whose handshake failed is still read.
const LINGER: Duration = Duration::from_secs(1);
const LINGER_BYTES: u64 = 64 << 10;
/// The wait after a failure to accept, such as too many open files.
const ACCEPT_AGAIN: Duration = Duration::from_millis(100);

/// The TLS settings of new connections; `None` if they are plain.
pub(super) type Certificates = Option<Arc<Reloading<Arc<ServerConfig>>>>;

/// Limits on connections.
#[derive(Debug, Clone, Copy)]
pub(super) struct Bounds {
    /// Connections at a time: further ones are closed.
    pub most: usize,
    /// How long a TLS handshake may take, and then the first bytes of HTTP/2. Without it a caller
    /// that opens connections and sends nothing would hold all of `most`.
    pub greeting: Duration,
}

impl Bounds {
    pub(super) fn of(most: usize) -> Self {
        Self {
            most,
            greeting: GREETING,
        }
    }
}

/// Connections that are ready for HTTP/2.
pub(super) fn incoming(
    listener: TcpListener,
    certificates: Certificates,
    bounds: Bounds,
) -> ReceiverStream<io::Result<Socket>> {
    let (accepted, incoming) = mpsc::channel(16);
    tokio::spawn(accept(listener, certificates, bounds, accepted));
    ReceiverStream::new(incoming)
}

async fn accept(
    listener: TcpListener,
    certificates: Certificates,
    bounds: Bounds,
    accepted: mpsc::Sender<io::Result<Socket>>,
) {
    let room = Arc::new(Semaphore::new(bounds.most));
    loop {
        let connection = tokio::select! {
            // The receiver is gone: the server stops.
            () = accepted.closed() => return,
            connection = listener.accept() => connection,
        };
        let (stream, address) = match connection {
            Ok(connection) => connection,
            Err(error) => {
                tracing::warn!(%error, "cannot accept a connection");
                sleep(ACCEPT_AGAIN).await;
                continue;
            }
        };
        let Ok(permit) = room.clone().try_acquire_owned() else {
            metrics::connections_refused("limit").increment(1);
            let most = bounds.most;
            tracing::debug!(%address, most, "closed a connection: there are as many as are \
            allowed");
            continue;
        };
        // With Nagle's algorithm a small message waits for the acknowledgement of the one before
        // it. If the option cannot be set, the connection still works.
        drop(stream.set_nodelay(true));
        // The handshake runs in a task of its own: a slow client must not hold up the clients
        // behind it.
        let (certificates, accepted) = (certificates.clone(), accepted.clone());
        tokio::spawn(async move {
            match accept_tls(stream, certificates, bounds.greeting).await {
                // Sending fails if the server has stopped in the meantime.
                Ok(io) => {
                    let socket = Socket::new(io, address, permit, bounds.greeting);
                    drop(accepted.send(Ok(socket)).await);
                }
                Err(error) => {
                    metrics::connections_refused("handshake").increment(1);
                    tracing::debug!(%address, %error, "the TLS handshake failed");
                }
            }
        });
    }
}

async fn accept_tls(
    stream: TcpStream,
    certificates: Certificates,
    within: Duration,
) -> io::Result<Io> {
    let Some(certificates) = certificates else {
        return Ok(Io::Plain(stream));
    };
    let acceptor = TlsAcceptor::from((*certificates.get()).clone());
    let handshake = acceptor.accept(stream).into_fallible();
    match timeout(within, handshake).await {
        Ok(Ok(stream)) => Ok(Io::Tls(Box::new(stream))),
        Ok(Err((error, stream))) => {
            linger(stream).await;
            Err(error)
        }
        Err(_) => Err(io::ErrorKind::TimedOut.into()),
    }
}

/// Ends a connection whose handshake failed so that the client can read why. In TLS 1.3 a client
/// sends its first request before the server has looked at its certificate. If the socket were
/// closed with these bytes unread, the kernel would reset the connection, and the client could
/// lose the alert that names the reason.
async fn linger(mut stream: TcpStream) {
    drop(stream.shutdown().await);
    let mut unread = stream.take(LINGER_BYTES);
    drop(timeout(LINGER, tokio::io::copy(&mut unread, &mut tokio::io::sink())).await);
}

enum Io {
    Plain(TcpStream),
    Tls(Box<TlsStream<TcpStream>>),
}

/// One connection. It holds its permit for as long as it lives.
pub(super) struct Socket {
    io: Io,
    address: SocketAddr,
    /// Bytes received and the deadline, until the HTTP/2 preface is complete.
    greeting: Option<(usize, Pin<Box<Sleep>>)>,
    _room: OwnedSemaphorePermit,
    _open: Open,
}

/// Counts open connections.
struct Open;

impl Open {
    fn new() -> Self {
        metrics::connections().increment(1.0);
        Self
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        metrics::connections().decrement(1.0);
    }
}

impl Socket {
    fn new(io: Io, address: SocketAddr, room: OwnedSemaphorePermit, greeting: Duration) -> Self {
        Self {
            io,
            address,
            greeting: Some((0, Box::pin(sleep(greeting)))),
            _room: room,
            _open: Open::new(),
        }
    }
}

impl Socket {
    /// Returns the other end.
    pub(super) fn peer(&self) -> Peer {
        Peer {
            address: Some(self.address),
        }
    }
}

impl Connected for Socket {
    type ConnectInfo = Peer;

    fn connect_info(&self) -> Peer {
        self.peer()
    }
}

impl AsyncRead for Socket {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        into: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = &mut *self;
        let before = into.filled().len();
        let read = match &mut this.io {
            Io::Plain(io) => Pin::new(io).poll_read(context, into),
            Io::Tls(io) => Pin::new(io).poll_read(context, into),
        };
        // tonic's own time-outs begin when HTTP/2 does. So the deadline for the first bytes is kept
        // here, in the only place that sees them, and is dropped with the 24th byte: a long call
        // may be silent.
        let Some((said, deadline)) = &mut this.greeting else {
            return read;
        };
        if read.is_ready() {
            *said += into.filled().len() - before;
            if *said >= PREFACE_BYTES {
                this.greeting = None;
            }
            return read;
        }
        ready!(deadline.as_mut().poll(context));
        metrics::connections_refused("silent").increment(1);
        Poll::Ready(Err(io::ErrorKind::TimedOut.into()))
    }
}

impl AsyncWrite for Socket {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        match &mut self.io {
            Io::Plain(io) => Pin::new(io).poll_write(context, bytes),
            Io::Tls(io) => Pin::new(io).poll_write(context, bytes),
        }
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        match &mut self.io {
            Io::Plain(io) => Pin::new(io).poll_write_vectored(context, bytes),
            Io::Tls(io) => Pin::new(io).poll_write_vectored(context, bytes),
        }
    }

    fn is_write_vectored(&self) -> bool {
        match &self.io {
            Io::Plain(io) => io.is_write_vectored(),
            Io::Tls(io) => io.is_write_vectored(),
        }
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.io {
            Io::Plain(io) => Pin::new(io).poll_flush(context),
            Io::Tls(io) => Pin::new(io).poll_flush(context),
        }
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.io {
            Io::Plain(io) => Pin::new(io).poll_shutdown(context),
            Io::Tls(io) => Pin::new(io).poll_shutdown(context),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio_stream::StreamExt;

    async fn listening(bounds: Bounds) -> (SocketAddr, ReceiverStream<io::Result<Socket>>) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        (address, incoming(listener, None, bounds))
    }

    #[tokio::test]
    async fn silent_connections_are_closed() {
        let (address, mut incoming) = listening(Bounds {
            most: 4,
            greeting: Duration::from_millis(20),
        })
        .await;
        let _silent = TcpStream::connect(address).await.unwrap();
        let mut socket = incoming.next().await.unwrap().unwrap();
        let mut byte = [0];
        let ended = socket.read_exact(&mut byte).await.unwrap_err();
        assert_eq!(ended.kind(), io::ErrorKind::TimedOut);
    }

    #[tokio::test]
    async fn there_is_room_for_so_many_connections() {
        let (address, mut incoming) = listening(Bounds::of(2)).await;
        let _first = TcpStream::connect(address).await.unwrap();
        let first = incoming.next().await.unwrap().unwrap();
        let _second = TcpStream::connect(address).await.unwrap();
        let _kept = incoming.next().await.unwrap().unwrap();
        let mut third = TcpStream::connect(address).await.unwrap();
        let mut byte = [0];
        assert_eq!(third.read(&mut byte).await.unwrap_or(0), 0, "it is closed");
        drop(first);
        let _fourth = TcpStream::connect(address).await.unwrap();
        assert!(incoming.next().await.unwrap().is_ok());
    }
}
