//! What to do about a step whose weights are not there: wait on, give up, or fall back. Pure.
use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};
use superbatch_proto::v1::Fallback;
use tokio::time::Instant;

/// Who waits for a step.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Demand {
    /// Ranks that stand still for it.
    pub needing: BTreeMap<u64, u32>,
    /// Calls that needed the step so far.
    pub calls: u64,
    pub world_size: u32,
    /// The newest step whose push each rank says it has begun, by its last word: one that came to
    /// nothing is taken back.
    pub pushing: BTreeMap<u32, i64>,
    /// When the first of them began to stand still.
    pub since: Option<Instant>,
    /// When the step was last asked for.
    pub asked: Option<Instant>,
}

/// What is known at one moment.
#[derive(Debug, Clone)]
pub struct Moment<'a> {
    pub demand: &'a Demand,
    /// How long some rank has stood still; `None` while none does.
    pub needed_for: Option<Duration>,
    pub deadline: Duration,
    /// The step whose push is due; `None` for initial weights.
    pub due: Option<i64>,
    /// No other push will do than that of the due step.
    pub exact: bool,
    /// Steps whose pushes have reached us in part.
    pub staging: &'a BTreeSet<i64>,
    /// Whether the due push came and was refused. That a rank announced it is no hope then.
    pub refused: bool,
    pub fallback: Fallback,
}

/// What to do, and why.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    Wait,
    /// Tell the ranks that the weights are missing, and go on waiting.
    TellRanks(Why),
    FallBack(Why),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Why {
    Deadline,
    /// Every rank stands still and no push is on its way: waiting cannot help.
    NobodyPushes,
}

/// A wait for weights that is longer is worth a line in the log: where the trainer stands still or
/// has pushed nothing yet.
const TOLD_AFTER: Duration = Duration::from_secs(15);
/// Where the trainer is busy: one step of it may take so long.
const TOLD_AFTER_BUSY: Duration = Duration::from_secs(60);

/// How long a step may wait for the push `due` (`None`: for initial weights) before the log says
/// so. `None` where nobody has asked for the step.
pub fn patience(demand: &Demand, due: Option<i64>) -> Option<Duration> {
    demand.asked?;
    let stands_still = demand.since.is_some() || due.is_none_or(|step| step < 0);
    Some(if stands_still {
        TOLD_AFTER
    } else {
        TOLD_AFTER_BUSY
    })
}

/// Decides. All ranks standing still with no push on its way needs no deadline; else the deadline
/// runs while some rank needs the step.
pub fn verdict(moment: &Moment) -> Verdict {
    let Some(needed_for) = moment.needed_for else {
        return Verdict::Wait;
    };
    let demand = moment.demand;
    let due = moment.due.unwrap_or(-1);
    let all = demand.world_size > 0
        && demand.needing.values().collect::<BTreeSet<_>>().len() >= demand.world_size as usize;
    let staged = moment
        .staging
        .range(due..)
        .next()
        .is_some_and(|step| !moment.exact || *step == due);
    // Of several that would do, the oldest may be refused and a later one still come.
    let hopeless = |step: i64| moment.refused && (moment.exact || step == due);
    let announced = demand
        .pushing
        .values()
        .any(|step| *step >= due && !hopeless(*step));
    let on_its_way = staged || announced;
    let why = match (needed_for >= moment.deadline, all && !on_its_way) {
        (_, true) => Why::NobodyPushes,
        (true, false) => Why::Deadline,
        (false, false) => return Verdict::Wait,
    };
    if moment.fallback == Fallback::Wait {
        Verdict::TellRanks(why)
    } else {
        Verdict::FallBack(why)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn decide(
        needing: &[u32],
        seconds: u64,
        pushing: Option<i64>,
        staging: &[i64],
        fallback: Fallback,
    ) -> Verdict {
        let demand = Demand {
            needing: (0..).zip(needing.iter().copied()).collect(),
            world_size: 2,
            pushing: pushing.map(|step| (0, step)).into_iter().collect(),
            ..Demand::default()
        };
        verdict(&Moment {
            demand: &demand,
            needed_for: (!needing.is_empty()).then(|| Duration::from_secs(seconds)),
            deadline: Duration::from_secs(60),
            due: Some(7),
            exact: false,
            staging: &staging.iter().copied().collect(),
            refused: false,
            fallback,
        })
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
            Verdict::TellRanks(Why::Deadline)
        );
    }

    #[test]
    fn nobody_pushing_ends_the_wait_at_once() {
        assert_eq!(
            decide(&[0, 1], 0, None, &[], Fallback::Uniform),
            Verdict::FallBack(Why::NobodyPushes)
        );
        assert_eq!(
            decide(&[0, 1], 0, Some(6), &[6], Fallback::Uniform),
            Verdict::FallBack(Why::NobodyPushes)
        );
        assert_eq!(
            decide(&[0, 1], 0, Some(7), &[], Fallback::Uniform),
            Verdict::Wait
        );
        assert_eq!(
            decide(&[0, 1], 0, None, &[7], Fallback::Uniform),
            Verdict::Wait
        );
        assert_eq!(
            decide(&[0, 1], 60, None, &[7], Fallback::Uniform),
            Verdict::FallBack(Why::Deadline)
        );
    }

    #[test]
    fn the_log_tells_of_a_wait_that_somebody_has() {
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
            Some(TOLD_AFTER),
            "a loader that reads ahead stands still before the first push"
        );
        assert_eq!(
            [Some(-1), Some(3)].map(|due| patience(&asked, due)),
            [Some(TOLD_AFTER), Some(TOLD_AFTER_BUSY)]
        );
        assert_eq!(patience(&needed, Some(3)), Some(TOLD_AFTER));
    }

    #[test]
    fn a_refused_push_is_not_waited_for() {
        let demand = Demand {
            needing: [(1, 0)].into(),
            world_size: 1,
            pushing: [(0, 9)].into(),
            ..Demand::default()
        };
        let decide = |refused, exact, staging: &[i64]| {
            verdict(&Moment {
                demand: &demand,
                needed_for: Some(Duration::ZERO),
                deadline: Duration::from_secs(60),
                due: Some(7),
                exact,
                staging: &staging.iter().copied().collect(),
                refused,
                fallback: Fallback::Uniform,
            })
        };
        assert_eq!(decide(false, true, &[]), Verdict::Wait);
        assert_eq!(
            decide(true, true, &[]),
            Verdict::FallBack(Why::NobodyPushes)
        );
        assert_eq!(
            decide(true, true, &[8]),
            Verdict::FallBack(Why::NobodyPushes),
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
