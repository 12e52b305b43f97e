//! A cache of up to a number of values. The least recently used ones leave first.
use std::{
    collections::HashMap,
    hash::Hash,
    sync::{Mutex, MutexGuard},
};

/// A counter of uses, and each value with the number of its last use.
type Used<K, V> = (u64, HashMap<K, (u64, V)>);

pub(super) struct Keep<K, V> {
    most: usize,
    kept: Mutex<Used<K, V>>,
}

impl<K: Eq + Hash + Clone, V: Clone> Keep<K, V> {
    pub(super) fn new(most: usize) -> Self {
        Self {
            most,
            kept: Mutex::default(),
        }
    }

    pub(super) fn get(&self, key: &K) -> Option<V> {
        let mut kept = self.lock();
        let (clock, values) = &mut *kept;
        let (used, value) = values.get_mut(key)?;
        *clock += 1;
        *used = *clock;
        Some(value.clone())
    }

    pub(super) fn put(&self, key: K, value: V) {
        let mut kept = self.lock();
        let (clock, values) = &mut *kept;
        *clock += 1;
        values.insert(key, (*clock, value));
        if values.len() > self.most {
            // A quarter at a time, so that the search for the oldest costs little.
            let mut ages: Vec<u64> = values.values().map(|(used, _)| *used).collect();
            ages.sort_unstable();
            let oldest_left = ages[self.most.div_ceil(4).min(ages.len() - 1)];
            values.retain(|_, (used, _)| *used >= oldest_left);
        }
    }

    fn lock(&self) -> MutexGuard<'_, Used<K, V>> {
        self.kept.lock().expect("no panic while held")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_used_stays_and_the_rest_makes_room() {
        let keep = Keep::new(8);
        for key in 0..8 {
            keep.put(key, key * 10);
        }
        assert_eq!(keep.get(&0), Some(0));
        keep.put(8, 80);
        assert_eq!(
            [0, 1, 2, 7, 8].map(|key| keep.get(&key)),
            [Some(0), None, None, Some(70), Some(80)]
        );
        let single = Keep::new(1);
        single.put("a", 1);
        single.put("b", 2);
        assert_eq!([single.get(&"a"), single.get(&"b")], [None, Some(2)]);
    }
}
