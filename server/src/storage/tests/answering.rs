//! A store that gives every request the same answer, for tests.
use crate::storage::{Location, StorageConfig, Stores};
use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpListener,
};

/// Starts a server that answers with `status` and `body`. Returns its address, and the count of the
/// requests.
pub(in crate::storage) async fn server(
    status: &'static str,
    body: &'static str,
) -> (String, Arc<AtomicUsize>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = format!("http://{}", listener.local_addr().unwrap());
    let asked = Arc::new(AtomicUsize::new(0));
    let count = asked.clone();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let mut head = Vec::new();
            while !head.windows(4).any(|end| end == b"\r\n\r\n") {
                if stream.read_buf(&mut head).await.is_ok_and(|read| read == 0) {
                    break;
                }
            }
            count.fetch_add(1, Ordering::Relaxed);
            let length = body.len();
            let answer = format!(
                "HTTP/1.1 {status}\r\ncontent-length: {length}\r\nconnection: close\r\n\r\n{body}"
            );
            drop(stream.write_all(answer.as_bytes()).await);
            drop(stream.shutdown().await);
            // Closing with bytes unread would reset the connection, and the answer with it.
            drop(stream.read_to_end(&mut head).await);
        }
    });
    (address, asked)
}

/// Opens `uri` at such a server. `options` are those of the store; `{}` in them is the server's
/// address.
pub(in crate::storage) async fn answering(
    uri: &str,
    options: &[(&str, &str)],
    status: &'static str,
    body: &'static str,
) -> (Location, Arc<AtomicUsize>) {
    let (address, asked) = server(status, body).await;
    let options = options
        .iter()
        .map(|(name, value)| ((*name).to_owned(), value.replace("{}", &address)))
        .collect();
    let config = StorageConfig {
        options,
        ..StorageConfig::default()
    };
    (Stores::new(config).open(uri).unwrap(), asked)
}
