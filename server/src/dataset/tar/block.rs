//! A block of a tar: the wanted members of its samples, as columns of bytes.
use super::{
    layout::{self, Place},
    samples::{Member, Sample, rows_of},
    survey::Survey,
};
use crate::{
    dataset::{
        Ranges,
        file::ShardFile,
        manifest::{Block, Layout},
    },
    error::Result,
};
use arrow::{
    array::{ArrayRef, BinaryArray, BinaryBuilder, ListBuilder, RecordBatch, RecordBatchOptions},
    error::ArrowError,
};
use bytes::Bytes;
use parquet::{errors::ParquetError, file::reader::ChunkReader};
use serde_json::Value;
use std::{borrow::Cow, ops::Range, sync::Arc};

/// The rows of one block, and the members that are read.
pub struct TarBlock {
    survey: Arc<Survey>,
    /// Numbers of the samples that are rows.
    rows: Vec<usize>,
    layout: Layout,
    columns: Vec<String>,
    /// Whether the caption is an entry that may be a list, and captions are drawn.
    has_lists: bool,
}

impl TarBlock {
    /// The column of the captions' lists. No member's ending has such a sign.
    pub const CAPTIONS: &str = "\0captions";

    /// # Errors
    /// `DatasetChanged` if the block's number of rows differs from the index.
    pub fn new(
        survey: Arc<Survey>,
        layout: &Layout,
        columns: &[String],
        block: &Block,
        file: &ShardFile,
    ) -> Result<Self> {
        let samples = &survey.samples;
        let mut rows: Vec<_> = rows_of(samples, block)
            .filter(|n| layout::is_row(layout, &samples[*n]))
            .collect();
        if rows.len() != block.stored_rows() as usize {
            return Err(file.changed("its members are others"));
        }
        if let Some(mask) = &block.mask {
            let mut kept = mask.rows();
            rows.retain(|_| kept.next() == Some(true));
        }
        let place = Place::of(&layout.caption_column);
        let has_lists = layout.caption_seed.is_some() && matches!(place, Place::Entry(..));
        let caption = (!has_lists).then_some(&layout.caption_column);
        let mut names: Vec<String> = Vec::new();
        for name in caption.into_iter().chain(columns) {
            if !names.contains(name) {
                names.push(name.clone());
            }
        }
        Ok(Self {
            survey,
            rows,
            layout: layout.clone(),
            columns: names,
            has_lists,
        })
    }

    fn samples(&self) -> impl Iterator<Item = &Sample> {
        self.rows.iter().map(|n| &self.survey.samples[*n])
    }

    /// Returns the byte ranges of the wanted members.
    ///
    /// # Errors
    /// If a column has more bytes than one array can hold. A block of one sample has any number.
    pub fn ranges(&self) -> Result<Vec<Range<u64>>, ArrowError> {
        let image = |sample| layout::image(&self.layout, sample);
        let mut ranges = column_ranges(self.samples().filter_map(image))?;
        let lists = self.has_lists.then_some(&self.layout.caption_column);
        for column in self.columns.iter().chain(lists) {
            let place = Place::of(column);
            let members = self.samples().filter_map(|sample| place.read(sample));
            ranges.extend(column_ranges(members)?);
        }
        Ok(ranges)
    }

    /// Returns the byte range of each row's image in the shard.
    pub fn image_ranges(&self) -> Vec<Option<Range<u64>>> {
        let image = |sample| layout::image(&self.layout, sample);
        let range = |member: &Member| member.offset..member.offset + member.length;
        self.samples().map(|s| image(s).map(range)).collect()
    }

    /// Returns the image, the caption (or the lists of captions), then the extra columns, all as
    /// bytes; null if a sample lacks one.
    ///
    /// # Errors
    /// If a column has more bytes than one array can hold.
    pub fn decode(&self, bytes: &Ranges) -> Result<RecordBatch, ArrowError> {
        let images = self
            .samples()
            .map(|sample| layout::image(&self.layout, sample));
        let images = images.map(|member| member.map(|m| content(bytes, m)).transpose());
        let mut columns = vec![(self.layout.image_column.as_str(), array(images)?)];
        if let (true, Place::Entry(field, name)) =
            (self.has_lists, Place::of(&self.layout.caption_column))
        {
            columns.push((Self::CAPTIONS, self.lists(field, name, bytes)?));
        }
        for column in &self.columns {
            let place = Place::of(column);
            let values = self.samples().map(|sample| value(place, sample, bytes));
            columns.push((column, array(values)?));
        }
        let schema = columns.iter().map(|(name, array)| {
            arrow::datatypes::Field::new(*name, array.data_type().clone(), true)
        });
        let schema = arrow::datatypes::Schema::new(schema.collect::<Vec<_>>());
        let arrays = columns.into_iter().map(|(_, array)| array).collect();
        let options = RecordBatchOptions::new().with_row_count(Some(self.rows.len()));
        RecordBatch::try_new_with_options(Arc::new(schema), arrays, &options)
    }
}

impl TarBlock {
    /// Returns an entry of each sample's JSON as a list: its parts, or the one value.
    fn lists(&self, field: &str, name: &str, bytes: &Ranges) -> Result<ArrayRef, ArrowError> {
        let mut lists = ListBuilder::new(BinaryBuilder::new());
        for sample in self.samples() {
            let member = Place::Entry(field, name).read(sample);
            let content = member.map(|member| content(bytes, member)).transpose()?;
            let value = content.map_or(Value::Null, |content| value_of(&content, name));
            match value {
                Value::Null => lists.append_null(),
                Value::Array(parts) => {
                    lists.append_value(parts.into_iter().map(text));
                }
                one => lists.append_value([text(one)]),
            }
        }
        Ok(Arc::new(lists.finish()))
    }
}

/// Returns where the members of one column lie.
fn column_ranges<'a>(
    members: impl Iterator<Item = &'a Member>,
) -> Result<Vec<Range<u64>>, ArrowError> {
    let members: Vec<&Member> = members.filter(|member| member.length > 0).collect();
    let lengths = members.iter().map(|member| member.length);
    if i32::try_from(lengths.fold(0, u64::saturating_add)).is_err() {
        return Err(too_large());
    }
    let range = |member: &&Member| member.offset..member.offset + member.length;
    Ok(members.iter().map(range).collect())
}

fn array<'a, T: AsRef<[u8]> + 'a>(
    values: impl Iterator<Item = Result<Option<T>, ParquetError>>,
) -> Result<ArrayRef, ArrowError> {
    let values = values.collect::<Result<Vec<_>, _>>()?;
    let sizes = values.iter().flatten().map(|value| value.as_ref().len());
    if i32::try_from(sizes.sum::<usize>()).is_err() {
        return Err(too_large());
    }
    Ok(Arc::new(BinaryArray::from_iter(values)))
}

fn too_large() -> ArrowError {
    ArrowError::InvalidArgumentError("a block has over 2 GiB of one column".to_owned())
}

fn content(bytes: &Ranges, member: &Member) -> Result<Bytes, ParquetError> {
    match member.length {
        0 => Ok(Bytes::new()),
        length => bytes.get_bytes(member.offset, length as usize),
    }
}

fn value<'s>(
    place: Place<'_>,
    sample: &'s Sample,
    bytes: &Ranges,
) -> Result<Option<Cow<'s, [u8]>>, ParquetError> {
    if place == Place::Key {
        return Ok(Some(Cow::Borrowed(sample.key.as_bytes())));
    }
    let Some(member) = place.read(sample) else {
        return Ok(None);
    };
    let content = content(bytes, member)?;
    let found = match place {
        Place::Entry(_, name) => entry(&content, name).map(String::into_bytes),
        _ => Some(content.to_vec()),
    };
    Ok(found.map(Cow::Owned))
}

/// Returns an entry of a JSON object: a text as it is, any other value as JSON. `None` if it is
/// null or absent, or if the member is no JSON object.
fn entry(content: &[u8], name: &str) -> Option<String> {
    text(value_of(content, name))
}

/// Returns an entry of a JSON object; null if it is absent, or if the member is no JSON object.
pub(super) fn value_of(content: &[u8], name: &str) -> Value {
    let object = serde_json::from_slice::<Value>(content);
    let mut object = object.unwrap_or_default();
    object.get_mut(name).map(Value::take).unwrap_or_default()
}

fn text(value: Value) -> Option<String> {
    match value {
        Value::Null => None,
        Value::String(text) => Some(text),
        other => Some(other.to_string()),
    }
}
