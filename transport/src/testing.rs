//! For tests of how connections are set up; no part of the service.
use crate::Dialer;
use std::io;
use tokio::{io::AsyncReadExt, net::TcpListener};
use tonic::transport::Endpoint;

/// Returns the largest frame that a connection set up by `tune` accepts, as it says in the SETTINGS
/// with which HTTP/2 begins; `None` if they do not say.
///
/// # Errors
/// If the connection fails, or does not begin as HTTP/2 does.
pub async fn frame_bytes_max(tune: impl FnOnce(Endpoint) -> Endpoint) -> io::Result<Option<u32>> {
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    let uri = format!("http://{}", listener.local_addr()?);
    let dialer = Dialer::default();
    let connected = async { dialer.connect(&uri, tune).await.map_err(io::Error::other) };
    let (_channel, settings) = tokio::try_join!(connected, settings_of(listener))?;
    let size = settings
        .chunks_exact(6)
        .find(|setting| setting[..2] == [0, 5]);
    Ok(size
        .and_then(|setting| setting[2..].try_into().ok())
        .map(u32::from_be_bytes))
}

/// Reads the SETTINGS of the next connection.
async fn settings_of(listener: TcpListener) -> io::Result<Vec<u8>> {
    let (mut socket, _) = listener.accept().await?;
    // 24 bytes of preface, and 9 of the frame's head: its length, and 4 for SETTINGS.
    let mut head = [0; 24 + 9];
    socket.read_exact(&mut head).await?;
    if head[27] != 4 {
        return Err(io::Error::other(format!("no SETTINGS: {head:?}")));
    }
    let length = u32::from_be_bytes([0, head[24], head[25], head[26]]);
    let mut settings = vec![0; length as usize];
    socket.read_exact(&mut settings).await?;
    Ok(settings)
}
