//! Which rows of a row group the statistics of single pages decide, so that nothing of these pages
//! is read.
use super::{bounds::Bounds, columns, row_groups::Look, values::values};
use crate::{
    blocking::blocking,
    caught::caught,
    dataset::file::{GAP_BYTES, Ranges, ShardFile},
    error::Result,
};
use arrow::{
    array::{Array, ArrayRef},
    error::ArrowError,
};
use parquet::{
    arrow::arrow_reader::{
        ArrowReaderMetadata, ArrowReaderOptions, RowSelection, RowSelector,
        statistics::StatisticsConverter,
    },
    basic::Type,
    errors::ParquetError,
    file::{
        metadata::{RowGroupMetaData, page_index::PageIndexBuilder},
        page_index::{
            column_index::ColumnIndexMetaData,
            index_reader::{decode_column_index, decode_offset_index},
            offset_index::{OffsetIndexMetaData, PageLocation},
        },
        reader::ChunkReader,
    },
};
use std::{ops::Range, sync::Arc};

/// Adjacent rows of a row group of which the same is to be done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Run {
    pub rows: u32,
    pub look: Look,
}

/// A column's statistics in each page of a row group.
pub(super) struct Pages {
    /// The first row of each page. They rise, and the first is 0.
    starts: Vec<u32>,
    bounds: Vec<Bounds>,
}

/// Returns the footer with the page indexes of columns of some row groups, as far as the file has
/// them; the footer as it is if the columns are so few bytes that asking would cost as much as
/// reading. An index that cannot be decoded is as none.
///
/// # Errors
/// Those of reading.
pub(super) async fn with_indexes(
    file: &ShardFile,
    footer: &ArrowReaderMetadata,
    groups: &[usize],
    names: &[&str],
) -> Result<ArrowReaderMetadata> {
    let leaves = columns::leaves(footer, names);
    let (mut chunks, mut column_bytes) = (Vec::new(), 0_u64);
    for group in groups {
        let rows = footer.metadata().row_group(*group);
        for leaf in &leaves {
            let chunk = Chunk::of(file, rows, *leaf)?;
            column_bytes = column_bytes.saturating_add(length(&chunk.column));
            if !chunk.values.is_empty() && !chunk.places.is_empty() {
                chunks.push((*group, *leaf, chunk));
            }
        }
    }
    let both = |(.., chunk): &(_, _, Chunk)| [chunk.values.clone(), chunk.places.clone()];
    let ranges: Vec<Range<u64>> = chunks.iter().flat_map(both).collect();
    let index_bytes = ranges.iter().map(length).fold(0, u64::saturating_add);
    // Ranges that overlap would be decoded as often as they are named.
    let overlap = index_bytes > file.size();
    if chunks.is_empty() || overlap || column_bytes <= GAP_BYTES.saturating_add(index_bytes) {
        return Ok(footer.clone());
    }
    let bytes = file.ranges(&ranges).await?;
    let footer = footer.clone();
    blocking("decoding indexes of pages", move || {
        Ok(attached(&footer, &chunks, &bytes).unwrap_or(footer))
    })
    .await
}

fn length(range: &Range<u64>) -> u64 {
    range.end.saturating_sub(range.start)
}

/// Where a column of a row group lies, and its index: the statistics of its pages, and their
/// places. Both are empty if the file has none.
struct Chunk {
    column: Range<u64>,
    values: Range<u64>,
    places: Range<u64>,
    kind: Type,
    rows: i64,
}

impl Chunk {
    fn of(file: &ShardFile, group: &RowGroupMetaData, leaf: usize) -> Result<Self> {
        let about = group.column(leaf);
        // The reader adds the numbers of a footer without a look at them.
        let ranges = caught(ParquetError::General, || {
            Ok::<_, ParquetError>([about.column_index_range(), about.offset_index_range()])
        });
        let lies_in_file = |range: &Range<u64>| range.end <= file.size();
        let [values, places] = ranges.unwrap_or_default();
        Ok(Self {
            column: file.column(about)?,
            values: values.filter(lies_in_file).unwrap_or_default(),
            places: places.filter(lies_in_file).unwrap_or_default(),
            kind: about.column_type(),
            rows: group.num_rows(),
        })
    }

    fn decode(
        &self,
        bytes: &Ranges,
    ) -> Result<(ColumnIndexMetaData, OffsetIndexMetaData), ParquetError> {
        let part = |range: &Range<u64>| bytes.get_bytes(range.start, length(range) as usize);
        let values = decode_column_index(&part(&self.values)?, self.kind)?;
        let places = part(&self.places)?;
        if announces_too_much(&places) {
            return Err(ParquetError::General(
                "it has fewer pages than it says".to_owned(),
            ));
        }
        let places = decode_offset_index(&places)?;
        if self.holds(places.page_locations()) {
            return Ok((values, places));
        }
        Err(ParquetError::General(
            "its pages cannot be those of the column".to_owned(),
        ))
    }

    /// Returns whether pages lie within the column, and divide its rows.
    fn holds(&self, pages: &[PageLocation]) -> bool {
        let lies_within = |page: &PageLocation| {
            let start = u64::try_from(page.offset).ok();
            let bytes = u64::try_from(page.compressed_page_size).ok();
            let end = start
                .zip(bytes)
                .and_then(|(start, bytes)| start.checked_add(bytes));
            start.is_some_and(|start| start >= self.column.start)
                && end.is_some_and(|end| end <= self.column.end)
        };
        let first = |page: &PageLocation| page.first_row_index;
        pages.iter().all(lies_within)
            && pages.first().map(first) == Some(0)
            && pages.is_sorted_by(|a, b| first(a) < first(b))
            && pages.last().is_some_and(|last| first(last) < self.rows)
    }
}

/// Returns whether an index of places says that it has more pages than bytes. The reader makes room
/// for them before it reads one, and if there is no such room the process ends.
fn announces_too_much(index: &[u8]) -> bool {
    // The header of a field, then that of its list: four bits of it are the count, or all are set
    // and the count follows, seven bits a byte.
    let [_, list, count @ ..] = index else {
        return false;
    };
    if list >> 4 != 15 {
        return false;
    }
    let mut pages = 0;
    for (n, byte) in count.iter().take(5).enumerate() {
        pages |= u64::from(byte & 0x7f) << (7 * n);
        if byte & 0x80 == 0 {
            break;
        }
    }
    pages > index.len() as u64
}

/// Returns the footer with those of the indexes that can be decoded.
fn attached(
    footer: &ArrowReaderMetadata,
    chunks: &[(usize, usize, Chunk)],
    bytes: &Ranges,
) -> Option<ArrowReaderMetadata> {
    let metadata = footer.metadata();
    let columns = footer.parquet_schema().num_columns();
    let mut indexes = PageIndexBuilder::new(metadata.num_row_groups(), columns);
    for (group, leaf, chunk) in chunks {
        if let Ok((values, places)) = caught(ParquetError::General, || chunk.decode(bytes)) {
            indexes.put_column_index(values, *group, *leaf);
            indexes.put_offset_index(places, *group, *leaf);
        }
    }
    let metadata = metadata.as_ref().clone().into_builder();
    let metadata = metadata
        .set_page_index(Some(Arc::new(indexes.build())))
        .build();
    let read = || ArrowReaderMetadata::try_new(Arc::new(metadata), ArrowReaderOptions::new());
    caught(ParquetError::General, read).ok()
}

/// Returns what the pages of a column say; `None` without an index. `rows` are
/// those of the group.
pub(super) fn pages(
    footer: &ArrowReaderMetadata,
    group: usize,
    rows: u32,
    name: &str,
) -> Option<Pages> {
    let index = footer.metadata().page_index()?.as_ref();
    let (schema, parquet) = (footer.schema(), footer.parquet_schema());
    let converter = StatisticsConverter::try_new(name, schema, parquet).ok()?;
    let locations = index.page_locations(group, converter.parquet_column_index()?)?;
    let starts = locations
        .iter()
        .map(|page| u32::try_from(page.first_row_index).ok());
    let starts: Vec<u32> = starts.collect::<Option<_>>()?;
    let side = |array: ArrayRef| values(&array);
    let found = caught(ArrowError::ParquetError, || {
        let nulls = converter.data_page_null_counts(index, &[group])?;
        let low = side(converter.data_page_mins(index, &[group])?)?;
        Ok((
            low,
            side(converter.data_page_maxes(index, &[group])?)?,
            nulls,
        ))
    });
    let (low, high, nulls) = found.ok()?;
    if [low.len(), high.len(), nulls.len()] != [starts.len(); 3] {
        return None;
    }
    let ends = starts[1..].iter().copied().chain([rows]);
    let sides = low.into_iter().zip(high).enumerate();
    let page = |((first, end), (n, (low, high))): ((&u32, u32), (usize, _))| Bounds {
        low,
        high,
        nulls: nulls.is_valid(n).then(|| nulls.value(n)),
        rows: u64::from(end - first),
    };
    let bounds = starts.iter().zip(ends).zip(sides).map(page).collect();
    Some(Pages { starts, bounds })
}

impl Pages {
    /// Returns what is known of some rows within one page.
    fn of(&self, first: u32, rows: u32) -> Bounds {
        let page = self.starts.partition_point(|start| *start <= first) - 1;
        let Bounds {
            low,
            high,
            nulls,
            rows: in_page,
        } = self.bounds[page].clone();
        let rows = u64::from(rows);
        // A part of a page has all of its nulls or none of them, or it is not known how many.
        let nulls = match nulls {
            Some(0) => Some(0),
            Some(all) if all == in_page => Some(rows),
            _ => None,
        };
        Bounds {
            low,
            high,
            nulls,
            rows,
        }
    }
}

/// Divides the rows of a group where pages begin. `decide` says what is to be done with rows of
/// which a column's bounds are so.
pub(super) fn runs(
    rows: u32,
    columns: &[(&str, Option<Pages>)],
    decide: impl Fn(&dyn Fn(&str) -> Option<Bounds>) -> Look,
) -> Vec<Run> {
    let known = columns.iter().filter_map(|(_, pages)| pages.as_ref());
    let mut cuts: Vec<u32> = known
        .flat_map(|pages| pages.starts.iter().copied())
        .collect();
    cuts.extend([0, rows]);
    cuts.sort_unstable();
    cuts.dedup();
    let mut runs: Vec<Run> = Vec::new();
    for part in cuts.windows(2) {
        let (first, rows) = (part[0], part[1] - part[0]);
        let look = decide(&|name: &str| {
            let (_, pages) = columns.iter().find(|(column, _)| *column == name)?;
            Some(pages.as_ref()?.of(first, rows))
        });
        match runs.last_mut() {
            Some(last) if last.look == look => last.rows += rows,
            _ => runs.push(Run { rows, look }),
        }
    }
    runs
}

/// Returns which rows are to be read; `None` if all are.
pub(super) fn selection(runs: &[Run]) -> Option<RowSelection> {
    let selector = |run: &Run| match run.look {
        Look::Read => RowSelector::select(run.rows as usize),
        Look::All | Look::None => RowSelector::skip(run.rows as usize),
    };
    let all_are = runs.iter().all(|run| run.look == Look::Read);
    (!all_are).then(|| runs.iter().map(selector).collect::<Vec<_>>().into())
}

/// Returns which rows of a group are kept, if `read` says it of those that were read.
pub(super) fn spread(runs: &[Run], read: &[bool]) -> Vec<bool> {
    let mut read = read.iter().copied();
    let mut kept = Vec::new();
    for run in runs {
        let rows = run.rows as usize;
        match run.look {
            Look::Read => kept.extend(read.by_ref().take(rows)),
            look => kept.extend(std::iter::repeat_n(look == Look::All, rows)),
        }
    }
    kept
}

#[cfg(test)]
mod tests;
