//! The `superbatch` binary: a table of contents.
use clap::{Parser, Subcommand};
use std::{process::ExitCode, time::Duration};
use superbatch_proto::reason_name;
use superbatch_server::{
    admin::{
        self, CheckArgs, PageArgs, ServeArgs, WorkerArgs,
        ending::{REST_MAX, RUNTIME_MAX, end_within, terminated},
    },
    app::{RunPage, Serve, Work, replayer, start_traces},
    config::Config,
    error::{Error, Result},
};

/// Online data selection for contrastive training: scans super-batches of image-text pairs, picks
/// the jointly most learnable sub-batch (JEST), and streams it to your trainer.
///
/// Start with `superbatch serve`: it needs no file, no GPU and no other service. Then point a
/// trainer at it: superbatch.connect("http://127.0.0.1:50051") in Python. `superbatch receipts RUN`
/// shows why each batch was chosen.
#[derive(Parser)]
#[command(name = "superbatch", version, propagate_version = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Serve trainers: coordinator and, by default, a scoring worker in one process.
    ///
    /// Prints its address once it is ready. On Ctrl-C or SIGTERM it lets calls finish and stops.
    /// Everything that was chosen, pushed and committed is in the state, and a new start continues
    /// from there.
    #[command(after_long_help = "\
Examples:
  # Everything on this machine, state in ./superbatch-state
  superbatch serve
  # State in object storage, as workers on other machines need it
  superbatch serve --state s3://bucket/superbatch
  # Settings of your own
  superbatch check-config --defaults > superbatch.yaml
  superbatch serve --config superbatch.yaml")]
    Serve(ServeArgs),
    /// Add a scoring worker to a coordinator, on this machine or another.
    ///
    /// It needs the coordinator's state and data at the same URIs: object storage, or a folder that
    /// both mount. Super-batches are shared among all workers; the choice does not depend on their
    /// number. On Ctrl-C or SIGTERM it lets slices finish.
    #[command(after_long_help = "\
Examples:
  # A second worker on the coordinator's machine
  superbatch worker
  # One on another machine; to listen there, its settings name a certificate (docs/security.md)
  superbatch worker --config worker.yaml --coordinator https://superbatch-0:50051 \\
      --state s3://bucket/superbatch --listen 10.0.0.7:50052")]
    Worker(WorkerArgs),
    /// Check settings, and print them with all defaults filled in.
    ///
    /// Prints `# ok` and exits with 0, or names the first setting that cannot work and exits with
    /// 1. It opens no connection.
    #[command(after_long_help = "\
Examples:
  # Every setting with its default
  superbatch check-config --defaults > superbatch.yaml
  # What a service with this file would run with
  superbatch check-config --config superbatch.yaml")]
    CheckConfig(CheckArgs),
    /// Index a data set ahead of its run: reads the files' footers and writes a dataset manifest.
    ///
    /// A run indexes its sources by itself when it is opened. Index ahead if that takes long, or to
    /// see what is found.
    #[command(after_long_help = "\
Examples:
  superbatch index file:///data/laion
  # Quote braces and stars, or the shell expands them
  superbatch index 's3://bucket/laion/{00000..00041}.parquet' --state s3://bucket/superbatch
  superbatch index file:///data/train --image-column photo --caption-column alt_text")]
    Index(admin::index::IndexArgs),
    /// Embed data sets ahead of their runs, and write the embeddings for others.
    ///
    /// Goes on where it was left; `superbatch serve` need not run.
    #[command(after_long_help = "\
Examples:
  # A run of this data and this reference on the same state then embeds nothing with the reference
  superbatch embed --model /models/reference --sources file:///data/pool \\
      --state s3://bucket/superbatch
  # For runs that score at 128 pixels, and as Parquet files
  superbatch embed --model /models/reference --sources file:///data/pool --resolution 128 \\
      --out embeddings")]
    #[cfg(feature = "torch")]
    Embed(admin::embed::EmbedArgs),
    /// What the service reads in a model folder, or why it refuses it.
    ///
    /// Family, towers, preprocessing, tokenizer, weights (names, shapes, finite numbers, a canary
    /// batch), memory, and what a pair costs at full and at smaller resolutions.
    #[command(after_long_help = "\
Examples:
  superbatch inspect /models/learner
  # For programs
  superbatch inspect s3://bucket/models/siglip --json | jq .fidelities")]
    #[cfg(feature = "torch")]
    Inspect(admin::inspect::InspectArgs),
    /// List the runs in the state, with how far each has come.
    ///
    /// Reads the state directly, so it works while the service is down.
    #[command(after_long_help = "\
Examples:
  superbatch runs
  # For programs, from object storage
  superbatch runs --state s3://bucket/superbatch --json | jq .")]
    Runs(admin::runs::RunsArgs),
    /// Why was this batch chosen? Show receipts of a run.
    ///
    /// Reads the state directly, so it works while the service is down. Without --step it lists the
    /// newest steps: the policy that drew the step, its mode (normal, or what it fell back to), the
    /// weights version that it was scored with and its lag in steps, rows scanned and chosen, holes
    /// (rows that could not be used), and the mean conditional score per example.
    #[command(after_long_help = "\
Examples:
  # The newest 20 steps, a line each
  superbatch receipts my-run
  # Every row of step 100 with its score, in the order drawn
  superbatch receipts my-run --step 100
  # For programs
  superbatch receipts my-run --last 1000 --json | jq .summary.batch_score")]
    Receipts(admin::receipts::ReceiptsArgs),
    /// What would another policy have drawn? Draw a step of the past again, offline.
    ///
    /// Prints the redrawn rows beside those that were chosen: how many are the same, and the batch
    /// scores of both by one criterion, with a uniform draw's. Without options it draws as the step
    /// was drawn, and finds the same rows. It reads the state, so it works while the service is
    /// down; the learner's embeddings are made again from the step's weights, which a service keeps
    /// for the newest versions of a run (`coordinator.snapshots_kept`).
    #[command(after_long_help = "\
Examples:
  # The step's own settings: the same rows, if data, models and arithmetic are what they were
  superbatch replay my-run --step 100
  # An ablation of one step
  superbatch replay my-run --step 100 --policy independent
  superbatch replay my-run --step 100 --filter-ratio 0.9 --n-chunks 4 --duplicates-above 0.95
  # For programs
  superbatch replay my-run --step 100 --policy uniform --json | jq .measured")]
    Replay(admin::replay::ReplayArgs),
    /// Check that a run's state is whole, pack its receipts, and delete what nothing needs.
    ///
    /// Reads the state directly, so it works while the service is down and while it runs.
    #[command(after_long_help = "\
Examples:
  # Every receipt, push and weights file of a run; exits with 1 where something is wrong
  superbatch state check my-run --state s3://bucket/superbatch
  # What gc would delete, then delete it
  superbatch state gc my-run --dry-run
  superbatch state gc my-run
  # The receipts of a run of a million steps, as a thousand files
  superbatch state compact my-run --dry-run
  superbatch state compact my-run")]
    State(admin::state::StateArgs),
    /// List the published weights of a run, and go back to an older version.
    #[command(after_long_help = "\
Examples:
  superbatch weights my-run list
  # The trainer pushed bad weights: the next steps are scored with version 41
  superbatch weights my-run rollback 41 --address https://superbatch:50051 --ca ca.pem \\
      --token-file admin.token")]
    Weights(admin::weights::WeightsArgs),
    /// Serve the run page: every run in the state, its steps, and what was chosen and passed over.
    ///
    /// `superbatch serve` serves it too. This command needs no service: it reads the state of any
    /// run, finished or crashed, and changes none. It also draws steps again under another policy,
    /// as `superbatch replay` does. Prints its address once it is ready.
    #[command(after_long_help = "\
Examples:
  # The state in ./superbatch-state
  superbatch page
  # A state in object storage, while a service runs on this machine
  superbatch page --state s3://bucket/superbatch --listen 127.0.0.1:0")]
    Page(PageArgs),
    // Its comment is that of its arguments.
    Select(admin::select::SelectArgs),
    /// Make, list and revoke the tokens that trainers, operators and workers show.
    ///
    /// A token is printed once; the file holds its SHA-256. A service reads the file again when it
    /// changes.
    #[command(after_long_help = "\
Examples:
  superbatch token new trainer --file tokens.yaml --runs 'team-a-*' --expires 90d
  superbatch token new worker --scopes worker --file tokens.yaml
  superbatch token list --file tokens.yaml
  superbatch token revoke trainer --file tokens.yaml")]
    Token(admin::token::TokenArgs),
    /// Try everything that a service with these settings needs, and say what to do if something is
    /// wrong.
    ///
    /// Ports, certificates, tokens, the state's conditional create, the clock, the device, and data
    /// and models by URI; with `--role worker` the coordinator too, and whether it takes the
    /// worker's token. Exits with 1 if a check fails.
    #[command(after_long_help = "\
Examples:
  superbatch doctor --config superbatch.yaml
  superbatch doctor --state s3://bucket/superbatch --source s3://bucket/data \\
    --model s3://bucket/models/siglip
  # On a worker's machine, before `superbatch worker`
  superbatch doctor --config worker.yaml --role worker")]
    Doctor(admin::doctor::DoctorArgs),
    /// Watch a live service: runs, steps a second, waits, where time goes, workers.
    #[command(after_long_help = "\
Examples:
  superbatch top
  # With two workers of their own (their `worker_role.metrics_listen`)
  superbatch top --metrics http://127.0.0.1:9464/metrics --metrics http://10.0.0.7:9464/metrics \\
      --metrics http://10.0.0.8:9464/metrics
  # A service with tokens, on its machine; where `auth.metrics` is set, a token of scope `admin`
  superbatch top --address https://superbatch.example:50051 --ca ca.pem --token-file admin.token
  # One view, for a log
  superbatch top --once")]
    Top(admin::top::TopArgs),
    /// Ask a service whether it serves: a probe for containers without a shell.
    #[command(after_long_help = "\
Examples:
  superbatch health --config superbatch.yaml
  superbatch health --address http://127.0.0.1:50053 --service liveness")]
    Health(admin::health::HealthArgs),
    /// Write the generated reference pages into a folder.
    #[command(hide = true)]
    Docs(admin::docs::DocsArgs),
}

fn main() -> ExitCode {
    let done = run(Cli::parse().command).and_then(|output| {
        admin::print(&output)
            .map_err(|e| Error::internal("cannot write to standard output").because(e))
    });
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("superbatch: {}", error.chain());
            let entry = reason_name(error.reason()).to_lowercase();
            eprintln!("  causes and remedies: docs/errors.md#{entry}");
            ExitCode::FAILURE
        }
    }
}

/// Runs the command. Returns the text to print at its end.
fn run(command: Command) -> Result<String> {
    match command {
        Command::Serve(args) => traced("superbatch-coordinator", args.load()?, async |config| {
            let grace = config.coordinator.grace();
            let serve = Serve::build(config).await?;
            admin::announce("serving", &serve.uri(), serve.metrics_address());
            serve.page_uri().into_iter().for_each(admin::announce_page);
            let served = serve.run(terminated(grace)).await;
            served.map(|()| String::new())
        }),
        Command::Worker(args) => traced("superbatch-worker", args.load()?, async |config| {
            let grace = config.coordinator.grace();
            let work = Work::build(config).await?;
            admin::announce("working", &work.uri(), work.metrics_address());
            let worked = work.run(terminated(grace)).await;
            worked.map(|()| String::new())
        }),
        Command::Page(args) => with_runtime(args.load()?, async |config| {
            let page = RunPage::build(&config).await?;
            admin::announce_page(page.uri());
            tokio::select! {
                () = page.run() => {}
                () = terminated(Duration::ZERO) => {}
            }
            Ok(String::new())
        }),
        Command::CheckConfig(args) => admin::check_config(&args),
        Command::Index(args) => with_runtime(args.settings.load()?, async |config| {
            let (stores, state) = admin::open_state(&config)?;
            admin::index::run(&stores, &state, &args).await
        }),
        #[cfg(feature = "torch")]
        Command::Embed(args) => with_runtime(args.settings.load()?, async |config| {
            admin::embed::run(&config, &args).await
        }),
        #[cfg(feature = "torch")]
        Command::Inspect(args) => with_runtime(args.settings.load()?, async |config| {
            admin::inspect::run(&config, &args).await
        }),
        Command::Runs(args) => with_runtime(args.settings.load()?, async |config| {
            admin::runs::run(&config, &args).await
        }),
        Command::Receipts(args) => with_runtime(args.settings.load()?, async |config| {
            admin::receipts::run(&config, &args).await
        }),
        Command::Replay(args) => with_runtime(args.settings.load()?, async |config| {
            let (stores, state) = admin::open_state(&config)?;
            let replayer = replayer(&config, &stores, &state)?;
            admin::replay::run(&state, &replayer, &args).await
        }),
        Command::State(args) => with_runtime(args.settings().load()?, async |config| {
            admin::state::run(&config, &args).await
        }),
        Command::Select(args) => admin::select::run(&args).map(|line| line + "\n"),
        Command::Token(args) => admin::token::run(&args),
        Command::Doctor(args) => with_runtime(args.settings.load()?, async |config| {
            admin::doctor::run(&config, &args).await
        }),
        Command::Weights(args) => plain(admin::weights::run(&args)),
        Command::Top(args) => plain(admin::top::run(&args)),
        Command::Health(args) => plain(admin::health::run(&args)),
        Command::Docs(args) => admin::docs::run(&args),
    }
}

/// Runs work that needs a runtime but no settings.
fn plain(work: impl Future<Output = Result<String>>) -> Result<String> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build();
    let runtime = runtime.map_err(|e| Error::internal("cannot start the runtime").because(e))?;
    runtime.block_on(work)
}

fn with_runtime(
    config: Config,
    work: impl AsyncFnOnce(Config) -> Result<String>,
) -> Result<String> {
    on_runtime(None, config, work)
}

/// As [`with_runtime`], for a service whose part in steps is traced under the name `process`.
fn traced(
    process: &'static str,
    config: Config,
    work: impl AsyncFnOnce(Config) -> Result<String>,
) -> Result<String> {
    on_runtime(Some(process), config, work)
}

fn on_runtime(
    traced: Option<&'static str>,
    config: Config,
    work: impl AsyncFnOnce(Config) -> Result<String>,
) -> Result<String> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        // In a build without optimisation the nested futures of one slice need more stack than the
        // default of 2 MiB.
        .thread_stack_size(8 << 20)
        .build();
    let runtime = runtime.map_err(|e| Error::internal("cannot start the runtime").because(e))?;
    let traces = traced.map(|process| runtime.block_on(async { start_traces(&config, process) }));
    let traces = traces.transpose()?.flatten();
    admin::start_logging(&config.log, traces.as_ref())?;
    let done = runtime.block_on(work(config));
    if traced.is_some() {
        // A worker that its coordinator refuses ends without being asked to.
        end_within(REST_MAX);
    }
    // The last spans are sent by the runtime.
    if let Some(traces) = traces {
        traces.stop();
    }
    runtime.shutdown_timeout(RUNTIME_MAX);
    done
}
