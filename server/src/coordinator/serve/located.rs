//! Where chosen rows lie: the columns by which a trainer reads its rows itself.
use crate::{
    coordinator::plan::planner,
    dataset::{Format, Manifest},
    error::{Error, Result},
};
use arrow::{
    array::{ArrayRef, FixedSizeBinaryArray, StringArray, UInt32Array, UInt64Array},
    datatypes::{DataType, Field},
};
use std::sync::Arc;
use superbatch_proto::{
    columns::{CONTENT_HASH, ROW, ROW_GROUP, ROW_IN_GROUP, SHARD, URI},
    v1::ChosenRow,
};

/// Returns the columns of locators that the receipt fills, beside those of every batch.
pub fn fields() -> Vec<Field> {
    vec![
        Field::new(URI, DataType::Utf8, false),
        Field::new(SHARD, DataType::UInt32, false),
        Field::new(ROW, DataType::UInt64, false),
        Field::new(ROW_GROUP, DataType::UInt32, true),
        Field::new(ROW_IN_GROUP, DataType::UInt64, true),
        hash_field(),
    ]
}

pub fn hash_field() -> Field {
    Field::new(CONTENT_HASH, DataType::FixedSizeBinary(16), false)
}

/// Returns a column of these rows; `None` if it is none of [`fields`].
///
/// # Errors
/// `Internal` if the manifest has no such row.
pub fn column(name: &str, manifest: &Manifest, rows: &[&ChosenRow]) -> Result<Option<ArrayRef>> {
    let each = || rows.iter().copied();
    Ok(Some(match name {
        URI => {
            let uris = each().map(|row| uri(manifest, row));
            let uris = uris.collect::<Result<Vec<_>>>()?;
            Arc::new(StringArray::from_iter_values(uris))
        }
        SHARD => Arc::new(UInt32Array::from_iter_values(each().map(|row| row.shard))),
        ROW => Arc::new(UInt64Array::from_iter_values(each().map(|row| row.row))),
        ROW_GROUP => {
            let groups = each().map(|row| in_group(manifest, row));
            let groups = groups.collect::<Result<Vec<_>>>()?;
            Arc::new(UInt32Array::from_iter(
                groups.into_iter().map(|place| Some(place?.0)),
            ))
        }
        ROW_IN_GROUP => {
            let rows = each().map(|row| in_group(manifest, row));
            let rows = rows.collect::<Result<Vec<_>>>()?;
            Arc::new(UInt64Array::from_iter(
                rows.into_iter().map(|place| Some(place?.1)),
            ))
        }
        CONTENT_HASH => hash_column(each())?,
        _ => return Ok(None),
    }))
}

/// Returns the content hashes as a column.
///
/// # Errors
/// `Internal` if a row has none.
pub fn hash_column<'a>(rows: impl Iterator<Item = &'a ChosenRow>) -> Result<ArrayRef> {
    let values = rows.map(|row| row.content_hash.as_ref());
    let wrong = |e| Error::internal("a receipt without content hashes").because(e);
    let hashes = FixedSizeBinaryArray::try_from_iter(values).map_err(wrong)?;
    Ok(Arc::new(hashes))
}

/// Returns the file that a row lies in.
fn uri(manifest: &Manifest, row: &ChosenRow) -> Result<String> {
    let source = manifest.sources.get(row.source as usize);
    let found = source.and_then(|source| {
        let shard = source.shards.get(row.shard as usize)?;
        Some((source.root_uri.trim_end_matches('/'), &shard.path))
    });
    let (root, path) = found.ok_or_else(|| {
        let message = format!(
            "row {} lies in shard {} of source {}, which the manifest does not have",
            row.id, row.shard, row.source
        );
        Error::internal(message)
    })?;
    if path.is_empty() {
        return Ok(root.to_owned());
    }
    Ok(format!("{root}/{path}"))
}

/// Returns the row group and the row in it; `None` for a tar, whose rows lie where their members
/// do, and for images beside the file, whose blocks are parts of row groups.
fn in_group(manifest: &Manifest, row: &ChosenRow) -> Result<Option<(u32, u64)>> {
    let found = planner::locate(manifest, row)?;
    let source = &manifest.sources[found.source as usize];
    if source.layout.format == Format::Tar || source.layout.image_root.is_some() {
        return Ok(None);
    }
    let block = &source.shards[found.shard as usize].blocks[found.block as usize];
    Ok(Some((found.block, row.row - block.first_row)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dataset::{Shard, SourceManifest};

    #[test]
    fn a_row_lies_in_a_file_of_the_manifest_or_nowhere() {
        let shard = Shard {
            path: "a.parquet".into(),
            size: 1,
            ..Shard::default()
        };
        let of_one_file = Shard {
            path: String::new(),
            ..shard.clone()
        };
        let source = SourceManifest {
            uri: "memory:///data".into(),
            root_uri: "memory:///data/".into(),
            shards: vec![shard, of_one_file],
            ..SourceManifest::default()
        };
        let manifest = Manifest {
            version: Manifest::VERSION,
            sources: vec![source],
        };
        let found = |source, shard| {
            let row = ChosenRow {
                source,
                shard,
                ..Default::default()
            };
            uri(&manifest, &row).ok()
        };
        assert_eq!(found(0, 0).as_deref(), Some("memory:///data/a.parquet"));
        assert_eq!(found(0, 1).as_deref(), Some("memory:///data"));
        assert_eq!((found(0, 2), found(1, 0)), (None, None));
    }
}
