//! `superbatch state`: what a run has left behind, seen from outside.
mod check;
mod compact;
mod shared;

use super::{ConfigArgs, open_state, receipts::unknown};
use crate::{
    config::Config,
    coordinator::{
        facts::run::{self, RunFacts},
        weights::stored::Stored,
    },
    error::{Error, Result},
    storage::Location,
};
use clap::{Args, Subcommand};
use std::time::SystemTime;
use superbatch_proto::v1::Reason;

#[derive(Args)]
pub struct StateArgs {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Read every receipt, push and weights file of a run, and verify what they say of each other
    ///
    /// Weights must have the digest that names them, the data set's manifest likewise; indexes of
    /// its tars, its score columns and its reference embeddings must be whole. Receipts
    /// must be whole, without a gap between the first and the last step that was ever committed,
    /// and name weights that were published. Exits with 1 if something is wrong.
    #[command(after_long_help = "\
Examples:
  superbatch state check my-run
  # A state in object storage, while its service runs or not
  superbatch state check my-run --state s3://bucket/superbatch")]
    Check(OfRun),
    /// Delete what nothing needs any more
    ///
    /// Weights that were uploaded and not published within a day, summaries of pushes that newer
    /// ones replace, and of a run that is closed all weights but the newest. Receipts stay, packed
    /// or not (`compact` packs them), and so does what runs share (`gc-shared`).
    #[command(after_long_help = "\
Examples:
  # What would go, then delete it
  superbatch state gc my-run --dry-run
  superbatch state gc my-run --state s3://bucket/superbatch")]
    Gc(GcArgs),
    /// Delete what is kept of data sets and no run names any more
    ///
    /// Indexes of tars, score columns and reference embeddings that are older than a week and
    /// belong to no data set of a run of this state, open or closed (embeddings: with that run's
    /// reference). They are made from the data, and made anew where they are needed again, which
    /// costs a scoring pass for embeddings. Embeddings that earlier builds wrote stay. If a run
    /// cannot be read, nothing is deleted. A run that is being opened meanwhile may have to make
    /// anew what is deleted.
    #[command(after_long_help = "\
Examples:
  # What would go, then delete it
  superbatch state gc-shared --dry-run
  superbatch state gc-shared --state s3://bucket/superbatch")]
    GcShared(GcSharedArgs),
    /// Pack the receipts of old steps, up to a thousand of them into one Parquet file
    ///
    /// A run of a million steps has a million receipts, each an object. Each pack is read back
    /// before the objects of its receipts are deleted. No receipt is lost, and none changes:
    /// rewind, forks, resume, the run page and all commands read packed ones as before. It may run
    /// beside the service, and be interrupted and run again at any time. Builds that do not know
    /// packs refuse the run from then on. Weights are left alone: `gc` deletes those that nothing
    /// needs. Exits with 1 if receipts could not be packed, and names them.
    #[command(after_long_help = "\
Examples:
  # How many objects and bytes would go, then do it
  superbatch state compact my-run --dry-run
  superbatch state compact my-run
  # A run that goes on: leave its newest 10,000 steps as they are
  superbatch state compact my-run --keep-last 10000 --state s3://bucket/superbatch")]
    Compact(compact::CompactArgs),
}

#[derive(Args)]
struct OfRun {
    /// Id of the run, as `superbatch runs` lists it
    run: String,
    #[command(flatten)]
    settings: ConfigArgs,
}

#[derive(Args)]
struct GcArgs {
    #[command(flatten)]
    of: OfRun,
    /// Say what would be done, and change nothing
    #[arg(long)]
    dry_run: bool,
}

#[derive(Args)]
struct GcSharedArgs {
    #[command(flatten)]
    settings: ConfigArgs,
    /// Say what would be done, and change nothing
    #[arg(long)]
    dry_run: bool,
}

impl StateArgs {
    pub fn settings(&self) -> &ConfigArgs {
        match &self.command {
            Command::Check(of) => &of.settings,
            Command::Gc(args) => &args.of.settings,
            Command::GcShared(args) => &args.settings,
            Command::Compact(args) => &args.common().of.settings,
        }
    }
}

/// # Errors
/// `RunNotFound`; `InvalidArgument` if a check found something wrong, with all of it; those of
/// compaction.
pub async fn run(config: &Config, args: &StateArgs) -> Result<String> {
    let (stores, state) = open_state(config)?;
    match &args.command {
        Command::Check(of) => {
            let (location, facts) = load(&state, &of.run).await?;
            let mut found = check::check(&state, &location, &of.run, &facts).await?;
            shared::check(&stores, &state, &facts, &mut found).await?;
            report_or_fail(found)
        }
        Command::GcShared(args) => shared::gc(&stores, &state, args.dry_run).await,
        Command::Gc(args) => {
            let (location, facts) = load(&state, &args.of.run).await?;
            gc(&location, &facts, args.dry_run).await
        }
        Command::Compact(args) => compact::run(config, &state, args).await,
    }
}

async fn load(state: &Location, id: &str) -> Result<(Location, RunFacts)> {
    let location = state.below(&format!("runs/{id}"));
    match run::load(&location).await? {
        Some(facts) => Ok((location, facts)),
        None => Err(unknown(state, id).await?),
    }
}

fn report_or_fail(found: check::CheckResult) -> Result<String> {
    let check::CheckResult {
        receipts,
        packs,
        pushes,
        weights,
        has_manifest: _,
        problems,
    } = found;
    let packed = match packs.len() {
        0 => String::new(),
        files => format!(" ({} of them in {files} packs)", packs.iter().sum::<u64>()),
    };
    let looked_at =
        format!("{receipts} receipts{packed}, {pushes} pushes, {weights} weights files");
    if problems.count == 0 {
        return Ok(format!("ok: {looked_at}\n"));
    }
    let mut lines: Vec<String> = problems.first.into_iter().collect();
    let beyond = problems.count - lines.len();
    if beyond > 0 {
        lines.push(format!("and {beyond} more"));
    }
    let message = format!("of {looked_at}:\n{}", lines.join("\n"));
    Err(Error::new(Reason::InvalidArgument, message))
}

async fn gc(run: &Location, facts: &RunFacts, dry_run: bool) -> Result<String> {
    let stored = Stored::read(run).await?;
    let keys = stored.unneeded(facts.closed, SystemTime::now());
    let mut bytes = 0;
    for key in &keys {
        bytes += run.head(key).await?.map_or(0, |meta| meta.size);
        if !dry_run {
            run.delete(key).await?;
        }
    }
    let verb = if dry_run { "would delete" } else { "deleted" };
    let mut text: String = keys
        .iter()
        .map(|key| format!("{}\n", run.uri_of(key)))
        .collect();
    text.push_str(&format!("{verb} {} objects, {bytes} bytes\n", keys.len()));
    Ok(text)
}
