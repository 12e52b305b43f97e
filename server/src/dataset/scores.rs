//! Numeric columns as scores of rows. The values of a shard are read once and kept in the state.
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
use std::{
    collections::VecDeque,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};
use tokio::sync::OnceCell;

/// Part of the key: what other versions wrote is not read.
const VERSION: &str = "1";
/// Tars of a source of which one must have the entry that is a score.
const SHARDS_CHECKED: usize = 16;
/// Values of shards that are kept in memory, in all.
const VALUES_MAX: usize = 8 << 20;

/// Bytes of a row of the joins that are kept in memory. A join is needed for the shards that are
/// scored for the first time only, so the one that was used longest ago goes if they take more than
/// the operator gives.
const ROW_BYTES: u64 = size_of::<(Id, f64)>() as u64;

/// An id's hash, most significant byte first. Bytes and not a number: a pair of u128 and f64 takes
/// 32 bytes, of which 8 are padding.
type Id = [u8; 16];
/// Ids, sorted, with their values.
type Joined = Arc<Vec<(Id, f64)>>;
/// URI, column of ids, column of values.
type JoinKey = [String; 3];
/// A shard's values with their key, newest last.
type Recent = VecDeque<(String, Arc<Vec<f64>>)>;
/// Joins, the one used last at the end.
type Joins = VecDeque<(JoinKey, Arc<OnceCell<Joined>>)>;

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
        // What a store gives no ETag is read again by each process.
        let kept = file.etag().map(|_| format!("score-columns/{key}"));
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

/// Returns the place of a join, now the one used last.
fn used(joins: &mut Joins, key: JoinKey) -> Arc<OnceCell<Joined>> {
    let known = joins.iter().position(|(known, _)| *known == key);
    let join = known.and_then(|at| joins.remove(at));
    let join = join.unwrap_or_else(|| (key, Arc::default()));
    joins.push_back(join.clone());
    join.1
}

/// Forgets joins until those that are left have `most` rows together, or only the last is left.
fn forget_oldest(joins: &mut Joins, most: usize) {
    let rows = |(_, cell): &(JoinKey, Arc<OnceCell<Joined>>)| cell.get().map_or(0, |j| j.len());
    while joins.len() > 1 && joins.iter().map(rows).sum::<usize>() > most {
        joins.pop_front();
    }
}

/// Sorts rows by id. Rows that repeat are one.
///
/// # Errors
/// `InvalidArgument` if an id has several values.
fn sorted(mut all: Vec<(Id, f64)>, uri: &str, column: &str) -> Result<Vec<(Id, f64)>> {
    all.sort_unstable_by(|a, b| a.0.cmp(&b.0).then(a.1.total_cmp(&b.1)));
    let rows = all.len();
    all.dedup_by(|a, b| a.0 == b.0 && a.1.to_bits() == b.1.to_bits());
    let ids = all.chunk_by(|a, b| a.0 == b.0).count();
    if ids == all.len() {
        return Ok(all);
    }
    let message =
        format!("{uri} has several values of '{column}' for one id: {rows} rows, {ids} ids");
    Err(Error::invalid("sources.scores", message).with("uri", uri))
}

/// Checks the number of rows before they are kept, so that files of any size cannot fill the
/// memory.
fn check_rows(rows: usize, most: usize, uri: &str) -> Result<()> {
    if rows <= most {
        return Ok(());
    }
    let bytes = |rows: usize| (rows as u64).saturating_mul(ROW_BYTES);
    let message = format!(
        "{uri} holds {rows} rows or more, and a source's scores are joined in memory: they take {} \
        bytes, and storage.ids_bytes_max leaves {}; raise it where there is memory for that, give \
        the scores as a column of the data, or cut the source and its scores into several",
        bytes(rows),
        bytes(most),
    );
    Err(Error::invalid("sources.scores", message).with("uri", uri))
}

fn no_number(file: &ShardFile, column: &str, found: &str) -> Error {
    let message = format!("column '{column}' of {} is {found}, no number", file.uri());
    layout::mismatch(message, file.uri(), column)
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
