//! The published weights of a run over all its generations, and the choice of the weights for a
//! step. No I/O.
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

    fn is_old(&self, oldest_step: i64, kept: u64, last_version: u64) -> bool {
        let version = &self.published.version;
        self.is_kept()
            && version.step < oldest_step
            && version.version <= last_version.saturating_sub(kept.max(1))
    }
}

/// All published versions of a run.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Book {
    initial: Option<Published>,
    /// By (step, generation).
    entries: BTreeMap<(i64, u32), Entry>,
    last_version: u64,
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
        let pushed = self
            .entries
            .values()
            .map(|entry| &entry.published)
            .max_by_key(|p| p.version.version);
        pushed.or(self.initial.as_ref()).cloned()
    }

    fn newest_within(&self, oldest: i64, newest: i64, chain: &[Began]) -> Option<Published> {
        if oldest > newest {
            return None;
        }
        let counts = |step: i64, generation: u32| {
            chain.iter().any(|began| began.generation == generation)
                && !chain.iter().any(|began| {
                    began.generation > generation
                        && i64::try_from(began.step).is_ok_and(|s| s <= step)
                })
        };
        let pushed = self.entries.range((oldest, 0)..=(newest, u32::MAX)).rev();
        let found = pushed
            .filter(|(at, entry)| entry.is_kept() && counts(at.0, at.1))
            .map(|(_, entry)| &entry.published)
            .next();
        found
            .or(self.initial.as_ref().filter(|_| oldest <= -1))
            .cloned()
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
        self.entries.insert(
            at,
            Entry {
                published,
                push_id,
                snapshot,
            },
        );
    }

    pub fn set_initial(&mut self, initial: Published) {
        self.initial = Some(initial);
    }

    /// Retires all versions from before `oldest_step`, except the newest `kept` (at least one).
    /// Returns the keys of snapshots that no other version needs.
    pub fn forget_before(&mut self, oldest_step: i64, kept: u64) -> Vec<String> {
        let last_version = self.last_version;
        let mut retired = BTreeSet::new();
        for entry in self.entries.values_mut() {
            if entry.is_old(oldest_step, kept, last_version)
                && let Snapshot::Kept(key) =
                    std::mem::replace(&mut entry.snapshot, Snapshot::Retired)
            {
                retired.insert(key);
            }
        }
        // Several versions may share one file: a trainer that resumes pushes its checkpoint's
        // weights for several steps. The file goes with the last of them.
        retired.retain(|key| !self.holds(key));
        retired.into_iter().collect()
    }

    /// Returns whether [`Book::forget_before`] would retire anything. Steps end all the time and
    /// mostly there is nothing to delete, so this is asked first, without the lock of commits.
    pub fn has_before(&self, oldest_step: i64, kept: u64) -> bool {
        self.entries
            .values()
            .any(|entry| entry.is_old(oldest_step, kept, self.last_version))
    }

    /// Returns whether the snapshot at `key` is still needed.
    pub fn holds(&self, key: &str) -> bool {
        self.entries
            .values()
            .any(|entry| matches!(&entry.snapshot, Snapshot::Kept(kept) if kept == key))
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
            !book.has_before(1, 1) && book.forget_before(1, 1).is_empty(),
            "step 1 is needed"
        );
        assert!(book.has_before(3, 1));
        assert_eq!(book.forget_before(3, 1), ["d1"]);
        assert_eq!(
            book.forget_before(9, 2),
            ["d2"],
            "of the others the newest two are kept"
        );
        assert!(book.forget_before(9, 2).is_empty());
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
    fn a_snapshot_that_two_versions_share_goes_with_the_second() {
        let mut book = Book::default();
        for (version, step) in (1..).zip([1, 3, 5]) {
            let snapshot = Snapshot::Kept(if step < 5 { "shared" } else { "own" }.into());
            book.insert("id".into(), published(version, step, 0), snapshot);
        }
        assert_eq!(book.forget_before(2, 1), [""; 0]);
        assert!(book.holds("shared"));
        assert_eq!(book.forget_before(4, 1), ["shared"]);
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
                (oldest..=newest).contains(q) && !chain.iter().any(|b| b.generation > *g && b.step as i64 <= *q)
            });
            let found = book(&pushes).find(Due::Within { oldest, newest }, &chain);
            prop_assert_eq!(at(found), tried.max().copied());
        }
    }
}
