//! All that a small run can do, tried: ranks, pushes, deciding, an owner that lost the run and goes
//! on, and ends of coordinator and trainer at any moment. The rules are the real ones ([`Members`],
//! [`Book`], [`due`], [`missing`], [`verdict`]); what lies in storage is a map whose keys are
//! created once.
use crate::coordinator::{
    facts::chain::Began,
    trainer::{
        patience::{Demand, Moment, Need, Verdict, verdict},
        ranks::{Asking, Bounds, Members},
    },
    weights::{Book, Due, Published, Snapshot, due, missing},
};
use std::{
    collections::{BTreeMap, BTreeSet, HashMap, VecDeque},
    time::Duration,
};
use superbatch_proto::v1::{Fallback, Lag, WeightsVersion, lag::Bound};
use tokio::time::Instant;

const CHAIN: &[Began] = &[Began {
    generation: 0,
    step: 0,
}];

#[derive(Clone, Copy, Debug)]
struct Size {
    steps: u64,
    world: u32,
    /// The world size of a trainer that comes back.
    world_after: u32,
    lag: Bound,
    max_ahead: u32,
    /// How often the owner may end, be replaced without knowing it, and the trainer may end.
    ends: [u8; 3],
}

/// A decision: the step of the weights, and which owner made it.
type Decision = (i64, u8);

/// What a coordinator knows in memory.
#[derive(Clone, Debug)]
struct Owner {
    number: u8,
    members: Members,
    wanted: BTreeSet<u64>,
    /// Steps of the pushes that it knows to be published.
    book: BTreeSet<i64>,
}

#[derive(Clone, Debug)]
struct State {
    // In storage.
    receipts: BTreeMap<u64, Decision>,
    pushes: BTreeSet<i64>,
    incarnations: Vec<String>,
    // In processes.
    owner: Owner,
    /// A former owner that does not know yet that it lost the run.
    former: Option<Owner>,
    trainer: u8,
    world: u32,
    /// The step that the trainer is at, and what each rank holds of it.
    at: u64,
    held: Vec<Option<Decision>>,
    /// Whether each rank has asked for the step, in this owner's life.
    asks: Vec<bool>,
    /// Pushes that were called for, oldest first.
    uploading: VecDeque<i64>,
    ends_left: [u8; 3],
}

impl State {
    fn begin(size: Size) -> Self {
        let owner = Owner {
            number: 0,
            members: Members::new(Vec::new(), None),
            wanted: BTreeSet::new(),
            book: BTreeSet::from([-1]),
        };
        Self {
            receipts: BTreeMap::new(),
            pushes: BTreeSet::from([-1]),
            incarnations: Vec::new(),
            owner,
            former: None,
            trainer: 0,
            world: size.world,
            at: 0,
            held: vec![None; size.world as usize],
            asks: vec![false; size.world as usize],
            uploading: VecDeque::new(),
            ends_left: size.ends,
        }
    }

    fn is_done(&self, size: Size) -> bool {
        self.at == size.steps
    }

    fn committed(&self) -> Option<u64> {
        self.receipts.keys().next_back().copied()
    }

    /// Everything that can happen next.
    fn next(&self, size: Size) -> Vec<Self> {
        let mut next = Vec::new();
        if !self.is_done(size) {
            for rank in 0..self.world {
                next.extend(self.ask(size, rank, 0, true));
                next.extend(self.ask(size, rank, 1, false));
                next.extend(self.receive(rank));
            }
            next.extend(self.train());
        }
        next.extend(self.decide(size, false));
        next.extend(self.decide(size, true));
        next.extend(self.publish());
        next.extend(self.owner_ends());
        next.extend(self.owner_is_replaced());
        next.extend(self.trainer_ends(size));
        next
    }

    /// A rank asks for its step, or for the one after while it holds its own.
    fn ask(&self, size: Size, rank: u32, ahead: u64, need: bool) -> Option<Self> {
        let (step, holds) = (self.at + ahead, self.held[rank as usize].is_some());
        if step >= size.steps || need == holds || (need && self.asks[rank as usize]) {
            return None;
        }
        let mut after = self.clone();
        let asking = Asking {
            step,
            rank,
            world_size: self.world,
            incarnation: self.trainer.to_string(),
            need,
            consumed_through: self.at.checked_sub(1),
            held: 0,
        };
        let bounds = Bounds {
            committed: self.committed(),
            max_ahead: size.max_ahead,
        };
        match after.owner.members.admit(&asking, bounds) {
            Ok(is_new) => {
                if is_new {
                    after.incarnations.push(asking.incarnation);
                    after.owner.wanted.clear();
                }
            }
            Err(error) => {
                assert!(
                    !need,
                    "a rank that stands still is refused: {error}\n{self:#?}"
                );
                return None;
            }
        }
        after.owner.wanted.insert(step);
        if need {
            after.asks[rank as usize] = true;
        }
        Some(after)
    }

    fn receive(&self, rank: u32) -> Option<Self> {
        let rank = rank as usize;
        let decision = *self.receipts.get(&self.at)?;
        if !self.asks[rank] || self.held[rank].is_some() {
            return None;
        }
        let others = self.held.iter().flatten();
        assert!(
            others.into_iter().all(|other| *other == decision),
            "{self:#?}"
        );
        let mut after = self.clone();
        after.held[rank] = Some(decision);
        Some(after)
    }

    /// All ranks train on what they hold, and call for a push.
    fn train(&self) -> Option<Self> {
        if self.held.iter().any(Option::is_none) {
            return None;
        }
        let mut after = self.clone();
        after.uploading.push_back(self.at as i64);
        after.at += 1;
        after.held.fill(None);
        after.asks.fill(false);
        Some(after)
    }

    /// An owner decides the first step that is wanted and whose weights it knows.
    fn decide(&self, size: Size, former: bool) -> Vec<Self> {
        let deciding = if former {
            self.former.as_ref()
        } else {
            Some(&self.owner)
        };
        let Some(owner) = deciding else {
            return Vec::new();
        };
        let lag = Lag {
            bound: Some(size.lag),
        };
        let book = book(&owner.book);
        let mut next = Vec::new();
        for step in owner
            .wanted
            .iter()
            .filter(|step| !self.receipts.contains_key(*step))
        {
            let due = due(*step, &lag, 1);
            let Some(found) = book.find(due, CHAIN) else {
                if !former {
                    self.check_wait(*step, due);
                }
                continue;
            };
            let with = found.version.step;
            check_lag(*step, with, size.lag);
            let mut after = self.clone();
            let was = after.receipts.insert(*step, (with, owner.number));
            assert!(was.is_none(), "step {step} was decided twice");
            next.push(after);
        }
        next
    }

    /// A step whose weights are not there waits for them, and never in vain.
    fn check_wait(&self, step: u64, due: Due) {
        let mut demand = Demand::default();
        demand.world_size = self.world;
        for rank in (0..self.world).filter(|_| step == self.at) {
            if self.asks[rank as usize] && self.held[rank as usize].is_none() {
                let stands_still = true;
                demand.join(Need { rank, stands_still }, Instant::now());
            }
        }
        let coming = self.uploading.iter().copied().collect();
        let (due, exact) = match due {
            Due::Initial => (None, true),
            Due::Exactly(step) => (Some(step as i64), true),
            Due::Within { oldest, .. } => (Some(oldest), false),
        };
        let said = verdict(&Moment {
            demand: &demand,
            needed_for: demand.since.map(|_| Duration::ZERO),
            deadline: Duration::MAX,
            stalled_for: demand.stalled_since.map(|_| Duration::ZERO),
            grace: Duration::ZERO,
            due,
            exact,
            coming: &coming,
            refused: false,
            fallback: Fallback::Wait,
        });
        assert_eq!(
            said,
            Verdict::Wait,
            "step {step} waits for what never comes\n{self:#?}"
        );
    }

    fn publish(&self) -> Option<Self> {
        let mut after = self.clone();
        let step = after.uploading.pop_front()?;
        after.pushes.insert(step);
        after.owner.book.insert(step);
        Some(after)
    }

    /// A new process knows what lies in storage.
    fn loaded(&self, number: u8) -> Owner {
        Owner {
            number,
            members: Members::new(self.incarnations.clone(), self.committed()),
            wanted: BTreeSet::new(),
            book: self.pushes.clone(),
        }
    }

    fn owner_ends(&self) -> Option<Self> {
        let mut after = self.clone();
        after.ends_left[0] = self.ends_left[0].checked_sub(1)?;
        after.owner = self.loaded(self.owner.number + 1);
        after.asks.fill(false);
        Some(after)
    }

    /// The owner is paused, and another one takes the run over.
    fn owner_is_replaced(&self) -> Option<Self> {
        let mut after = self.clone();
        after.ends_left[1] = self.ends_left[1].checked_sub(1)?;
        after.former = Some(self.owner.clone());
        after.owner = self.loaded(self.owner.number + 1);
        after.asks.fill(false);
        Some(after)
    }

    /// The trainer ends, and comes back at its last checkpoint, of this step or of the one before.
    /// It repeats the pushes that were on their way.
    fn trainer_ends(&self, size: Size) -> Vec<Self> {
        let Some(left) = self.ends_left[2].checked_sub(1) else {
            return Vec::new();
        };
        let resumes = [Some(self.at), self.at.checked_sub(1)];
        let resume = |at: u64| {
            let mut after = self.clone();
            let world = size.world_after as usize;
            after.ends_left[2] = left;
            (after.trainer, after.world, after.at) = (self.trainer + 1, size.world_after, at);
            (after.held, after.asks) = (vec![None; world], vec![false; world]);
            let (lag, book) = (
                Lag {
                    bound: Some(size.lag),
                },
                book(&self.owner.book),
            );
            let lost = missing(
                at,
                &lag,
                1,
                |step| step < size.steps && !self.receipts.contains_key(&step),
                |due| book.find(due, CHAIN).is_some(),
            );
            after.uploading = lost.into();
            after
        };
        resumes.into_iter().flatten().map(resume).collect()
    }

    fn key(&self) -> String {
        format!("{self:?}")
    }
}

fn check_lag(step: u64, with: i64, lag: Bound) {
    let age = step as i64 - 1 - with;
    match lag {
        Bound::Exact(n) => {
            assert_eq!(
                with,
                (step as i64 - 1 - i64::from(n)).max(-1),
                "step {step}"
            );
        }
        Bound::AtMost(n) => assert!((0..=i64::from(n)).contains(&age), "step {step}, {with}"),
    }
}

fn book(pushes: &BTreeSet<i64>) -> Book {
    let mut book = Book::default();
    for (version, step) in (1..).zip(pushes) {
        let published = Published {
            version: WeightsVersion {
                version,
                step: *step,
                generation: 0,
                digest: step.to_string(),
            },
            snapshot_uri: String::new(),
            logit_scale: 1.0,
            logit_bias: None,
        };
        let kept = Snapshot::Kept(step.to_string());
        book.insert(step.to_string(), published, kept);
    }
    book
}

/// Tries everything, and returns the number of states.
fn explore(size: Size) -> usize {
    let first = State::begin(size);
    let mut numbers = HashMap::from([(first.key(), 0usize)]);
    let (mut open, mut before, mut done) = (VecDeque::from([(0, first)]), vec![vec![]], vec![]);
    while let Some((number, state)) = open.pop_front() {
        if state.is_done(size) {
            done.push(number);
        }
        for after in state.next(size) {
            let known = numbers.len();
            let reached = *numbers.entry(after.key()).or_insert(known);
            if reached == known {
                before.push(Vec::new());
                open.push_back((reached, after));
            }
            before[reached].push(number);
        }
    }
    // From every state there is a way to the end: nothing is ever waited for in vain.
    let mut ends = vec![false; before.len()];
    let mut open = done;
    while let Some(number) = open.pop() {
        if !std::mem::replace(&mut ends[number], true) {
            open.extend(&before[number]);
        }
    }
    let stuck = ends.iter().position(|ends| !ends);
    let state = stuck.and_then(|stuck| numbers.iter().find(|(_, number)| **number == stuck));
    assert_eq!(state, None, "{size:?}: no way leads on from here");
    ends.len()
}

#[test]
fn every_way_through_a_small_run_ends_and_decides_each_step_once() {
    let sizes = [
        (3, 2, 1, Bound::Exact(0), 1, [1, 0, 1]),
        (3, 2, 2, Bound::Exact(1), 2, [0, 1, 1]),
        (3, 1, 2, Bound::Exact(1), 1, [1, 1, 1]),
        (4, 1, 1, Bound::Exact(2), 2, [1, 1, 1]),
        (3, 2, 1, Bound::AtMost(1), 2, [0, 1, 1]),
        (4, 1, 1, Bound::AtMost(0), 1, [1, 1, 1]),
    ];
    for (steps, world, world_after, lag, max_ahead, ends) in sizes {
        let size = Size {
            steps,
            world,
            world_after,
            lag,
            max_ahead,
            ends,
        };
        assert!(explore(size) > 500, "{size:?} was not explored");
    }
}
