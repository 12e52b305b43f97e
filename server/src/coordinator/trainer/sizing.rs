//! Estimates how many workers there should be, so that trainers do not wait for their batches.
use crate::metrics;
use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard},
    time::Duration,
};
use tokio::time::Instant;

/// Share of the newest observation in a running mean: the last ten steps or so count.
const NEWEST: f64 = 0.2;

/// A trainer counts once so many of its steps were seen: a few calls by hand have no pace.
const STEPS_SEEN_MIN: u64 = 3;

/// A trainer that has been silent for so many of its steps, and for so many seconds, does not
/// count: it may have ended. One that waits for a batch is there, however long it waits: it is the
/// one that needs workers most.
const STEPS_UNHEARD: f64 = 10.0;
const SECONDS_UNHEARD: f64 = 300.0;

/// The time to decide one step, in seconds.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Work {
    /// Workers that shared its slices.
    pub workers: f64,
    /// The slowest slice's time: reading, decoding, and both models' forward passes.
    pub scored: f64,
    /// The part of `scored` that can begin only when the weights are there: the learner's forward
    /// pass.
    pub learner: f64,
    /// The time that more workers do not shorten: planning, selection, the commit.
    pub rest: f64,
}

/// Workers (not a whole number) with which a trainer that takes `step_seconds` for a step, and
/// allows weights to lag `lag_steps` behind, would find each batch ready.
///
/// Two conditions must hold. Scoring must keep up: one step's slices, shared among the workers,
/// take no longer than the trainer's step, however much is done ahead. And it must be in time: the
/// learner's pass, selection and commit fit between the push that the step waits for and the step
/// itself, which are `lag_steps` apart. If no number of workers fulfils the second one (lag 0, or
/// selection alone takes longer), only the first one counts.
///
/// The estimate assumes that the stages of a slice follow one another and that slices shrink as
/// workers are added. Both assumptions err towards too many workers.
pub fn optimal_workers(work: &Work, step_seconds: f64, lag_steps: u32) -> f64 {
    let keeps_up = work.workers * work.scored / step_seconds;
    let room = f64::from(lag_steps) * step_seconds - work.rest;
    if room > 0.0 {
        keeps_up.max(work.workers * work.learner / room)
    } else {
        keeps_up
    }
}

/// Sets `superbatch_optimal_workers` from measurements of all open runs.
#[derive(Debug, Default)]
pub struct Sizing(Mutex<HashMap<String, Pace>>);

/// The measurements of one run.
#[derive(Debug, Default)]
struct Pace {
    work: Option<Work>,
    step_seconds: Option<f64>,
    /// The number of steps over which `step_seconds` was measured.
    steps_seen: u64,
    lag_steps: u32,
    /// The newest step that rank 0 has consumed, and when it first said so.
    consumed: Option<(u64, Instant)>,
    /// How long it has stood still since then. This time is subtracted: the trainer's own pace is
    /// wanted, and not the pace at which it gets batches.
    waited: Duration,
    /// When a rank last began or ended a call.
    heard: Option<Instant>,
    /// Held by each call that needs its batch now.
    waiting: Arc<()>,
}

/// A rank's call that waits for its batch, until it is dropped: also if the call is broken off.
#[derive(Debug)]
pub struct Wait {
    sizing: Arc<Sizing>,
    run: String,
    /// When the trainer began to stand still; `None` of a call that only shows that it is there.
    stands_still_since: Option<Instant>,
    /// `None` of a call that looks ahead.
    _waiting: Option<Arc<()>>,
}

impl Drop for Wait {
    fn drop(&mut self) {
        let now = Instant::now();
        let waited = self.stands_still_since.map(|since| now - since);
        // A run that was forgotten meanwhile stays so.
        if let Some(pace) = self.sizing.lock_paces().get_mut(&self.run) {
            pace.heard = Some(now);
            pace.waited += waited.unwrap_or_default();
        }
        self.sizing.set_gauge(now);
    }
}

impl Sizing {
    /// Notes that a step of `run` was decided.
    pub fn decided(&self, run: &str, work: Work, lag_steps: u32) {
        self.change_pace(run, |pace| pace.decided(work, lag_steps));
    }

    /// Notes that rank 0 has consumed `step`, at `now`.
    pub fn consumed(&self, run: &str, step: u64, now: Instant) {
        self.change_pace(run, |pace| pace.consumed(step, now));
    }

    /// Notes that a rank waits for a batch of `run` from `now` on. `need` tells whether it needs
    /// the batch now: one that looks ahead may keep its call open and hang. The time of `is_first`
    /// counts as the trainer's wait: all ranks go at the same pace, so rank 0 stands for them.
    pub fn begin_wait(
        self: &Arc<Self>,
        run: &str,
        is_first: bool,
        need: bool,
        now: Instant,
    ) -> Wait {
        let waiting = self.change_pace(run, |pace| {
            pace.heard = Some(now);
            need.then(|| pace.waiting.clone())
        });
        Wait {
            sizing: self.clone(),
            run: run.to_owned(),
            stands_still_since: (is_first && need).then_some(now),
            _waiting: waiting,
        }
    }

    /// Forgets a run that has left this process.
    pub fn forget(&self, run: &str) {
        self.lock_paces().remove(run);
        self.set_gauge(Instant::now());
    }

    /// Sets the metric, as of `now`.
    pub fn set_gauge(&self, now: Instant) {
        metrics::optimal_workers().set(workers(self.lock_paces().values(), now));
    }

    fn change_pace<T>(&self, run: &str, change: impl FnOnce(&mut Pace) -> T) -> T {
        let changed = change(self.lock_paces().entry(run.to_owned()).or_default());
        self.set_gauge(Instant::now());
        changed
    }

    fn lock_paces(&self) -> MutexGuard<'_, HashMap<String, Pace>> {
        self.0.lock().expect("no panic while held")
    }
}

impl Pace {
    fn decided(&mut self, new: Work, lag_steps: u32) {
        self.lag_steps = lag_steps;
        // Normalised to one worker, since the number of workers may change between two steps.
        let mean = |of: fn(&Work) -> f64| mean(self.work.as_ref().map(of), of(&new));
        let (scored, learner) = (
            mean(|w| w.workers * w.scored),
            mean(|w| w.workers * w.learner),
        );
        self.work = Some(Work {
            workers: 1.0,
            scored,
            learner,
            rest: mean(|w| w.rest),
        });
    }

    fn consumed(&mut self, step: u64, now: Instant) {
        self.heard = Some(now);
        if let Some((before, since)) = self.consumed {
            if step == before {
                return;
            }
            if step > before {
                let own = (now - since).saturating_sub(self.waited).as_secs_f64()
                    / (step - before) as f64;
                self.step_seconds = Some(mean(self.step_seconds, own));
                self.steps_seen = self.steps_seen.saturating_add(step - before);
            }
        }
        // A step below the last one means that the trainer went back; its pace is measured from
        // here.
        (self.consumed, self.waited) = (Some((step, now)), Duration::ZERO);
    }

    fn workers(&self, now: Instant) -> Option<f64> {
        let seen = self.steps_seen >= STEPS_SEEN_MIN;
        let step_seconds = self.step_seconds.filter(|seconds| seen && *seconds > 0.0)?;
        let is_waiting = Arc::strong_count(&self.waiting) > 1;
        let unheard = (now - self.heard?).as_secs_f64();
        if !is_waiting && unheard > SECONDS_UNHEARD.max(STEPS_UNHEARD * step_seconds) {
            return None;
        }
        Some(optimal_workers(
            self.work.as_ref()?,
            step_seconds,
            self.lag_steps,
        ))
    }
}

fn mean(before: Option<f64>, new: f64) -> f64 {
    before.map_or(new, |before| before + NEWEST * (new - before))
}

/// Returns the sum over all runs with a live trainer, as a whole number.
fn workers<'a>(paces: impl Iterator<Item = &'a Pace>, now: Instant) -> f64 {
    paces
        .filter_map(|pace| pace.workers(now))
        .fold(0.0, |all, workers| all + workers)
        .ceil()
}

#[cfg(test)]
mod tests {
    use super::*;

    const WORK: Work = Work {
        workers: 2.0,
        scored: 6.0,
        learner: 4.0,
        rest: 0.5,
    };

    #[test]
    fn scoring_must_keep_up_with_the_trainer_and_be_in_time() {
        // 12 worker-seconds a step; 8 of them in the time of the lag, less 0.5 s.
        assert_eq!(optimal_workers(&WORK, 3.0, 2), 4.0, "it must keep up");
        assert_eq!(
            optimal_workers(&WORK, 1.5, 1),
            8.0,
            "both bounds are the same here"
        );
        assert_eq!(optimal_workers(&WORK, 1.0, 1), 16.0, "and be in time");
        assert_eq!(
            optimal_workers(&WORK, 1.0, 0),
            12.0,
            "which no number of workers can without a lag"
        );
        assert_eq!(
            optimal_workers(&WORK, 0.5, 1),
            24.0,
            "or where selection takes as long as the trainer"
        );
    }

    #[test]
    fn the_trainers_own_time_is_what_is_left_of_its_steps_without_its_waits() {
        let (mut pace, start) = (Pace::default(), Instant::now());
        let at = |seconds| start + Duration::from_secs(seconds);
        pace.consumed(4, at(0));
        pace.waited += Duration::from_secs(6);
        assert_eq!(pace.step_seconds, None, "one cursor is no step");
        pace.consumed(4, at(7));
        pace.consumed(6, at(10));
        assert_eq!(pace.step_seconds, Some(2.0), "10 s less 6 s for two steps");
        pace.consumed(7, at(17));
        assert_eq!(
            pace.step_seconds,
            Some(3.0),
            "a fifth of the way from 2 to 7"
        );
        pace.consumed(3, at(99));
        pace.consumed(4, at(102));
        assert_eq!(pace.step_seconds, Some(3.0), "going back is no step");
    }

    #[test]
    fn work_is_a_running_mean_whatever_the_workers() {
        let (mut pace, now) = (Pace::default(), Instant::now());
        pace.decided(WORK, 1);
        assert_eq!(pace.workers(now), None, "nothing is known of the trainer");
        (pace.step_seconds, pace.heard) = (Some(1.5), Some(now));
        pace.steps_seen = STEPS_SEEN_MIN - 1;
        assert_eq!(pace.workers(now), None, "a few probes are no pace");
        pace.steps_seen += 1;
        assert_eq!(pace.workers(now), Some(8.0));
        pace.decided(
            Work {
                workers: 4.0,
                scored: 3.0,
                learner: 2.0,
                rest: 0.5,
            },
            1,
        );
        assert_eq!(
            pace.workers(now),
            Some(8.0),
            "twice the workers, half the time"
        );
    }

    /// A trainer that was heard of at `start`.
    fn pace(step_seconds: f64, start: Instant) -> Pace {
        Pace {
            work: Some(WORK),
            step_seconds: Some(step_seconds),
            steps_seen: STEPS_SEEN_MIN,
            lag_steps: 1,
            consumed: Some((3, start)),
            heard: Some(start),
            ..Pace::default()
        }
    }

    #[test]
    fn a_trainer_that_is_gone_needs_no_workers() {
        let start = Instant::now();
        let (quick, slow) = (pace(1.5, start), pace(60.0, start));
        let at = |seconds| {
            workers(
                [&quick, &slow].into_iter(),
                start + Duration::from_secs(seconds),
            )
        };
        assert_eq!([300, 301, 601].map(at), [9.0, 1.0, 0.0]);
    }

    #[test]
    fn a_trainer_that_starves_needs_its_workers_however_long_it_waits() {
        let (start, hour) = (Instant::now(), Duration::from_secs(3600));
        let pace = pace(1.5, start);
        let wait = pace.waiting.clone();
        assert_eq!(pace.workers(start + hour), Some(8.0), "it stands still");
        drop(wait);
        assert_eq!(
            pace.workers(start + hour),
            None,
            "it was last heard of then"
        );
    }

    #[test]
    fn a_trainer_that_hangs_while_it_looks_ahead_needs_none() {
        let (sizing, start) = (Arc::<Sizing>::default(), Instant::now());
        let hour = start + Duration::from_secs(3600);
        let run = "a".to_owned();
        sizing.lock_paces().insert(run, pace(1.5, start));
        let workers_of = || sizing.lock_paces()["a"].workers(hour);
        let ahead = sizing.begin_wait("a", true, false, start);
        assert_eq!(workers_of(), None, "only its look-ahead call is open");
        let needs = sizing.begin_wait("a", true, true, start);
        assert_eq!(workers_of(), Some(8.0), "it stands still");
        drop((ahead, needs));
    }

    #[test]
    fn a_wait_is_noted_when_its_call_ends_and_not_for_a_run_that_is_gone() {
        let sizing = Arc::<Sizing>::default();
        let start = Instant::now() - Duration::from_secs(7);
        let looks_on = sizing.begin_wait("a", false, true, start);
        let (stands, gone) = (
            sizing.begin_wait("a", true, true, start),
            sizing.begin_wait("b", true, true, start),
        );
        drop(looks_on);
        let of = |run: &str| sizing.lock_paces().get(run).map(|pace| pace.waited);
        assert_eq!(
            of("a"),
            Some(Duration::ZERO),
            "only the first rank's counts"
        );
        drop(stands);
        assert!(of("a").is_some_and(|waited| waited >= Duration::from_secs(7)));
        let heard = sizing.lock_paces()["a"].heard;
        assert!(heard.is_some_and(|heard| heard >= start + Duration::from_secs(7)));
        sizing.forget("b");
        drop(gone);
        assert_eq!(of("b"), None);
    }
}
