//! A cache that makes each value once: callers that want the same value at the same time share the
//! work.
use crate::error::Result;
use std::{
    collections::HashMap,
    future::Future,
    hash::Hash,
    sync::{Arc, Mutex, Weak},
};
use tokio::sync::OnceCell;

/// Values by key, bounded by the sum of their weights. The least recently used values leave first.
/// A value that is being made is shared whatever the bound is: with `max` 0 no value stays, but
/// concurrent callers still share the work.
pub(crate) struct Cache<K, V> {
    max: usize,
    weigh: fn(&V) -> usize,
    state: Mutex<State<K, V>>,
}

struct State<K, V> {
    used: usize,
    clock: u64,
    entries: HashMap<K, Entry<V>>,
}

struct Entry<V> {
    cell: Arc<OnceCell<V>>,
    /// 0 until the value is made.
    weight: usize,
    last_used: u64,
}

impl<K: Clone + Eq + Hash, V: Clone> Cache<K, V> {
    /// Makes a cache for values of at most `max` in all. A value weighs `weigh(value)`, and at
    /// least 1.
    pub(crate) fn new(max: usize, weigh: fn(&V) -> usize) -> Self {
        Self {
            max,
            weigh,
            state: Mutex::new(State {
                used: 0,
                clock: 0,
                entries: HashMap::new(),
            }),
        }
    }

    /// Returns the value of `key`. It is made by `make` unless it is cached or another caller is
    /// making it. If the caller that makes it is cancelled, the next waiting caller makes it with
    /// its own `make`. An error is returned to the caller that made it and is not cached.
    pub(crate) async fn get(&self, key: &K, make: impl Future<Output = Result<V>>) -> Result<V> {
        let cell = self.cell(key);
        let made = cell.get_or_try_init(|| make).await.cloned();
        // `settle` removes cells that no caller holds, and it counts the strong references. This
        // caller's own reference must be gone by then, or its failed cell would stay for ever. A
        // weak one still identifies the cell.
        let weak = Arc::downgrade(&cell);
        drop(cell);
        self.keep_or_remove(key, &weak, made.as_ref().ok());
        made
    }

    /// Returns the weight of all kept values.
    pub(crate) fn used(&self) -> usize {
        self.state.lock().expect("no panic while held").used
    }

    /// Removes `key`: the next caller makes its value again. A caller that is making the value now
    /// still gets it, but it is not kept, see `settle`.
    pub(crate) fn remove(&self, key: &K) {
        let mut state = self.state.lock().expect("no panic while held");
        if let Some(entry) = state.entries.remove(key) {
            state.used -= entry.weight;
        }
    }

    fn cell(&self, key: &K) -> Arc<OnceCell<V>> {
        let mut state = self.state.lock().expect("no panic while held");
        state.clock += 1;
        let now = state.clock;
        let fresh = || Entry {
            cell: Arc::default(),
            weight: 0,
            last_used: now,
        };
        let entry = state.entries.entry(key.clone()).or_insert_with(fresh);
        entry.last_used = now;
        entry.cell.clone()
    }

    /// Weighs a new value. Removes values that no longer fit, and empty cells that no caller fills
    /// any more.
    fn keep_or_remove(&self, key: &K, cell: &Weak<OnceCell<V>>, value: Option<&V>) {
        let mut state = self.state.lock().expect("no panic while held");
        let State { used, entries, .. } = &mut *state;
        if let (Some(value), Some(entry)) = (value, entries.get_mut(key))
            // `remove` may have dropped this caller's cell while the value was made, and another
            // caller may have put a new cell under the key. Weighing that one by this value would
            // count a weight that no value has.
            && entry.weight == 0
            && Arc::as_ptr(&entry.cell) == cell.as_ptr()
        {
            entry.weight = (self.weigh)(value).max(1);
            *used += entry.weight;
        }
        // A cell without a weight is in use while a caller holds it. If its maker failed or was
        // cancelled and no other caller waits, nothing would ever fill or remove it.
        entries.retain(|_, entry| entry.weight > 0 || Arc::strong_count(&entry.cell) > 1);
        while *used > self.max {
            let made = entries.iter().filter(|(_, entry)| entry.weight > 0);
            let Some(oldest) = made
                .min_by_key(|(_, entry)| entry.last_used)
                .map(|(key, _)| key.clone())
            else {
                break;
            };
            *used -= entries.remove(&oldest).map_or(0, |entry| entry.weight);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Error;
    use std::sync::atomic::{AtomicUsize, Ordering};

    async fn get(cache: &Cache<u32, u32>, key: u32, made: &AtomicUsize) -> u32 {
        let make = async {
            made.fetch_add(1, Ordering::Relaxed);
            tokio::task::yield_now().await;
            Ok(key * 10)
        };
        cache.get(&key, make).await.unwrap()
    }

    #[tokio::test]
    async fn a_value_is_made_once_and_the_longest_unused_goes_first() {
        let (cache, made) = (Cache::new(2, |_| 1), AtomicUsize::new(0));
        let both = futures::join!(get(&cache, 1, &made), get(&cache, 1, &made));
        assert_eq!((both, made.load(Ordering::Relaxed)), ((10, 10), 1));
        for key in [2, 1, 3, 1] {
            get(&cache, key, &made).await;
        }
        assert_eq!(
            made.load(Ordering::Relaxed),
            3,
            "1 stayed, because it was used after 2"
        );
        get(&cache, 2, &made).await;
        assert_eq!(made.load(Ordering::Relaxed), 4);
    }

    #[tokio::test]
    async fn without_room_nothing_stays_and_failures_are_not_kept() {
        let (cache, made) = (Cache::new(0, |_| 1), AtomicUsize::new(0));
        get(&cache, 1, &made).await;
        get(&cache, 1, &made).await;
        assert_eq!(made.load(Ordering::Relaxed), 2);
        assert!(
            cache
                .get(&2, async { Err(Error::internal("no")) })
                .await
                .is_err()
        );
        assert_eq!(get(&cache, 2, &made).await, 20);
        // Nor what a caller left unmade, nor what weighs more than there is room for.
        let mut waits = Box::pin(cache.get(&3, std::future::pending()));
        assert!(futures::poll!(&mut waits).is_pending());
        drop(waits);
        let heavy: Cache<u32, u32> = Cache::new(10, |_| 20);
        assert_eq!(get(&heavy, 1, &made).await, 10);
        for cache in [&cache, &heavy] {
            get(cache, 4, &made).await;
            let state = cache.state.lock().unwrap();
            assert!(state.entries.is_empty() && state.used == 0);
        }
    }

    #[tokio::test]
    async fn what_was_forgotten_while_it_was_made_is_made_anew() {
        let cache: Cache<u32, u32> = Cache::new(9, |_| 1);
        let (go, gone) = tokio::sync::oneshot::channel::<()>();
        let old = cache.get(&1, async {
            drop(gone.await);
            Ok(1)
        });
        let mut old = std::pin::pin!(old);
        assert!(futures::poll!(&mut old).is_pending());
        cache.remove(&1);
        assert_eq!(cache.get(&1, async { Ok(2) }).await.unwrap(), 2);
        go.send(()).unwrap();
        assert_eq!(
            old.await.unwrap(),
            1,
            "whoever asked before gets what was made then"
        );
        assert_eq!(cache.get(&1, async { Ok(3) }).await.unwrap(), 2);
    }
}
