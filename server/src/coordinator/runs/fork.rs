//! Forks: a run whose steps before one are another run's. Their receipts are read where they lie;
//! of the weights, those that the next steps need are copied.
use crate::{
    coordinator::{
        facts::run::{self, ForkFact, RunFacts},
        receipts::{before::Before, store::Receipts},
        spec::{Asked, Difference, first_difference, phase_at, references_from},
        weights::{
            Due, due,
            inherit::{Inheritance, Inherited, Needed, inherited},
        },
    },
    error::{Error, Result},
    storage::Location,
};
use superbatch_proto::v1::{self, Phase, Reason, RunSpec};

/// Forks of forks that are followed: each is one more read for a step of the first run.
const DEPTH_MAX: usize = 16;

/// Says that the weights were taken over.
const TAKEN_OVER: &str = "forked.json";

/// A fork that may be.
pub(super) struct Fork {
    pub fact: ForkFact,
    /// The digest of the other run's manifest.
    pub manifest: String,
    parent: Location,
    weights: Inherited,
}

/// Returns the receipts of a run, with those of the runs that it is a fork of.
///
/// # Errors
/// `StorageUnreachable`; `Internal` if a run that it is a fork of is gone.
pub async fn receipts(state: &Location, id: &str, facts: &RunFacts) -> Result<Receipts> {
    Ok(receipts_after(state, id, left(state, id, facts).await?))
}

/// Returns where the run left another one, and where that one left the next, and so on. With each
/// goes the `max_ahead` of the run that was left.
async fn left(state: &Location, id: &str, facts: &RunFacts) -> Result<Vec<(ForkFact, u32)>> {
    let (mut forks, mut next) = (Vec::new(), facts.run.fork.clone());
    while let Some(fork) = next.take() {
        check_depth(id, forks.len() + 1)?;
        let parent = load(state, &fork.run_id).await?;
        next = parent.run.fork;
        forks.push((fork, parent.spec.max_ahead));
    }
    Ok(forks)
}

/// Checks that no more than [`DEPTH_MAX`] runs have steps of run `id`.
fn check_depth(id: &str, forks: usize) -> Result<()> {
    if forks <= DEPTH_MAX {
        return Ok(());
    }
    let message = format!("run '{id}' is a fork of more than {DEPTH_MAX} runs");
    Err(Error::new(Reason::RunSpecImpossible, message).with("field", "fork_of"))
}

fn receipts_after(state: &Location, id: &str, forks: Vec<(ForkFact, u32)>) -> Receipts {
    let mut before = None;
    for (fork, max_ahead) in forks.into_iter().rev() {
        before = Some(Before {
            receipts: Receipts::forked(location(state, &fork.run_id), before.take()),
            chain: fork.chain,
            step: fork.step,
            max_ahead,
        });
    }
    Receipts::forked(location(state, id), before)
}

fn location(state: &Location, id: &str) -> Location {
    state.below(&format!("runs/{id}"))
}

async fn load(state: &Location, id: &str) -> Result<RunFacts> {
    let facts = run::load(&location(state, id)).await?;
    facts.ok_or_else(|| {
        let message = format!("there is no run '{id}' to fork");
        Error::new(Reason::RunNotFound, message).with("run_id", id)
    })
}

/// Checks that `spec` may be the fork `id`, and returns where it leaves the other run and what it
/// takes over; `None` if it is no fork.
///
/// # Errors
/// `RunNotFound`; `RunSpecConflict` with the `field` in which the two differ and must not;
/// `StepNotCommitted` if the other run has not come so far; `WeightsMissing` if weights that the
/// next steps need are no longer kept; `RunSpecImpossible` for a fork of too many forks.
pub(super) async fn point(state: &Location, id: &str, spec: &RunSpec) -> Result<Option<Fork>> {
    let Some(asked) = &spec.fork_of else {
        return Ok(None);
    };
    let parent = load(state, &asked.run_id).await?;
    if let Some(difference) = history_differs(&parent.spec, spec, asked.step) {
        let Difference { field, values } = difference;
        let [known, given] = values;
        let message = format!(
            "a fork shares the history of its run: '{}' has the {field} {known}, and this spec \
            {given}",
            asked.run_id
        );
        let error = Error::new(Reason::RunSpecConflict, message).with("field", field);
        return Err(error.with("known", known).with("given", given));
    }
    let forks = left(state, &asked.run_id, &parent).await?;
    check_depth(id, forks.len() + 1)?;
    let receipts = receipts_after(state, &asked.run_id, forks);
    let (trail, _) = receipts
        .opened(&parent.chain, parent.spec.max_ahead)
        .await?;
    if trail.next() < asked.step {
        let message = format!(
            "run '{}' is committed up to step {} (not included); fork it there or earlier",
            asked.run_id,
            trail.next()
        );
        let error = Error::new(Reason::StepNotCommitted, message);
        return Err(error.with("step", asked.step).with("next", trail.next()));
    }
    let at = location(state, &asked.run_id);
    let weights = inherited(&at, &parent.chain, &needed(asked.step, spec)).await?;
    check_kept(&weights, asked, spec)?;
    Ok(Some(Fork {
        fact: ForkFact {
            run_id: asked.run_id.clone(),
            step: asked.step,
            chain: parent.chain,
            weights: weights.fact.to_value()?,
        },
        manifest: parent.run.manifest,
        parent: at,
        weights,
    }))
}

/// Returns the first difference in what the steps before `step` rest on. What else a spec says may
/// differ: that is what forks are for.
fn history_differs(parent: &RunSpec, fork: &RunSpec, step: u64) -> Option<Difference> {
    let before = |phases: &[Phase]| -> Vec<Phase> {
        let before = phases.iter().filter(|phase| phase.from_step < step);
        before.cloned().collect()
    };
    let known = RunSpec {
        phases: before(&parent.phases),
        fork_of: None,
        ..parent.clone()
    };
    let learner = match &parent.learner {
        None => None,
        Some(_) => fork.learner.clone(),
    };
    let given = RunSpec {
        sources: fork.sources.clone(),
        seed: fork.seed,
        window_blocks: fork.window_blocks,
        phases: before(&fork.phases),
        learner,
        ..known.clone()
    };
    first_difference(&known, &given)
}

/// Returns the pushes of the other run that steps of a fork at `step` may be scored with.
fn needed(step: u64, spec: &RunSpec) -> Needed {
    let signed = |step: u64| i64::try_from(step).unwrap_or(i64::MAX);
    let oldest = match due(step, &spec.lag.unwrap_or_default(), spec.push_every_steps) {
        Due::Initial => -1,
        Due::Exactly(push) => signed(push),
        Due::Within { oldest, .. } => oldest,
    };
    // Later ones are the fork's own.
    let references = references_from(&spec.phases, step).into_iter();
    Needed {
        oldest,
        last: signed(step) - 1,
        references: references.filter(|at| *at < step).map(signed).collect(),
    }
}

/// Checks that the weights of a fork's first step, and those that are the reference of its phases,
/// are still there.
///
/// # Errors
/// `WeightsMissing`.
fn check_kept(found: &Inherited, at: &v1::Fork, spec: &RunSpec) -> Result<()> {
    let needed = needed(at.step, spec);
    let is_scored = Asked::by(phase_at(&spec.phases, at.step)).learner;
    let is_needed =
        |step: &&i64| (is_scored && **step >= needed.oldest) || needed.references.contains(*step);
    let Some(step) = found.lost.iter().find(is_needed) else {
        return Ok(());
    };
    let what = if needed.references.contains(step) {
        ", which are the reference of a phase (reference_step),"
    } else {
        ""
    };
    let message = format!(
        "the weights of run '{}' after step {step}{what} are no longer kept, or were rolled back; \
        fork it at a later step or with other phases, or keep more (coordinator.snapshots_kept)",
        at.run_id
    );
    Err(Error::new(Reason::WeightsMissing, message).with("step", step))
}

impl Fork {
    /// Copies the files of the weights that it takes over into the fork at `own`, which does not
    /// exist yet: if the other run has deleted one by now, nothing of the fork is left.
    ///
    /// # Errors
    /// `WeightsMissing`; `StorageUnreachable`.
    pub(super) async fn copy_files(&self, own: &Location) -> Result<()> {
        self.weights.copy_files(&self.parent, own).await
    }
}

/// Writes what the run at `own` takes over if it is a fork, unless that is done. To be called
/// before the run's weights are opened.
///
/// # Errors
/// `StorageUnreachable`; `Internal` if the fork's definition cannot be read; `WeightsMissing` if an
/// older build defined the fork and weights that it needs are gone.
pub(super) async fn take_over(state: &Location, own: &Location, facts: &RunFacts) -> Result<()> {
    let Some(fork) = &facts.run.fork else {
        return Ok(());
    };
    if own.head(TAKEN_OVER).await?.is_some() {
        return Ok(());
    }
    let weights = if fork.weights.is_null() {
        taken_now(state, own, fork, &facts.spec).await?
    } else {
        Inheritance::from_value(&fork.weights)?
    };
    weights.write(own).await?;
    own.create(TAKEN_OVER, "{}".into()).await.map(drop)
}

/// Copies the files of what a fork takes over whose definition does not say it. Older builds chose
/// the weights after the fork was defined, and may have ended in between.
async fn taken_now(
    state: &Location,
    own: &Location,
    fork: &ForkFact,
    spec: &RunSpec,
) -> Result<Inheritance> {
    let parent = location(state, &fork.run_id);
    let found = inherited(&parent, &fork.chain, &needed(fork.step, spec)).await?;
    let at = v1::Fork {
        run_id: fork.run_id.clone(),
        step: fork.step,
    };
    check_kept(&found, &at, spec)?;
    found.copy_files(&parent, own).await?;
    Ok(found.fact)
}

#[cfg(test)]
mod tests;
