//! `superbatch top`: watches a live service in a terminal.
mod page;

use self::page::{Metrics, view};
use super::service::{Client, answered, client};
use crate::error::{Error, Result};
use clap::Args;
use std::{
    io::IsTerminal,
    path::PathBuf,
    time::{Duration, Instant},
};
use superbatch_proto::v1::{ListRunsRequest, Reason, RunSummary};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};
use tonic::transport::Uri;

/// Longest wait for an answer.
const PATIENCE: Duration = Duration::from_secs(10);
/// Largest page of metrics that is read.
const PAGE_BYTES_MAX: u64 = 16 << 20;

/// Shows the runs, how fast they go, where time goes, and the workers.
#[derive(Args)]
pub struct TopArgs {
    /// The coordinator
    #[arg(long, value_name = "URI", default_value = "http://127.0.0.1:50051")]
    address: String,
    /// Its metrics
    #[arg(
        long,
        value_name = "URI",
        default_value = "http://127.0.0.1:9464/metrics"
    )]
    metrics: String,
    /// Refresh interval; rates are those of one interval
    #[arg(long, value_name = "TIME", default_value = "2s",
        value_parser = humantime::parse_duration)]
    every: Duration,
    /// Print one view and end
    #[arg(long)]
    once: bool,
    /// Certificate authority that verifies an https:// address
    #[arg(long, value_name = "FILE")]
    ca: Option<PathBuf>,
    /// File that holds a token of scope `read`
    #[arg(long, value_name = "FILE")]
    token_file: Option<PathBuf>,
}

/// The values seen at one time.
struct Look {
    at: Instant,
    runs: Vec<RunSummary>,
    metrics: Metrics,
}

/// # Errors
/// `NoWorkers` if the service or its metrics do not answer; the service's refusals.
pub async fn run(args: &TopArgs) -> Result<String> {
    let (ca, token_file) = (args.ca.as_deref(), args.token_file.as_deref());
    let mut client = client(&args.address, ca, token_file)?;
    let mut before = ask_service(&mut client, &args.metrics).await?;
    let clears = std::io::stdout().is_terminal();
    loop {
        tokio::time::sleep(args.every).await;
        let now = ask_service(&mut client, &args.metrics).await?;
        let seconds = now.at.duration_since(before.at).as_secs_f64();
        let was = (before.runs.as_slice(), &before.metrics);
        let text = view(was, (now.runs.as_slice(), &now.metrics), seconds);
        if args.once {
            return Ok(text);
        }
        // Clears the screen and moves to its top.
        let start = if clears { "\u{1b}[2J\u{1b}[H" } else { "" };
        super::print(&format!("{start}{text}"))
            .map_err(|e| Error::internal("cannot write to standard output").because(e))?;
        before = now;
    }
}

async fn ask_service(client: &mut Client, metrics: &str) -> Result<Look> {
    let listed = answered(PATIENCE, client.list_runs(ListRunsRequest {})).await?;
    let page = tokio::time::timeout(PATIENCE, get(metrics)).await;
    let page = page.map_err(|_| Error::new(Reason::NoWorkers, "the metrics do not answer"))??;
    Ok(Look {
        at: Instant::now(),
        runs: listed.runs,
        metrics: Metrics::parse(&page),
    })
}

/// Reads a page over plain HTTP.
async fn get(uri: &str) -> Result<String> {
    let malformed = || Error::invalid("metrics", format!("{uri} is no http://host:port/metrics"));
    let parsed: Uri = uri.parse().map_err(|_| malformed())?;
    let host = parsed.host().ok_or_else(malformed)?;
    let bare = host.trim_start_matches('[').trim_end_matches(']');
    let port = parsed.port_u16().unwrap_or(80);
    let asked = async {
        let mut stream = TcpStream::connect((bare, port)).await?;
        let request = format!("GET {} HTTP/1.0\r\nHost: {host}\r\n\r\n", parsed.path());
        stream.write_all(request.as_bytes()).await?;
        let mut answer = String::new();
        stream
            .take(PAGE_BYTES_MAX)
            .read_to_string(&mut answer)
            .await?;
        Ok::<_, std::io::Error>(answer)
    };
    let answer = asked
        .await
        .map_err(|e| Error::new(Reason::NoWorkers, format!("cannot read {uri}")).because(e))?;
    let (head, body) = answer.split_once("\r\n\r\n").unwrap_or((&answer, ""));
    if head.split(' ').nth(1) != Some("200") {
        let status = head.lines().next().unwrap_or_default();
        return Err(Error::new(
            Reason::NoWorkers,
            format!("{uri} answers {status:?}"),
        ));
    }
    Ok(body.to_owned())
}
