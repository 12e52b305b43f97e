//! Waits for the weights with which a step is scored, or applies the fallback.
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

/// The weights for a step, or the way in which it is decided without weights.
pub(crate) enum Learner {
    NotAsked,
    Version(Published, Mode),
    Degraded(Mode),
}

impl Maker<'_> {
    /// Returns the weights that the lag requires, or the fallback. The wait holds no slot of a
    /// worker: the trainer may push these weights only after it has an earlier step, which needs
    /// the slot.
    ///
    /// Each turn of the loop reads everything anew, since any of it may have changed: a push was
    /// announced, published or refused, a rank came or went, or the run was rewound.
    /// `borrow_and_update` marks a value as seen before it is judged, so a change after that wakes
    /// the `select!`, and none is missed between the verdict and the wait.
    ///
    /// The traffic is read before the book. A push enters the book before it leaves the traffic, so
    /// in this order it is seen in at least one of them. In the other order a push that is
    /// published in between would be in neither, and the run would count as stalled at the very
    /// moment its weights arrive.
    pub(crate) async fn await_weights(&self, step: u64) -> Result<Learner> {
        let run = self.run;
        let due = self.due(step);
        let (mut book, mut traffic, mut demand) = (
            run.weights.book(),
            run.weights.traffic(),
            self.reporter.demand(),
        );
        let limits = Limits::of(self.spec);
        let (begun, mut logged) = (Instant::now(), false);
        loop {
            let (began, current) = run.began();
            let (coming, fate) = pushes(&traffic.borrow_and_update(), current, due);
            if let Some(published) = book.borrow_and_update().find(due, &began) {
                let mode = mode_of(due, published.version.step);
                return Ok(Learner::Version(published, mode));
            }
            let wanted = demand.borrow_and_update().clone();
            let verdict = verdict(&Moment {
                demand: &wanted,
                needed_for: wanted.since.map(|since| since.elapsed()),
                deadline: limits.deadline,
                stalled_for: wanted.stalled_since.map(|since| since.elapsed()),
                grace: limits.grace,
                due: due_step(due),
                // Initial weights are a single push too, so no other one serves.
                exact: !matches!(due, Due::Within { .. }),
                coming: &coming,
                refused: fate.refused.is_some(),
                fallback: self.spec.fallback(),
            });
            match verdict {
                Verdict::Wait => {}
                Verdict::FailWaiting(why) => self.reporter.fail_waiting(missing(
                    step,
                    due,
                    self.awaited(due),
                    why,
                    limits,
                    fate,
                )),
                Verdict::FallBack(_) => return Ok(self.fall_back(step)),
            }
            let patience = patience(&wanted, due_step(due)).filter(|_| !logged);
            let overdue = patience.map(|patience| begun + patience);
            if overdue.is_some_and(|at| at <= Instant::now()) {
                logged = true;
                self.log_wait(step, due, begun);
                continue;
            }
            let _parked = self.reporter.begin_waiting_for_trainer();
            // Only time can end a wait when nothing changes: the moment when the deadline or the
            // grace period ends. If ranks got their error already, they have left and there is
            // nothing to wake for.
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

    /// Returns the weights that `step` must be scored with.
    fn due(&self, step: u64) -> Due {
        let lag = self.spec.lag.unwrap_or_default();
        due(step, &lag, self.spec.push_every_steps)
    }

    fn log_wait(&self, step: u64, due: Due, begun: Instant) {
        let (waits_for, seconds) = (self.awaited(due), begun.elapsed().as_secs());
        let run = &self.run.id;
        tracing::warn!(run, step, seconds, waits_for, "a step waits for weights");
    }

    /// Returns a description of the awaited weights.
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
                // The run's state and the book are never locked at the same time, so that their
                // order cannot cause a deadlock.
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

/// Returns the mode of a step whose due weights are there. Those that were rolled back gave way to
/// older ones.
fn mode_of(due: Due, step: i64) -> Mode {
    if due_step(due).is_some_and(|oldest| step < oldest) {
        Mode::Stale
    } else {
        Mode::Normal
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

    /// Returns when the passing of time alone may next change the verdict.
    fn next_verdict(&self, demand: &Demand, now: Instant) -> Option<Instant> {
        let ends = [
            demand.since.map(|since| since + self.deadline),
            demand.stalled_since.map(|since| since + self.grace),
        ];
        ends.into_iter().flatten().filter(|at| *at > now).min()
    }
}

/// The outcome of the push that is due.
struct Fate {
    refused: Option<String>,
    /// Why it failed, if the cause may pass: the client sends the push again.
    failed: Option<String>,
}

/// Returns the steps of the generation's pushes that are under way, and the outcome of the due one.
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

/// Describes the awaited weights. `newest` is the step of the newest published push.
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
        (Why::NoPushAnnounced, None) => (
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

/// Returns advice for a lag of 0. A loop that fetches a batch before it has trained on the previous
/// one cannot push what the next step needs: each side waits for the other.
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
