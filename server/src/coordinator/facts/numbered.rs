//! Facts with consecutive numbers, of which nobody says how many there are.
use crate::{error::Result, storage::Location};
use bytes::Bytes;
use futures::future::try_join_all;

/// Most facts that are read at a time.
const AT_ONCE_MAX: u64 = 32;

/// Reads the facts at `key(first)`, `key(first + 1)`, …, up to the first that is missing.
///
/// A run whose trainer was restarted thousands of times has a fact of each start. Read one after
/// another they would cost a round trip each, at every load. Reads begin one at a time, since most
/// runs have no such fact, and grow.
///
/// # Errors
/// `StorageUnreachable`.
pub(super) async fn read(
    run: &Location,
    first: u64,
    key: impl Fn(u64) -> String,
) -> Result<Vec<Bytes>> {
    let mut found: Vec<Bytes> = Vec::new();
    let mut at_once = 1;
    loop {
        let from = first + found.len() as u64;
        let reads = (from..from + at_once).map(|n| find(run, key(n)));
        let next = try_join_all(reads).await?;
        let wanted = found.len() + next.len();
        found.extend(next.into_iter().map_while(|fact| fact));
        if found.len() < wanted {
            return Ok(found);
        }
        at_once = (2 * at_once).min(AT_ONCE_MAX);
    }
}

async fn find(run: &Location, key: String) -> Result<Option<Bytes>> {
    run.find(&key).await
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::{StorageConfig, Stores};

    #[tokio::test]
    async fn all_are_read_in_order_up_to_the_first_gap() {
        let stores = Stores::new(StorageConfig::default());
        for count in [0, 1, 2, 3, 4, 70] {
            let run = stores.open(&format!("memory:///runs/{count}")).unwrap();
            let key = |n: u64| format!("facts/{n}.json");
            for n in (1..=count).chain([count + 2]) {
                let bytes = Bytes::from(n.to_string());
                run.create(&key(n), bytes).await.unwrap();
            }
            let found = read(&run, 1, key).await.unwrap();
            let expected: Vec<_> = (1..=count).map(|n| Bytes::from(n.to_string())).collect();
            assert_eq!(found, expected);
        }
    }
}
