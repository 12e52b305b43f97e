//! Indexes Parquet files as a source of the manifest. Blocks are row groups, or parts of them where
//! the images lie elsewhere; only footers are read.
use super::{
    LARGE_BLOCK_ROWS, SourceRequest, counted,
    file::{self, ShardFile},
    filter::Filter,
    layout,
    manifest::{Block, Column, Layout, Shard, SourceManifest},
    paths, unify,
};
use crate::{
    error::{Error, Result},
    storage::Location,
};
use arrow::datatypes::{DataType, Schema};
use futures::{StreamExt, TryStreamExt};
use object_store::ObjectMeta;
use parquet::{
    arrow::arrow_reader::ArrowReaderMetadata,
    file::metadata::{ColumnChunkMetaData, RowGroupMetaData},
};
use std::collections::BTreeMap;
use superbatch_proto::v1::Reason;

/// Most bytes of one column of a row group: an Arrow array's offsets have 32 bits.
const COLUMN_BYTES_MAX: i64 = i32::MAX as i64;
/// Most rows of a row group: which of them are kept is decided in memory.
const GROUP_ROWS_MAX: u32 = 1 << 24;
/// Files that are read at the same time.
const FILES_AT_ONCE: usize = 16;

/// Indexes the source whose shards are `files` below `root`.
///
/// # Errors
/// `ColumnNotFound`, `SchemaMismatch`, `DatasetEmpty`, and those of reading a footer.
pub(super) async fn index_shards(
    request: &SourceRequest,
    filter: &Filter,
    root: &Location,
    root_uri: String,
    files: Vec<(String, ObjectMeta)>,
) -> Result<SourceManifest> {
    let looks = files.into_iter().map(|(path, meta)| {
        let etag = file::etag(root, &meta);
        let file = ShardFile::new(root.below(&path), meta.size, etag.clone());
        async move {
            let footer = file.footer().await?;
            let mut blocks = blocks(&file, &footer)?;
            let left_out = filter.keep_rows(&file, &footer, &mut blocks).await?;
            let shard = Shard {
                path,
                size: meta.size,
                etag,
                blocks,
                left_out: 0,
                without_image: 0,
                outside: left_out.outside,
                not_downloaded: left_out.not_downloaded,
                flaw: None,
            };
            Ok::<_, Error>((file, footer, shard))
        }
    });
    let mut looks = futures::stream::iter(looks).buffered(FILES_AT_ONCE);
    let mut source = Building::default();
    while let Some((file, footer, shard)) = looks.try_next().await? {
        source.add(request, &file, footer.schema(), shard)?;
        source.look_at(request, &file, footer.metadata().row_groups())?;
    }
    source.finish(request, filter, root_uri)
}

/// A source under construction. Its shards are added in the order of their paths.
#[derive(Default)]
struct Building {
    layout: Option<Layout>,
    /// Columns, each with the type to which all shards so far can be cast.
    columns: BTreeMap<String, (Column, DataType)>,
    shards: Vec<Shard>,
    /// Whether large row groups were logged.
    has_logged_large: bool,
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
            Some(layout) => layout::check(schema, layout, request, file.uri())?,
        }
        for field in schema.fields() {
            let (name, data_type) = (field.name(), unify::plain(field.data_type()));
            let Some((column, unified)) = self.columns.get_mut(name) else {
                let column = Column {
                    name: name.clone(),
                    data_type: data_type.to_string(),
                    differs_in: self.shards.first().map(|first| first.path.clone()),
                };
                self.columns
                    .insert(name.clone(), (column, data_type.clone()));
                continue;
            };
            match unify::unify(unified, &data_type) {
                Some(both) => {
                    column.data_type = both.to_string();
                    *unified = both;
                }
                None => {
                    column.differs_in.get_or_insert_with(|| shard.path.clone());
                }
            }
        }
        for (column, _) in self.columns.values_mut() {
            if schema.field_with_name(&column.name).is_err() {
                column.differs_in.get_or_insert_with(|| shard.path.clone());
            }
        }
        let blocks = match &self.layout {
            Some(layout) if layout.image_root.is_some() => paths::cut(shard.blocks),
            _ => shard.blocks,
        };
        self.shards.push(Shard { blocks, ..shard });
        Ok(())
    }

    /// Refuses a shard with a row group whose images or captions exceed one Arrow array. Counts the
    /// rows without an image.
    fn look_at(
        &mut self,
        request: &SourceRequest,
        file: &ShardFile,
        groups: &[RowGroupMetaData],
    ) -> Result<()> {
        let Some(layout) = &self.layout else {
            return Ok(());
        };
        let (source, first) = (request.uri.as_str(), self.shards.len() == 1);
        paths::check(layout, (source, file.uri()), groups, first)?;
        let is_image =
            |column: &&ColumnChunkMetaData| layout.reads_for_image(column.column_path().parts());
        let is_caption = |column: &&ColumnChunkMetaData| {
            column.column_path().parts()[0] == layout.caption_column
        };
        let mut without_image = 0;
        for (number, group) in groups.iter().enumerate() {
            let held = group
                .columns()
                .iter()
                .filter(|c| is_image(c) || is_caption(c));
            let largest = held.map(ColumnChunkMetaData::uncompressed_size).max();
            if let Some(bytes) = largest.filter(|bytes| *bytes > COLUMN_BYTES_MAX) {
                let message = format!(
                    "row group {number} of {} holds {bytes} bytes of images or captions, and \
                     {COLUMN_BYTES_MAX} can be read at once; write it with smaller row groups \
                     (row_group_size in pyarrow, a few hundred images)",
                    file.uri()
                );
                return Err(Error::invalid("sources", message).with("shard", file.uri()));
            }
            without_image += paths::without_image(layout, group);
        }
        if let Some(shard) = self.shards.last_mut() {
            // Which of them are left out anyway is known of failed downloads alone.
            shard.without_image = match shard.outside {
                0 => without_image.saturating_sub(shard.not_downloaded),
                _ => 0,
            };
        }
        let largest = groups.iter().map(RowGroupMetaData::num_rows).max();
        let is_large = |rows: &i64| *rows > i64::from(LARGE_BLOCK_ROWS);
        if let Some(rows) = largest.filter(|rows| is_large(rows) && !self.has_logged_large) {
            self.has_logged_large = true;
            let cure = match layout.image_root {
                None => "write groups of a few hundred rows (row_group_size in pyarrow)",
                // Blocks are smaller, and each reads its whole group's paths and captions.
                Some(_) => "write groups of a few thousand rows (row_group_size in pyarrow)",
            };
            tracing::warn!(
                shard = file.uri(),
                rows,
                cure,
                "a step reads whole row groups, and these are large"
            );
        }
        Ok(())
    }

    fn finish(
        self,
        request: &SourceRequest,
        filter: &Filter,
        root_uri: String,
    ) -> Result<SourceManifest> {
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
                columns: self
                    .columns
                    .into_values()
                    .map(|(column, _)| column)
                    .collect(),
                shards: self.shards,
                kept_by: filter.kept_by(),
                scores: None,
            }),
            _ => {
                let outside = self.shards.iter().map(|shard| shard.outside).sum();
                let message = format!(
                    "{} has no rows in its {}{}",
                    request.uri,
                    counted(self.shards.len(), "file"),
                    filter.left_out_hint(outside)
                );
                Err(Error::new(Reason::DatasetEmpty, message).with("source", &request.uri))
            }
        }
    }
}

/// Returns the row groups of a file as blocks.
fn blocks(file: &ShardFile, footer: &ArrowReaderMetadata) -> Result<Vec<Block>> {
    let mut first_row = 0;
    let block = |group: &RowGroupMetaData| {
        let rows = u32::try_from(group.num_rows()).ok();
        let rows = rows.filter(|rows| *rows <= GROUP_ROWS_MAX).ok_or_else(|| {
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
            mask: None,
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
    use std::sync::Arc;

    /// What a footer says of a group's rows need not be what its columns hold.
    #[tokio::test]
    async fn a_group_whose_columns_have_other_rows_is_refused() {
        let stores = stores();
        let bytes = parquet(&img2dataset(0..4), 4);
        let size = bytes.len() as u64;
        put(&stores, &[("0.parquet", bytes)]).await;
        let file = ShardFile::new(stores.open("memory:///data/0.parquet").unwrap(), size, None);
        let footer = file.footer().await.unwrap();
        let filtered = SourceRequest {
            predicate: Some("uid <> 7".to_owned()),
            ..request("memory:///data")
        };
        let filter = Filter::open(&stores, &filtered).await.unwrap();
        for rows in [3, 4, 5] {
            let mut blocks = blocks(&file, &footer).unwrap();
            blocks[0].rows = rows;
            // The statistics would decide it, so they are left out.
            let groups = footer.metadata().row_groups().iter();
            let groups = groups.map(|group| without_statistics(group.clone()));
            let metadata = footer.metadata().as_ref().clone().into_builder();
            let metadata = metadata.set_row_groups(groups.collect()).build();
            let footer = ArrowReaderMetadata::try_new(Arc::new(metadata), Default::default());
            let kept = filter.keep_rows(&file, &footer.unwrap(), &mut blocks).await;
            assert_eq!(kept.is_ok(), rows == 4, "{rows}");
        }
    }

    fn without_statistics(group: RowGroupMetaData) -> RowGroupMetaData {
        let columns = group.columns().iter().cloned();
        let columns = columns.map(|c| c.into_builder().clear_statistics().build().unwrap());
        let columns = columns.collect();
        let built = group.into_builder().set_column_metadata(columns).build();
        built.unwrap()
    }

    #[tokio::test]
    async fn a_row_group_that_no_array_holds_is_refused_with_the_cure() {
        let stores = stores();
        let bytes = parquet(&img2dataset(0..4), 2);
        let size = bytes.len() as u64;
        put(&stores, &[("0.parquet", bytes)]).await;
        let file = ShardFile::new(stores.open("memory:///data/0.parquet").unwrap(), size, None);
        let footer = file.footer().await.unwrap();
        let layout = layout::discover(footer.schema(), &request("memory:///data")).unwrap();
        let mut building = Building {
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
        let asked = request("memory:///data");
        building
            .look_at(&asked, &file, footer.metadata().row_groups())
            .unwrap();
        building
            .look_at(&asked, &file, &of("url"))
            .expect("a column that is not read");
        let error = building.look_at(&asked, &file, &of("jpg")).unwrap_err();
        assert_eq!(error.value("shard"), Some("memory:///data/0.parquet"));
        assert!(error.to_string().contains("smaller row groups"), "{error}");
    }
}
