//! `superbatch runs`: lists the runs in the state.
use super::{ConfigArgs, open_state, table::table};
use crate::{
    config::Config,
    coordinator::{
        facts::run,
        runs::{fork, progress::progress, registry::stored_state},
    },
    error::{Error, Result},
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

/// # Errors
/// Those of storage. What could be read is printed first.
pub async fn run(config: &Config, args: &RunsArgs) -> Result<String> {
    let (_, state) = open_state(config)?;
    let (runs, passing) = list(&state).await?;
    let text: String = if args.json {
        runs.iter().map(|run| format!("{run}\n")).collect()
    } else if runs.is_empty() {
        format!("no runs in {}\n", state.uri())
    } else {
        shown(&runs)
    };
    let Some(error) = passing else {
        return Ok(text);
    };
    let printed = super::print(&text);
    printed.map_err(|e| Error::internal("cannot write to standard output").because(e))?;
    Err(error)
}

fn shown(runs: &[Value]) -> String {
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
    let failure = |run: &Value| {
        let error = run["error"].as_str()?;
        Some(format!(
            "{} cannot be read: {error}\n",
            run["run"].as_str()?
        ))
    };
    let unread: String = runs.iter().filter_map(failure).collect();
    table(&rows) + &unread
}

/// Describes each run. One that cannot be read is there with the reason: it must not keep others
/// from being seen. The first error that may pass is returned beside them: a script must not take
/// the list for the whole.
async fn list(state: &Location) -> Result<(Vec<Value>, Option<Error>)> {
    let (mut runs, mut passing) = (Vec::new(), None);
    for id in state.folders("runs").await? {
        match describe_run(state, &id).await {
            Ok(run) => runs.extend(run),
            Err(error) => {
                runs.push(unreadable(&id, &error));
                if passing.is_none() && error.reason().is_transient() {
                    passing = Some(error.about(format!("run '{id}' cannot be read")));
                }
            }
        }
    }
    Ok((runs, passing))
}

fn unreadable(id: &str, error: &Error) -> Value {
    json!({
        "run": id,
        "state": "unreadable",
        "generation": null,
        "last_step": null,
        "scanned": null,
        "selected": null,
        "sub_batch": null,
        "policy": null,
        "failure": null,
        "error": error.chain(),
        "reason": error.reason().word(),
    })
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        coordinator::facts::run::{RunFact, create_run},
        storage::{StorageConfig, Stores},
    };
    use superbatch_proto::v1::RunSpec;

    #[tokio::test]
    async fn one_run_that_cannot_be_read_is_told_among_the_others() {
        let stores = Stores::new(StorageConfig::default());
        let state = stores.open("memory:///state").unwrap();
        let fact = RunFact::new(&RunSpec::default(), "manifest".into(), None, None, None);
        create_run(&state.below("runs/good"), fact).await.unwrap();
        let newer = "{\"format\": 4000000000}";
        state
            .put("runs/newer/run.json", newer.into())
            .await
            .unwrap();
        let (found, passing) = list(&state).await.unwrap();
        assert!(passing.is_none(), "no later attempt reads it");
        assert_eq!(
            (&found[0]["run"], &found[0]["state"]),
            (&json!("good"), &json!("open"))
        );
        assert_eq!(
            (&found[1]["run"], &found[1]["state"]),
            (&json!("newer"), &json!("unreadable"))
        );
        let error = found[1]["error"].as_str().unwrap();
        assert!(error.contains("runs/newer"), "{error}");
        assert_eq!(
            found[1]["policy"],
            Value::Null,
            "programs find the same names"
        );
    }

    #[tokio::test]
    async fn a_failure_that_may_pass_fails_the_list_too() {
        let folder = tempfile::tempdir().unwrap();
        let stores = Stores::new(StorageConfig::default());
        let uri = format!("file://{}", folder.path().display());
        let state = stores.open(&uri).unwrap();
        let fact = RunFact::new(&RunSpec::default(), "manifest".into(), None, None, None);
        create_run(&state.below("runs/good"), fact).await.unwrap();
        let fact = folder.path().join("runs/away/run.json");
        std::fs::create_dir_all(fact.parent().unwrap()).unwrap();
        // A link to itself, which nobody can open.
        std::os::unix::fs::symlink("run.json", &fact).unwrap();
        let (found, passing) = list(&state).await.unwrap();
        let states: Vec<_> = found.iter().map(|run| &run["state"]).collect();
        assert_eq!(states, [&json!("unreadable"), &json!("open")]);
        let error = passing.unwrap().to_string();
        assert!(error.contains("run 'away' cannot be read"), "{error}");
    }
}
