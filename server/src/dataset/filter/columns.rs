//! Reads a few columns of a Parquet file.
use crate::{
    caught::caught,
    dataset::file::ShardFile,
    error::{Error, Result},
};
use arrow::error::ArrowError;
use parquet::{
    arrow::{
        ProjectionMask,
        arrow_reader::{
            ArrowReaderMetadata, ParquetRecordBatchReader, ParquetRecordBatchReaderBuilder,
        },
    },
    file::metadata::ColumnChunkMetaData,
};

/// Rows of one batch.
const BATCH_ROWS: usize = 64 << 10;

/// The columns of one row group, batch by batch.
pub(in crate::dataset) type Batches = ParquetRecordBatchReader;

/// Reads whole columns of some row groups, by ranges. Returns what `look` makes of each group, in
/// their order; it is given the group's place among `groups`.
///
/// `look` runs on a thread for blocking work, and sees one batch at a time: where values repeat, a
/// few bytes are any number of rows, so that all of them together may not fit into memory.
///
/// # Errors
/// Those of reading, and `InvalidArgument` if the columns cannot be decoded.
pub(in crate::dataset) async fn read<T: Send + 'static>(
    file: &ShardFile,
    footer: &ArrowReaderMetadata,
    groups: &[usize],
    names: &[&str],
    mut look: impl FnMut(usize, &mut Batches) -> Result<T, ArrowError> + Send + 'static,
) -> Result<Vec<T>> {
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
        let mut one = |(n, group): (usize, &usize)| {
            let builder =
                ParquetRecordBatchReaderBuilder::new_with_metadata(bytes.clone(), footer.clone());
            let mut batches = builder
                .with_row_groups(vec![*group])
                .with_projection(mask.clone())
                .with_batch_size(BATCH_ROWS)
                .build()?;
            look(n, &mut batches)
        };
        let looks = wanted.iter().enumerate();
        let looks = looks.map(|at| {
            let read = caught(ArrowError::ParquetError, || one(at));
            read.map_err(|cause| (*at.1, cause))
        });
        looks.collect::<Result<Vec<T>, (usize, ArrowError)>>()
    };
    let panicked = |e| Error::internal(format!("reading {} panicked", file.uri())).because(e);
    let decoded = tokio::task::spawn_blocking(decode)
        .await
        .map_err(panicked)?;
    decoded.map_err(|(group, cause)| file.undecodable(group, cause))
}
