//! What no run can meet.
use super::{Asked, columns, fidelity, impossible, own, per_example, tuning};
use crate::{
    bounds::{
        COLUMNS_MAX, FIDELITIES_MAX, MAX_AHEAD_MAX, MICRO_BATCH_ROWS_MAX, NAME_BYTES_MAX,
        PHASES_MAX, SECONDS_MAX, SOURCES_MAX, WINDOW_BLOCKS_MAX,
    },
    dataset::{describe_fault, parse_predicate},
    error::{Error, Result},
    selection,
};
use std::{collections::HashSet, fmt::Display};
use superbatch_kernels as kernels;
use superbatch_proto::{
    SUPER_BATCH_SIZE_MAX,
    ids::is_run_id,
    reflect::Word,
    v1::{
        ComputeDtype, Criterion, Delivery, EmbeddingDtype, Fallback, Fidelity, LearnerSpec, Loss,
        Phase, Policy, RunSpec, Source, lag::Bound, learner_spec::Initial,
    },
};

/// Columns that every batch has, and the prefix of the service's own columns.
const COLUMNS_TAKEN: [&str; 2] = ["image", "caption"];
const PREFIX_TAKEN: &str = "_superbatch_";

/// Refuses a spec, with defaults filled in, that can never be met.
pub(super) fn check(spec: &RunSpec) -> Result<()> {
    sources(spec)?;
    check_models(spec)?;
    schedule(spec)?;
    per_example::check(spec)?;
    needs(spec)?;
    fidelity::trained(spec)?;
    weights(spec)?;
    delivered(&spec.columns)?;
    bounds(spec)
}

fn sources(spec: &RunSpec) -> Result<()> {
    if spec.sources.is_empty() || spec.sources.len() > SOURCES_MAX {
        let message = format!(
            "{} sources; a run has 1 to {SOURCES_MAX}",
            spec.sources.len()
        );
        return Err(impossible("sources", message));
    }
    for (i, source) in spec.sources.iter().enumerate() {
        let at = |field: &str| format!("sources[{i}].{field}");
        named(&at("uri"), &source.uri)?;
        positive(&at("weight"), source.weight)?;
        short(&at("image_column"), &source.image_column)?;
        short(&at("image_root"), &source.image_root)?;
        short(&at("caption_column"), &source.caption_column)?;
        short(&at("target_column"), &source.target_column)?;
        short(&at("text_column"), &source.text_column)?;
        kept_by(&at, source)?;
        if !source.image_column.is_empty() && source.image_column == source.caption_column {
            let message = format!("'{}' cannot be both image and caption", source.image_column);
            return Err(impossible(&at("caption_column"), message));
        }
    }
    Ok(())
}

/// Checks the predicate and the list of ids of a source.
fn kept_by(at: &impl Fn(&str) -> String, source: &Source) -> Result<()> {
    short(&at("where"), &source.r#where)?;
    short(&at("allow"), &source.allow)?;
    short(&at("id_column"), &source.id_column)?;
    short(&at("scores"), &source.scores)?;
    if source.r#where.is_empty() {
        return Ok(());
    }
    let bad = |fault| impossible(&at("where"), describe_fault(&source.r#where, &fault));
    parse_predicate(&source.r#where).map(|_| ()).map_err(bad)
}

fn check_models(spec: &RunSpec) -> Result<()> {
    if let Some(learner) = &spec.learner {
        self::learner(learner)?;
    }
    if let Some(reference) = &spec.reference {
        named("reference.model_uri", &reference.model_uri)?;
        finite("reference.logit_bias", reference.logit_bias.unwrap_or(0.0))?;
    }
    Ok(())
}

fn learner(learner: &LearnerSpec) -> Result<()> {
    named("learner.model_uri", &learner.model_uri)?;
    finite("learner.logit_bias", learner.logit_bias.unwrap_or(0.0))?;
    if learner.trained_fidelities.len() > FIDELITIES_MAX {
        let message = format!(
            "{} trained_fidelities; at most {FIDELITIES_MAX}",
            learner.trained_fidelities.len()
        );
        return Err(impossible("learner.trained_fidelities", message));
    }
    for (i, known) in learner.trained_fidelities.iter().enumerate() {
        let field = format!("learner.trained_fidelities[{i}]");
        known
            .by
            .map_or(Ok(()), |by| fidelity::possible(&field, by))?;
    }
    match &learner.initial {
        None | Some(Initial::FirstPush(false)) => {
            let message =
                "the learner has no initial weights; set random_seed, snapshot_uri or first_push";
            Err(impossible("learner.initial", message))
        }
        Some(Initial::SnapshotUri(uri)) => named("learner.snapshot_uri", uri),
        Some(Initial::RandomSeed(_) | Initial::FirstPush(true)) => Ok(()),
    }
}

fn schedule(spec: &RunSpec) -> Result<()> {
    let Some(first) = spec.phases.first() else {
        return Err(impossible(
            "phases",
            "the run has no phase; give one from step 0",
        ));
    };
    if spec.phases.len() > PHASES_MAX {
        return Err(too_many_phases(spec.phases.len()));
    }
    if first.from_step != 0 {
        let message = format!(
            "the first phase starts at step {}; it must start at 0",
            first.from_step
        );
        return Err(impossible("phases[0].from_step", message));
    }
    for (i, pair) in spec.phases.windows(2).enumerate() {
        let (before, after) = (pair[0].from_step, pair[1].from_step);
        if after <= before {
            let message = format!("phases must rise by from_step; {after} comes after {before}");
            return Err(impossible(&format!("phases[{}].from_step", i + 1), message));
        }
    }
    spec.phases
        .iter()
        .enumerate()
        .try_for_each(|(i, phase)| self::phase(i, phase, spec.micro_batches))
}

pub(super) fn too_many_phases(count: usize) -> Error {
    let message = format!("{count} phases are too many; a run has at most {PHASES_MAX}");
    impossible("phases", message)
}

fn phase(i: usize, phase: &Phase, micro_batches: u32) -> Result<()> {
    let at = format!("phases[{i}]");
    drawn(&at, phase)?;
    if !phase.sub_batch_size.is_multiple_of(micro_batches) {
        let message = format!(
            "sub_batch_size {} is not divisible by micro_batches {micro_batches}",
            phase.sub_batch_size
        );
        return Err(impossible(&format!("{at}.sub_batch_size"), message));
    }
    fidelity::check(&at, phase, micro_batches)
}

/// Refuses settings of a draw that can never work. `of` is the path of the phase.
pub(super) fn drawn(of: &str, phase: &Phase) -> Result<()> {
    let at = |field| format!("{of}.{field}");
    check_enum::<Policy>(&at("policy"), phase.policy)?;
    check_enum::<Criterion>(&at("criterion"), phase.criterion)?;
    check_enum::<Fidelity>(&at("fidelity"), phase.fidelity)?;
    check_range(
        &at("super_batch_size"),
        phase.super_batch_size,
        SUPER_BATCH_SIZE_MAX,
    )?;
    check_range(
        &at("sub_batch_size"),
        phase.sub_batch_size,
        phase.super_batch_size,
    )?;
    positive(&at("gain"), phase.gain)?;
    columns::check(of, phase)?;
    tuning::check(of, phase)
}

fn needs(spec: &RunSpec) -> Result<()> {
    for (i, phase) in spec.phases.iter().enumerate() {
        own::check(i, spec, phase)?;
        models_named(&format!("phase {i}"), spec, phase)?;
    }
    check_fallback(spec)
}

/// Checks that the run names the models that `phase` asks. `of` names the phase.
pub(super) fn models_named(of: &str, spec: &RunSpec, phase: &Phase) -> Result<()> {
    let asked = Asked::by(phase);
    let missing = match (
        asked.learner && spec.learner.is_none(),
        asked.reference && spec.reference.is_none() && phase.reference_step.is_none(),
    ) {
        (true, _) => "learner",
        (_, true) => "reference",
        _ => return Ok(()),
    };
    let (policy, criterion) = (phase.policy().word(), phase.criterion().word());
    let of_scores =
        missing == "learner" || asked.reference_losses || phase.policy() == Policy::KCenter;
    let why = if of_scores {
        format!("({policy}, {criterion}) scores with a {missing}")
    } else {
        "leaves candidates out by what the reference makes of them (tuning)".to_owned()
    };
    Err(impossible(missing, format!("{of} {why}; name one")))
}

/// Checks that the fallback is possible too: it applies when something else goes wrong, and must
/// not fail then.
fn check_fallback(spec: &RunSpec) -> Result<()> {
    if spec.fallback() != Fallback::ReferenceOnly {
        return Ok(());
    }
    if spec.reference.is_none() {
        return Err(impossible(
            "fallback",
            "fallback reference_only scores with a reference; name one, or fall back otherwise",
        ));
    }
    let draws_by_easy = |phase: &Phase| {
        let policy = selection::policy(phase.policy()).unwrap_or_default();
        policy.check_criterion(kernels::Criterion::Easy)
    };
    for (i, phase) in spec.phases.iter().enumerate() {
        if let Err(error) = draws_by_easy(phase) {
            let message = format!(
                "reference_only draws by easy scores, and in phases[{i}] the {error}; fall back \
                 otherwise"
            );
            return Err(impossible("fallback", message));
        }
    }
    Ok(())
}

/// Checks the lag of the weights. `exact(n)` can always be met: the newest push that is old enough,
/// or the initial weights. `at_most(n)` needs pushes often enough: just before a push the newest
/// weights are push_every_steps - 1 steps old.
fn weights(spec: &RunSpec) -> Result<()> {
    let oldest = spec.push_every_steps - 1;
    match spec.lag.and_then(|lag| lag.bound) {
        Some(Bound::AtMost(most)) if oldest > most => {
            let message = format!(
                "with push_every_steps {} the newest weights are up to {oldest} steps old, and \
                the lag allows {most}; push more \
                 often or allow more",
                spec.push_every_steps
            );
            Err(impossible("lag.at_most", message))
        }
        _ => Ok(()),
    }
}

fn delivered(columns: &[String]) -> Result<()> {
    if columns.len() > COLUMNS_MAX {
        let message = format!("{} columns; at most {COLUMNS_MAX}", columns.len());
        return Err(impossible("columns", message));
    }
    let mut seen = HashSet::new();
    for (i, column) in columns.iter().enumerate() {
        let field = format!("columns[{i}]");
        named(&field, column)?;
        if COLUMNS_TAKEN.contains(&column.as_str()) || column.starts_with(PREFIX_TAKEN) {
            let message = format!(
                "'{column}' is a column that every batch has or the service's own; leave it out"
            );
            return Err(impossible(&field, message));
        }
        if !seen.insert(column) {
            return Err(impossible(&field, format!("'{column}' is asked for twice")));
        }
    }
    Ok(())
}

fn bounds(spec: &RunSpec) -> Result<()> {
    check_enum::<Loss>("loss", spec.loss)?;
    check_enum::<Fallback>("fallback", spec.fallback)?;
    check_enum::<Delivery>("delivery", spec.delivery)?;
    check_enum::<EmbeddingDtype>("embedding_dtype", spec.embedding_dtype)?;
    if spec.compute_dtype != 0 {
        check_enum::<ComputeDtype>("compute_dtype", spec.compute_dtype)?;
    }
    check_range("window_blocks", spec.window_blocks, WINDOW_BLOCKS_MAX)?;
    if spec.micro_batch_rows != 0 {
        check_range(
            "micro_batch_rows",
            spec.micro_batch_rows,
            MICRO_BATCH_ROWS_MAX,
        )?;
    }
    check_range("max_ahead", spec.max_ahead, MAX_AHEAD_MAX)?;
    positive("need_deadline_seconds", spec.need_deadline_seconds)?;
    at_most_years("need_deadline_seconds", spec.need_deadline_seconds)?;
    let grace = spec.stall_grace_seconds.unwrap_or(0.0);
    if grace != 0.0 {
        positive("stall_grace_seconds", grace)?;
        at_most_years("stall_grace_seconds", grace)?;
    }
    positive("max_bad_row_share", spec.max_bad_row_share)?;
    if spec.max_bad_row_share > 1.0 {
        return Err(impossible(
            "max_bad_row_share",
            format!("{} is no share; it is at most 1", spec.max_bad_row_share),
        ));
    }
    if spec.train_flops_per_example != 0.0 {
        positive("train_flops_per_example", spec.train_flops_per_example)?;
    }
    match &spec.fork_of {
        Some(fork) if !is_run_id(&fork.run_id) => Err(impossible(
            "fork_of.run_id",
            format!("'{}' is no run id", fork.run_id),
        )),
        _ => Ok(()),
    }
}

fn at_most_years(field: &str, seconds: f64) -> Result<()> {
    if seconds <= SECONDS_MAX {
        return Ok(());
    }
    let message = format!("{seconds} seconds is too long; give at most {SECONDS_MAX}");
    Err(impossible(field, message))
}

/// Checks that a value is one of the enum `E` and not its zero.
fn check_enum<E: TryFrom<i32>>(field: &str, value: i32) -> Result<()> {
    if value != 0 && E::try_from(value).is_ok() {
        return Ok(());
    }
    let what = if value == 0 {
        "is not set".to_owned()
    } else {
        format!("{value} is not known to this version")
    };
    Err(impossible(
        field,
        format!("{field} {what}; use a value of the protocol"),
    ))
}

fn named(field: &str, value: &str) -> Result<()> {
    if value.is_empty() {
        return Err(impossible(field, format!("{field} is empty")));
    }
    short(field, value)
}

fn short(field: &str, value: &str) -> Result<()> {
    if value.len() <= NAME_BYTES_MAX {
        return Ok(());
    }
    let message = format!(
        "{field} has {} bytes; it has at most {NAME_BYTES_MAX}",
        value.len()
    );
    Err(impossible(field, message))
}

fn finite(field: &str, value: f64) -> Result<()> {
    if value.is_finite() {
        Ok(())
    } else {
        Err(impossible(
            field,
            format!("{field} is {value}; give a finite number"),
        ))
    }
}

fn positive(field: &str, value: f64) -> Result<()> {
    if value.is_finite() && value > 0.0 {
        return Ok(());
    }
    Err(impossible(
        field,
        format!("{field} is {value}; give a finite number above 0"),
    ))
}

fn check_range<T: PartialOrd + Display + From<u8>>(field: &str, value: T, most: T) -> Result<()> {
    if value >= T::from(1) && value <= most {
        return Ok(());
    }
    Err(impossible(
        field,
        format!("{field} is {value}; it lies between 1 and {most}"),
    ))
}
