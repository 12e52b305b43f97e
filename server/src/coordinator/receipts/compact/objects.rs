//! Receipts in objects of their own, on their way into a pack.
use crate::{
    blocking::blocking,
    coordinator::receipts::{
        packs::file::Parts,
        parquet,
        store::{folder, key, parse},
    },
    error::{Error, Result},
    storage::Location,
};
use bytes::Bytes;
use futures::{FutureExt, StreamExt, stream};
use prost::Message;
use superbatch_proto::v1::Receipt;

/// Receipts that are read at the same time.
const READS_AT_ONCE: usize = 16;

/// A receipt in an object of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Single {
    pub generation: u32,
    pub step: u64,
    pub bytes: u64,
}

impl Single {
    pub(super) fn key(&self) -> String {
        key(self.step, self.generation)
    }
}

/// Returns the receipts of the folder `number`.
pub(super) async fn singles(run: &Location, number: u64) -> Result<Vec<Single>> {
    let listed = run.list(&folder(number)).await?;
    let singles = listed.iter().filter_map(|(key, meta)| {
        let (step, generation) = parse(key)?;
        Some(Single {
            generation,
            step,
            bytes: meta.size,
        })
    });
    Ok(singles.collect())
}

/// Divides receipts into those of one generation and of consecutive steps. Each ends before the
/// multiples of `pack`, so that whoever packs later comes to the same ones.
pub(super) fn runs(mut singles: Vec<Single>, pack: u64) -> Vec<Vec<Single>> {
    singles.sort_unstable();
    let goes_on = |last: &Single, next: &Single| {
        last.generation == next.generation
            && last.step + 1 == next.step
            && last.step / pack == next.step / pack
    };
    let runs = singles.chunk_by(goes_on);
    runs.map(<[Single]>::to_vec).collect()
}

/// Reads objects, in their order; nothing for one that is gone.
pub(super) fn read_each<'a>(
    run: &'a Location,
    singles: &[Single],
) -> impl futures::Stream<Item = Result<(Single, Option<Bytes>)>> + Unpin + 'a {
    let read = move |single: Single| async move {
        let bytes = run.find(&single.key()).await?;
        Ok::<_, Error>((single, bytes))
    };
    let reads: Vec<_> = singles.iter().map(|single| read(*single).boxed()).collect();
    stream::iter(reads).buffered(READS_AT_ONCE)
}

/// Takes a receipt apart, and returns the hash of its content with it.
///
/// # Errors
/// `Internal` if it cannot be read, or has what this build does not know.
pub(super) async fn taken_apart(file: Bytes) -> Result<(Parts, blake3::Hash)> {
    blocking("taking a receipt apart", move || {
        let content = content(&parquet::decode(file.clone())?);
        Ok((Parts::of(file).map_err(parquet::unreadable)?, content))
    })
    .await
}

/// Returns the hash of all that a receipt says. Numbers count by their bits: NaN is equal to
/// itself.
pub(super) fn content(receipt: &Receipt) -> blake3::Hash {
    blake3::hash(&receipt.encode_to_vec())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn receipts_go_together_by_generation_and_up_to_the_next_multiple() {
        let single = |(step, generation)| Single {
            generation,
            step,
            bytes: 1,
        };
        let given = [
            (3, 0),
            (4, 0),
            (9, 1),
            (5, 0),
            (7, 0),
            (8, 0),
            (5, 1),
            (6, 1),
        ];
        let found: Vec<Vec<_>> = runs(given.map(single).to_vec(), 4)
            .iter()
            .map(|run| run.iter().map(|s| (s.step, s.generation)).collect())
            .collect();
        let expected: [&[(u64, u32)]; 6] = [
            &[(3, 0)],
            &[(4, 0), (5, 0)],
            &[(7, 0)],
            &[(8, 0)],
            &[(5, 1), (6, 1)],
            &[(9, 1)],
        ];
        assert_eq!(found, expected);
    }
}
