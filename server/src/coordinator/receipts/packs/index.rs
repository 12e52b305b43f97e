//! Which receipts lie in which pack. A pack's name tells, so packs are listed and not read.
use crate::{error::Result, storage::Location};
use std::collections::BTreeSet;

/// Packs, below the run. No step is called so, and builds that know no packs pass it over.
const PACKS: &str = "receipts/packed";

/// Most receipts of one pack.
pub const RECEIPTS_MAX: u64 = 1000;

/// A file with the receipts of consecutive steps of one generation.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Pack {
    pub first: u64,
    /// The last step, included.
    pub last: u64,
    pub generation: u32,
    /// BLAKE3 of the file, in hex.
    pub digest: String,
    /// Size of the file.
    pub bytes: u64,
}

impl Pack {
    /// Returns the key of the file below its run.
    pub fn key(&self) -> String {
        let Self {
            first,
            last,
            generation,
            digest,
            ..
        } = self;
        format!("{PACKS}/{first:012}-{last:012}-{generation}-{digest}.parquet")
    }

    /// Returns how many receipts it has.
    pub fn count(&self) -> u64 {
        self.last - self.first + 1
    }

    pub fn holds(&self, step: u64, generation: u32) -> bool {
        self.generation == generation && (self.first..=self.last).contains(&step)
    }

    /// Reads a key; `None` for any other object there.
    fn parse(found: &str, bytes: u64) -> Option<Self> {
        let name = found.strip_prefix(PACKS)?.strip_prefix('/')?;
        let mut parts = name.strip_suffix(".parquet")?.split('-');
        let pack = Self {
            first: parts.next()?.parse().ok()?,
            last: parts.next()?.parse().ok()?,
            generation: parts.next()?.parse().ok()?,
            digest: parts.next()?.to_owned(),
            bytes,
        };
        let is_range = pack.first <= pack.last && pack.last - pack.first < RECEIPTS_MAX;
        (is_range && pack.key() == found).then_some(pack)
    }
}

/// The packs of a run at one time. Packs are only ever added.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Index(Vec<Pack>);

impl Index {
    /// # Errors
    /// `StorageUnreachable`.
    pub(super) async fn read(run: &Location) -> Result<Self> {
        let listed = run.list(PACKS).await?;
        Ok(Self::of(listed.into_iter().filter_map(|(key, meta)| {
            let pack = Pack::parse(&key, meta.size);
            if pack.is_none() {
                tracing::warn!(key, "no pack of receipts; it is passed over");
            }
            pack
        })))
    }

    fn of(packs: impl IntoIterator<Item = Pack>) -> Self {
        let mut packs: Vec<Pack> = packs.into_iter().collect();
        packs.sort_unstable();
        Self(packs)
    }

    pub fn all(&self) -> &[Pack] {
        &self.0
    }

    /// Returns the pack that has the receipt of a step in a generation. Two may have it, if two
    /// processes packed at the same time: they say the same.
    pub fn find(&self, step: u64, generation: u32) -> Option<&Pack> {
        self.0.iter().find(|pack| pack.holds(step, generation))
    }

    /// Returns the numbers of the folders of `steps` steps each whose steps are packed.
    pub fn folders(&self, steps: u64) -> BTreeSet<u64> {
        let numbers = self
            .0
            .iter()
            .flat_map(|pack| pack.first / steps..=pack.last / steps);
        numbers.collect()
    }

    /// Returns all (step, generation) that are packed, of the folder `number` of `steps` steps.
    pub fn of_folder(&self, number: u64, steps: u64) -> impl Iterator<Item = (u64, u32)> {
        let of_pack = move |pack: &Pack| {
            let generation = pack.generation;
            let of_folder = move |step: &u64| step / steps == number;
            (pack.first..=pack.last)
                .filter(of_folder)
                .map(move |step| (step, generation))
        };
        let touches =
            move |pack: &&Pack| (pack.first / steps..=pack.last / steps).contains(&number);
        self.0.iter().filter(touches).flat_map(of_pack)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::{StorageConfig, Stores};

    fn pack(first: u64, last: u64, generation: u32) -> Pack {
        Pack {
            first,
            last,
            generation,
            digest: "ab".into(),
            bytes: 7,
        }
    }

    #[test]
    fn a_name_tells_what_is_inside_and_no_other_name_is_a_pack() {
        let known = pack(1000, 1999, 3);
        let key = "receipts/packed/000000001000-000000001999-3-ab.parquet";
        assert_eq!((known.key().as_str(), known.count()), (key, 1000));
        assert_eq!(Pack::parse(key, 7), Some(known.clone()));
        for other in [
            "receipts/packed/1000-1999-3-ab.parquet",
            "receipts/packed/000000001000-000000000999-3-ab.parquet",
            // A name may not make its reader count to the end of time.
            "receipts/packed/000000000000-18446744073709551615-3-ab.parquet",
            "receipts/packed/000000001000-000000001999-3.parquet",
            "receipts/packed/notes.txt",
            "receipts/0/8/0.parquet",
        ] {
            assert_eq!(Pack::parse(other, 7), None, "{other}");
        }
        assert!(known.holds(1999, 3) && !known.holds(2000, 3) && !known.holds(1500, 2));
    }

    #[test]
    fn packs_are_found_by_step_generation_and_folder() {
        let index = Index::of([pack(20, 24, 1), pack(8, 11, 0), pack(10, 10, 1)]);
        assert_eq!(index.find(11, 0), Some(&pack(8, 11, 0)));
        assert_eq!(index.find(11, 1), None);
        assert_eq!(index.folders(10), BTreeSet::from([0, 1, 2]));
        let in_folder = |number| index.of_folder(number, 10).collect::<Vec<_>>();
        assert_eq!(in_folder(0), [(8, 0), (9, 0)]);
        assert_eq!(in_folder(1), [(10, 0), (11, 0), (10, 1)]);
        assert_eq!(in_folder(3), []);
    }

    #[tokio::test]
    async fn packs_are_listed_and_what_is_none_is_passed_over() {
        let run = Stores::new(StorageConfig::default())
            .open("memory:///runs/r")
            .unwrap();
        assert_eq!(Index::read(&run).await.unwrap(), Index::default());
        let known = pack(0, 3, 0);
        run.put(&known.key(), "1234567".into()).await.unwrap();
        let other = "receipts/packed/notes.txt";
        run.put(other, "not ours".into()).await.unwrap();
        assert_eq!(Index::read(&run).await.unwrap(), Index::of([known]));
    }
}
