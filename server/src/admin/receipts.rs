//! `superbatch receipts`: shows why a batch was chosen.
mod costs;

use self::costs::{price_of, probe, stages, towers};
use super::{ConfigArgs, at_least_one, open_state, table::table};
use crate::{
    config::Config,
    coordinator::{
        facts::{chain::Chain, run},
        receipts::{json, parquet::has_scores, store::Receipts},
        runs::fork,
    },
    error::{Error, Result},
    storage::Location,
};
use clap::Args;
use std::{collections::BTreeSet, num::NonZeroUsize};
use superbatch_proto::reflect::Word;
use superbatch_proto::v1::{LeftOut, Reason, Receipt, ReceiptSummary};

/// Reads the state directly, so it works while the service is down.
#[derive(Args)]
pub struct ReceiptsArgs {
    /// Id of the run, as `superbatch runs` lists it
    run: String,
    /// One step, with all its rows; without it the newest steps, a line each
    #[arg(long)]
    step: Option<u64>,
    /// A generation (a rewind opens the next) other than the newest that decided the step
    #[arg(long, requires = "step")]
    generation: Option<u32>,
    /// How many steps to list
    #[arg(long, value_name = "N", default_value = "20", conflicts_with = "step",
        value_parser = at_least_one)]
    last: NonZeroUsize,
    #[command(flatten)]
    pub settings: ConfigArgs,
    /// Print one JSON object a receipt, with all its rows, instead of text
    #[arg(long)]
    json: bool,
}

pub async fn run(config: &Config, args: &ReceiptsArgs) -> Result<String> {
    let (_, state) = open_state(config)?;
    let location = state.below(&format!("runs/{}", args.run));
    let Some(facts) = run::load(&location).await? else {
        return Err(unknown(&state, &args.run).await?);
    };
    let receipts = fork::receipts(&state, &args.run, &facts).await?;
    let found = match args.step {
        Some(step) => vec![one(&receipts, &facts.chain, args, step).await?],
        None => newest(&receipts, &facts, args.last).await?,
    };
    if args.json {
        return Ok(found
            .iter()
            .map(|receipt| format!("{}\n", json::receipt(receipt)))
            .collect());
    }
    Ok(match (args.step, found.first()) {
        (Some(_), Some(receipt)) => in_full(receipt),
        _ => list(&found),
    })
}

async fn one(
    receipts: &Receipts,
    chain: &Chain,
    args: &ReceiptsArgs,
    step: u64,
) -> Result<Receipt> {
    let asked = args.generation.unwrap_or(chain.current());
    if let Some(receipt) = receipts.find_of(chain, step, asked).await? {
        return Ok(receipt);
    }
    let message = format!(
        "step {step} of run '{}' is not committed in generation {asked}; `superbatch runs` tells \
         its last step and its newest generation",
        args.run
    );
    Err(Error::new(Reason::StepNotCommitted, message))
}

async fn newest(
    receipts: &Receipts,
    facts: &run::RunFacts,
    last: NonZeroUsize,
) -> Result<Vec<Receipt>> {
    let chain = &facts.chain;
    let committed = receipts.committed().await?;
    let steps: BTreeSet<u64> = committed.iter().map(|(step, _)| *step).collect();
    let mut found = Vec::new();
    for step in steps.into_iter().rev() {
        let candidates = chain.candidates(step, chain.current());
        let best = candidates
            .into_iter()
            .find(|generation| committed.contains(&(step, *generation)));
        if let Some(generation) = best {
            found.extend(receipts.find(step, generation).await?);
        }
        if found.len() == last.get() {
            break;
        }
    }
    // Of a fork, the steps before its own, which the other run has.
    let fork = facts.run.fork.as_ref();
    let forked_at = fork.map_or(0, |fork| fork.step.min(chain.kept_of(0)));
    let missing = (last.get() - found.len()) as u64;
    for step in (forked_at.saturating_sub(missing)..forked_at).rev() {
        found.extend(receipts.find(step, 0).await?);
    }
    found.reverse();
    Ok(found)
}

/// Names the state and its runs: the usual cause is a state other than the service's.
pub async fn unknown(state: &Location, run: &str) -> Result<Error> {
    let what = match (
        state.folders("").await?.is_empty(),
        state.folders("runs").await?.is_empty(),
    ) {
        (true, _) => ", where nothing is",
        (false, true) => ", which holds no runs",
        (false, false) => "; `superbatch runs` with the same state lists those there are",
    };
    let message = format!(
        "there is no run '{run}' in the state {}{what}; name the service's state with --state or \
        --config",
        state.uri()
    );
    Ok(Error::new(Reason::RunNotFound, message).with("uri", state.uri()))
}

fn list(receipts: &[Receipt]) -> String {
    let head = [
        "step",
        "gen",
        "policy",
        "mode",
        "weights",
        "lag",
        "scanned",
        "chosen",
        "holes",
        "batch_score",
        "seconds",
    ];
    let mut rows = vec![head.map(str::to_owned).to_vec()];
    for (receipt, s) in receipts
        .iter()
        .filter_map(|r| r.summary.as_ref().map(|s| (r, s)))
    {
        let cost = s.cost.unwrap_or_default();
        rows.push(vec![
            s.step.to_string(),
            s.generation.to_string(),
            s.policy().word(),
            s.mode().word(),
            s.learner
                .as_ref()
                .map_or("-".to_owned(), |v| v.version.to_string()),
            s.lag_steps.to_string(),
            cost.candidates_scanned.to_string(),
            receipt.chosen.len().to_string(),
            s.holes.to_string(),
            if has_scores(s) {
                format!("{:.4}", s.batch_score)
            } else {
                "-".into()
            },
            format!("{:.3}", cost.seconds.unwrap_or_default().total),
        ]);
    }
    table(&rows)
}

fn in_full(receipt: &Receipt) -> String {
    let Some(s) = &receipt.summary else {
        return String::new();
    };
    let mut text = head(s);
    text.push_str(&chosen(receipt));
    if !receipt.passed_over.is_empty() {
        text.push_str("\npassed over: the best own scores, then a sample of the others\n");
        text.push_str(&passed_over(receipt));
    }
    if !receipt.bad_rows.is_empty() {
        text.push_str("\nrows that could not be used\n");
        let reason = |row: &superbatch_proto::v1::BadRow| row.reason().word();
        let bad = receipt
            .bad_rows
            .iter()
            .map(|row| vec![row.id.clone(), reason(row), row.detail.clone()]);
        text.push_str(&table(&bad.collect::<Vec<_>>()));
    }
    text
}

fn chosen(receipt: &Receipt) -> String {
    let head = "drawn chunk score own learner reference weight position id";
    let mut rows: Vec<Vec<String>> = vec![head.split(' ').map(str::to_owned).collect()];
    rows.extend(receipt.chosen.iter().enumerate().map(|(drawn, row)| {
        vec![
            drawn.to_string(),
            row.chunk.to_string(),
            format!("{:.5}", row.score),
            number(row.own_score),
            number(row.learner_loss),
            number(row.reference_loss),
            format!("{:.3}", row.weight),
            row.position.to_string(),
            row.id.clone(),
        ]
    }));
    table(&rows)
}

fn passed_over(receipt: &Receipt) -> String {
    let head = "own learner reference position id";
    let mut rows: Vec<Vec<String>> = vec![head.split(' ').map(str::to_owned).collect()];
    rows.extend(receipt.passed_over.iter().map(|row| {
        vec![
            number(Some(row.own_score.into())),
            number(row.learner_loss.map(f64::from)),
            number(row.reference_loss.map(f64::from)),
            row.position.to_string(),
            row.id.clone(),
        ]
    }));
    table(&rows)
}

fn number(value: Option<f64>) -> String {
    value.map_or("-".to_owned(), |value| format!("{value:.5}"))
}

fn head(s: &ReceiptSummary) -> String {
    let cost = s.cost.unwrap_or_default();
    let seconds = cost.seconds.unwrap_or_default();
    let learner = s.learner.as_ref().map_or("none".to_owned(), |v| {
        format!(
            "version {} (pushed after step {}, {})",
            v.version, v.step, v.digest
        )
    });
    let lines = [
        (
            "run",
            format!("{} step {} generation {}", s.run_id, s.step, s.generation),
        ),
        ("drawn by", drawn_by(s)),
        ("tuning", tuning(s)),
        ("mode", s.mode().word()),
        (
            "learner",
            format!(
                "{learner}, scale {} bias {}, lag {}",
                s.learner_scale, s.learner_bias, s.lag_steps
            ),
        ),
        (
            "reference",
            format!(
                "{}, scale {} bias {}",
                s.reference_digest, s.reference_scale, s.reference_bias
            ),
        ),
        (
            "scanned",
            format!(
                "{} of super_batch_size {}, {} holes",
                cost.candidates_scanned, s.super_batch_size, s.holes
            ),
        ),
        ("fidelity", fidelity(s)),
        ("scores", scores(s)),
        ("probe", probe(s)),
        (
            "cost",
            format!(
                "{:.3e} FLOPs reference, {:.3e} learner, {:.3e} selection, {:.3e} training",
                cost.reference_flops, cost.learner_flops, cost.selection_flops, cost.train_flops
            ),
        ),
        ("scoring", towers(cost.scoring.as_ref())),
        ("training", towers(cost.training.as_ref())),
        ("price", price_of(&cost)),
        ("seconds", stages(&seconds)),
        (
            "on",
            format!(
                "{}, {}, plan {}, manifest {}",
                s.device, s.build, s.plan_version, s.dataset_manifest
            ),
        ),
    ];
    let mut text: String = lines
        .iter()
        .map(|(name, value)| format!("{name:<10}{value}\n"))
        .collect();
    text.push('\n');
    text
}

fn drawn_by(s: &ReceiptSummary) -> String {
    format!(
        "{} {} {}, {} chunks, seed {}",
        s.policy().word(),
        s.criterion().word(),
        s.loss().word(),
        s.n_chunks,
        s.seed
    )
}

/// Returns the fidelity of the scores, and how many rows are trained at which fidelity.
fn fidelity(s: &ReceiptSummary) -> String {
    let mut text = format!("scored {}", json::fidelity_name(s.fidelity));
    if let Some(approximation) = &s.approximation {
        text.push_str(&format!(
            "; approximate is {}",
            json::approximation(approximation)
        ));
    }
    if let Some(asked) = &s.multi_resolution {
        let of = if asked.whole_step { "steps" } else { "rows" };
        text.push_str(&format!("; {} of the {of} trained so", asked.share));
    }
    text
}

fn scores(s: &ReceiptSummary) -> String {
    if !has_scores(s) {
        return "none: no loss was read".to_owned();
    }
    let uniform = s.uniform_score.map_or_else(String::new, |score| {
        format!(", of a uniform draw {score:.5} expected")
    });
    format!(
        "sub-batch {:.5} (mean conditional score{uniform}), chosen {:.5} and candidates {:.5} \
        (mean unconditional scores)",
        s.batch_score, s.mean_score_chosen, s.mean_score_candidates
    )
}

/// Returns the tuning, and how many candidates its rules left out.
fn tuning(s: &ReceiptSummary) -> String {
    let Some(tuning) = &s.tuning else {
        return "none".to_owned();
    };
    let mut text = json::tuning(tuning).to_string();
    if let Some(LeftOut {
        clip_score_at_least,
        neg_clip_loss_keep,
        duplicates_above,
        score_columns,
    }) = s.left_out
    {
        text.push_str(&format!(
            "; left out {} (CLIPScore {clip_score_at_least}, negCLIPLoss {neg_clip_loss_keep}, \
            duplicates {duplicates_above}, score columns {score_columns})",
            clip_score_at_least + neg_clip_loss_keep + duplicates_above + score_columns
        ));
    }
    text
}
