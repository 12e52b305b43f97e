//! `superbatch weights`: the published weights of a run, and going back to an older version.
use super::{
    service::{answered, client},
    table::table,
};
use crate::error::Result;
use clap::{Args, Subcommand};
use std::{path::PathBuf, time::Duration};
use superbatch_proto::{
    reflect::Word,
    v1::{KeptWeights, ListWeightsRequest, RollBackWeightsRequest},
};

/// Longest wait for an answer. A roll-back writes to storage, which may take some tries.
const PATIENCE: Duration = Duration::from_secs(90);

/// Calls the coordinator, which must run.
#[derive(Args)]
pub struct WeightsArgs {
    /// Id of the run, as `superbatch runs` lists it
    run: String,
    #[command(subcommand)]
    command: Command,
    /// The coordinator
    #[arg(
        long,
        value_name = "URI",
        default_value = "http://127.0.0.1:50051",
        global = true
    )]
    address: String,
    /// Certificate authority that verifies an https:// address
    #[arg(long, value_name = "FILE", global = true)]
    ca: Option<PathBuf>,
    /// File that holds a token: of scope `read` for a list, `admin` for a rollback
    #[arg(long, value_name = "FILE", global = true)]
    token_file: Option<PathBuf>,
}

#[derive(Subcommand)]
enum Command {
    /// List the newest versions: step, state, digest, and which version serves in their place
    #[command(after_long_help = "\
Examples:
  superbatch weights my-run list
  # All of them, of a service on another machine
  superbatch weights my-run list --newest 1000 --address https://superbatch:50051 --ca ca.pem \\
      --token-file read.token")]
    List {
        /// Number of versions
        #[arg(long, value_name = "N", default_value_t = 20)]
        newest: u32,
    },
    /// Take back all versions after VERSION, which serves in their place
    ///
    /// Steps that are decided keep their weights; the next ones are scored with VERSION, in mode
    /// `stale`, until pushes that come later are due. The trainer's own weights are not touched.
    #[command(after_long_help = "\
Examples:
  # Which versions there are, then back to 41
  superbatch weights my-run list
  superbatch weights my-run rollback 41")]
    Rollback {
        /// As `list` shows it; its weights must still be kept
        #[arg(value_name = "VERSION")]
        to: u64,
    },
}

/// # Errors
/// `NoWorkers` if the service does not answer; the service's refusals.
pub async fn run(args: &WeightsArgs) -> Result<String> {
    let (ca, token_file) = (args.ca.as_deref(), args.token_file.as_deref());
    let mut client = client(&args.address, ca, token_file)?;
    let run_id = args.run.clone();
    match args.command {
        Command::List { newest } => {
            let request = ListWeightsRequest { run_id, newest };
            let listed = answered(PATIENCE, client.list_weights(request)).await?;
            Ok(shown(&listed.versions))
        }
        Command::Rollback { to: version } => {
            let request = RollBackWeightsRequest { run_id, version };
            let done = answered(PATIENCE, client.roll_back_weights(request)).await?;
            let through = done.taken_back_through;
            let step = done.version.unwrap_or_default().step;
            Ok(format!(
                "version {version} (step {step}) serves in place of those up to {through}\n"
            ))
        }
    }
}

fn shown(versions: &[KeptWeights]) -> String {
    if versions.is_empty() {
        return "no weights were pushed\n".to_owned();
    }
    let columns = [
        "version",
        "generation",
        "step",
        "state",
        "replaced_by",
        "digest",
        "push",
    ];
    let mut rows = vec![columns.map(str::to_owned).to_vec()];
    for kept in versions {
        let version = kept.version.clone().unwrap_or_default();
        rows.push(vec![
            version.version.to_string(),
            version.generation.to_string(),
            version.step.to_string(),
            kept.state().word(),
            kept.replaced_by
                .map_or_else(|| "-".to_owned(), |by| by.to_string()),
            version.digest.chars().take(16).collect(),
            kept.push_id.clone(),
        ]);
    }
    table(&rows)
}
