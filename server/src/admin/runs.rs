//! `superbatch runs`: lists the runs in the state.
use super::{ConfigArgs, open_state, table::table};
use crate::{
    config::Config,
    coordinator::{
        facts::run,
        runs::{open::summary_of_stopped, registry::stored_state},
    },
    error::Result,
    storage::Location,
};
use clap::Args;
use serde_json::{Value, json};

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
        if let Some(run) = describe_run(&state.below(&format!("runs/{id}")), &id).await? {
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

async fn describe_run(location: &Location, id: &str) -> Result<Option<Value>> {
    let Some(facts) = run::load(location).await? else {
        return Ok(None);
    };
    let (last, totals) = summary_of_stopped(location, &facts.chain, facts.spec.max_ahead).await?;
    let phase = facts.spec.phases.last();
    Ok(Some(json!({
        "run": id,
        "state": stored_state(&facts).as_str_name().trim_start_matches("RUN_STATE_").to_lowercase(),
        "generation": facts.chain.current(),
        "last_step": last,
        "scanned": last.map(|_| totals.candidates_scanned),
        "selected": last.map(|_| totals.examples_selected),
        "sub_batch": phase.map(|phase| phase.sub_batch_size),
        "policy": phase.map(|phase| {
            phase.policy().as_str_name().trim_start_matches("POLICY_").to_lowercase()
        }),
        "failure": facts.failure,
    })))
}
