//! Reads a few columns of a Parquet file.
use crate::{
    caught::caught,
    dataset::file::ShardFile,
    error::{Error, Result},
};
use arrow::error::ArrowError;
use parquet::arrow::{
    ProjectionMask,
    arrow_reader::{
        ArrowReaderMetadata, ParquetRecordBatchReader, ParquetRecordBatchReaderBuilder,
        RowSelection, RowSelectionPolicy,
    },
};
use std::ops::Range;

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
    look: impl FnMut(usize, &mut Batches) -> Result<T, ArrowError> + Send + 'static,
) -> Result<Vec<T>> {
    let whole: Vec<_> = groups.iter().map(|group| (*group, None)).collect();
    read_selected(file, footer, &whole, names, look).await
}

/// As [`read`], with the rows to read of each group; `None` for all. Pages without such rows are
/// not read, if `footer` has the index of their column.
///
/// # Errors
/// As [`read`].
pub(super) async fn read_selected<T: Send + 'static>(
    file: &ShardFile,
    footer: &ArrowReaderMetadata,
    groups: &[(usize, Option<RowSelection>)],
    names: &[&str],
    mut look: impl FnMut(usize, &mut Batches) -> Result<T, ArrowError> + Send + 'static,
) -> Result<Vec<T>> {
    let leaves = leaves(footer, names);
    let mut ranges = Vec::new();
    for (group, selection) in groups {
        for leaf in &leaves {
            let column = file.column(footer.metadata().row_group(*group).column(*leaf))?;
            let pages = selection
                .as_ref()
                .and_then(|rows| selected_pages(footer, (*group, *leaf), &column, rows));
            ranges.extend(pages.unwrap_or_else(|| vec![column]));
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
        let mut one = |(n, (group, selection)): (usize, &(usize, Option<RowSelection>))| {
            let mut builder =
                ParquetRecordBatchReaderBuilder::new_with_metadata(bytes.clone(), footer.clone())
                    .with_row_groups(vec![*group])
                    .with_projection(mask.clone())
                    .with_batch_size(BATCH_ROWS);
            if let Some(rows) = selection {
                // By a mask the reader would decode pages between those that were read.
                builder = builder
                    .with_row_selection(rows.clone())
                    .with_row_selection_policy(RowSelectionPolicy::Selectors);
            }
            look(n, &mut builder.build()?)
        };
        let looks = wanted.iter().enumerate();
        let looks = looks.map(|at| {
            let read = caught(ArrowError::ParquetError, || one(at));
            read.map_err(|cause| (at.1.0, cause))
        });
        looks.collect::<Result<Vec<T>, (usize, ArrowError)>>()
    };
    let panicked = |e| Error::internal(format!("reading {} panicked", file.uri())).because(e);
    let decoded = tokio::task::spawn_blocking(decode)
        .await
        .map_err(panicked)?;
    decoded.map_err(|(group, cause)| file.undecodable(group, cause))
}

/// Returns the leaves of columns, by their numbers in the file.
pub(super) fn leaves(footer: &ArrowReaderMetadata, names: &[&str]) -> Vec<usize> {
    let columns = footer.parquet_schema().columns().iter().enumerate();
    let is_wanted = |root: &String| names.contains(&root.as_str());
    let wanted = columns.filter(|(_, leaf)| leaf.path().parts().first().is_some_and(is_wanted));
    wanted.map(|(leaf, _)| leaf).collect()
}

/// Returns the ranges of the pages that hold rows, and of the dictionary before them; `None` if
/// the column, which lies at `column`, has no index.
fn selected_pages(
    footer: &ArrowReaderMetadata,
    (group, leaf): (usize, usize),
    column: &Range<u64>,
    rows: &RowSelection,
) -> Option<Vec<Range<u64>>> {
    let pages = footer
        .metadata()
        .page_index()?
        .page_locations(group, leaf)?;
    let first = u64::try_from(pages.first()?.offset).ok()?;
    let mut ranges = rows.scan_ranges(pages);
    if first > column.start {
        ranges.push(column.start..first);
    }
    Some(ranges)
}
