//! Indexing: which files a source has, and of each file the blocks, read from its footer alone.
use super::{
    file::{self, ShardFile},
    layout,
    manifest::{Block, Column, Layout, Manifest, Shard, SourceManifest},
    pattern::{self, Keys, Pattern},
};
use crate::{
    error::{Error, Result},
    storage::{Location, Stores},
};
use arrow::datatypes::Schema;
use futures::{StreamExt, TryStreamExt};
use object_store::ObjectMeta;
use parquet::{arrow::arrow_reader::ArrowReaderMetadata, file::metadata::RowGroupMetaData};
use std::collections::BTreeMap;
use superbatch_proto::v1::Reason;

/// Files that are looked at at once.
const FILES_AT_ONCE: usize = 16;

/// One source to index. An empty column name in a request is `None` here.
#[derive(Debug, Clone, PartialEq)]
pub struct SourceRequest {
    /// A Parquet file, a folder of them, or a pattern.
    pub uri: String,
    /// Share of each super-batch, relative to the other sources.
    pub weight: f64,
    pub image_column: Option<String>,
    pub caption_column: Option<String>,
}

/// Indexes all sources: lists their files, reads every footer, finds image and caption. The caller has checked the URIs
/// against the allow-list.
///
/// # Errors
/// `DatasetEmpty` (also for what does not exist), `ColumnNotFound`, `SchemaMismatch`, `StorageUnreachable`, `InvalidArgument` for a
/// pattern, a weight, or a file that is no Parquet file.
pub async fn index(stores: &Stores, sources: &[SourceRequest]) -> Result<Manifest> {
    if sources.is_empty() {
        return Err(Error::invalid("sources", "no source is named; name at least one"));
    }
    let mut indexed = Vec::with_capacity(sources.len());
    for request in sources {
        indexed.push(index_source(stores, request).await?);
    }
    Ok(Manifest { version: Manifest::VERSION, sources: indexed })
}

async fn index_source(stores: &Stores, request: &SourceRequest) -> Result<SourceManifest> {
    if !(request.weight.is_finite() && request.weight > 0.0) {
        let message = format!("the weight {} of {} is no positive number", request.weight, request.uri);
        return Err(Error::invalid("sources.weight", message));
    }
    let Pattern { root_uri, keys } = pattern::parse(&request.uri)?;
    let root = stores.open(&root_uri)?;
    let (root, root_uri, mut files) = match find(&root, &keys, &request.uri).await? {
        Found::Below(files) => (root, root_uri, files),
        Found::Itself(meta) => {
            let (folder, file) = root_uri.trim_end_matches('/').rsplit_once('/').unwrap_or_default();
            (stores.open(folder)?, folder.to_owned(), vec![(file.to_owned(), meta)])
        }
    };
    files.sort_by(|a, b| a.0.cmp(&b.0));
    let looks = files.into_iter().map(|(path, meta)| {
        let file = ShardFile::new(root.below(&path), meta.size, file::etag(&meta));
        async move {
            let footer = file.footer().await?;
            let blocks = blocks(&file, &footer)?;
            let shard = Shard { path, size: meta.size, etag: file::etag(&meta), blocks };
            Ok::<_, Error>((file, footer, shard))
        }
    });
    let mut looks = futures::stream::iter(looks).buffered(FILES_AT_ONCE);
    let mut source = Building::default();
    while let Some((file, footer, shard)) = looks.try_next().await? {
        source.add(request, &file, footer.schema(), shard)?;
    }
    source.finish(request, root_uri)
}

enum Found {
    /// Paths below the root.
    Below(Vec<(String, ObjectMeta)>),
    /// What looked like a folder's URI is a file's.
    Itself(ObjectMeta),
}

fn nothing(at: &str, source: &str) -> Error {
    let message = format!("there is nothing at {at}; give the URI of a Parquet file, or of a folder that holds some");
    Error::new(Reason::DatasetEmpty, message).with("source", source)
}

/// The files that `keys` name below `root`.
async fn find(root: &Location, keys: &Keys, uri: &str) -> Result<Found> {
    let globs = match keys {
        Keys::Exact(keys) => {
            let heads = keys.clone().into_iter().map(|key| {
                let root = root.clone();
                async move {
                    let found = root.head(&key).await?.ok_or_else(|| nothing(&root.uri_of(&key), uri))?;
                    Ok::<_, Error>((key, found))
                }
            });
            return futures::stream::iter(heads).buffered(FILES_AT_ONCE).try_collect().await.map(Found::Below);
        }
        Keys::Globs(globs) => Some(globs),
        Keys::Folder => None,
    };
    let mut all = root.list("").await?;
    all.retain(|(path, _)| !path.is_empty());
    if all.is_empty() && globs.is_none() {
        return root.head("").await?.map(Found::Itself).ok_or_else(|| nothing(root.uri(), uri));
    }
    let objects = all.len();
    // Writers leave `_metadata`, `_SUCCESS` and dot files beside their shards.
    let shard =
        |path: &str| path.ends_with(".parquet") && !path.split('/').any(|segment| segment.starts_with(['.', '_']));
    let wanted = |path: &str| globs.map_or_else(|| shard(path), |g| g.iter().any(|g| pattern::matches(g, path)));
    let files: Vec<_> = all.into_iter().filter(|(path, _)| wanted(path)).collect();
    if files.is_empty() {
        let message = format!("none of the {objects} objects at {} is a Parquet file that {uri} names", root.uri());
        return Err(Error::new(Reason::DatasetEmpty, message).with("source", uri));
    }
    Ok(Found::Below(files))
}

/// A source while its shards come in, in the order of their paths.
#[derive(Default)]
struct Building {
    layout: Option<Layout>,
    columns: BTreeMap<String, Column>,
    shards: Vec<Shard>,
}

impl Building {
    fn add(&mut self, request: &SourceRequest, file: &ShardFile, schema: &Schema, shard: Shard) -> Result<()> {
        match &self.layout {
            None => self.layout = Some(layout::discover(schema, request)?),
            Some(layout) => layout::check(schema, layout, &request.uri, file.uri())?,
        }
        for field in schema.fields() {
            let (name, data_type) = (field.name(), field.data_type().to_string());
            let new = || Column {
                name: name.clone(),
                data_type: data_type.clone(),
                differs_in: self.shards.first().map(|first| first.path.clone()),
            };
            let column = self.columns.entry(name.clone()).or_insert_with(new);
            if column.data_type != data_type {
                column.differs_in.get_or_insert_with(|| shard.path.clone());
            }
        }
        for column in self.columns.values_mut() {
            if schema.field_with_name(&column.name).is_err() {
                column.differs_in.get_or_insert_with(|| shard.path.clone());
            }
        }
        self.shards.push(shard);
        Ok(())
    }

    fn finish(self, request: &SourceRequest, root_uri: String) -> Result<SourceManifest> {
        let rows = self.shards.iter().flat_map(|shard| &shard.blocks).map(|block| u64::from(block.rows)).sum::<u64>();
        match self.layout {
            Some(layout) if rows > 0 => Ok(SourceManifest {
                uri: request.uri.clone(),
                root_uri,
                weight: request.weight,
                layout,
                columns: self.columns.into_values().collect(),
                shards: self.shards,
            }),
            _ => {
                let message = format!("{} has no rows in its {} files", request.uri, self.shards.len());
                Err(Error::new(Reason::DatasetEmpty, message).with("source", &request.uri))
            }
        }
    }
}

/// The blocks of a file: its row groups.
fn blocks(file: &ShardFile, footer: &ArrowReaderMetadata) -> Result<Vec<Block>> {
    let mut first_row = 0;
    let block = |group: &RowGroupMetaData| {
        let rows = u32::try_from(group.num_rows()).map_err(|_| {
            let message = format!("{} has a row group of {} rows; write smaller ones", file.uri(), group.num_rows());
            Error::invalid("sources", message).with("shard", file.uri())
        })?;
        let ranges = group.columns().iter().map(|column| file.column(column)).collect::<Result<Vec<_>>>()?;
        let start = ranges.iter().map(|range| range.start).min().unwrap_or_default();
        let end = ranges.iter().map(|range| range.end).max().unwrap_or_default();
        let block = Block { rows, first_row, bytes: (start, end) };
        first_row += u64::from(rows);
        Ok(block)
    };
    footer.metadata().row_groups().iter().map(block).collect()
}
