//! `superbatch replay`: what another policy would have drawn in a step of the past.
use super::{ConfigArgs, select::TuningArgs, table::table};
use crate::{
    coordinator::replay::{Change, Past, Replayer, redraw::Redrawn},
    error::Result,
    storage::Location,
};
use clap::{Args, ValueEnum};
use superbatch_proto::{
    reflect::Word,
    v1::{Criterion, Policy, Tuning},
};

/// Reads receipts, weights and embeddings from the state; `superbatch serve` need not run. The
/// reference's embeddings are those that the state holds. The learner's are made again from the
/// weights with which the step was scored, which a service keeps for the newest versions of a run
/// (`coordinator.snapshots_kept`). Nothing is written but reference embeddings that are missing.
#[derive(Args)]
pub struct ReplayArgs {
    /// Id of the run, as `superbatch runs` lists it
    run: String,
    /// The step
    #[arg(long)]
    step: u64,
    /// A generation (a rewind opens the next) other than the newest that decided the step
    #[arg(long)]
    generation: Option<u32>,
    /// How to draw [default: as the step was drawn, like each option that is not given]
    #[arg(long, value_enum)]
    policy: Option<PolicyName>,
    /// What makes an example worth drawing
    #[arg(long, value_enum)]
    criterion: Option<CriterionName>,
    /// How many to draw
    #[arg(long, value_name = "N", conflicts_with = "filter_ratio",
        value_parser = clap::value_parser!(u32).range(1..))]
    sub_batch_size: Option<u32>,
    /// The share of the candidates to leave out, such as 0.9
    #[arg(long, value_name = "SHARE")]
    filter_ratio: Option<f64>,
    /// Draws of joint selection
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    n_chunks: Option<u32>,
    /// Multiplies softmax scores
    #[arg(long, value_name = "GAIN")]
    gain: Option<f64>,
    /// Another seed of the noise
    #[arg(long, value_name = "SEED")]
    seed: Option<u64>,
    #[command(flatten)]
    tuning: TuningArgs,
    #[command(flatten)]
    pub settings: ConfigArgs,
    /// Print one JSON object instead of text
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, ValueEnum)]
#[value(rename_all = "snake_case")]
enum PolicyName {
    Joint,
    JointTopK,
    Independent,
    TopK,
    Rank,
    Proportional,
    KCenter,
    Uniform,
}

#[derive(Clone, Copy, ValueEnum)]
#[value(rename_all = "snake_case")]
enum CriterionName {
    Learnability,
    Hard,
    Easy,
    Column,
}

impl From<PolicyName> for Policy {
    fn from(name: PolicyName) -> Self {
        match name {
            PolicyName::Joint => Self::Joint,
            PolicyName::JointTopK => Self::JointTopK,
            PolicyName::Independent => Self::Independent,
            PolicyName::TopK => Self::TopK,
            PolicyName::Rank => Self::Rank,
            PolicyName::Proportional => Self::Proportional,
            PolicyName::KCenter => Self::KCenter,
            PolicyName::Uniform => Self::Uniform,
        }
    }
}

impl From<CriterionName> for Criterion {
    fn from(name: CriterionName) -> Self {
        match name {
            CriterionName::Learnability => Self::Learnability,
            CriterionName::Hard => Self::Hard,
            CriterionName::Easy => Self::Easy,
            CriterionName::Column => Self::Column,
        }
    }
}

/// # Errors
/// Those of [`Past::find`] and [`Replayer::redraw`].
pub async fn run(state: &Location, replayer: &Replayer, args: &ReplayArgs) -> Result<String> {
    let past = Past::find(state, &args.run, args.step, args.generation).await?;
    let redrawn = replayer.redraw(&past, &args.change()).await?;
    Ok(if args.json {
        format!("{}\n", redrawn.json(&past))
    } else {
        text(&past, &redrawn)
    })
}

impl ReplayArgs {
    fn change(&self) -> Change {
        let tuning = &self.tuning;
        Change {
            policy: self.policy.map(Into::into),
            criterion: self.criterion.map(Into::into),
            sub_batch_size: self.sub_batch_size,
            filter_ratio: self.filter_ratio,
            n_chunks: self.n_chunks,
            gain: self.gain,
            seed: self.seed,
            tuning: Tuning {
                temperature: tuning.temperature,
                pressure: tuning.pressure,
                priority_exponent: tuning.priority_exponent,
                weight_exponent: tuning.weight_exponent,
                duplicates_above: tuning.duplicates_above,
                clip_score_at_least: tuning.clip_score_at_least,
                neg_clip_loss_keep: tuning.neg_clip_loss_keep,
            },
        }
    }
}

fn text(past: &Past, redrawn: &Redrawn) -> String {
    let json = redrawn.json(past);
    let [was, now] = [&json["chosen"], &json["redrawn"]].map(|of| {
        let name = |field: &str| of[field].as_str().unwrap_or_default().to_owned();
        let score = of["batch_score"].as_f64();
        vec![
            name("policy"),
            name("criterion"),
            name("mode"),
            of["sub_batch_size"].to_string(),
            of["n_chunks"].to_string(),
            of["seed"].to_string(),
            score.map_or("-".to_owned(), |score| format!("{score:.5}")),
        ]
    });
    let head = [
        "",
        "policy",
        "criterion",
        "mode",
        "size",
        "chunks",
        "seed",
        "batch_score",
    ];
    let mut rows = vec![head.map(str::to_owned).to_vec()];
    for (name, mut cells) in [("chosen", was), ("redrawn", now)] {
        cells.insert(0, name.to_owned());
        rows.push(cells);
    }
    let summary = &past.summary;
    let mut text = format!(
        "run {} step {} generation {}: {} candidates, {} of them not usable\n\n{}\n",
        summary.run_id,
        summary.step,
        summary.generation,
        past.super_batch.candidates.len(),
        redrawn.holes,
        table(&rows)
    );
    text.push_str(&verdict(past, redrawn));
    text.push_str(&drawn(redrawn));
    text
}

fn verdict(past: &Past, redrawn: &Redrawn) -> String {
    let (all, were) = (redrawn.rows.len(), past.receipt.chosen.len());
    let mut text = if redrawn.same {
        format!("the same {all} rows in the same order\n")
    } else {
        format!(
            "{} of {all} rows are among the {were} chosen\n",
            redrawn.shared
        )
    };
    match (&redrawn.measured, &redrawn.missing) {
        (Some(measured), _) => {
            let uniform = measured.uniform;
            text.push_str(&format!(
                "batch score by {}: chosen {:.5}, redrawn {:.5}, uniform {} (expected)\n",
                measured.criterion.word(),
                measured.chosen,
                measured.redrawn,
                uniform.map_or("-".to_owned(), |score| format!("{score:.5}")),
            ));
        }
        (None, Some(why)) => text.push_str(&format!("batch scores cannot be compared: {why}\n")),
        (None, None) => {}
    }
    if let Some(most) = redrawn.losses_differ_by {
        text.push_str(&format!(
            "losses differ from those of the receipt by at most {most:.3e}\n"
        ));
    }
    text
}

fn drawn(redrawn: &Redrawn) -> String {
    let head = "drawn chunk score own chosen position id";
    let mut rows: Vec<Vec<String>> = vec![head.split(' ').map(str::to_owned).collect()];
    rows.extend(redrawn.rows.iter().enumerate().map(|(drawn, row)| {
        vec![
            drawn.to_string(),
            row.chunk.to_string(),
            format!("{:.5}", row.score),
            row.own_score
                .map_or("-".to_owned(), |own| format!("{own:.5}")),
            if row.was_chosen { "yes" } else { "no" }.to_owned(),
            row.position.to_string(),
            row.id.clone(),
        ]
    }));
    format!("\n{}", table(&rows))
}
