//! Plain gRPC streams by tonic over loopback, beside which `make bench-service` puts the service:
//! the same bytes from memory to memory, with no reading, no checks, and nothing kept.
//!
//!     plain
//!
//! For each line `send COUNT` or `take COUNT` on standard input it moves so many parts of 1 MiB
//! from the server to the client, or from the client to the server, and answers with the bytes that
//! arrived. Both ends are in this process, so its processor time is that of both.
use bytes::Bytes;
use futures::{
    StreamExt,
    stream::{self, BoxStream},
};
use std::{error::Error, io::BufRead};
use superbatch_client::v1::{
    EmbeddingPart, FetchRowsRequest, FetchRowsResponse, PrepareModelRequest, PrepareModelResponse,
    ScoreRequest, ScoreResponse, SelectRequest, SelectResponse,
    fetch_rows_response::Message as Sent,
    select_request::Message as Taken,
    worker_service_client::WorkerServiceClient,
    worker_service_server::{WorkerService, WorkerServiceServer},
};
use superbatch_proto::{PART_BYTES, http2};
use tokio::{net::TcpListener, runtime::Runtime};
use tokio_stream::wrappers::TcpListenerStream;
use tonic::{
    Request, Response, Status, Streaming,
    transport::{Channel, Endpoint, Server},
};

type Result<T> = std::result::Result<T, Box<dyn Error + Send + Sync>>;
type Answer<T> = std::result::Result<Response<T>, Status>;
type Answers<T> = BoxStream<'static, std::result::Result<T, Status>>;

/// Two calls of a worker that carry bytes, without a worker behind them.
struct Plain {
    part: Bytes,
}

#[tonic::async_trait]
impl WorkerService for Plain {
    type ScoreStream = Answers<ScoreResponse>;
    type FetchRowsStream = Answers<FetchRowsResponse>;

    async fn prepare_model(&self, _: Request<PrepareModelRequest>) -> Answer<PrepareModelResponse> {
        Err(Status::unimplemented("it moves bytes"))
    }

    async fn score(&self, _: Request<Streaming<ScoreRequest>>) -> Answer<Self::ScoreStream> {
        Err(Status::unimplemented("it moves bytes"))
    }

    async fn fetch_rows(
        &self,
        request: Request<FetchRowsRequest>,
    ) -> Answer<Self::FetchRowsStream> {
        let message = FetchRowsResponse {
            message: Some(Sent::ArrowIpc(self.part.clone())),
        };
        let count = request.into_inner().step as usize;
        let parts = stream::repeat(message).take(count).map(Ok);
        Ok(Response::new(parts.boxed()))
    }

    async fn select(&self, request: Request<Streaming<SelectRequest>>) -> Answer<SelectResponse> {
        let (mut parts, mut bytes) = (request.into_inner(), 0);
        while let Some(part) = parts.message().await? {
            if let Some(Taken::Embedding(part)) = part.message {
                bytes += part.image.len();
            }
        }
        Ok(Response::new(SelectResponse {
            batch_score: bytes as f64,
            ..Default::default()
        }))
    }
}

async fn connect(part: Bytes) -> Result<WorkerServiceClient<Channel>> {
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    let address = listener.local_addr()?;
    let router =
        http2::server(Server::builder()).add_service(WorkerServiceServer::new(Plain { part }));
    tokio::spawn(router.serve_with_incoming(TcpListenerStream::new(listener)));
    let endpoint = Endpoint::from_shared(format!("http://{address}"))?.tcp_nodelay(true);
    let channel = http2::client(endpoint).connect().await?;
    Ok(WorkerServiceClient::new(channel))
}

async fn send(mut client: WorkerServiceClient<Channel>, count: u64) -> Result<u64> {
    let request = FetchRowsRequest {
        step: count,
        ..Default::default()
    };
    let (mut parts, mut bytes) = (client.fetch_rows(request).await?.into_inner(), 0);
    while let Some(part) = parts.message().await? {
        if let Some(Sent::ArrowIpc(part)) = part.message {
            bytes += part.len() as u64;
        }
    }
    Ok(bytes)
}

async fn take(mut client: WorkerServiceClient<Channel>, part: Bytes, count: u64) -> Result<u64> {
    let message = SelectRequest {
        message: Some(Taken::Embedding(EmbeddingPart {
            image: part,
            ..Default::default()
        })),
    };
    let parts = stream::repeat(message).take(count as usize);
    let answer = client.select(parts).await?.into_inner();
    Ok(answer.batch_score as u64)
}

fn main() -> Result<()> {
    let runtime = Runtime::new()?;
    let part = Bytes::from(vec![7; PART_BYTES]);
    let client = runtime.block_on(connect(part.clone()))?;
    for line in std::io::stdin().lock().lines() {
        let line = line?;
        let bytes = match line.split_once(' ') {
            Some(("send", count)) => runtime.block_on(send(client.clone(), count.parse()?))?,
            Some(("take", count)) => {
                runtime.block_on(take(client.clone(), part.clone(), count.parse()?))?
            }
            _ => return Err("usage: lines of send COUNT or take COUNT".into()),
        };
        println!("{bytes}");
    }
    Ok(())
}
