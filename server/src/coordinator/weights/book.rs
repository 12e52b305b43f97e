//! The published weights of a run over all its generations, and the choice of the weights for a
//! step. No I/O.
//!
//! Versions are looked up by (step, generation) and never by their order of arrival. Under `exact`
//! a step names the push that it is scored with. A push that arrives late, for the second time or
//! after a rewind must not shift that choice. If the newest version were taken instead, the choice
//! would depend on how fast uploads were, and a resumed run would choose other rows than the run
//! that it repeats.
//!
//! A version also outlives its file. Were its entry removed together with the weights, a step that
//! needs them would look like one whose push is still to come, and would wait for it for ever.
use super::lag::Due;
use crate::coordinator::facts::chain::Began;
use std::collections::{BTreeMap, BTreeSet};
use superbatch_proto::v1::WeightsVersion;

/// One published set of weights.
#[derive(Debug, Clone, PartialEq)]
pub struct Published {
    pub version: WeightsVersion,
    /// The safetensors file, for workers.
    pub snapshot_uri: String,
    /// The logit scale of these weights, exp applied.
    pub logit_scale: f64,
    pub logit_bias: Option<f64>,
}

#[derive(Debug, Clone, PartialEq)]
struct Entry {
    published: Published,
    push_id: String,
    snapshot: Snapshot,
}

/// The state of a version's weights file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Snapshot {
    /// The file is at this key.
    Kept(String),
    /// The file was deleted, because no step needs it any more.
    Retired,
    /// The file was missing when the run was opened.
    Missing,
}

impl Entry {
    fn is_kept(&self) -> bool {
        matches!(self.snapshot, Snapshot::Kept(_))
    }

    fn numbered(&self) -> Numbered {
        let version = &self.published.version;
        (version.version, version.step, version.generation)
    }
}

/// Version, step and generation of an entry: sorted by version.
type Numbered = (u64, i64, u32);

/// Versions after `to`, up to `through`, were taken back: `to` serves in their place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RolledBack {
    pub to: u64,
    pub through: u64,
}

impl RolledBack {
    fn takes_back(self, version: u64) -> bool {
        self.to < version && version <= self.through
    }
}

/// One version and what is left of it, for people and programs that look at the run.
#[derive(Debug, Clone, PartialEq)]
pub struct Listed {
    pub version: WeightsVersion,
    pub push_id: String,
    pub snapshot: Snapshot,
    pub in_force: u64,
}

/// Returns whether the push of a (step, generation) is of the trajectory that `chain` describes.
fn counts((step, generation): (i64, u32), chain: &[Began]) -> bool {
    let taken_back = |began: &Began| {
        began.generation > generation && i64::try_from(began.step).is_ok_and(|s| s <= step)
    };
    chain.iter().any(|began| began.generation == generation) && !chain.iter().any(taken_back)
}

/// All published versions of a run.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Book {
    initial: Option<Published>,
    /// By (step, generation).
    entries: BTreeMap<(i64, u32), Entry>,
    /// All entries, by version.
    versions: BTreeSet<Numbered>,
    /// Those whose weights are there. They are few, and steps end all the time: what they look for
    /// must not depend on how many versions there ever were.
    kept: BTreeSet<Numbered>,
    last_version: u64,
    /// In the order in which they were made.
    rolled_back: Vec<RolledBack>,
}

impl Book {
    /// Returns the version that `due` requires, among the generations of `chain`. `None` if it is
    /// not published (yet), or its snapshot was deleted.
    ///
    /// A push of step q in generation g counts only if no later generation of the chain begins at
    /// or before q: a rewind to step t discards the pushes of step t and later. If several
    /// generations pushed a step, the latest one counts.
    pub fn find(&self, due: Due, chain: &[Began]) -> Option<Published> {
        match due {
            Due::Initial => self.newest_within(-1, -1, chain),
            Due::Exactly(step) => i64::try_from(step)
                .ok()
                .and_then(|step| self.newest_within(step, step, chain)),
            Due::Within { oldest, newest } => self.newest_within(oldest, newest, chain),
        }
    }

    /// Returns the newest version from before `step`, however old. A stale step is scored with it.
    pub fn last_before(&self, step: u64, chain: &[Began]) -> Option<Published> {
        self.newest_within(-1, i64::try_from(step).unwrap_or(i64::MAX) - 1, chain)
    }

    /// Returns the newest publication by version number; the initial learner if nothing was pushed.
    pub fn newest(&self) -> Option<Published> {
        let newest = self.versions.last().and_then(|at| self.entry_at(at));
        let pushed = newest.map(|entry| &entry.published);
        pushed.or(self.initial.as_ref()).cloned()
    }

    fn newest_within(&self, oldest: i64, newest: i64, chain: &[Began]) -> Option<Published> {
        if oldest > newest {
            return None;
        }
        let pushed = self.entries.range((oldest, 0)..=(newest, u32::MAX)).rev();
        let found = pushed
            .filter(|(at, _)| counts(**at, chain))
            .find_map(|(_, entry)| self.serving(entry));
        found
            .or(self.initial.as_ref().filter(|_| oldest <= -1))
            .cloned()
    }

    /// Returns the weights that serve for an entry: its own, or those of the version that it was
    /// rolled back to. `None` if their file is not there.
    fn serving<'a>(&'a self, entry: &'a Entry) -> Option<&'a Published> {
        let own = entry.published.version.version;
        match self.in_force(own) {
            version if version == own => entry.is_kept().then_some(&entry.published),
            version => self.kept(version),
        }
    }

    /// Returns the version that serves in place of `version`, after all roll-backs.
    pub fn in_force(&self, version: u64) -> u64 {
        self.rolled_back.iter().fold(version, |version, back| {
            if back.takes_back(version) {
                back.to
            } else {
                version
            }
        })
    }

    fn entry_of(&self, version: u64) -> Option<&Entry> {
        let from = self.versions.range((version, i64::MIN, 0)..).next();
        self.entry_at(from.filter(|(number, ..)| *number == version)?)
    }

    fn entry_at(&self, &(_, step, generation): &Numbered) -> Option<&Entry> {
        self.entries.get(&(step, generation))
    }

    /// Returns the version of this number, if its weights are there. Number 0 is the initial
    /// learner.
    pub fn kept(&self, version: u64) -> Option<&Published> {
        match self.entry_of(version) {
            Some(entry) => entry.is_kept().then_some(&entry.published),
            None => self.initial.as_ref().filter(|_| version == 0),
        }
    }

    /// Returns whether a version of this number was ever published.
    pub fn is_known(&self, version: u64) -> bool {
        self.entry_of(version).is_some()
    }

    pub fn last_version(&self) -> u64 {
        self.last_version
    }

    pub fn roll_back(&mut self, back: RolledBack) {
        self.rolled_back.push(back);
    }

    pub fn rollbacks(&self) -> usize {
        self.rolled_back.len()
    }

    /// Returns the newest versions, the newest first.
    pub fn list(&self, newest: usize) -> Vec<Listed> {
        let all = self.versions.iter().rev().take(newest);
        let all = all.filter_map(|at| self.entry_at(at));
        let listed = all.map(|entry| Listed {
            version: entry.published.version.clone(),
            push_id: entry.push_id.clone(),
            snapshot: entry.snapshot.clone(),
            in_force: self.in_force(entry.published.version.version),
        });
        listed.collect()
    }

    /// Returns the versions that serve in place of others which may still be due, or of the newest
    /// one. They are kept, however old.
    fn stand_ins(&self, oldest_step: i64, pinned: &[i64]) -> BTreeSet<u64> {
        if self.rolled_back.is_empty() {
            return BTreeSet::new();
        }
        let of_step = |step: &i64| self.entries.range((*step, 0)..=(*step, u32::MAX));
        let due = self.entries.range((oldest_step, 0)..);
        let due = due.chain(pinned.iter().flat_map(of_step));
        due.map(|(_, entry)| entry.published.version.version)
            .chain([self.last_version])
            .map(|version| self.in_force(version))
            .collect()
    }

    /// Returns the number of the push of exactly `step`, whether or not it still serves.
    pub fn push_of(&self, step: i64, chain: &[Began]) -> Option<u64> {
        let of_step = self.entries.range((step, 0)..=(step, u32::MAX)).rev();
        let mut pushed = of_step.filter(|(at, _)| counts(**at, chain));
        pushed
            .next()
            .map(|(_, entry)| entry.published.version.version)
    }

    /// Returns whether a version is of the trajectory that `chain` describes. Number 0, the initial
    /// learner, is of each.
    pub fn is_of(&self, version: u64, chain: &[Began]) -> bool {
        let at = self.entry_of(version).map(|entry| &entry.published.version);
        at.map_or(version == 0, |at| counts((at.step, at.generation), chain))
    }

    /// Returns whether one of the roll-backs after the first `seen` takes `version` back.
    pub fn is_taken_back_since(&self, seen: usize, version: u64) -> bool {
        let later = self.rolled_back.iter().skip(seen);
        later.into_iter().any(|back| back.takes_back(version))
    }

    /// Returns the newest roll-back.
    pub fn last_rollback(&self) -> Option<RolledBack> {
        self.rolled_back.last().copied()
    }

    /// Returns whether the push of `step` was published but its snapshot is no longer kept.
    pub fn is_forgotten(&self, step: i64, chain: &[Began]) -> bool {
        self.newest_within(step, step, chain).is_none()
            && self
                .entries
                .range((step, 0)..=(step, u32::MAX))
                .next()
                .is_some()
    }

    /// Returns the publication for exactly this step of this generation: the id of its push, the
    /// version, and the state of its weights.
    pub fn at(&self, step: i64, generation: u32) -> Option<(&str, &Published, &Snapshot)> {
        self.entries
            .get(&(step, generation))
            .map(|entry| (entry.push_id.as_str(), &entry.published, &entry.snapshot))
    }

    pub fn next_version(&self) -> u64 {
        self.last_version + 1
    }

    pub fn insert(&mut self, push_id: String, published: Published, snapshot: Snapshot) {
        self.last_version = self.last_version.max(published.version.version);
        let at = (published.version.step, published.version.generation);
        let entry = Entry {
            published,
            push_id,
            snapshot,
        };
        let (numbered, is_kept) = (entry.numbered(), entry.is_kept());
        if let Some(before) = self.entries.insert(at, entry) {
            self.versions.remove(&before.numbered());
            self.kept.remove(&before.numbered());
        }
        self.versions.insert(numbered);
        if is_kept {
            self.kept.insert(numbered);
        }
    }

    pub fn set_initial(&mut self, initial: Published) {
        self.initial = Some(initial);
    }

    /// Retires all versions from before `oldest_step`, except the newest `kept` (at least one) and
    /// those of the steps that are `pinned`. Returns the keys of snapshots that no other version
    /// needs.
    pub fn forget_before(&mut self, oldest_step: i64, kept: u64, pinned: &[i64]) -> Vec<String> {
        let old: Vec<Numbered> = self.before(oldest_step, kept, pinned).copied().collect();
        let mut retired = BTreeSet::new();
        for numbered in old {
            self.kept.remove(&numbered);
            let (_, step, generation) = numbered;
            let entry = self.entries.get_mut(&(step, generation));
            let snapshot = entry.map(|e| std::mem::replace(&mut e.snapshot, Snapshot::Retired));
            if let Some(Snapshot::Kept(key)) = snapshot {
                retired.insert(key);
            }
        }
        // Several versions may share one file: a trainer that resumes pushes its checkpoint's
        // weights for several steps. The file goes with the last of them.
        let held: BTreeSet<&str> = self.held().collect();
        retired.retain(|key| !held.contains(key.as_str()));
        retired.into_iter().collect()
    }

    /// Returns whether [`Book::forget_before`] would retire anything. Steps end all the time and
    /// mostly there is nothing to delete, so this is asked first, without the lock of commits.
    pub fn has_before(&self, oldest_step: i64, kept: u64, pinned: &[i64]) -> bool {
        self.before(oldest_step, kept, pinned).next().is_some()
    }

    /// Returns what [`Book::forget_before`] retires. Looks at the weights that are there and not
    /// among the newest `kept`, which are few.
    fn before(
        &self,
        oldest_step: i64,
        kept: u64,
        pinned: &[i64],
    ) -> impl Iterator<Item = &Numbered> {
        let stand_ins = self.stand_ins(oldest_step, pinned);
        let newer = self.last_version.saturating_sub(kept.max(1)) + 1;
        let older = self.kept.range(..(newer, i64::MIN, 0));
        older.filter(move |(version, step, _)| {
            *step < oldest_step && !pinned.contains(step) && !stand_ins.contains(version)
        })
    }

    /// Returns the number of publications.
    pub fn count(&self) -> usize {
        self.entries.len()
    }

    /// Returns whether the snapshot at `key` is still needed.
    pub fn holds(&self, key: &str) -> bool {
        self.held().any(|held| held == key)
    }

    /// Returns the keys of the snapshots that are still needed.
    fn held(&self) -> impl Iterator<Item = &str> {
        let kept = self.kept.iter().filter_map(|at| self.entry_at(at));
        kept.filter_map(|entry| match &entry.snapshot {
            Snapshot::Kept(key) => Some(key.as_str()),
            Snapshot::Retired | Snapshot::Missing => None,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn published(version: u64, step: i64, generation: u32) -> Published {
        let digest = format!("d{version}");
        let version = WeightsVersion {
            version,
            step,
            generation,
            digest,
        };
        Published {
            version,
            snapshot_uri: String::new(),
            logit_scale: 1.0,
            logit_bias: None,
        }
    }

    fn book(pushes: &[(i64, u32)]) -> Book {
        let mut book = Book::default();
        for (version, &(step, generation)) in (1..).zip(pushes) {
            let snapshot = Snapshot::Kept(format!("d{version}"));
            book.insert("id".into(), published(version, step, generation), snapshot);
        }
        book
    }

    fn chain(steps: &[u64]) -> Vec<Began> {
        (0..)
            .zip(steps)
            .map(|(generation, &step)| Began { generation, step })
            .collect()
    }

    fn at(found: Option<Published>) -> Option<(i64, u32)> {
        found.map(|p| (p.version.step, p.version.generation))
    }

    #[test]
    fn a_rewind_takes_back_the_pushes_from_its_step_on() {
        let book = book(&[(-1, 0), (3, 0), (4, 0), (12, 0), (4, 1), (9, 1), (2, 2)]);
        let chain = chain(&[0, 10, 4]);
        let find = |step, generations| at(book.find(Due::Exactly(step), &chain[..generations]));
        assert_eq!(find(12, 1), Some((12, 0)));
        assert_eq!(find(12, 2), None, "generation 1 begins at 10");
        assert_eq!(
            find(4, 2),
            Some((4, 1)),
            "the later generation pushed it again"
        );
        assert_eq!(find(4, 3), None, "generation 2 begins at 4");
        assert_eq!(find(9, 3), None);
        assert_eq!(find(3, 3), Some((3, 0)));
        assert_eq!(find(2, 2), None, "generation 2 is not of this chain");
        assert_eq!(
            at(book.find(Due::Initial, &chain)),
            Some((-1, 0)),
            "initial weights survive every rewind"
        );
        assert_eq!(at(book.last_before(12, &chain)), Some((3, 0)));
    }

    #[test]
    fn the_initial_learner_stands_in_where_nothing_was_pushed() {
        let mut book = book(&[(5, 0)]);
        let chain = chain(&[0]);
        assert_eq!(book.find(Due::Initial, &chain), None);
        book.set_initial(published(0, -1, 0));
        assert_eq!(
            book.find(Due::Initial, &chain).map(|p| p.version.version),
            Some(0)
        );
        assert_eq!(
            book.find(
                Due::Within {
                    oldest: -1,
                    newest: 4
                },
                &chain
            )
            .map(|p| p.version.version),
            Some(0)
        );
        assert_eq!(
            book.find(
                Due::Within {
                    oldest: 0,
                    newest: 4
                },
                &chain
            ),
            None
        );
        assert_eq!(book.newest().map(|p| p.version.version), Some(1));
    }

    #[test]
    fn what_is_forgotten_is_not_found_and_the_newest_is_kept() {
        let mut book = book(&[(1, 0), (3, 0), (5, 0), (7, 0)]);
        let chain = chain(&[0]);
        assert!(
            !book.has_before(1, 1, &[]) && book.forget_before(1, 1, &[]).is_empty(),
            "step 1 is needed"
        );
        assert!(book.has_before(3, 1, &[]));
        assert_eq!(book.forget_before(3, 1, &[]), ["d1"]);
        assert_eq!(
            book.forget_before(9, 2, &[]),
            ["d2"],
            "of the others the newest two are kept"
        );
        assert!(book.forget_before(9, 2, &[]).is_empty());
        let find = |step| at(book.find(Due::Exactly(step), &chain));
        assert_eq!(
            [1, 3, 5, 7].map(find),
            [None, None, Some((5, 0)), Some((7, 0))]
        );
        assert!(!book.holds("d2") && book.holds("d3"));
        assert!(
            book.is_forgotten(3, &chain)
                && !book.is_forgotten(5, &chain)
                && !book.is_forgotten(4, &chain)
        );
        assert_eq!(book.next_version(), 5);
    }

    #[test]
    fn what_was_rolled_back_gives_way_to_the_older_version_and_later_pushes_count() {
        let mut book = book(&[(0, 0), (1, 0), (2, 0), (3, 0)]);
        let chain = chain(&[0]);
        book.roll_back(RolledBack { to: 2, through: 4 });
        let find = |book: &Book, step| {
            let found = book.find(Due::Exactly(step), &chain);
            found.map(|p| p.version.version)
        };
        assert_eq!(
            [0, 1, 2, 3].map(|step| find(&book, step)),
            [1, 2, 2, 2].map(Some),
            "versions before it are as they were"
        );
        let snapshot = Snapshot::Kept("d5".into());
        book.insert("id".into(), published(5, 4, 0), snapshot);
        assert_eq!(find(&book, 4), Some(5));
        assert_eq!(
            book.last_before(4, &chain).map(|p| p.version.version),
            Some(2)
        );
        // Version 2 stays while a step may be scored with it, whatever else is deleted.
        assert_eq!(book.forget_before(3, 1, &[]), ["d1", "d3"]);
        assert!(!book.has_before(3, 1, &[]));
        assert_eq!(find(&book, 3), Some(2));
        assert_eq!(book.forget_before(4, 1, &[]), ["d2", "d4"]);
        book.roll_back(RolledBack { to: 1, through: 5 });
        assert_eq!(find(&book, 4), None, "version 1 is no longer kept");
        assert_eq!(
            book.list(2).iter().map(|l| l.in_force).collect::<Vec<_>>(),
            [1, 1]
        );
    }

    #[test]
    fn a_lost_file_is_no_hindrance_for_a_version_that_was_rolled_back() {
        let mut book = book(&[(0, 0)]);
        book.insert("id".into(), published(2, 1, 0), Snapshot::Missing);
        let chain = chain(&[0]);
        assert_eq!(book.find(Due::Exactly(1), &chain), None);
        book.roll_back(RolledBack { to: 1, through: 2 });
        assert_eq!(at(book.find(Due::Exactly(1), &chain)), Some((0, 0)));
    }

    #[test]
    fn a_snapshot_that_two_versions_share_goes_with_the_second() {
        let mut book = Book::default();
        for (version, step) in (1..).zip([1, 3, 5]) {
            let snapshot = Snapshot::Kept(if step < 5 { "shared" } else { "own" }.into());
            book.insert("id".into(), published(version, step, 0), snapshot);
        }
        assert_eq!(book.forget_before(2, 1, &[]), [""; 0]);
        assert!(book.holds("shared"));
        assert_eq!(book.forget_before(4, 1, &[]), ["shared"]);
    }

    proptest! {
        #[test]
        fn find_agrees_with_trying_every_push(
            pushes in prop::collection::vec((-1i64..12, 0u32..4), 0..20),
            begins in prop::collection::vec(0u64..12, 4),
            oldest in -1i64..12, newest in -1i64..12,
        ) {
            let chain = chain(&begins);
            let tried = pushes.iter().filter(|(q, g)| {
                let is_later = |b: &Began| b.generation > *g && b.step as i64 <= *q;
                (oldest..=newest).contains(q) && !chain.iter().any(is_later)
            });
            let found = book(&pushes).find(Due::Within { oldest, newest }, &chain);
            prop_assert_eq!(at(found), tried.max().copied());
        }

        #[test]
        fn what_is_forgotten_agrees_with_looking_at_every_push(
            pushes in prop::collection::vec((-1i64..12, 0u32..4), 0..20),
            oldest in prop::collection::vec(-1i64..14, 3),
            kept in 0u64..6, pinned in prop::collection::vec(-1i64..12, 0..3),
        ) {
            let (mut book, last) = (book(&pushes), pushes.len() as u64);
            for oldest in oldest {
                let is_old = |l: &Listed| {
                    matches!(l.snapshot, Snapshot::Kept(_)) && l.version.step < oldest
                        && l.version.version + kept.max(1) <= last
                        && !pinned.contains(&l.version.step)
                };
                let all = book.list(usize::MAX);
                let old = all.iter().filter(|l| is_old(l)).map(|l| l.version.digest.clone());
                let mut old: Vec<_> = old.collect();
                old.sort();
                prop_assert_eq!(book.has_before(oldest, kept, &pinned), !old.is_empty());
                prop_assert_eq!(book.forget_before(oldest, kept, &pinned), old);
            }
        }
    }
}
