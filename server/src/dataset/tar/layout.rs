//! Finds a sample's image, caption and extra columns among its members.
use super::{
    block::value_of,
    samples::{Member, Sample},
    survey::Survey,
};
use crate::{
    dataset::{
        SourceRequest,
        file::ShardFile,
        layout::{mismatch, not_found},
        manifest::{Format, Layout},
    },
    error::{Error, Result},
};
use arrow::datatypes::DataType;
use serde_json::Value;
use std::collections::BTreeSet;

/// Fields of the image, in open_clip's order: the first one that a sample has.
const IMAGES: &str = "jpg;png;jpeg;webp";
/// Fields of the caption, in order. img2dataset and open_clip write `txt`; the JSON repeats it as
/// `caption`.
const CAPTIONS: [&str; 2] = ["txt", "json[caption]"];
/// The column of a sample's key.
pub(super) const KEY: &str = "__key__";
/// Fields that hold text. All others are delivered as bytes.
const TEXTS: [&str; 12] = [
    "txt",
    "text",
    "caption",
    "transcript",
    "json",
    "jsn",
    "cls",
    "id",
    "index",
    "url",
    "uid",
    "key",
];

/// A column of a tar source.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Place<'a> {
    Key,
    Member(&'a str),
    /// `json[caption]`: an entry of the object in a member.
    Entry(&'a str, &'a str),
}

impl<'a> Place<'a> {
    pub(super) fn of(column: &'a str) -> Self {
        let entry = column
            .strip_suffix(']')
            .and_then(|text| text.split_once('['));
        match entry {
            _ if column == KEY => Self::Key,
            Some((field, name)) => Self::Entry(field, name),
            None => Self::Member(column),
        }
    }

    pub(super) fn member(self, sample: &Sample) -> Option<&Member> {
        match self {
            Self::Key => None,
            Self::Member(field) | Self::Entry(field, _) => sample.member(field),
        }
    }

    /// Returns the member to read: of entries none that is too large to be taken apart.
    pub(super) fn read(self, sample: &Sample) -> Option<&Member> {
        let member = self.member(sample);
        member.filter(|member| !matches!(self, Self::Entry(..)) || is_json(member))
    }
}

/// Returns whether a member can be a JSON. Taken apart, one takes up to 32 times its bytes.
pub(super) fn is_json(member: &Member) -> bool {
    const BYTES_MAX: u64 = 16 << 20;
    (1..=BYTES_MAX).contains(&member.length)
}

/// Returns the image of a sample: the first of the layout's fields that it has.
pub(super) fn image<'s>(layout: &Layout, sample: &'s Sample) -> Option<&'s Member> {
    let mut fields = layout.image_column.split(';');
    let found = fields.find_map(|field| sample.member(field));
    found.filter(|member| i32::try_from(member.length).is_ok())
}

/// Returns whether a sample is a row: as in open_clip, it must have an image and a caption.
pub(super) fn is_row(layout: &Layout, sample: &Sample) -> bool {
    let caption = Place::of(&layout.caption_column).member(sample);
    image(layout, sample).is_some()
        && caption.is_some_and(|member| i32::try_from(member.length).is_ok())
}

/// Returns the type in which a column is delivered, if the source has it.
pub(in crate::dataset) fn member_type<'a>(
    column: &str,
    mut fields: impl Iterator<Item = &'a str>,
) -> Option<DataType> {
    match Place::of(column) {
        Place::Key => Some(DataType::Utf8),
        Place::Entry(field, _) => fields.any(|f| f == field).then_some(DataType::Utf8),
        Place::Member(field) => fields.any(|f| f == field).then(|| type_of(field)),
    }
}

pub(super) fn type_of(field: &str) -> DataType {
    if field == KEY || TEXTS.contains(&field) {
        DataType::Utf8
    } else {
        DataType::Binary
    }
}

/// Finds image and caption in the first shard that has samples. Names in the request come first.
///
/// # Errors
/// `ColumnNotFound` listing the fields there are; those of reading a member.
pub(super) async fn discover(
    request: &SourceRequest,
    file: &ShardFile,
    survey: &Survey,
) -> Result<Layout> {
    if request.is_text {
        let message = format!(
            "{} is a tar: a text_column is read of Parquet files only",
            file.uri()
        );
        return Err(Error::invalid("text_column", message));
    }
    let members = survey.samples.iter().flat_map(|sample| &sample.members);
    let fields: BTreeSet<&str> = members.map(|member| member.field.as_str()).collect();
    let listed: Vec<&str> = fields.iter().copied().collect();
    let absent = |what: &str, option: &str, names: &str| {
        let flag = option.replace('_', "-");
        let message = format!(
            "no member of {} is the {what}: none ends in {names}; name its ending with {option} \
             (as a flag --{flag}), several as 'jpg;png', an entry of a JSON as 'json[caption]'",
            file.uri()
        );
        not_found(message, names, &listed)
    };
    let image_column = request
        .image_column
        .as_deref()
        .unwrap_or(IMAGES)
        .to_lowercase();
    if !image_column.split(';').any(|field| fields.contains(field)) {
        return Err(absent("image", "image_column", &image_column));
    }
    let has = |column: &str| match Place::of(column) {
        Place::Key => false,
        Place::Member(field) | Place::Entry(field, _) => fields.contains(field),
    };
    let caption_column = match &request.caption_column {
        Some(named) if has(named) => named.clone(),
        Some(named) => return Err(absent("caption", "caption_column", named)),
        None if has(CAPTIONS[0]) => CAPTIONS[0].to_owned(),
        None => CAPTIONS[1].to_owned(),
    };
    let first = first_value(&caption_column, file, survey).await?;
    if request.caption_column.is_none() && caption_column == CAPTIONS[1] && !is_caption(&first) {
        return Err(absent("caption", "caption_column", &CAPTIONS.join(" or ")));
    }
    if first.is_array() && (request.is_target || !is_caption(&first)) {
        let found = if request.is_target {
            "a list, and a target is a text or an integer"
        } else {
            "a list of other values than texts"
        };
        let message = format!(
            "{caption_column} of {} is {found}; name another entry",
            file.uri()
        );
        return Err(mismatch(message, &request.uri, &caption_column));
    }
    let has_lists = first.is_array();
    Ok(Layout {
        image_column,
        image_in_struct: false,
        image_root: None,
        caption_seed: request.caption_seed.or(has_lists.then_some(0)),
        caption_column,
        format: Format::Tar,
    })
}

/// How many samples without a value are passed over before an entry counts as empty.
const LOOKS: usize = 64;

/// Returns the first value other than null that a shard's JSON members have under an entry's name;
/// null if there is none among the first [`LOOKS`], or if `column` is no entry.
async fn first_value(column: &str, file: &ShardFile, survey: &Survey) -> Result<Value> {
    let Place::Entry(field, name) = Place::of(column) else {
        return Ok(Value::Null);
    };
    let samples = survey.samples.iter();
    let members = samples.filter_map(|sample| sample.member(field));
    for member in members.take(LOOKS).filter(|member| is_json(member)) {
        let bytes = file
            .fetch(member.offset..member.offset + member.length)
            .await?;
        let value = value_of(&bytes, name);
        if !value.is_null() {
            return Ok(value);
        }
    }
    Ok(Value::Null)
}

/// Returns whether a value is a text or a list of texts.
fn is_caption(value: &Value) -> bool {
    let is_text = |value: &Value| value.is_string() || value.is_null();
    let listed = value.as_array();
    value.is_string() || listed.is_some_and(|values| values.iter().all(is_text))
}
