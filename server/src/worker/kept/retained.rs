//! A memory budget for things that can be made again. If it is full, the newest step's things are
//! dropped first.
use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    ops::Bound::{Excluded, Unbounded},
    sync::{Arc, Mutex},
};

/// Things kept within a number of bytes, each for as long as its [`Kept`] lives.
///
/// The oldest step is served next, so its things are worth most: a trainer waits for them. Room is
/// made only by dropping things of newer steps. Dropping the least recently used ones would do the
/// opposite: steps ahead are read later and would push out the step that is due.
pub(crate) struct Retained<T>(Arc<Inner<T>>);

struct Inner<T> {
    bytes_max: usize,
    state: Mutex<State<T>>,
}

struct State<T> {
    bytes: usize,
    next: u64,
    /// The order of the keys is the order in which things are dropped, from the end.
    things: BTreeMap<Key, Thing<T>>,
    /// The keys under which one thing is kept, by where it lies.
    shared: HashMap<usize, BTreeSet<Key>>,
}

/// Step and number.
type Key = (u64, u64);

struct Thing<T> {
    /// What is free once it is dropped. Of a thing that is kept more than once, the first key has
    /// its bytes, and the others have none.
    bytes: usize,
    /// Where it lies, if others may keep it too.
    place: Option<usize>,
    thing: T,
}

/// A handle to a thing, which may have been dropped in the meantime. Dropping the handle frees the
/// thing.
pub(crate) struct Kept<T> {
    key: Key,
    inner: Arc<Inner<T>>,
}

impl<T: Clone> Retained<T> {
    pub(crate) fn new(bytes_max: usize) -> Self {
        let state = Mutex::new(State {
            bytes: 0,
            next: 0,
            things: BTreeMap::new(),
            shared: HashMap::new(),
        });
        Self(Arc::new(Inner { bytes_max, state }))
    }

    /// Keeps `thing` of `bytes`, and drops things of steps after `step` if that makes room for it.
    /// Returns `None` if there is no room.
    pub(crate) fn keep(&self, step: u64, bytes: usize, thing: T) -> Option<Kept<T>> {
        let mut state = self.0.state.lock().expect("no panic while held");
        let newer = || {
            state
                .things
                .range((Excluded((step, u64::MAX)), Unbounded))
                .map(|(_, thing)| thing.bytes)
                .sum::<usize>()
        };
        let over = |used: usize| used + bytes > self.0.bytes_max;
        // The sum over newer steps walks the map, so it is taken only if the budget is full. If
        // even dropping all of them would not make room, nothing is dropped: those things would be
        // lost for no gain.
        if over(state.bytes) && over(state.bytes - newer()) {
            return None;
        }
        let mut dropped = Vec::new();
        while over(state.bytes) {
            // The last key is of a newer step: the test above has shown that newer steps hold
            // enough.
            let (last, _) = state.things.last_key_value()?;
            let last = *last;
            dropped.push(state.remove(last));
        }
        let key = state.new_key(step);
        state.bytes += bytes;
        let place = None;
        let kept = self.add(
            &mut state,
            key,
            Thing {
                bytes,
                place,
                thing,
            },
        );
        // To free a block takes long, and others wait for the lock.
        drop(state);
        drop(dropped);
        Some(kept)
    }

    /// Returns the bytes that are kept now.
    pub(crate) fn bytes(&self) -> usize {
        self.0.state.lock().expect("no panic while held").bytes
    }
}

impl<T> Retained<Arc<T>> {
    /// Keeps a thing that could be kept smaller, but only while half of the memory stays free, and
    /// nothing is dropped for it. If the same thing is kept more than once, its bytes count once.
    pub(crate) fn keep_shared(
        &self,
        step: u64,
        bytes: usize,
        thing: Arc<T>,
    ) -> Option<Kept<Arc<T>>> {
        let mut state = self.0.state.lock().expect("no panic while held");
        let place = Arc::as_ptr(&thing) as usize;
        let is_kept = state.shared.contains_key(&place);
        let fits = state.bytes.saturating_add(bytes) <= self.0.bytes_max / 2;
        if !is_kept && !fits {
            return None;
        }
        let key = state.new_key(step);
        let keys = state.shared.entry(place).or_default();
        let first = keys.first().copied();
        keys.insert(key);
        // The oldest step has the bytes: it is dropped last, and nothing is free before.
        let bytes = match first.filter(|first| *first < key) {
            Some(_) => 0,
            None => first
                .and_then(|first| state.things.get_mut(&first))
                .map_or(bytes, |first| std::mem::take(&mut first.bytes)),
        };
        if !is_kept {
            state.bytes += bytes;
        }
        let place = Some(place);
        Some(self.add(
            &mut state,
            key,
            Thing {
                bytes,
                place,
                thing,
            },
        ))
    }
}

impl<T> Retained<T> {
    fn add(&self, state: &mut State<T>, key: Key, thing: Thing<T>) -> Kept<T> {
        state.things.insert(key, thing);
        let inner = self.0.clone();
        Kept { key, inner }
    }
}

impl<T> State<T> {
    fn new_key(&mut self, step: u64) -> Key {
        self.next += 1;
        (step, self.next)
    }

    /// Returns a thing that is kept no longer. Its bytes are free if it is kept under no other key.
    fn remove(&mut self, key: Key) -> Option<T> {
        // It may be gone already; its bytes were subtracted then and must not be subtracted twice.
        let Thing {
            bytes,
            place,
            thing,
        } = self.things.remove(&key)?;
        let Some(place) = place else {
            self.bytes -= bytes;
            return Some(thing);
        };
        let keys = self.shared.get_mut(&place)?;
        keys.remove(&key);
        match keys.first().and_then(|first| self.things.get_mut(first)) {
            Some(heir) => heir.bytes += bytes,
            None => {
                self.bytes -= bytes;
                self.shared.remove(&place);
            }
        }
        Some(thing)
    }
}

impl<T: Clone> Kept<T> {
    /// Returns the thing; `None` if it was dropped for lack of room.
    pub(crate) fn get(&self) -> Option<T> {
        let state = self.inner.state.lock().expect("no panic while held");
        state.things.get(&self.key).map(|kept| kept.thing.clone())
    }
}

impl<T> Drop for Kept<T> {
    fn drop(&mut self) {
        let mut state = self.inner.state.lock().expect("no panic while held");
        let dropped = state.remove(self.key);
        drop(state);
        drop(dropped);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_step_makes_room_and_drops_give_it_back() {
        let budget = Retained::new(10);
        let old = budget.keep(1, 4, 'a');
        let newer = budget.keep(3, 6, 'b').unwrap();
        assert!(
            budget.keep(3, 1, 'c').is_none(),
            "a step does not drop its own"
        );
        assert!(budget.keep(4, 1, 'd').is_none(), "nor older ones");
        let middle = budget.keep(2, 5, 'e').unwrap();
        assert_eq!(
            (newer.get(), middle.get(), budget.bytes()),
            (None, Some('e'), 9)
        );
        assert!(budget.keep(0, 11, 'f').is_none());
        assert_eq!(middle.get(), Some('e'), "nothing is dropped in vain");
        drop((old, middle, newer));
        assert_eq!(budget.bytes(), 0);
    }

    #[test]
    fn shared_things_leave_half_of_the_room_and_drop_nothing() {
        let budget = Retained::new(10);
        let [a, b, c, d] = ['a', 'b', 'c', 'd'].map(Arc::new);
        let newer = budget.keep(3, 2, a.clone()).unwrap();
        let shared = budget.keep_shared(1, 3, b.clone()).unwrap();
        assert!(budget.keep_shared(1, 1, c).is_none());
        assert_eq!((newer.get(), shared.get()), (Some(a), Some(b)));
        // They make room for older steps as others do.
        let old = budget.keep(0, 8, d.clone()).unwrap();
        assert_eq!(
            (newer.get(), shared.get(), old.get()),
            (None, None, Some(d))
        );
        drop((newer, shared, old));
        assert_eq!(budget.bytes(), 0);
    }

    #[test]
    fn what_several_steps_share_counts_once() {
        let budget = Retained::new(10);
        let block = Arc::new('a');
        let keep = |step| budget.keep_shared(step, 5, block.clone()).unwrap();
        let (middle, new, old) = (keep(2), keep(3), keep(1));
        assert_eq!(budget.bytes(), 5);
        // To drop it of newer steps would free nothing, so room for 6 is not made.
        assert!(budget.keep(1, 6, Arc::new('b')).is_none());
        assert_eq!(new.get(), Some(block.clone()));
        drop(old);
        assert_eq!(budget.bytes(), 5);
        // Now it is of newer steps alone.
        let other = budget.keep(1, 6, Arc::new('b')).unwrap();
        assert_eq!((middle.get(), new.get(), budget.bytes()), (None, None, 6));
        drop((middle, new, other));
        assert_eq!(budget.bytes(), 0);
        assert!(budget.0.state.lock().unwrap().shared.is_empty());
    }
}
