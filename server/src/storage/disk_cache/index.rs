//! What a disk cache holds, and what leaves it for something new. No file is touched here.
use std::collections::{BTreeMap, HashMap};

/// A digest of everything that says which bytes an entry holds.
pub(super) type Name = [u8; 32];

/// Entries by name, with the sum of their sizes and the order of their last uses.
pub(super) struct Index {
    bytes_max: u64,
    used: u64,
    clock: u64,
    entries: HashMap<Name, Entry>,
    /// Names by the time of their last use; each time is there once.
    by_use: BTreeMap<u64, Name>,
}

struct Entry {
    bytes: u64,
    last_used: u64,
}

impl Index {
    pub(super) fn new(bytes_max: u64) -> Self {
        Self {
            bytes_max,
            used: 0,
            clock: 0,
            entries: HashMap::new(),
            by_use: BTreeMap::new(),
        }
    }

    /// Returns the bytes of all entries.
    pub(super) fn used(&self) -> u64 {
        self.used
    }

    pub(super) fn holds(&self, name: &Name) -> bool {
        self.entries.contains_key(name)
    }

    /// Returns whether an entry of this size can be held at all.
    pub(super) fn has_room_for(&self, bytes: u64) -> bool {
        bytes <= self.bytes_max
    }

    /// Makes an entry the one that was used last. Returns whether it is there.
    pub(super) fn touch(&mut self, name: &Name) -> bool {
        self.clock += 1;
        let Some(entry) = self.entries.get_mut(name) else {
            return false;
        };
        self.by_use.remove(&entry.last_used);
        entry.last_used = self.clock;
        self.by_use.insert(self.clock, *name);
        true
    }

    /// Adds an entry, as the one that was used last.
    pub(super) fn insert(&mut self, name: Name, bytes: u64) {
        self.remove(&name);
        self.clock += 1;
        let last_used = self.clock;
        self.entries.insert(name, Entry { bytes, last_used });
        self.by_use.insert(last_used, name);
        self.used += bytes;
    }

    /// Removes an entry, and returns its size; 0 if it is not there.
    pub(super) fn remove(&mut self, name: &Name) -> u64 {
        let Some(entry) = self.entries.remove(name) else {
            return 0;
        };
        self.by_use.remove(&entry.last_used);
        self.used -= entry.bytes;
        entry.bytes
    }

    /// Returns the entry to remove before so many further bytes are written; `None` once they fit,
    /// or if nothing is left to remove.
    pub(super) fn in_the_way_of(&self, bytes: u64) -> Option<Name> {
        let is_full = self.used.saturating_add(bytes) > self.bytes_max;
        let (_, oldest) = self.by_use.first_key_value().filter(|_| is_full)?;
        Some(*oldest)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn name(of: u8) -> Name {
        [of; 32]
    }

    #[test]
    fn the_longest_unused_leaves_first() {
        let mut index = Index::new(30);
        for of in 1..=3 {
            index.insert(name(of), 10);
        }
        assert_eq!(index.in_the_way_of(0), None, "it is full and holds no more");
        assert!(index.touch(&name(1)));
        assert!(!index.touch(&name(9)));
        assert_eq!(index.in_the_way_of(1), Some(name(2)));
        assert_eq!(index.remove(&name(2)), 10);
        assert_eq!(index.in_the_way_of(10), None);
        assert_eq!(index.in_the_way_of(11), Some(name(3)));
        assert_eq!(index.remove(&name(2)), 0, "it is gone");
        assert_eq!(index.used(), 20);
    }

    #[test]
    fn an_entry_that_comes_again_counts_once() {
        let mut index = Index::new(30);
        index.insert(name(1), 10);
        index.insert(name(1), 12);
        assert_eq!(index.used(), 12);
        assert!(index.has_room_for(30) && !index.has_room_for(31));
        assert_eq!(index.in_the_way_of(u64::MAX), Some(name(1)));
        index.remove(&name(1));
        assert_eq!(index.in_the_way_of(u64::MAX), None, "nothing is left");
    }

    proptest! {
        /// Whatever is asked for in whatever order: with what is in the way removed first, the
        /// entries never exceed the limit, and the sum is that of the entries.
        #[test]
        fn the_limit_holds(asked in prop::collection::vec((0_u8..12, 1_u64..40), 0..200)) {
            let mut index = Index::new(64);
            for (of, bytes) in asked {
                if index.touch(&name(of)) || !index.has_room_for(bytes) {
                    continue;
                }
                while let Some(oldest) = index.in_the_way_of(bytes) {
                    prop_assert!(index.remove(&oldest) > 0);
                }
                index.insert(name(of), bytes);
                prop_assert!(index.used() <= 64);
                let sum: u64 = index.entries.values().map(|entry| entry.bytes).sum();
                prop_assert_eq!(sum, index.used());
                prop_assert_eq!(index.entries.len(), index.by_use.len());
            }
        }
    }
}
