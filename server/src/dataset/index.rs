//! Indexing: which files a source has, and of each file the blocks, read from its footer alone.
use super::{
    counted,
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
use parquet::{
    arrow::arrow_reader::ArrowReaderMetadata,
    file::metadata::{ColumnChunkMetaData, RowGroupMetaData},
};
use std::collections::BTreeMap;
use superbatch_proto::v1::Reason;

/// Bytes of one column of a row group: an Arrow array's offsets are 32-bit.
const COLUMN_BYTES_MAX: i64 = i32::MAX as i64;
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

/// Indexes all sources: lists their files, reads every footer, finds image and caption. The caller
/// has checked the URIs against the allow-list.
///
/// # Errors
/// `DatasetEmpty` (also for what does not exist), `ColumnNotFound`, `SchemaMismatch`,
/// `StorageUnreachable`, `InvalidArgument` for a pattern, a weight, or a file that is no Parquet
/// file.
pub async fn index(stores: &Stores, sources: &[SourceRequest]) -> Result<Manifest> {
    if sources.is_empty() {
        return Err(Error::invalid(
            "sources",
            "no source is named; name at least one",
        ));
    }
    let mut indexed = Vec::with_capacity(sources.len());
    for request in sources {
        indexed.push(index_source(stores, request).await?);
    }
    Ok(Manifest {
        version: Manifest::VERSION,
        sources: indexed,
    })
}

async fn index_source(stores: &Stores, request: &SourceRequest) -> Result<SourceManifest> {
    if !(request.weight.is_finite() && request.weight > 0.0) {
        let message = format!(
            "the weight {} of {} is no positive number",
            request.weight, request.uri
        );
        return Err(Error::invalid("sources.weight", message));
    }
    let Pattern { root_uri, keys } = pattern::parse(&request.uri)?;
    let root = stores.open(&root_uri)?;
    let (root, root_uri, mut files) = match find(&root, &keys, &request.uri).await? {
        Found::Below(files) => (root, root_uri, files),
        Found::Itself(meta) => {
            let (folder, file) = root_uri
                .trim_end_matches('/')
                .rsplit_once('/')
                .unwrap_or_default();
            (
                stores.open(folder)?,
                folder.to_owned(),
                vec![(file.to_owned(), meta)],
            )
        }
    };
    files.sort_by(|a, b| a.0.cmp(&b.0));
    let looks = files.into_iter().map(|(path, meta)| {
        let etag = file::etag(&root, &meta);
        let file = ShardFile::new(root.below(&path), meta.size, etag.clone());
        async move {
            let footer = file.footer().await?;
            let blocks = blocks(&file, &footer)?;
            let shard = Shard {
                path,
                size: meta.size,
                etag,
                blocks,
            };
            Ok::<_, Error>((file, footer, shard))
        }
    });
    let mut looks = futures::stream::iter(looks).buffered(FILES_AT_ONCE);
    let mut source = Building::default();
    while let Some((file, footer, shard)) = looks.try_next().await? {
        source.add(request, &file, footer.schema(), shard)?;
        source.check_room(&file, footer.metadata().row_groups())?;
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
    let message = format!(
        "there is nothing at {at}; give the URI of a Parquet file, or of a folder that holds some"
    );
    Error::new(Reason::DatasetEmpty, message).with("source", source)
}

/// There are objects, but none of them is wanted: the first few are named, so that a wrong folder
/// is recognised.
fn none_of(others: &[String], at: &str, source: &str, is_pattern: bool) -> Error {
    const NAMED_MAX: usize = 3;
    let first = others
        .iter()
        .take(NAMED_MAX)
        .map(String::as_str)
        .collect::<Vec<_>>()
        .join(", ");
    let more = if others.len() > NAMED_MAX {
        ", …"
    } else {
        ""
    };
    let what = match is_pattern {
        true => format!("nothing at {at} matches {source}"),
        false => format!("no file at {at} ends in .parquet"),
    };
    let message = format!(
        "{what}; there are {}: {first}{more}",
        counted(others.len(), "other file")
    );
    Error::new(Reason::DatasetEmpty, message).with("source", source)
}

/// The files that `keys` name below `root`.
async fn find(root: &Location, keys: &Keys, uri: &str) -> Result<Found> {
    let globs = match keys {
        Keys::Exact(keys) => {
            let heads = keys.clone().into_iter().map(|key| {
                let root = root.clone();
                async move {
                    let found = root
                        .head(&key)
                        .await?
                        .ok_or_else(|| nothing(&root.uri_of(&key), uri))?;
                    Ok::<_, Error>((key, found))
                }
            });
            return futures::stream::iter(heads)
                .buffered(FILES_AT_ONCE)
                .try_collect()
                .await
                .map(Found::Below);
        }
        Keys::Globs(globs) => Some(globs),
        Keys::Folder => None,
    };
    let mut all = root.list("").await?;
    all.retain(|(path, _)| !path.is_empty());
    if all.is_empty() && globs.is_none() {
        return root
            .head("")
            .await?
            .map(Found::Itself)
            .ok_or_else(|| nothing(root.uri(), uri));
    }
    let mut others: Vec<String> = all.iter().map(|(path, _)| path.clone()).collect();
    // Writers leave `_metadata`, `_SUCCESS` and dot files beside their shards.
    let shard = |path: &str| {
        path.ends_with(".parquet")
            && !path
                .split('/')
                .any(|segment| segment.starts_with(['.', '_']))
    };
    let wanted = |path: &str| {
        globs.map_or_else(
            || shard(path),
            |g| g.iter().any(|g| pattern::matches(g, path)),
        )
    };
    let files: Vec<_> = all.into_iter().filter(|(path, _)| wanted(path)).collect();
    if files.is_empty() {
        others.sort();
        return Err(none_of(&others, root.uri(), uri, globs.is_some()));
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
    fn add(
        &mut self,
        request: &SourceRequest,
        file: &ShardFile,
        schema: &Schema,
        shard: Shard,
    ) -> Result<()> {
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

    /// Refuses a shard with a row group of more images or captions than one Arrow array holds.
    fn check_room(&self, file: &ShardFile, groups: &[RowGroupMetaData]) -> Result<()> {
        let Some(layout) = &self.layout else {
            return Ok(());
        };
        let held = |column: &&ColumnChunkMetaData| {
            let path = column.column_path().parts();
            let is_image = path[0] == layout.image_column
                && (!layout.image_in_struct || path.get(1).is_some_and(|part| part == "bytes"));
            is_image || path[0] == layout.caption_column
        };
        for (number, group) in groups.iter().enumerate() {
            let largest = group
                .columns()
                .iter()
                .filter(held)
                .map(ColumnChunkMetaData::uncompressed_size)
                .max();
            if let Some(bytes) = largest.filter(|bytes| *bytes > COLUMN_BYTES_MAX) {
                let message = format!(
                    "row group {number} of {} holds {bytes} bytes of images or captions, and \
                    {COLUMN_BYTES_MAX} can be read at \
                     once; write it with smaller row groups (row_group_size in pyarrow, a few \
                     hundred images)",
                    file.uri()
                );
                return Err(Error::invalid("sources", message).with("shard", file.uri()));
            }
        }
        Ok(())
    }

    fn finish(self, request: &SourceRequest, root_uri: String) -> Result<SourceManifest> {
        let rows = self
            .shards
            .iter()
            .flat_map(|shard| &shard.blocks)
            .map(|block| u64::from(block.rows))
            .sum::<u64>();
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
                let message = format!(
                    "{} has no rows in its {}",
                    request.uri,
                    counted(self.shards.len(), "file")
                );
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
            let message = format!(
                "{} has a row group of {} rows; write smaller ones",
                file.uri(),
                group.num_rows()
            );
            Error::invalid("sources", message).with("shard", file.uri())
        })?;
        let ranges = group
            .columns()
            .iter()
            .map(|column| file.column(column))
            .collect::<Result<Vec<_>>>()?;
        let start = ranges
            .iter()
            .map(|range| range.start)
            .min()
            .unwrap_or_default();
        let end = ranges
            .iter()
            .map(|range| range.end)
            .max()
            .unwrap_or_default();
        let block = Block {
            rows,
            first_row,
            bytes: (start, end),
        };
        first_row += u64::from(rows);
        Ok(block)
    };
    footer.metadata().row_groups().iter().map(block).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dataset::fixtures::{img2dataset, parquet, put, request, stores};

    #[tokio::test]
    async fn a_row_group_that_no_array_holds_is_refused_with_the_cure() {
        let stores = stores();
        let bytes = parquet(&img2dataset(0..4), 2);
        let size = bytes.len() as u64;
        put(&stores, &[("0.parquet", bytes)]).await;
        let file = ShardFile::new(stores.open("memory:///data/0.parquet").unwrap(), size, None);
        let footer = file.footer().await.unwrap();
        let layout = layout::discover(footer.schema(), &request("memory:///data")).unwrap();
        let building = Building {
            layout: Some(layout),
            ..Default::default()
        };
        let of = |name: &str| {
            let mut groups = footer.metadata().row_groups().to_vec();
            let mut columns = groups[1].columns().to_vec();
            let at = columns
                .iter()
                .position(|column| column.column_path().string() == name)
                .unwrap();
            let large = columns[at]
                .clone()
                .into_builder()
                .set_total_uncompressed_size(COLUMN_BYTES_MAX + 1);
            columns[at] = large.build().unwrap();
            groups[1] = groups[1]
                .clone()
                .into_builder()
                .set_column_metadata(columns)
                .build()
                .unwrap();
            groups
        };
        building
            .check_room(&file, footer.metadata().row_groups())
            .unwrap();
        building
            .check_room(&file, &of("url"))
            .expect("a column that is not read");
        let error = building.check_room(&file, &of("jpg")).unwrap_err();
        assert_eq!(error.value("shard"), Some("memory:///data/0.parquet"));
        assert!(error.to_string().contains("smaller row groups"), "{error}");
    }
}
