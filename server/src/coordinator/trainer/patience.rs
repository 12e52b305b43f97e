//! Decides about a step whose weights are missing: wait on, fail the waiting calls, or fall back.
//! Pure.
//!
//! Waiting is right as long as the push can still come, and wrong from the moment when it cannot: a
//! trainer whose ranks all wait for the step trains nothing, so it pushes nothing, and the two
//! would wait for each other up to the deadline. The decision therefore goes by what the trainer
//! can do, and not by time alone: which ranks stand still, which pushes were announced, which have
//! arrived in part. This information comes by other connections than the request for the step, and
//! may be late; the grace period is for that. To conclude too early is the worse mistake. A
//! fallback is written into a receipt and cannot be taken back, while a stall that is noticed late
//! costs seconds.
use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};
use superbatch_proto::v1::Fallback;
use tokio::time::Instant;

/// The ranks that wait for a step.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Demand {
    /// The calls that need it, by number. Calls and not ranks: a rank whose connection broke asks
    /// again, and the end of the old call must not remove the new one.
    needing: BTreeMap<u64, Need>,
    /// The number of calls so far that needed the step.
    calls: u64,
    pub world_size: u32,
    /// The newest step whose push each rank says it has begun, by its last request. A rank
    /// withdraws a push that failed by its next request.
    pub pushing: BTreeMap<u32, i64>,
    /// When the first of the calls that need the step arrived.
    pub since: Option<Instant>,
    /// Since when all ranks stand still for the step; `None` while not all do.
    pub stalled_since: Option<Instant>,
    /// When a rank last asked for the step.
    pub asked: Option<Instant>,
}

/// One call that needs a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Need {
    pub rank: u32,
    /// Whether the rank has trained on all batches before this one. A rank that still holds a batch
    /// may train on it and push, while its loader asks for the next one.
    pub stands_still: bool,
}

impl Demand {
    /// Adds a call that needs the step, and returns its number.
    pub fn join(&mut self, need: Need, now: Instant) -> u64 {
        self.calls += 1;
        self.needing.insert(self.calls, need);
        self.since.get_or_insert(now);
        if self.all_stand_still() {
            self.stalled_since.get_or_insert(now);
        }
        self.calls
    }

    /// Removes a call. Returns whether it was present.
    pub fn leave(&mut self, call: u64) -> bool {
        let was = self.needing.remove(&call).is_some();
        if self.needing.is_empty() {
            self.since = None;
        }
        if !self.all_stand_still() {
            self.stalled_since = None;
        }
        was
    }

    /// Removes all calls.
    pub fn leave_all(&mut self) {
        self.needing.clear();
        (self.since, self.stalled_since) = (None, None);
    }

    /// Returns the demand for another start of the trainer. The count of calls goes on: a late drop
    /// of an old call must not remove a new one of the same number.
    pub fn for_new_start(&self) -> Self {
        Self {
            calls: self.calls,
            ..Self::default()
        }
    }

    fn all_stand_still(&self) -> bool {
        // Distinct ranks are counted and not calls: two calls of one rank must not pass for two
        // ranks, else a stall would be declared while the other rank is still training.
        let still = self.needing.values().filter(|need| need.stands_still);
        let ranks: BTreeSet<u32> = still.map(|need| need.rank).collect();
        self.world_size > 0 && ranks.len() >= self.world_size as usize
    }
}

/// Everything that the decision depends on, at one moment.
#[derive(Debug, Clone)]
pub struct Moment<'a> {
    pub demand: &'a Demand,
    /// How long some call has needed the step; `None` while no call does.
    pub needed_for: Option<Duration>,
    pub deadline: Duration,
    /// How long all ranks have stood still for the step; `None` while not all do.
    pub stalled_for: Option<Duration>,
    /// How long they must have stood still to count as stalled: the announcement of a push may
    /// still be under way on another connection.
    pub grace: Duration,
    /// The step whose push is due; `None` for initial weights.
    pub due: Option<i64>,
    /// Whether only the push of the due step serves.
    pub exact: bool,
    /// Steps whose pushes were announced, or have arrived in part.
    pub coming: &'a BTreeSet<i64>,
    /// Whether the due push arrived and was refused. An announcement of it then counts for nothing.
    pub refused: bool,
    pub fallback: Fallback,
}

/// The decision, with its reason.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    Wait,
    /// Send the waiting ranks an error that names the missing weights, and wait on.
    FailWaiting(Why),
    FallBack(Why),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Why {
    Deadline,
    /// Every rank has stood still for the grace period and no push is under way, so waiting cannot
    /// help.
    NoPushAnnounced,
}

/// A longer wait for weights is logged, if the trainer stands still or has pushed nothing yet.
const LOG_AFTER: Duration = Duration::from_secs(15);
/// The same, if the trainer is busy: one of its steps may take this long.
const LOG_AFTER_BUSY: Duration = Duration::from_secs(60);

/// Returns how long a step may wait for the push `due` (`None`: initial weights) before the wait is
/// logged. `None` if no rank has asked for the step.
pub fn patience(demand: &Demand, due: Option<i64>) -> Option<Duration> {
    demand.asked?;
    let stands_still = demand.since.is_some() || due.is_none_or(|step| step < 0);
    Some(if stands_still {
        LOG_AFTER
    } else {
        LOG_AFTER_BUSY
    })
}

/// Decides. If all ranks have stood still for the grace period and no push is under way, the step
/// does not wait for its deadline. Otherwise the deadline runs while some rank needs the step.
pub fn verdict(moment: &Moment) -> Verdict {
    let Some(needed_for) = moment.needed_for else {
        return Verdict::Wait;
    };
    // With `at_most` any later push serves as well, so a newer one that is under way is a reason to
    // wait. With `exact` it is not: a later push does not decide this step.
    let due = moment.due.unwrap_or(-1);
    let coming = moment
        .coming
        .range(due..)
        .next()
        .is_some_and(|step| !moment.exact || *step == due);
    // If several pushes serve, the oldest may be refused and a later one may still come.
    let hopeless = |step: i64| moment.refused && (moment.exact || step == due);
    let said = moment
        .demand
        .pushing
        .values()
        .any(|step| *step >= due && !hopeless(*step));
    let stalled = moment.stalled_for.is_some_and(|long| long >= moment.grace) && !coming && !said;
    let why = match (needed_for >= moment.deadline, stalled) {
        (_, true) => Why::NoPushAnnounced,
        (true, false) => Why::Deadline,
        (false, false) => return Verdict::Wait,
    };
    if moment.fallback == Fallback::Wait {
        Verdict::FailWaiting(why)
    } else {
        Verdict::FallBack(why)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const STILL: Need = Need {
        rank: 0,
        stands_still: true,
    };
    const HOLDS: Need = Need {
        rank: 1,
        stands_still: false,
    };

    /// A trainer of two ranks, which began to need step 8 or 9 so many seconds ago.
    fn demand(needing: &[Need], seconds_ago: &[u64], now: Instant) -> Demand {
        let mut demand = Demand {
            world_size: 2,
            ..Demand::default()
        };
        for (need, ago) in needing.iter().zip(seconds_ago) {
            demand.join(*need, now - Duration::from_secs(*ago));
        }
        demand
    }

    fn judge(demand: &Demand, coming: &[i64], fallback: Fallback, now: Instant) -> Verdict {
        verdict(&Moment {
            demand,
            needed_for: demand.since.map(|since| now - since),
            deadline: Duration::from_secs(60),
            stalled_for: demand.stalled_since.map(|since| now - since),
            grace: Duration::from_secs(5),
            due: Some(7),
            exact: false,
            coming: &coming.iter().copied().collect(),
            refused: false,
            fallback,
        })
    }

    /// All of the ranks given have stood still for so many seconds.
    fn decide(
        needing: &[u32],
        seconds: u64,
        pushing: Option<i64>,
        coming: &[i64],
        fallback: Fallback,
    ) -> Verdict {
        let now = Instant::now() + Duration::from_secs(3600);
        let needs: Vec<Need> = needing
            .iter()
            .map(|rank| Need {
                rank: *rank,
                ..STILL
            })
            .collect();
        let mut demand = demand(&needs, &vec![seconds; needs.len()], now);
        demand.pushing = pushing.map(|step| (0, step)).into_iter().collect();
        judge(&demand, coming, fallback, now)
    }

    #[test]
    fn a_stall_begins_with_the_last_rank_and_is_told_after_the_grace() {
        let now = Instant::now() + Duration::from_secs(3600);
        let ranks = [STILL, Need { rank: 1, ..STILL }];
        let decide = |ago: &[u64]| judge(&demand(&ranks, ago, now), &[], Fallback::Wait, now);
        assert_eq!(decide(&[50, 4]), Verdict::Wait);
        assert_eq!(decide(&[50, 5]), Verdict::FailWaiting(Why::NoPushAnnounced));
    }

    #[test]
    fn a_rank_that_holds_a_batch_is_no_part_of_a_stall() {
        let now = Instant::now() + Duration::from_secs(3600);
        let decide = |ago| {
            judge(
                &demand(&[STILL, HOLDS], &[ago; 2], now),
                &[],
                Fallback::Wait,
                now,
            )
        };
        assert_eq!(decide(59), Verdict::Wait);
        assert_eq!(decide(60), Verdict::FailWaiting(Why::Deadline));
    }

    #[test]
    fn a_rank_that_leaves_ends_the_stall() {
        let now = Instant::now() + Duration::from_secs(3600);
        let ranks = [STILL, Need { rank: 1, ..STILL }];
        let mut demand = demand(&ranks, &[30, 30], now);
        assert!(demand.leave(2) && !demand.leave(2));
        assert_eq!(judge(&demand, &[], Fallback::Wait, now), Verdict::Wait);
        demand.join(ranks[1], now - Duration::from_secs(1));
        assert_eq!(judge(&demand, &[], Fallback::Wait, now), Verdict::Wait);
    }

    #[test]
    fn no_deadline_runs_while_the_trainer_works() {
        assert_eq!(
            decide(&[], 1000, None, &[], Fallback::Uniform),
            Verdict::Wait
        );
    }

    #[test]
    fn a_deadline_runs_while_one_rank_needs_the_step() {
        assert_eq!(
            decide(&[0], 59, None, &[], Fallback::Uniform),
            Verdict::Wait
        );
        assert_eq!(
            decide(&[0], 60, None, &[], Fallback::Uniform),
            Verdict::FallBack(Why::Deadline)
        );
        assert_eq!(
            decide(&[0], 60, None, &[], Fallback::Wait),
            Verdict::FailWaiting(Why::Deadline)
        );
    }

    #[test]
    fn a_stall_without_a_push_ends_after_the_grace() {
        assert_eq!(
            decide(&[0, 1], 4, None, &[], Fallback::Uniform),
            Verdict::Wait
        );
        assert_eq!(
            decide(&[0, 1], 5, None, &[], Fallback::Uniform),
            Verdict::FallBack(Why::NoPushAnnounced)
        );
        assert_eq!(
            decide(&[0, 1], 5, Some(6), &[6], Fallback::Uniform),
            Verdict::FallBack(Why::NoPushAnnounced)
        );
        assert_eq!(
            decide(&[0, 1], 59, Some(7), &[], Fallback::Uniform),
            Verdict::Wait
        );
        assert_eq!(
            decide(&[0, 1], 59, None, &[7], Fallback::Uniform),
            Verdict::Wait
        );
        assert_eq!(
            decide(&[0, 1], 60, None, &[7], Fallback::Uniform),
            Verdict::FallBack(Why::Deadline)
        );
    }

    #[test]
    fn waits_of_asked_steps_are_logged() {
        let asked = Demand {
            asked: Some(Instant::now()),
            ..Demand::default()
        };
        let needed = Demand {
            since: asked.asked,
            ..asked.clone()
        };
        assert_eq!(
            patience(&Demand::default(), None),
            None,
            "a step that was prepared may wait as long as it likes"
        );
        assert_eq!(
            patience(&asked, None),
            Some(LOG_AFTER),
            "a loader that reads ahead stands still before the first push"
        );
        assert_eq!(
            [Some(-1), Some(3)].map(|due| patience(&asked, due)),
            [Some(LOG_AFTER), Some(LOG_AFTER_BUSY)]
        );
        assert_eq!(patience(&needed, Some(3)), Some(LOG_AFTER));
    }

    #[test]
    fn a_refused_push_is_not_waited_for() {
        let now = Instant::now();
        let mut demand = Demand {
            world_size: 1,
            pushing: [(0, 9)].into(),
            ..Demand::default()
        };
        demand.join(STILL, now);
        let decide = |refused, exact, coming: &[i64]| {
            verdict(&Moment {
                demand: &demand,
                needed_for: Some(Duration::ZERO),
                deadline: Duration::from_secs(60),
                stalled_for: Some(Duration::ZERO),
                grace: Duration::ZERO,
                due: Some(7),
                exact,
                coming: &coming.iter().copied().collect(),
                refused,
                fallback: Fallback::Uniform,
            })
        };
        assert_eq!(decide(false, true, &[]), Verdict::Wait);
        assert_eq!(
            decide(true, true, &[]),
            Verdict::FallBack(Why::NoPushAnnounced)
        );
        assert_eq!(
            decide(true, true, &[8]),
            Verdict::FallBack(Why::NoPushAnnounced),
            "a later push is not the due one"
        );
        assert_eq!(
            decide(true, false, &[8]),
            Verdict::Wait,
            "with at_most a later one helps"
        );
        assert_eq!(decide(true, true, &[7]), Verdict::Wait, "it is sent again");
        assert_eq!(
            decide(true, false, &[]),
            Verdict::Wait,
            "with at_most the announced push of step 9 still helps"
        );
    }
}
