//! Packs: receipts of old steps, up to a thousand in one file.
//!
//! `superbatch state compact` writes them ([`super::compact`]). A pack is a fact: it is created
//! once, by the digest of its bytes, and only when all that it holds was committed. From then on it
//! is what says how its steps were decided, and the receipts' own objects may go.
pub mod file;
mod groups;
mod index;

pub use index::{Index, Pack, RECEIPTS_MAX};

use crate::{
    blocking::blocking,
    coordinator::receipts::parquet::unreadable,
    dataset::Ranges,
    error::{Error, Result},
    storage::Location,
};
use arrow::array::RecordBatch;
use bytes::Bytes;
use file::Columns;
use groups::Groups;
use parquet::{
    arrow::arrow_reader::{ArrowReaderMetadata, ArrowReaderOptions},
    errors::ParquetError,
    file::metadata::{ParquetMetaData, ParquetMetaDataReader},
};
use std::{
    collections::VecDeque,
    sync::{Arc, Mutex},
};
use superbatch_proto::v1::{Receipt, ReceiptSummary};

/// Bytes of a pack's end that are read for its footer. Most footers fit.
const FOOTER_BYTES: u64 = 64 << 10;
/// Footers that are kept, some 100 KiB each.
const FOOTERS_KEPT: usize = 4;

/// The packs of one run, with what of them was read last.
#[derive(Debug)]
pub struct Packs {
    run: Location,
    index: Mutex<Arc<Index>>,
    footers: Mutex<VecDeque<(Pack, ArrowReaderMetadata)>>,
    groups: Arc<Groups>,
    /// By which `groups` knows those of this run.
    owner: u64,
}

impl Packs {
    pub(super) fn new(run: Location) -> Self {
        Self {
            run,
            index: Mutex::default(),
            footers: Mutex::default(),
            groups: Groups::of_process(),
            owner: groups::owner(),
        }
    }

    /// Returns the packs that were there at the last look; none before the first.
    pub fn known(&self) -> Arc<Index> {
        self.index.lock().expect("no panic while held").clone()
    }

    /// Looks which packs there are.
    ///
    /// Whoever finds that a receipt has no object of its own must look after that, and not before:
    /// its pack may have come, and the object gone, in between.
    ///
    /// # Errors
    /// `StorageUnreachable`.
    pub async fn look(&self) -> Result<Arc<Index>> {
        let new = Arc::new(Index::read(&self.run).await?);
        *self.index.lock().expect("no panic while held") = new.clone();
        Ok(new)
    }

    /// Reads a receipt of a pack.
    ///
    /// # Errors
    /// `Internal` naming the pack if it is damaged; `StorageUnreachable`.
    pub async fn receipt(&self, pack: &Pack, step: u64) -> Result<Receipt> {
        let read = async {
            let rows = self.row(pack, step, Columns::All).await?;
            let decoded = blocking("reading a packed receipt", move || {
                file::receipt(&rows, 0).map_err(unreadable)
            });
            match decoded.await? {
                (found, receipt) if found == step => Ok(receipt),
                (found, _) => Err(Error::internal(format!(
                    "it has step {found} where step {step} belongs"
                ))),
            }
        };
        read.await.map_err(|error| self.about(pack, error))
    }

    /// As [`Self::receipt`], without the rows: reads one column.
    ///
    /// # Errors
    /// As [`Self::receipt`].
    pub async fn summary(&self, pack: &Pack, step: u64) -> Result<Option<ReceiptSummary>> {
        let read = async {
            let rows = self.row(pack, step, Columns::Summary).await?;
            file::summary(&rows, 0).map_err(unreadable)
        };
        read.await.map_err(|error| self.about(pack, error))
    }

    fn about(&self, pack: &Pack, error: Error) -> Error {
        let key = pack.key();
        error.about(self.run.uri_of(&key)).with("file", &key)
    }

    /// Returns the row of a step.
    async fn row(&self, pack: &Pack, step: u64, columns: Columns) -> Result<RecordBatch> {
        let footer = self.footer(pack).await?;
        let place = file::place(footer.metadata(), step - pack.first);
        let missing = || Error::internal(format!("it has no step {step}"));
        let (group, row) = place.ok_or_else(missing)?;
        let bytes = self.group(pack, &footer, group, columns).await?;
        blocking("reading a packed receipt", move || {
            file::read(bytes, &footer, group, columns, Some(row)).map_err(unreadable)
        })
        .await
    }

    async fn footer(&self, pack: &Pack) -> Result<ArrowReaderMetadata> {
        let footers = || self.footers.lock().expect("no panic while held");
        let kept = || {
            let footers = footers();
            let kept = footers.iter().find(|(known, _)| known == pack);
            kept.map(|(_, footer)| footer.clone())
        };
        if let Some(footer) = kept() {
            return Ok(footer);
        }
        let metadata = self.metadata(pack).await?;
        let footer = ArrowReaderMetadata::try_new(Arc::new(metadata), ArrowReaderOptions::new());
        let footer = footer.map_err(unreadable)?;
        let mut footers = footers();
        if footers.len() == FOOTERS_KEPT {
            footers.pop_front();
        }
        footers.push_back((pack.clone(), footer.clone()));
        Ok(footer)
    }

    async fn metadata(&self, pack: &Pack) -> Result<ParquetMetaData> {
        // A store answers a request for no bytes as if it were at fault.
        if pack.bytes == 0 {
            return Err(Error::internal("it is empty"));
        }
        let mut reader = ParquetMetaDataReader::new();
        let mut wanted = FOOTER_BYTES.min(pack.bytes);
        // The last 8 bytes hold the footer's length, so at most one more read is needed.
        for _ in 0..2 {
            let range = pack.bytes - wanted..pack.bytes;
            let end = self.run.part(&pack.key(), range).await?;
            match reader.try_parse_sized(&end, pack.bytes) {
                Ok(()) => break,
                Err(ParquetError::NeedMoreData(needed)) => {
                    wanted = (needed as u64).min(pack.bytes);
                }
                Err(cause) => return Err(unreadable(cause)),
            }
        }
        reader.finish().map_err(unreadable)
    }

    async fn group(
        &self,
        pack: &Pack,
        footer: &ArrowReaderMetadata,
        group: usize,
        columns: Columns,
    ) -> Result<Ranges> {
        if columns != Columns::All {
            return self.read(pack, footer, group, columns).await;
        }
        let at = (self.owner, pack.clone(), group);
        let read = || self.read(pack, footer, group, columns);
        self.groups.get(at, read).await
    }

    async fn read(
        &self,
        pack: &Pack,
        footer: &ArrowReaderMetadata,
        group: usize,
        columns: Columns,
    ) -> Result<Ranges> {
        let range = columns.range(footer, group);
        let range = range.filter(|range| !range.is_empty() && range.end <= pack.bytes);
        let outside = || Error::internal("its columns lie outside the file");
        let range = range.ok_or_else(outside)?;
        let bytes = self.run.part(&pack.key(), range.clone()).await?;
        Ok(Ranges::one(pack.bytes, range.start, bytes))
    }
}

impl Drop for Packs {
    fn drop(&mut self) {
        self.groups.forget(self.owner);
    }
}

/// Shows what the file of a pack holds, receipt by receipt: the hash of its own file, its step, and
/// itself.
///
/// # Errors
/// `Internal` if it is damaged.
pub fn each(pack: &Bytes, see: impl FnMut([u8; 32], u64, Receipt)) -> Result<()> {
    each_row(pack, see).map_err(unreadable)
}

fn each_row(pack: &Bytes, mut see: impl FnMut([u8; 32], u64, Receipt)) -> Result<(), ParquetError> {
    let footer = ArrowReaderMetadata::load(pack, ArrowReaderOptions::new())?;
    for group in file::groups(&footer) {
        let rows = file::read(pack.clone(), &footer, group, Columns::All, None)?;
        for row in 0..rows.num_rows() {
            let (step, receipt) = file::receipt(&rows, row)?;
            see(file::hash(&rows, row)?, step, receipt);
        }
    }
    Ok(())
}

#[cfg(test)]
pub(crate) mod tests;
