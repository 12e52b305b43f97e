//! Numeric columns as scores of rows. The values of a shard are read once and kept in the state.
mod joins;

use super::{
    file::ShardFile,
    filter::{
        columns::{self, Batches},
        expression::Literal,
        ids::{self, NUMBERS, number},
        values::{Kind, values},
    },
    layout,
    manifest::{Format, Shard, SourceManifest},
    tar,
};
use crate::{
    blocking::blocking,
    error::{Error, Result},
    storage::{Location, Stores},
};
use arrow::error::ArrowError;
use bytes::Bytes;
use joins::{Id, Joined, Joins, ROW_BYTES, check_rows, forget_oldest, sorted, used};
use std::{
    collections::VecDeque,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

/// Folder of the values, in the state.
pub(super) const COLUMNS: &str = "score-columns";
/// Part of the key: what other versions wrote is not read.
const VERSION: &str = "1";
/// Tars of a source of which one must have the entry that is a score.
const SHARDS_CHECKED: usize = 16;
/// Values of shards that are kept in memory, in all.
const VALUES_MAX: usize = 8 << 20;

/// A shard's values with their key, newest last.
type Recent = VecDeque<(String, Arc<Vec<f64>>)>;

/// Reads the score columns of a run.
pub struct Scores {
    stores: Stores,
    state: Location,
    joined: Mutex<Joins>,
    recent: Mutex<Recent>,
}

impl Scores {
    pub fn new(stores: Stores, state: Location) -> Self {
        Self {
            stores,
            state,
            joined: Mutex::default(),
            recent: Mutex::default(),
        }
    }

    /// Returns the value of each row that is stored in a shard, by its number in it; NaN where
    /// there is none.
    ///
    /// # Errors
    /// `ColumnNotFound`, `SchemaMismatch` if it holds no numbers, `DatasetChanged`; those of
    /// reading.
    pub async fn of_shard(
        &self,
        source: &SourceManifest,
        shard: &Shard,
        column: &str,
    ) -> Result<Arc<Vec<f64>>> {
        let location = self.stores.open(&source.root_uri)?.below(&shard.path);
        let file = ShardFile::new(location, shard.size, shard.etag.clone());
        let key = key(source, &file, column);
        if let Some(known) = self.known(&key) {
            return Ok(known);
        }
        let kept = kept_key(source, &file, column);
        let mut found = None;
        if let Some(kept) = &kept {
            found = self
                .state
                .find(kept)
                .await?
                .and_then(|bytes| decoded(&bytes));
        }
        let values = match found {
            Some(values) => values,
            None => {
                let values = self.read(source, &file, column).await?;
                if let Some(kept) = &kept {
                    self.state.put(kept, encoded(&values)).await?;
                }
                values
            }
        };
        let values = Arc::new(values);
        self.cache(key, values.clone());
        Ok(values)
    }

    /// Checks that a source has a column of numbers, by its first shard. A tar may be cut off
    /// before its first JSON, so that the next ones are looked at.
    ///
    /// # Errors
    /// As [`Scores::of_shard`].
    pub async fn check(&self, source: &SourceManifest, column: &str) -> Result<()> {
        let shards = source
            .shards
            .iter()
            .filter(|shard| !shard.blocks.is_empty());
        let mut missing = None;
        for shard in shards.take(SHARDS_CHECKED) {
            let values = self.of_shard(source, shard, column).await?;
            let has_values = values.iter().any(|value| !value.is_nan());
            if has_values || source.layout.format != Format::Tar {
                return Ok(());
            }
            let location = self.stores.open(&source.root_uri)?.below(&shard.path);
            let file = ShardFile::new(location, shard.size, shard.etag.clone());
            let scores = source.scores.as_ref();
            let name = scores.map_or(column, |scores| &scores.id_column);
            let survey = tar::survey_kept(Some(&self.state), &file).await?;
            let entries = tar::entries(&file, &survey, &source.layout, &[name]).await?;
            match entries.seen().missing(file.uri(), name, "") {
                None => return Ok(()),
                error => missing = missing.or(error),
            }
        }
        missing.map_or(Ok(()), Err)
    }

    fn recent(&self) -> MutexGuard<'_, Recent> {
        self.recent.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn known(&self, key: &str) -> Option<Arc<Vec<f64>>> {
        let mut recent = self.recent();
        let at = recent.iter().position(|(known, _)| known == key)?;
        let entry = recent.remove(at)?;
        let values = entry.1.clone();
        recent.push_back(entry);
        Some(values)
    }

    fn cache(&self, key: String, values: Arc<Vec<f64>>) {
        let mut recent = self.recent();
        recent.push_back((key, values));
        let held = |recent: &Recent| recent.iter().map(|(_, v)| v.len().max(1)).sum::<usize>();
        while recent.len() > 1 && held(&recent) > VALUES_MAX {
            recent.pop_front();
        }
    }

    async fn read(
        &self,
        source: &SourceManifest,
        file: &ShardFile,
        column: &str,
    ) -> Result<Vec<f64>> {
        let Some(scores) = &source.scores else {
            let number = |value: Option<&Literal>| value.map_or(f64::NAN, number);
            return self.column(source, file, column, true, number).await;
        };
        let id = |value: Option<&Literal>| value.map(|id| ids::hashed(id).to_be_bytes());
        let ids = self.column(source, file, &scores.id_column, false, id);
        let ids = ids.await?;
        let joined = self.joined(source, column).await?;
        let value = |id: &Option<Id>| {
            let id = (*id)?;
            let at = joined.binary_search_by_key(&id, |(id, _)| *id).ok()?;
            Some(joined[at].1)
        };
        Ok(ids.iter().map(|id| value(id).unwrap_or(f64::NAN)).collect())
    }

    /// Reads a column of the shard itself, and returns what `of` makes of each row's value.
    async fn column<T: Send + 'static>(
        &self,
        source: &SourceManifest,
        file: &ShardFile,
        column: &str,
        is_number: bool,
        of: fn(Option<&Literal>) -> T,
    ) -> Result<Vec<T>> {
        if source.layout.format == Format::Tar {
            let survey = tar::survey_kept(Some(&self.state), file).await?;
            let entries = tar::entries(file, &survey, &source.layout, &[column]).await?;
            let values = entries.column(column)?.to_vec();
            let text = values
                .iter()
                .flatten()
                .find(|v| matches!(v, Literal::Text(_)));
            return match text.filter(|_| is_number) {
                Some(text) => Err(no_number(file, column, &text.to_string())),
                None => Ok(values.iter().map(|value| of(value.as_ref())).collect()),
            };
        }
        let footer = file.footer().await?;
        let schema = footer.schema();
        let Ok(field) = schema.field_with_name(column) else {
            let names: Vec<&str> = schema.fields().iter().map(|f| f.name().as_str()).collect();
            let message = format!("{} has no column '{column}'", file.uri());
            return Err(layout::not_found(message, column, &names));
        };
        let kind = Kind::of(field.data_type());
        let fits = if is_number {
            kind.is_some_and(|kind| NUMBERS.contains(&kind))
        } else {
            matches!(kind, Some(Kind::Text | Kind::Int | Kind::Null))
        };
        if !fits {
            return Err(no_number(file, column, &field.data_type().to_string()));
        }
        let groups: Vec<usize> = (0..footer.metadata().num_row_groups()).collect();
        let look = move |_: usize, batches: &mut Batches| -> Result<Vec<T>, ArrowError> {
            let mut all = Vec::new();
            for batch in batches {
                let values = values(batch?.column(0))?;
                all.extend(values.iter().map(|value| of(value.as_ref())));
            }
            Ok(all)
        };
        let all = columns::read(file, &footer, &groups, &[column], look).await?;
        Ok(all.into_iter().flatten().collect())
    }

    /// Reads a column of the Parquet files beside the source, by id.
    async fn joined(&self, source: &SourceManifest, column: &str) -> Result<Joined> {
        let Some(scores) = &source.scores else {
            return Err(Error::internal("a source without files of scores"));
        };
        let key = [&scores.uri, &scores.id_column, column].map(ToString::to_string);
        let cell = used(&mut self.joins(), key);
        let most = usize::try_from(self.stores.ids_bytes_max() / ROW_BYTES).unwrap_or(usize::MAX);
        let make = || async {
            let found = ids::find(&self.stores, &scores.uri).await?;
            if found.digest != scores.digest {
                let message = format!(
                    "{} is not what it was when the run was opened; put the files back, or open \
                     another run",
                    scores.uri
                );
                let changed = superbatch_proto::v1::Reason::DatasetChanged;
                return Err(Error::new(changed, message).with("shard", &scores.uri));
            }
            let mut all = Vec::new();
            for file in &found.files {
                let before = all.len();
                let check = |rows| check_rows(before.saturating_add(rows), most, &scores.uri);
                let more = ids::numbered(file, &scores.id_column, Some(column), check).await?;
                let more = more
                    .into_iter()
                    .map(|(id, value)| (id.to_be_bytes(), value));
                // No more than they need: a join may take half of the machine's memory.
                all.reserve_exact(more.len());
                all.extend(more);
            }
            let (uri, column) = (scores.uri.clone(), column.to_owned());
            // Sorting hundreds of millions of rows takes minutes.
            let sort = move || sorted(all, &uri, &column).map(Arc::new);
            blocking("joining scores", sort).await
        };
        let joined = cell.get_or_try_init(make).await.cloned();
        forget_oldest(&mut self.joins(), most);
        joined
    }

    fn joins(&self) -> MutexGuard<'_, Joins> {
        self.joined.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn no_number(file: &ShardFile, column: &str, found: &str) -> Error {
    let message = format!("column '{column}' of {} is {found}, no number", file.uri());
    layout::mismatch(message, file.uri(), column)
}

/// Returns the key in the state of a shard's values. `None` without an ETag: what a store gives
/// none is read again by each process.
pub(super) fn kept_key(source: &SourceManifest, file: &ShardFile, column: &str) -> Option<String> {
    file.etag()?;
    Some(format!("{COLUMNS}/{}", key(source, file, column)))
}

/// Returns whether these are the bytes of a shard's values.
pub(super) fn is_whole(bytes: &[u8]) -> bool {
    decoded(bytes).is_some()
}

/// Returns what the values of a shard depend on.
fn key(source: &SourceManifest, file: &ShardFile, column: &str) -> String {
    let scores = source.scores.as_ref();
    let layout = match source.layout.format {
        Format::Parquet => String::new(),
        // They decide which samples are rows.
        Format::Tar => {
            let layout = &source.layout;
            [layout.image_column.as_str(), &layout.caption_column].join("\0")
        }
    };
    let size = file.size().to_string();
    let parts = [
        VERSION,
        file.uri(),
        &size,
        file.etag().unwrap_or_default(),
        &layout,
        column,
        scores.map_or("", |scores| &scores.id_column),
        scores.map_or("", |scores| &scores.digest),
    ];
    let mut hasher = blake3::Hasher::new();
    for part in parts {
        hasher
            .update(&(part.len() as u64).to_le_bytes())
            .update(part.as_bytes());
    }
    hasher.finalize().to_hex().to_string()
}

/// Returns little-endian values, then BLAKE3 of them.
fn encoded(values: &[f64]) -> Bytes {
    let mut bytes: Vec<u8> = values
        .iter()
        .flat_map(|value| value.to_le_bytes())
        .collect();
    let hash = blake3::hash(&bytes);
    bytes.extend_from_slice(hash.as_bytes());
    bytes.into()
}

/// Returns `None` if the bytes are damaged: they are read from the data again.
fn decoded(bytes: &[u8]) -> Option<Vec<f64>> {
    let (values, hash) = bytes.split_at_checked(bytes.len().checked_sub(32)?)?;
    if blake3::hash(values).as_bytes() != hash {
        return None;
    }
    let chunks = values.as_chunks::<8>().0;
    Some(
        chunks
            .iter()
            .map(|value| f64::from_le_bytes(*value))
            .collect(),
    )
}

#[cfg(test)]
mod tests;
