//! All that a small run can do, tried: ranks, pushes, deciding, an owner that lost the run and goes
//! on, and ends of coordinator and trainer at any moment. The rules are the real ones ([`Members`],
//! [`Book`], [`due`], [`missing`], [`verdict`]); what lies in storage is a map whose keys are
//! created once.
//!
//! A step is decided in three moves, between which anything may happen: an owner finds no receipt
//! and computes its choice, creates the receipt, and learns whose is there. It serves what it
//! learnt. That the checks can fail is shown by rules that are wrong.
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
    rules: Rules,
}

/// A decision: the step of the weights, and which owner made it.
type Decision = (i64, u8);

/// What is wrong, if anything is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Rules {
    Right,
    /// A store that overwrites an object on a conditional create.
    StoreOverwrites,
    /// An owner whose create came second serves what it computed.
    LoserServesItsOwn,
    /// The lag is that of another number.
    WrongLag,
}

/// What a coordinator knows in memory.
#[derive(Clone, Debug)]
struct Owner {
    number: u8,
    members: Members,
    wanted: BTreeSet<u64>,
    /// Steps of the pushes that it knows to be published.
    book: BTreeSet<i64>,
    /// What it computed and has not learnt the outcome of.
    computed: BTreeMap<u64, Decision>,
    /// What it knows to be in force.
    serves: BTreeMap<u64, Decision>,
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
    /// The owners that each rank has asked for the step.
    asks: Vec<BTreeSet<u8>>,
    /// What any rank ever got of each step.
    seen: BTreeMap<u64, Decision>,
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
            computed: BTreeMap::new(),
            serves: BTreeMap::new(),
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
            asks: vec![BTreeSet::new(); size.world as usize],
            seen: BTreeMap::new(),
            uploading: VecDeque::new(),
            ends_left: size.ends,
        }
    }

    fn is_done(&self, size: Size) -> bool {
        self.at == size.steps
    }

    /// The owner, or the former one.
    fn process(&self, former: bool) -> Option<&Owner> {
        if former {
            self.former.as_ref()
        } else {
            Some(&self.owner)
        }
    }

    /// This state after `change` of the owner, or of the former one.
    fn with(&self, former: bool, change: impl FnOnce(&mut Owner)) -> Self {
        let mut after = self.clone();
        let process = if former {
            after.former.as_mut()
        } else {
            Some(&mut after.owner)
        };
        if let Some(process) = process {
            change(process);
        }
        after
    }

    /// Everything that can happen next.
    fn next(&self, size: Size) -> Vec<Self> {
        let mut next = Vec::new();
        if !self.is_done(size) {
            for rank in 0..self.world {
                next.extend(self.ask(size, rank, 0, true));
                next.extend(self.ask(size, rank, 1, false));
                next.extend(self.receive(rank, false));
                next.extend(self.receive(rank, true));
            }
            next.extend(self.train());
        }
        for former in [false, true] {
            next.extend(self.compute(size, former));
            next.extend(self.create(size, former));
        }
        next.extend(self.publish());
        next.extend(self.owner_ends());
        next.extend(self.owner_is_replaced());
        next.extend(self.trainer_ends(size));
        next
    }

    /// A rank asks for its step, or for the one after while it holds its own.
    fn ask(&self, size: Size, rank: u32, ahead: u64, need: bool) -> Option<Self> {
        let (step, holds) = (self.at + ahead, self.held[rank as usize].is_some());
        let has_asked = self.asks[rank as usize].contains(&self.owner.number);
        if step >= size.steps || need == holds || (need && has_asked) {
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
        let known = self.owner.serves.keys().next_back().copied();
        let bounds = |committed| Bounds {
            committed,
            max_ahead: size.max_ahead,
        };
        // A service that would refuse the rank looks for what it says it has consumed.
        let consumed = asking.consumed_through;
        let found = consumed.filter(|step| self.receipts.contains_key(step));
        let members = &mut after.owner.members;
        let admitted = members
            .admit(&asking, bounds(known))
            .or_else(|_| members.admit(&asking, bounds(known.max(found))));
        match admitted {
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
            after.asks[rank as usize].insert(self.owner.number);
        }
        Some(after)
    }

    fn receive(&self, rank: u32, former: bool) -> Option<Self> {
        let rank = rank as usize;
        let process = self.process(former)?;
        let decision = *process.serves.get(&self.at)?;
        if !self.asks[rank].contains(&process.number) || self.held[rank].is_some() {
            return None;
        }
        let mut after = self.clone();
        let before = after.seen.insert(self.at, decision);
        assert!(
            before.is_none_or(|before| before == decision),
            "another batch was served of a step\n{self:#?}"
        );
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
        after.asks.fill(BTreeSet::new());
        Some(after)
    }

    /// An owner takes up a step that is wanted: it finds its receipt, or computes a choice if it
    /// knows the weights.
    fn compute(&self, size: Size, former: bool) -> Vec<Self> {
        let Some(owner) = self.process(former) else {
            return Vec::new();
        };
        let lag = Lag {
            bound: Some(size.lag),
        };
        let book = book(&owner.book);
        let mut next = Vec::new();
        let is_new =
            |step: &&u64| !owner.serves.contains_key(*step) && !owner.computed.contains_key(*step);
        for step in owner.wanted.iter().filter(is_new) {
            if let Some(decided) = self.receipts.get(step) {
                next.push(self.with(former, |owner| _ = owner.serves.insert(*step, *decided)));
                continue;
            }
            let due = due(*step, &lag, 1);
            let Some(found) = book.find(due, CHAIN) else {
                if !former {
                    self.check_wait(*step, due);
                }
                continue;
            };
            let with = found.version.step + i64::from(size.rules == Rules::WrongLag);
            check_lag(*step, with, size.lag);
            let decision = (with, owner.number);
            let computed = self.with(former, |owner| _ = owner.computed.insert(*step, decision));
            // Where nobody else can come between, the moves are one: there are fewer states.
            let alone = self.former.is_none() && self.ends_left[1] == 0;
            next.push(if alone {
                computed
                    .created(*step, decision, size, false)
                    .learnt(*step, decision, size, false)
            } else {
                computed
            });
        }
        next
    }

    /// An owner creates the receipt of what it computed. It learns the outcome, or the answer is
    /// lost and it creates it again.
    fn create(&self, size: Size, former: bool) -> Vec<Self> {
        let mut next = Vec::new();
        let Some(owner) = self.process(former) else {
            return next;
        };
        for (step, decision) in owner.computed.clone() {
            let created = self.created(step, decision, size, former);
            if !self.receipts.contains_key(&step) {
                next.push(created.clone());
            }
            next.push(created.learnt(step, decision, size, former));
        }
        next
    }

    fn created(&self, step: u64, decision: Decision, size: Size, former: bool) -> Self {
        let mut after = self.clone();
        let found = self.receipts.get(&step);
        if found.is_none() || size.rules == Rules::StoreOverwrites {
            let was = after.receipts.insert(step, decision);
            assert!(
                was.is_none_or(|was| was == decision),
                "step {step} was decided twice, at last by the former owner: {former}\n{self:#?}"
            );
        }
        after
    }

    /// After its create an owner reads whose receipt is there. A former owner whose own it is finds
    /// that it lost the run, and ends.
    fn learnt(&self, step: u64, decision: Decision, size: Size, former: bool) -> Self {
        let in_force = self.receipts[&step];
        let mut after = self.with(former, |owner| {
            owner.computed.remove(&step);
            let own = size.rules == Rules::LoserServesItsOwn;
            owner
                .serves
                .insert(step, if own { decision } else { in_force });
        });
        if former && in_force == decision {
            after.former = None;
        }
        after
    }

    /// A step whose weights are not there waits for them, and never in vain.
    fn check_wait(&self, step: u64, due: Due) {
        let mut demand = Demand::default();
        demand.world_size = self.world;
        for rank in (0..self.world).filter(|_| step == self.at) {
            let has_asked = self.asks[rank as usize].contains(&self.owner.number);
            if has_asked && self.held[rank as usize].is_none() {
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
            members: Members::new(
                self.incarnations.clone(),
                self.receipts.keys().next_back().copied(),
            ),
            wanted: BTreeSet::new(),
            book: self.pushes.clone(),
            computed: BTreeMap::new(),
            serves: self.receipts.clone(),
        }
    }

    fn owner_ends(&self) -> Option<Self> {
        let mut after = self.clone();
        after.ends_left[0] = self.ends_left[0].checked_sub(1)?;
        after.owner = self.loaded(self.owner.number + 1);
        after.only_former_is_asked();
        Some(after)
    }

    /// The calls of a process that ended are gone.
    fn only_former_is_asked(&mut self) {
        let former = self.former.as_ref().map(|former| former.number);
        for asks in &mut self.asks {
            asks.retain(|number| Some(*number) == former);
        }
    }

    /// The owner is paused, and another one takes the run over.
    fn owner_is_replaced(&self) -> Option<Self> {
        let mut after = self.clone();
        after.ends_left[1] = self.ends_left[1].checked_sub(1)?;
        after.former = Some(self.owner.clone());
        after.owner = self.loaded(self.owner.number + 1);
        after.only_former_is_asked();
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
            (after.held, after.asks) = (vec![None; world], vec![BTreeSet::new(); world]);
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
        (3, 2, 2, Bound::Exact(1), 2, [0, 1, 0]),
        (2, 2, 2, Bound::Exact(1), 2, [0, 1, 1]),
        (3, 1, 1, Bound::Exact(2), 2, [1, 1, 0]),
        (3, 2, 1, Bound::AtMost(1), 2, [0, 1, 0]),
        (3, 1, 1, Bound::AtMost(0), 1, [1, 1, 0]),
    ];
    for (steps, world, world_after, lag, max_ahead, ends) in sizes {
        let size = Size {
            steps,
            world,
            world_after,
            lag,
            max_ahead,
            ends,
            rules: Rules::Right,
        };
        assert!(explore(size) > 500, "{size:?} was not explored");
    }
}

#[test]
fn a_way_on_which_wrong_rules_show_is_found() {
    for (rules, says) in [
        (Rules::StoreOverwrites, "was decided twice"),
        (Rules::LoserServesItsOwn, "another batch was served"),
        (Rules::WrongLag, "step 0"),
    ] {
        let size = Size {
            steps: 2,
            world: 2,
            world_after: 2,
            lag: Bound::Exact(0),
            max_ahead: 1,
            ends: [0, 1, 0],
            rules,
        };
        let found = std::panic::catch_unwind(|| explore(size)).unwrap_err();
        let found = found.downcast_ref::<String>().unwrap();
        assert!(found.contains(says), "{rules:?}: {found}");
    }
}
