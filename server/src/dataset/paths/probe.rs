//! Looks for a few images of a source when it is indexed. With a wrong `image_root` none is there,
//! which a run would otherwise learn only as a thousand bad rows.
use super::{image_key, quoted, row_group_of};
use crate::{
    caught::caught,
    dataset::{
        file::ShardFile,
        manifest::{Block, Layout, Shard, SourceManifest},
    },
    error::{Error, Result},
    storage::{Location, Stores},
};
use arrow::{
    array::{Array, ArrayRef, AsArray},
    compute::cast,
    datatypes::DataType,
    error::ArrowError,
};
use futures::{FutureExt, StreamExt, TryStreamExt};
use parquet::{
    arrow::{
        ProjectionMask,
        arrow_reader::{ArrowReaderMetadata, ParquetRecordBatchReaderBuilder},
    },
    file::statistics::Statistics,
};
use superbatch_proto::v1::Reason;

/// Images that are looked up, all at once.
const LOOKS: usize = 16;

/// Looks up some images of a source's first block.
///
/// # Errors
/// `DatasetEmpty` if none of them is there; those of reading.
pub(in crate::dataset) async fn probe(stores: &Stores, source: &SourceManifest) -> Result<()> {
    let Some(root) = &source.layout.image_root else {
        return Ok(());
    };
    let mut shards = source.shards.iter();
    let first = shards.find_map(|shard| {
        let block = shard.blocks.iter().find(|block| block.rows > 0)?;
        Some((shard, block))
    });
    let Some((shard, block)) = first else {
        return Ok(());
    };
    let (root, shards) = (stores.open(root)?, stores.open(&source.root_uri)?);
    let Some(paths) = paths(&shards, shard, block, &source.layout).await? else {
        return Ok(());
    };
    let looks: Vec<_> = paths.iter().map(|path| look(&root, path).boxed()).collect();
    let looked = futures::stream::iter(looks).buffered(LOOKS);
    let wrong: Vec<Option<String>> = looked.try_collect().await?;
    match wrong.first() {
        Some(Some(first)) if wrong.iter().all(Option::is_some) => {
            let message = format!(
                "none of {} images of {} that were looked up is there: {first}; name the folder \
                 that the paths begin in with image_root (as a flag --image-root)",
                wrong.len(),
                source.uri
            );
            Err(Error::new(Reason::DatasetEmpty, message).with("source", &source.uri))
        }
        _ => Ok(()),
    }
}

/// Returns what is wrong with a path, if anything.
async fn look(root: &Location, path: &str) -> Result<Option<String>> {
    Ok(match image_key(path) {
        Err(why) => Some(why),
        Ok(key) if root.is_there(&key).await? => None,
        Ok(_) => Some(format!("there is no {} in {}", quoted(path), root.uri())),
    })
}

/// Returns some paths of a block's rows, spread over it; `None` if it may hold images that are
/// bytes, or texts that cannot be read.
async fn paths(
    root: &Location,
    shard: &Shard,
    block: &Block,
    layout: &Layout,
) -> Result<Option<Vec<String>>> {
    let location = root.below(&shard.path);
    let file = ShardFile::new(location, shard.size, shard.etag.clone());
    let footer = file.footer().await?;
    let groups = footer.metadata().row_groups();
    let Some((group, first)) = row_group_of(groups, block) else {
        return Err(file.changed("its row groups are others"));
    };
    let is_path = |parts: &[String]| {
        let field = parts.get(1).map(String::as_str);
        layout.reads_for_image(parts) && (!layout.image_in_struct || field == Some("path"))
    };
    let mut ranges = Vec::new();
    for leaf in groups[group].columns() {
        let parts = leaf.column_path().parts();
        if is_path(parts) {
            ranges.push(file.column(leaf)?);
        } else if layout.reads_for_image(parts) {
            let nulls = leaf.statistics().and_then(Statistics::null_count_opt);
            if nulls != u64::try_from(groups[group].num_rows()).ok() {
                return Ok(None);
            }
        }
    }
    let schema = footer.parquet_schema();
    let leaves = (0..schema.num_columns()).filter(|n| is_path(schema.column(*n).path().parts()));
    let mask = ProjectionMask::leaves(schema, leaves);
    let bytes = file.ranges(&ranges).await?;
    let (footer, in_struct) = (footer.clone(), layout.image_in_struct);
    let read = move || {
        caught(ArrowError::ParquetError, || {
            column(bytes, footer, group, mask, in_struct)
        })
    };
    let column = tokio::task::spawn_blocking(read).await;
    let column = column
        .map_err(|e| Error::internal(format!("reading {} panicked", file.uri())).because(e))?;
    // Paths that are not UTF-8 are told row by row when they are read.
    let Ok(column) = column else {
        return Ok(None);
    };
    let column = column.as_string::<i32>();
    let rows = (0..block.rows).map(|row| (block.row_in_shard(row) - block.first_row) as usize);
    let rows = rows.map(|row| first + row);
    let rows: Vec<usize> = rows.filter(|row| column.is_valid(*row)).collect();
    let each = rows.len().div_ceil(LOOKS).max(1);
    let some = rows.iter().step_by(each);
    Ok(Some(
        some.map(|row| column.value(*row).to_owned()).collect(),
    ))
}

/// Reads a row group's column of paths, as texts.
fn column(
    bytes: crate::dataset::Ranges,
    footer: ArrowReaderMetadata,
    group: usize,
    mask: ProjectionMask,
    in_struct: bool,
) -> Result<ArrayRef, ArrowError> {
    let rows = footer.metadata().row_group(group).num_rows();
    let builder = ParquetRecordBatchReaderBuilder::new_with_metadata(bytes, footer)
        .with_row_groups(vec![group])
        .with_projection(mask)
        .with_batch_size(usize::try_from(rows).unwrap_or_default().max(1));
    let none = || ArrowError::SchemaError("there is no column of paths".to_owned());
    let batch = builder.build()?.next().ok_or_else(none)??;
    let column = batch.columns().first().cloned().ok_or_else(none)?;
    // What a footer says of a group's rows need not be what its columns hold.
    if i64::try_from(column.len()).ok() != Some(rows) {
        let message = "the column of paths has other rows than its group";
        return Err(ArrowError::SchemaError(message.to_owned()));
    }
    let column = if in_struct {
        let fields = column.as_struct_opt().ok_or_else(none)?;
        fields.column_by_name("path").cloned().ok_or_else(none)?
    } else {
        column
    };
    cast(&column, &DataType::Utf8)
}
