//! Reads a few columns of a Parquet file.
use crate::{
    dataset::file::ShardFile,
    error::{Error, Result},
};
use arrow::{array::RecordBatch, error::ArrowError};
use parquet::{
    arrow::{
        ProjectionMask,
        arrow_reader::{ArrowReaderMetadata, ParquetRecordBatchReaderBuilder},
    },
    file::metadata::ColumnChunkMetaData,
};

/// Rows of one batch.
const BATCH_ROWS: usize = 64 << 10;

/// Reads whole columns of some row groups, by ranges, in the order of the groups' rows.
///
/// # Errors
/// Those of reading, and `InvalidArgument` if the columns cannot be decoded.
pub(in crate::dataset) async fn read(
    file: &ShardFile,
    footer: &ArrowReaderMetadata,
    groups: &[usize],
    names: &[&str],
) -> Result<Vec<RecordBatch>> {
    let is_wanted = |column: &ColumnChunkMetaData| {
        let root = column.column_path().parts().first();
        root.is_some_and(|root| names.contains(&root.as_str()))
    };
    let mut ranges = Vec::new();
    for group in groups {
        let columns = footer.metadata().row_group(*group).columns();
        for column in columns.iter().filter(|column| is_wanted(column)) {
            ranges.push(file.column(column)?);
        }
    }
    let bytes = file.ranges(&ranges).await?;
    let mask = ProjectionMask::roots(
        footer.parquet_schema(),
        (0..footer.schema().fields().len())
            .filter(|n| names.contains(&footer.schema().field(*n).name().as_str())),
    );
    let (footer, wanted) = (footer.clone(), groups.to_vec());
    let decode = move || {
        let reader = ParquetRecordBatchReaderBuilder::new_with_metadata(bytes, footer)
            .with_row_groups(wanted)
            .with_projection(mask)
            .with_batch_size(BATCH_ROWS)
            .build()?;
        reader.collect::<Result<Vec<_>, ArrowError>>()
    };
    let panicked = |e| Error::internal(format!("reading {} panicked", file.uri())).because(e);
    let decoded = tokio::task::spawn_blocking(decode)
        .await
        .map_err(panicked)?;
    let first = groups.first().copied().unwrap_or_default();
    decoded.map_err(|cause| file.undecodable(first, cause))
}
