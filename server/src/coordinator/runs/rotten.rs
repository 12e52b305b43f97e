//! Shards of which most rows cannot be used: each is named once, and not row by row.
use crate::metrics;
use std::{
    collections::BTreeMap,
    sync::{Mutex, PoisonError},
};

/// Bad rows of a shard before it is judged. A few may be bad in any shard.
const BAD_MIN: u32 = 16;

/// A source and a shard in it.
type Shard = (u32, u32);

/// The rows of a run's shards that were read as candidates so far.
#[derive(Debug, Default)]
pub struct Rotten(Mutex<BTreeMap<Shard, Seen>>);

#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Seen {
    pub rows: u32,
    pub bad: u32,
    is_reported: bool,
}

impl Rotten {
    /// Notes the candidates that a step read, each with whether its content is at fault. Returns
    /// the shards that are seen to be rotten for the first time: half of their rows, and not only a
    /// few, are bad.
    pub fn note(&self, rows: impl IntoIterator<Item = (Shard, bool)>) -> Vec<(Shard, Seen)> {
        let mut shards = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let mut touched = BTreeMap::new();
        for (shard, is_bad) in rows {
            let seen = shards.entry(shard).or_default();
            seen.rows = seen.rows.saturating_add(1);
            seen.bad = seen.bad.saturating_add(u32::from(is_bad));
            if is_bad {
                touched.insert(shard, ());
            }
        }
        let mut found = Vec::new();
        for shard in touched.into_keys() {
            let Some(seen) = shards.get_mut(&shard).filter(|seen| !seen.is_reported) else {
                continue;
            };
            if seen.bad >= BAD_MIN && seen.bad >= seen.rows - seen.bad {
                seen.is_reported = true;
                metrics::rotten_shards().increment(1);
                found.push((shard, *seen));
            }
        }
        found
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rows(shard: u32, good: u32, bad: u32) -> impl Iterator<Item = (Shard, bool)> {
        let of = move |is_bad| move |_| ((0, shard), is_bad);
        (0..good).map(of(false)).chain((0..bad).map(of(true)))
    }

    fn reported(rotten: &Rotten, rows: impl Iterator<Item = (Shard, bool)>) -> Vec<u32> {
        let found = rotten.note(rows);
        found.into_iter().map(|((_, shard), _)| shard).collect()
    }

    #[test]
    fn a_rotten_shard_is_named_once() {
        let rotten = Rotten::default();
        let first = rows(0, 10, 9).chain(rows(1, 100, 20)).chain(rows(2, 0, 15));
        assert_eq!(
            reported(&rotten, first),
            [0; 0],
            "some bad rows are in any shard"
        );
        let second = rows(0, 3, 7).chain(rows(2, 0, 1));
        assert_eq!(reported(&rotten, second), [0, 2]);
        assert_eq!(
            reported(&rotten, rows(0, 0, 50).chain(rows(2, 0, 9))),
            [0; 0]
        );
        let seen = rotten.note(rows(1, 0, 80));
        assert_eq!(
            (seen[0].0, seen[0].1.rows, seen[0].1.bad),
            ((0, 1), 200, 100)
        );
    }
}
