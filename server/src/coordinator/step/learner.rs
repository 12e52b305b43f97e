//! The weights that a step is scored with, or what the fallback puts in their place.
use super::maker::Maker;
use crate::{
    coordinator::{
        spec::stall_grace_seconds,
        trainer::patience::{Demand, Moment, Verdict, Why, patience, verdict},
        weights::{Due, Published, Traffic, due},
    },
    error::{Error, Result},
};
use std::{collections::BTreeSet, time::Duration};
use superbatch_proto::v1::{Fallback, Mode, Reason, RunSpec};
use tokio::time::Instant;

/// Weights for a step, or the way it is decided without.
pub enum Learner {
    NotAsked,
    Version(Published, Mode),
    Degraded(Mode),
}

impl Maker<'_> {
    /// The weights that the lag asks for, or what the fallback puts in their place. Waits without
    /// holding a worker's slot.
    pub async fn await_weights(&self, step: u64) -> Result<Learner> {
        let run = self.run;
        let due = due(
            step,
            &self.spec.lag.unwrap_or_default(),
            self.spec.push_every_steps,
        );
        let (mut book, mut traffic, mut demand) = (
            run.weights.book(),
            run.weights.traffic(),
            self.reporter.demand(),
        );
        let limits = Limits::of(self.spec);
        let (begun, mut told) = (Instant::now(), false);
        loop {
            let (began, current) = run.began();
            // Traffic first: a push leaves it only after it has entered the book.
            let (coming, fate) = pushes(&traffic.borrow_and_update(), current, due);
            if let Some(published) = book.borrow_and_update().find(due, &began) {
                return Ok(Learner::Version(published, Mode::Normal));
            }
            let wanted = demand.borrow_and_update().clone();
            let verdict = verdict(&Moment {
                demand: &wanted,
                needed_for: wanted.since.map(|since| since.elapsed()),
                deadline: limits.deadline,
                stalled_for: wanted.stalled_since.map(|since| since.elapsed()),
                grace: limits.grace,
                due: due_step(due),
                // Initial weights are one push, too.
                exact: !matches!(due, Due::Within { .. }),
                coming: &coming,
                refused: fate.refused.is_some(),
                fallback: self.spec.fallback(),
            });
            match verdict {
                Verdict::Wait => {}
                Verdict::TellRanks(why) => self.reporter.fail_waiting(missing(
                    step,
                    due,
                    self.awaited(due),
                    why,
                    limits,
                    fate,
                )),
                Verdict::FallBack(_) => return Ok(self.fall_back(step)),
            }
            let patience = patience(&wanted, due_step(due)).filter(|_| !told);
            let overdue = patience.map(|patience| begun + patience);
            if overdue.is_some_and(|at| at <= Instant::now()) {
                told = true;
                self.log_wait(step, due, begun);
                continue;
            }
            let _parked = self.reporter.begin_waiting_for_trainer();
            let given_up = limits
                .next_verdict(&wanted, Instant::now())
                .filter(|_| verdict == Verdict::Wait);
            let alarm = wait_until(given_up.into_iter().chain(overdue).min());
            let changed = tokio::select! {
                changed = book.changed() => changed,
                changed = traffic.changed() => changed,
                changed = demand.changed() => changed,
                () = alarm => Ok(()),
            };
            changed.map_err(|_| crate::coordinator::released())?;
        }
    }

    fn log_wait(&self, step: u64, due: Due, begun: Instant) {
        let (waits_for, seconds) = (self.awaited(due), begun.elapsed().as_secs());
        let run = &self.run.id;
        tracing::warn!(run, step, seconds, waits_for, "a step waits for weights");
    }

    /// What is waited for.
    fn awaited(&self, due: Due) -> String {
        let newest = self
            .run
            .weights
            .book()
            .borrow()
            .newest()
            .map(|published| published.version.step);
        awaited(due, newest)
    }

    fn fall_back(&self, step: u64) -> Learner {
        match self.spec.fallback() {
            Fallback::ServeFlagged => {
                // The run's state and the book are never held at once, in whatever order.
                let began = self.run.began().0;
                let newest = self.run.weights.book().borrow().last_before(step, &began);
                newest.map_or(Learner::Degraded(Mode::Uniform), |published| {
                    Learner::Version(published, Mode::Stale)
                })
            }
            Fallback::ReferenceOnly if self.spec.reference.is_some() => {
                Learner::Degraded(Mode::ReferenceOnly)
            }
            _ => Learner::Degraded(Mode::Uniform),
        }
    }
}

async fn wait_until(at: Option<Instant>) {
    match at {
        Some(at) => tokio::time::sleep_until(at).await,
        None => std::future::pending().await,
    }
}

/// How long a step waits for weights.
#[derive(Debug, Clone, Copy)]
struct Limits {
    deadline: Duration,
    grace: Duration,
}

impl Limits {
    fn of(spec: &RunSpec) -> Self {
        Self {
            deadline: Duration::from_secs_f64(spec.need_deadline_seconds),
            grace: Duration::from_secs_f64(stall_grace_seconds(spec)),
        }
    }

    /// When time alone may next change the verdict.
    fn next_verdict(&self, demand: &Demand, now: Instant) -> Option<Instant> {
        let ends = [
            demand.since.map(|since| since + self.deadline),
            demand.stalled_since.map(|since| since + self.grace),
        ];
        ends.into_iter().flatten().filter(|at| *at > now).min()
    }
}

/// What became of the push that is due.
struct Fate {
    refused: Option<String>,
    /// It failed for a cause that passes.
    failed: Option<String>,
}

/// Steps of the generation's pushes that are on their way, and what became of the due one.
fn pushes(traffic: &Traffic, generation: u32, due: Due) -> (BTreeSet<i64>, Fate) {
    let staged = traffic.staging.iter().filter(|(g, _)| *g == generation);
    let announced = traffic.announced.steps(generation);
    let coming = staged.map(|(_, step)| *step).chain(announced).collect();
    let at = (generation, due_step(due).unwrap_or(-1));
    (
        coming,
        Fate {
            refused: traffic.refused.get(&at).cloned(),
            failed: traffic.failed.get(&at).cloned(),
        },
    )
}

fn due_step(due: Due) -> Option<i64> {
    match due {
        Due::Initial => None,
        Due::Exactly(step) => i64::try_from(step).ok(),
        Due::Within { oldest, .. } => Some(oldest),
    }
}

/// What is waited for; `newest` is the step of the newest push that is here.
fn awaited(due: Due, newest: Option<i64>) -> String {
    match (due, newest) {
        (Due::Initial, Some(newest @ 0..)) => {
            format!(
                "initial weights (a push of step -1; that of step {newest} is here and is held \
                for later steps)"
            )
        }
        (Due::Initial, _) => "initial weights (a push of step -1)".to_owned(),
        (Due::Exactly(push), _) => format!("weights pushed after step {push}"),
        (Due::Within { oldest, .. }, _) => format!("weights pushed after step {oldest} or later"),
    }
}

fn missing(step: u64, due: Due, weights: String, why: Why, limits: Limits, fate: Fate) -> Error {
    let failed = fate
        .failed
        .map(|cause| format!(" (taking them failed: {cause})"))
        .unwrap_or_default();
    let (reason, what) = match (why, fate.refused) {
        (Why::Deadline, None) => (
            Reason::NeedDeadline,
            format!(
                "did not come within {} s{failed}",
                limits.deadline.as_secs_f64()
            ),
        ),
        (Why::NobodyPushes, None) => (
            Reason::WeightsMissing,
            format!(
                "are not there, every rank has waited for {} s, and none has a push on its \
                way{failed}",
                limits.grace.as_secs_f64()
            ),
        ),
        (_, Some(refusal)) => (Reason::WeightsMissing, format!("were refused ({refusal})")),
    };
    let message = format!(
        "step {step} is scored with the {weights}, which {what}; push them, or give the run a \
        fallback{}",
        needs_the_step_before(step, due)
    );
    Error::new(reason, message).with("step", step)
}

/// A loop that fetches a batch before it has trained on the one before cannot have pushed what the
/// next step is scored with, where the lag allows no step between.
fn needs_the_step_before(step: u64, due: Due) -> String {
    match due_step(due).and_then(|due| u64::try_from(due).ok()) {
        Some(due) if due + 1 == step => format!(
            "; a loop that fetches step {step} before it has trained on step {due} (as accelerate \
            and \
             Lightning do) needs a lag of one step more, such as exact(1)"
        ),
        _ => String::new(),
    }
}
