//! What broke a connection.
use std::{
    io,
    pin::Pin,
    sync::{Arc, Mutex, PoisonError},
    task::{Context, Poll},
};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// Why reading failed last, on any connection of one [`Dialer`](crate::Dialer).
#[derive(Debug, Clone, Default)]
pub(crate) struct LastFault(Arc<Mutex<Option<String>>>);

impl LastFault {
    pub(crate) fn get(&self) -> Option<String> {
        let last = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        last.clone()
    }

    fn set(&self, fault: &io::Error) {
        let mut last = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        *last = Some(fault.to_string());
    }
}

/// A stream that keeps the reason why it could not be read.
///
/// If a service refuses a client's certificate, the TLS alert comes while the first request is on
/// its way. HTTP/2 then ends the connection for the alert's sake, but the request may be told only
/// that the connection closed. Without the reason kept here nothing would say that a certificate
/// is required.
pub(crate) struct Noted<S> {
    stream: S,
    fault: LastFault,
}

impl<S> Noted<S> {
    pub(crate) fn new(stream: S, fault: LastFault) -> Self {
        Self { stream, fault }
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Noted<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let read = Pin::new(&mut self.stream).poll_read(context, buffer);
        if let Poll::Ready(Err(fault)) = &read {
            self.fault.set(fault);
        }
        read
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Noted<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(context, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(context, bytes)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}
