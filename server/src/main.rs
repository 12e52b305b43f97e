//! The `superbatch` binary: a table of contents.
use clap::{Parser, Subcommand};
use std::process::ExitCode;
use superbatch_server::{
    admin::{self, Common},
    app::{Serve, Work},
    error::Result,
};

/// Online data selection for contrastive training: scans super-batches of image-text pairs, picks the jointly most learnable
/// sub-batch (JEST), and streams it to your trainer.
///
/// Start with `superbatch serve`: it needs no file, no GPU and no other service. Then point a trainer at it:
/// superbatch.connect("http://127.0.0.1:50051") in Python.
#[derive(Parser)]
#[command(name = "superbatch", version, propagate_version = true)]
struct Cli {
    #[command(flatten)]
    common: Common,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Serve trainers: coordinator and, by default, a scoring worker in one process.
    Serve,
    /// Add a scoring worker to a coordinator, on this machine or another. It needs the same `state`.
    Worker,
    /// Check a config file, and print it with all defaults filled in.
    CheckConfig,
    /// Index a data set ahead of OpenRun: reads the files' footers and writes a dataset manifest.
    Index(admin::index::IndexArgs),
    /// List the runs in the state.
    Runs(admin::runs::RunsArgs),
    /// Why was this batch chosen? Show receipts of a run.
    Receipts(admin::receipts::ReceiptsArgs),
    /// Select from a file of embeddings, without a service: the same code, for offline use and experiments.
    Select(admin::select::SelectArgs),
    /// Write the generated reference pages into a folder.
    #[command(hide = true)]
    Docs(admin::docs::DocsArgs),
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    match run(cli) {
        Ok(output) => {
            print!("{output}");
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("superbatch: {}", error.chain());
            ExitCode::FAILURE
        }
    }
}

fn run(cli: Cli) -> Result<String> {
    if let Command::Select(args) = &cli.command {
        return admin::select::run(args).map(|line| line + "\n");
    }
    if let Command::Docs(args) = &cli.command {
        return admin::docs::run(args);
    }
    let config = cli.common.load()?;
    if matches!(cli.command, Command::CheckConfig) {
        return admin::check_config(&config);
    }
    admin::start_logging(&config.log)?;
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build();
    let runtime =
        runtime.map_err(|e| superbatch_server::error::Error::internal("cannot start the runtime").because(e))?;
    let result = runtime.block_on(async {
        match cli.command {
            Command::Serve => {
                let serve = Serve::build(config).await?;
                admin::announce("serving", serve.address(), serve.metrics_address());
                serve.run(admin::terminated()).await.map(|()| String::new())
            }
            Command::Worker => {
                let work = Work::build(config).await?;
                admin::announce("working", work.address(), work.metrics_address());
                work.run(admin::terminated()).await.map(|()| String::new())
            }
            Command::Index(args) => {
                let (stores, state) = admin::open_state(&config)?;
                admin::index::run(&stores, &state, &args).await
            }
            Command::Runs(args) => admin::runs::run(&config, &args).await,
            Command::Receipts(args) => admin::receipts::run(&config, &args).await,
            Command::CheckConfig | Command::Select(_) | Command::Docs(_) => Ok(String::new()),
        }
    });
    runtime.shutdown_timeout(std::time::Duration::from_secs(2));
    result
}
