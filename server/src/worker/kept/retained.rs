//! A memory budget for things that can be made again. If it is full, the newest step's things are
//! dropped first.
use std::{
    collections::BTreeMap,
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
    /// By (step, number). The order of the keys is the order in which things are dropped, from the
    /// end.
    things: BTreeMap<(u64, u64), (usize, T)>,
}

/// A handle to a thing, which may have been dropped in the meantime. Dropping the handle frees the
/// thing.
pub(crate) struct Kept<T> {
    key: (u64, u64),
    inner: Arc<Inner<T>>,
}

impl<T: Clone> Retained<T> {
    pub(crate) fn new(bytes_max: usize) -> Self {
        let state = Mutex::new(State {
            bytes: 0,
            next: 0,
            things: BTreeMap::new(),
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
                .map(|(_, (bytes, _))| bytes)
                .sum::<usize>()
        };
        let over = |used: usize| used + bytes > self.0.bytes_max;
        // The sum over newer steps walks the map, so it is taken only if the budget is full. If
        // even dropping all of them would not make room, nothing is dropped: those things would be
        // lost for no gain.
        if over(state.bytes) && over(state.bytes - newer()) {
            return None;
        }
        while over(state.bytes) {
            // The last key is of a newer step: the test above has shown that newer steps hold
            // enough.
            let (_, (dropped, _)) = state.things.pop_last()?;
            state.bytes -= dropped;
        }
        Some(self.add(&mut state, step, bytes, thing))
    }

    /// Keeps a thing that could be kept smaller: as [`Retained::keep`], but only while half of the
    /// memory stays free, and nothing is dropped for it.
    pub(crate) fn keep_large(&self, step: u64, bytes: usize, thing: T) -> Option<Kept<T>> {
        let mut state = self.0.state.lock().expect("no panic while held");
        let fits = state.bytes.saturating_add(bytes) <= self.0.bytes_max / 2;
        fits.then(|| self.add(&mut state, step, bytes, thing))
    }

    fn add(&self, state: &mut State<T>, step: u64, bytes: usize, thing: T) -> Kept<T> {
        let key = (step, state.next);
        state.next += 1;
        state.bytes += bytes;
        state.things.insert(key, (bytes, thing));
        let inner = self.0.clone();
        Kept { key, inner }
    }

    /// Returns the bytes that are kept now.
    pub(crate) fn bytes(&self) -> usize {
        self.0.state.lock().expect("no panic while held").bytes
    }
}

impl<T: Clone> Kept<T> {
    /// Returns the thing; `None` if it was dropped for lack of room.
    pub(crate) fn get(&self) -> Option<T> {
        let state = self.inner.state.lock().expect("no panic while held");
        state.things.get(&self.key).map(|(_, thing)| thing.clone())
    }
}

impl<T> Drop for Kept<T> {
    fn drop(&mut self) {
        let mut state = self.inner.state.lock().expect("no panic while held");
        // It may be gone already; its bytes were subtracted then and must not be subtracted twice.
        if let Some((bytes, _)) = state.things.remove(&self.key) {
            state.bytes -= bytes;
        }
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
    fn large_things_leave_half_of_the_room_and_drop_nothing() {
        let budget = Retained::new(10);
        let newer = budget.keep(3, 2, 'a').unwrap();
        let large = budget.keep_large(1, 3, 'b').unwrap();
        assert!(budget.keep_large(1, 1, 'c').is_none());
        assert_eq!((newer.get(), large.get()), (Some('a'), Some('b')));
        // They make room for older steps as others do.
        let old = budget.keep(0, 8, 'd').unwrap();
        assert_eq!(
            (newer.get(), large.get(), old.get()),
            (None, None, Some('d'))
        );
        drop((newer, large, old));
        assert_eq!(budget.bytes(), 0);
    }
}
