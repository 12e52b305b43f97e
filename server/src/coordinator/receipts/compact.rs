//! Packs receipts of old steps: a run of a million steps has a million of them.
//!
//! In this order, so that nothing is lost wherever it ends: receipts are read; their pack is
//! written; what was written is read back; then their own objects are deleted. Whoever does it
//! again finishes it. Two that do it at once write the same packs, or packs that say the same.
//!
//! No step is decided twice. A packed step was committed, which its run's owner knows in memory,
//! and every later owner by the packs, which it lists after it claimed the run. A former owner that
//! does not know it finds that it is one before it serves anything (`step/decide.rs`). Only builds
//! that know no packs must be kept out: that is the caller's part.
mod objects;
mod verify;

pub use verify::problems;

use super::{
    packs::{
        Pack, Packs,
        file::{Parts, Writer},
    },
    store::{Receipts, folder},
};
use crate::{
    blocking::blocking,
    error::{Error, Result},
    storage::Location,
};
use futures::TryStreamExt;
use objects::{Single, read_each, runs, singles, taken_apart};
use parquet::errors::ParquetError;
use std::collections::{BTreeMap, BTreeSet};
use verify::{check, compared, hashes};

/// Bytes of receipts' files in one pack, which is made and read back in memory.
const PACK_BYTES: usize = 64 << 20;
/// Receipts that are not worth a pack.
const ALONE: usize = 1;

/// What is to be packed.
#[derive(Debug, Clone, Copy)]
pub struct Settings {
    /// Steps in one pack, at most.
    pub pack: u64,
    /// Only steps before this one.
    pub before: u64,
    /// Only up to this generation: one that is opened meanwhile begins among those steps.
    pub generation: u32,
    /// Whether to look only.
    pub dry_run: bool,
}

impl Settings {
    fn takes(&self, single: &Single) -> bool {
        single.step < self.before && single.generation <= self.generation
    }
}

/// What was done, or would be.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Compacted {
    /// Receipts that were packed, and the size of their own objects.
    pub packed: u64,
    pub packed_bytes: u64,
    pub packs: u64,
    pub packs_bytes: u64,
    /// Objects that were deleted: those of packed receipts, and of those that were packed before.
    pub deleted: u64,
    pub deleted_bytes: u64,
    /// Objects of receipts that stay.
    pub stay: u64,
    /// Why receipts stay that could have been packed.
    pub problems: BTreeSet<String>,
}

/// A pack that is being gathered: what it has, and of each receipt the hash of its content.
struct Gathered {
    writer: Writer,
    singles: Vec<Single>,
    contents: Vec<blake3::Hash>,
}

/// Whether a folder is done.
#[derive(Debug, PartialEq, Eq)]
enum Pass {
    Done,
    /// Another process packed meanwhile: it has to be listed again.
    Again,
}

/// Packs the receipts of one run.
pub struct Compaction<'a, M> {
    run: &'a Location,
    packs: &'a Packs,
    settings: Settings,
    /// Asked before each deletion; an error ends it all.
    may_delete: M,
    done: Compacted,
}

impl<'a, M, F> Compaction<'a, M>
where
    M: Fn() -> F,
    F: Future<Output = Result<()>>,
{
    pub fn new(receipts: &'a Receipts, settings: Settings, may_delete: M) -> Self {
        Self {
            run: receipts.run(),
            packs: receipts.packs(),
            settings,
            may_delete,
            done: Compacted::default(),
        }
    }

    /// Goes through the folders `numbers`; `tell` is told after each what was done so far.
    ///
    /// # Errors
    /// Those of `may_delete`; `StorageUnreachable`; `Internal` if the store gives other bytes than
    /// were written. Nothing is lost by any of them.
    pub async fn run(
        mut self,
        numbers: Vec<u64>,
        mut tell: impl FnMut(&Compacted),
    ) -> Result<Compacted> {
        for number in numbers {
            let stay = self.done.stay;
            while self.folder(number).await? == Pass::Again {
                self.done.stay = stay;
            }
            if !self.settings.dry_run {
                self.run.prune(&folder(number)).await;
            }
            tell(&self.done);
        }
        Ok(self.done)
    }

    async fn folder(&mut self, number: u64) -> Result<Pass> {
        let singles = singles(self.run, number).await?.into_iter();
        let (old, new): (Vec<_>, Vec<_>) = singles.partition(|single| self.settings.takes(single));
        // After the objects: a pack that came in between only makes a read in vain.
        let index = self.packs.look().await?;
        let (mut covered, mut free) = (BTreeMap::<_, Vec<_>>::new(), Vec::new());
        for single in old {
            match index.find(single.step, single.generation) {
                Some(pack) => covered.entry(pack.clone()).or_default().push(single),
                None => free.push(single),
            }
        }
        let (worth, alone): (Vec<_>, Vec<_>) = runs(free, self.settings.pack)
            .into_iter()
            .partition(|run| run.len() > ALONE);
        if self.settings.dry_run {
            self.count(&covered, &worth);
        } else {
            for (pack, singles) in &covered {
                self.finish(pack, singles).await?;
            }
            for run in &worth {
                if self.pack(run).await? == Pass::Again {
                    return Ok(Pass::Again);
                }
            }
        }
        self.done.stay += (new.len() + alone.iter().flatten().count()) as u64;
        Ok(Pass::Done)
    }

    /// Counts what would be done.
    fn count(&mut self, covered: &BTreeMap<Pack, Vec<Single>>, runs: &[Vec<Single>]) {
        for single in covered.values().flatten() {
            self.done.deleted += 1;
            self.done.deleted_bytes += single.bytes;
        }
        for run in runs {
            self.done.packs += 1;
            for single in run {
                self.done.packed += 1;
                self.done.packed_bytes += single.bytes;
                self.done.deleted += 1;
                self.done.deleted_bytes += single.bytes;
            }
        }
    }

    /// Deletes objects of receipts that a pack has: it was written before, and its writer ended.
    async fn finish(&mut self, pack: &Pack, singles: &[Single]) -> Result<()> {
        let hashes = match hashes(self.run, pack).await? {
            Ok(hashes) => hashes,
            Err(damage) => {
                self.done.problems.insert(damage);
                self.done.stay += singles.len() as u64;
                return Ok(());
            }
        };
        let (same, others) = compared(self.run, pack, &hashes, singles).await?;
        self.done.stay += others.len() as u64;
        self.done.problems.extend(others);
        self.delete(&same).await
    }

    /// Packs receipts of consecutive steps.
    async fn pack(&mut self, singles: &[Single]) -> Result<Pass> {
        let mut gathered: Option<Gathered> = None;
        let mut files = read_each(self.run, singles);
        while let Some((single, bytes)) = files.try_next().await? {
            let Some(bytes) = bytes else {
                return Ok(Pass::Again);
            };
            let (parts, content) = match taken_apart(bytes).await {
                Ok(taken) => taken,
                Err(error) => {
                    self.stays(&[single], &error);
                    self.write(gathered.take()).await?;
                    continue;
                }
            };
            let is_full = |pack: &Gathered| {
                pack.writer.bytes + parts.bytes > PACK_BYTES || !pack.writer.takes(&parts)
            };
            if gathered.as_ref().is_some_and(is_full) {
                self.write(gathered.take()).await?;
            }
            gathered = self.gather(gathered.take(), single, parts, content);
        }
        self.write(gathered).await?;
        Ok(Pass::Done)
    }

    /// Adds a receipt to those of one pack. If they cannot be packed, all of them stay.
    fn gather(
        &mut self,
        gathered: Option<Gathered>,
        single: Single,
        parts: Parts,
        content: blake3::Hash,
    ) -> Option<Gathered> {
        let (singles, cause) = match gathered {
            None => match Writer::begin(single.generation, single.step, parts) {
                Ok(writer) => {
                    return Some(Gathered {
                        writer,
                        singles: vec![single],
                        contents: vec![content],
                    });
                }
                Err(cause) => (vec![single], cause),
            },
            Some(mut pack) => {
                pack.singles.push(single);
                pack.contents.push(content);
                match pack.writer.push(parts) {
                    Ok(()) => return Some(pack),
                    Err(cause) => (pack.singles, cause),
                }
            }
        };
        self.stays(&singles, &unwritable(cause));
        None
    }

    /// Counts receipts of consecutive steps that cannot be packed.
    fn stays(&mut self, singles: &[Single], error: &Error) {
        let Some(first) = singles.first() else {
            return;
        };
        let (uri, why) = (self.run.uri_of(&first.key()), error.chain());
        self.done.problems.insert(match singles.len() {
            1 => format!("{uri} stays as it is: {why}"),
            count => format!(
                "{uri} and the {} after it stay as they are: {why}",
                count - 1
            ),
        });
        self.done.stay += singles.len() as u64;
    }

    /// Writes a pack, makes sure that it is there, and deletes the objects of its receipts.
    async fn write(&mut self, gathered: Option<Gathered>) -> Result<()> {
        let Some(gathered) = gathered else {
            return Ok(());
        };
        let Gathered {
            writer,
            singles,
            contents,
        } = gathered;
        let (first, last) = (singles[0], singles[singles.len() - 1]);
        if singles.len() <= ALONE {
            self.done.stay += singles.len() as u64;
            return Ok(());
        }
        // A receipt is looked at as this build understands it, before the pack is there for all.
        let packed = blocking("packing receipts", move || {
            let bytes = writer.finish().map_err(unwritable)?;
            check(&bytes, first.step, &contents)?;
            Ok(bytes)
        });
        let bytes = match packed.await {
            Ok(bytes) => bytes,
            Err(error) => {
                self.stays(&singles, &error);
                return Ok(());
            }
        };
        let pack = Pack {
            first: first.step,
            last: last.step,
            generation: first.generation,
            digest: blake3::hash(&bytes).to_hex().to_string(),
            bytes: bytes.len() as u64,
        };
        // Another compaction may have written the same one, and deleted objects since: whatever is
        // read back, it is neither overwritten nor deleted.
        self.run.put_new(&pack.key(), bytes.clone()).await?;
        if self.run.get_large(&pack.key()).await? != bytes {
            let uri = self.run.uri_of(&pack.key());
            return Err(Error::internal(format!(
                "{uri} was read back with other bytes than were written; nothing was deleted. If \
                 `superbatch state check` finds it damaged too, and the receipts of all its steps \
                 are there as objects, delete it"
            )));
        }
        self.delete(&singles).await?;
        self.done.packs += 1;
        self.done.packs_bytes += pack.bytes;
        self.done.packed += singles.len() as u64;
        self.done.packed_bytes += singles.iter().map(|single| single.bytes).sum::<u64>();
        Ok(())
    }

    async fn delete(&mut self, singles: &[Single]) -> Result<()> {
        (self.may_delete)().await?;
        let keys: Vec<String> = singles.iter().map(Single::key).collect();
        self.run.delete_all(&keys).await?;
        self.done.deleted += keys.len() as u64;
        self.done.deleted_bytes += singles.iter().map(|single| single.bytes).sum::<u64>();
        Ok(())
    }
}

fn unwritable(cause: ParquetError) -> Error {
    Error::internal("cannot pack receipts").because(cause)
}

#[cfg(test)]
mod tests;
