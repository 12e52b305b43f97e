//! `superbatch runs`: lists the runs in the state.
use super::{ConfigArgs, open_state, table::table};
use crate::{
    config::Config,
    coordinator::{
        facts::run,
        runs::{fork, progress::progress, registry::stored_state},
    },
    error::Result,
    storage::Location,
};
use clap::Args;
use serde_json::{Value, json};
use superbatch_proto::reflect::Word;

/// Reads the state directly, so it works while the service is down.
#[derive(Args)]
pub struct RunsArgs {
    #[command(flatten)]
    pub settings: ConfigArgs,
    /// Print one JSON object a run instead of a table
    #[arg(long)]
    json: bool,
}

pub async fn run(config: &Config, args: &RunsArgs) -> Result<String> {
    let (_, state) = open_state(config)?;
    let mut runs = Vec::new();
    for id in state.folders("runs").await? {
        if let Some(run) = describe_run(&state, &id).await? {
            runs.push(run);
        }
    }
    if args.json {
        return Ok(runs.iter().map(|run| format!("{run}\n")).collect());
    }
    if runs.is_empty() {
        return Ok(format!("no runs in {}\n", state.uri()));
    }
    let columns = [
        "run",
        "state",
        "generation",
        "last_step",
        "scanned",
        "selected",
        "sub_batch",
        "policy",
    ];
    let mut rows = vec![columns.map(str::to_owned).to_vec()];
    let cell = |run: &Value, column: &str| match &run[column] {
        Value::String(text) => text.clone(),
        Value::Null => "-".to_owned(),
        other => other.to_string(),
    };
    rows.extend(
        runs.iter()
            .map(|run| columns.iter().map(|column| cell(run, column)).collect()),
    );
    Ok(table(&rows))
}

async fn describe_run(state: &Location, id: &str) -> Result<Option<Value>> {
    let location = state.below(&format!("runs/{id}"));
    let Some(facts) = run::load(&location).await? else {
        return Ok(None);
    };
    let receipts = fork::receipts(state, id, &facts).await?;
    let progress = progress(&receipts, &facts.chain, facts.spec.max_ahead).await?;
    let last = progress.last_step;
    let phase = facts.spec.phases.last();
    Ok(Some(json!({
        "run": id,
        "state": stored_state(&facts).word(),
        "generation": facts.chain.current(),
        "last_step": last,
        "scanned": last.map(|_| progress.candidates_scanned),
        "selected": last.map(|_| progress.examples_selected),
        "sub_batch": phase.map(|phase| phase.sub_batch_size),
        "policy": phase.map(|phase| {
            phase.policy().word()
        }),
        "failure": facts.failure,
    })))
}
