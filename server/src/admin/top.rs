//! `superbatch top`: watches a live service in a terminal.
mod metrics;
mod page;

use self::{
    metrics::{Metrics, Page},
    page::{Seen, view},
};
use super::service::{Client, answered, bearer, client_with, header};
use crate::error::{Error, Result};
use clap::Args;
use std::{
    io::IsTerminal,
    path::PathBuf,
    time::{Duration, Instant},
};
use superbatch_proto::v1::{ListRunsRequest, Reason, RunSummary};
use superbatch_transport::Bearer;

/// Longest wait for an answer.
const PATIENCE: Duration = Duration::from_secs(10);

/// Shows the runs, how fast they go, where time goes, and how many workers there are.
#[derive(Args)]
pub struct TopArgs {
    /// The coordinator
    #[arg(long, value_name = "URI", default_value = "http://127.0.0.1:50051")]
    address: String,
    /// Its metrics. Given again, those of its workers: the coordinator does not know how their time
    /// goes, so without them only the stages of its own process are shown
    #[arg(
        long,
        value_name = "URI",
        default_value = "http://127.0.0.1:9464/metrics"
    )]
    metrics: Vec<String>,
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
    /// File that holds a token of scope `read`; `admin` where `auth.metrics` is set
    #[arg(long, value_name = "FILE")]
    token_file: Option<PathBuf>,
    /// Send the token to the metrics of other machines too. Metrics are plain HTTP, so that
    /// everybody between could read it
    #[arg(long)]
    allow_insecure: bool,
}

/// The service that is watched.
struct Watched {
    client: Client,
    bearer: Bearer,
    /// The coordinator's, then the workers'.
    pages: Vec<Page>,
    allow_insecure: bool,
}

/// The values seen at one time.
struct Look {
    at: Instant,
    runs: Vec<RunSummary>,
    /// Empty ones of workers that did not answer, as `silent` says.
    pages: Vec<Metrics>,
    silent: Vec<String>,
}

/// # Errors
/// `NoWorkers` if the service or its metrics do not answer; the service's refusals.
pub async fn run(args: &TopArgs) -> Result<String> {
    let bearer = bearer(args.token_file.as_deref())?;
    let pages = args.metrics.iter().map(|uri| Page::parse(uri));
    let mut watched = Watched {
        client: client_with(&args.address, args.ca.as_deref(), bearer.clone())?,
        bearer,
        pages: pages.collect::<Result<_>>()?,
        allow_insecure: args.allow_insecure,
    };
    let mut before = watched.look().await?;
    let clears = std::io::stdout().is_terminal();
    loop {
        tokio::time::sleep(args.every).await;
        let now = watched.look().await?;
        let seconds = now.at.duration_since(before.at).as_secs_f64();
        let mut text = view(before.seen(), now.seen(), seconds);
        for error in &now.silent {
            text.push_str(&format!("\nnot shown: {error}\n"));
        }
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

impl Watched {
    async fn look(&mut self) -> Result<Look> {
        let runs = answered(PATIENCE, self.client.list_runs(ListRunsRequest {})).await?;
        let (header, allow_insecure) = (header(&self.bearer), self.allow_insecure);
        let header = header.as_deref();
        let asked = self.pages.iter().map(|page| async move {
            let read = page.read(header, allow_insecure);
            let late = || {
                let message = format!("{} does not answer", page.uri);
                Error::new(Reason::NoWorkers, message)
            };
            let read = tokio::time::timeout(PATIENCE, read).await;
            read.unwrap_or_else(|_| Err(late()))
        });
        let (mut pages, mut silent) = (Vec::new(), Vec::new());
        for read in futures::future::join_all(asked).await {
            match read {
                Ok(page) => pages.push(Metrics::parse(&page)),
                // Without the coordinator's there is nothing to show. Workers come and go.
                Err(error) if pages.is_empty() => return Err(error),
                Err(error) => {
                    pages.push(Metrics::default());
                    silent.push(error.chain());
                }
            }
        }
        Ok(Look {
            at: Instant::now(),
            runs: runs.runs,
            pages,
            silent,
        })
    }
}

impl Look {
    fn seen(&self) -> Seen<'_> {
        Seen {
            runs: &self.runs,
            pages: &self.pages,
        }
    }
}
