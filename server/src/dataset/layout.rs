//! Finds image and caption in a source: in the layouts of img2dataset and Hugging Face datasets, or
//! by the run's names.
use super::{
    SourceRequest,
    manifest::{Format, Layout},
};
use crate::error::{Error, Result};
use arrow::datatypes::{DataType, Field, FieldRef, Schema};
use serde_json::Value;
use superbatch_proto::v1::Reason;

/// Names that img2dataset (after its `encode_format`) and Hugging Face exports give the image
/// column.
const IMAGE_NAMES: [&str; 5] = ["jpg", "jpeg", "png", "webp", "image"];
const IMAGE: &str = "image";
/// Names that exports without images give the column of their paths: Hugging Face's ImageFolder,
/// COCO and open_clip's CSV among them.
const PATH_NAMES: [&str; 4] = ["file_name", "filename", "filepath", "image_path"];
/// What to do if a column holds paths.
const NAME_ROOT: &str = " (texts are no images: if they are paths, name the folder that they begin \
    in with image_root, as a flag --image-root; URLs are not fetched, download them with \
    img2dataset)";
const CAPTION_KIND: &str = "a string or a list of strings";
const TARGET_KIND: &str = "a string or an integer";
/// What to do if a column of captions holds numbers.
const NAME_TARGET: &str =
    " (classes are targets of the loss per_example: name them with target_column)";
const CAPTION_NAMES: [&str; 4] = ["caption", "text", "txt", "captions"];

/// Finds the columns in `schema`, the first shard's. Names in the request come first; then, for
/// images, the `Image` feature in the `huggingface` metadata; then the layouts' own names. A column
/// with such a name decides even if its type is wrong: guessing another one could train on masks or
/// thumbnails without a sign.
///
/// # Errors
/// `ColumnNotFound` listing the columns there are; `SchemaMismatch` if a column has another
/// type.
pub(super) fn discover(schema: &Schema, request: &SourceRequest) -> Result<Layout> {
    let image = match &request.image_column {
        Some(name) => named(schema, request, name)?,
        None => find_image(schema, request)?,
    };
    let caption = match &request.caption_column {
        Some(name) => named(schema, request, name)?,
        None => find_caption(schema, request)?,
    };
    for column in [image, caption] {
        let twice = schema
            .fields()
            .iter()
            .filter(|field| field.name() == column.name())
            .count()
            > 1;
        if twice {
            let name = column.name();
            let message = format!(
                "{} has several columns named '{name}'; rename them",
                request.uri
            );
            return Err(mismatch(message, &request.uri, name));
        }
    }
    let has_lists = listed(caption.data_type()).is_some() && is_caption(caption.data_type());
    let layout = Layout {
        image_column: image.name().clone(),
        image_in_struct: matches!(image.data_type(), DataType::Struct(_)),
        image_root: request
            .image_root
            .as_ref()
            .map(|root| root.trim_end_matches('/').to_owned()),
        caption_column: caption.name().clone(),
        caption_seed: request.caption_seed.or(has_lists.then_some(0)),
        format: Format::Parquet,
    };
    // Older writers do not mark text as such. Bytes are read as UTF-8 only if the request names the
    // column.
    let kind = caption.data_type();
    let is_bytes = is_binary(listed(kind).unwrap_or(kind));
    if request.caption_column.is_none() && is_bytes {
        let name = caption.name();
        let message = format!(
            "column '{name}' of {} is {kind}, not a string; name it with caption_column (as a flag \
             --caption-column) to read it as UTF-8",
            request.uri
        );
        return Err(mismatch(message, &request.uri, name));
    }
    let cure = "; name another";
    fits(schema, &layout, request, &request.uri, cure)?;
    Ok(layout)
}

/// Checks that a further shard has image and caption in the columns of `layout`.
///
/// # Errors
/// `SchemaMismatch` naming source, shard and column.
pub(super) fn check(
    schema: &Schema,
    layout: &Layout,
    request: &SourceRequest,
    shard: &str,
) -> Result<()> {
    fits(
        schema,
        layout,
        request,
        shard,
        "; all shards of a source need the same columns",
    )
}

fn fits(
    schema: &Schema,
    layout: &Layout,
    request: &SourceRequest,
    shard: &str,
    cure: &str,
) -> Result<()> {
    let source = request.uri.as_str();
    let image_fits = |t: &DataType| match (&layout.image_root, layout.image_in_struct) {
        _ if request.is_text => is_text(t),
        (Some(_), in_struct) => holds_paths(t) && matches!(t, DataType::Struct(_)) == in_struct,
        (None, true) => is_image_struct(t),
        (None, false) => is_binary(t),
    };
    let image_kind = match (&layout.image_root, layout.image_in_struct) {
        _ if request.is_text => "a text",
        (Some(_), false) => "a text with paths below image_root",
        (Some(_), true) => "a struct with a text `path`",
        (None, true) => "a struct with binary `bytes`",
        (None, false) => "binary (or struct<bytes>)",
    };
    for (column, is_image) in [
        (&layout.image_column, true),
        (&layout.caption_column, false),
    ] {
        let kind = match (is_image, request.is_target) {
            (true, _) => image_kind,
            (false, true) => TARGET_KIND,
            (false, false) => CAPTION_KIND,
        };
        let fits = |t: &DataType| match (is_image, request.is_target) {
            (true, _) => image_fits(t),
            (false, true) => is_text(t) || t.is_integer(),
            (false, false) => {
                is_caption(t) && (layout.caption_seed.is_some() || listed(t).is_none())
            }
        };
        let what = match schema.field_with_name(column) {
            Ok(field) if fits(field.data_type()) => continue,
            Ok(field) => {
                let found = field.data_type();
                let (kind, why) = if request.is_text || (request.is_target && !is_image) {
                    (kind, "")
                } else if is_image && layout.image_root.is_none() && holds_paths(found) {
                    (kind, NAME_ROOT)
                } else if !is_image && found.is_integer() {
                    (kind, NAME_TARGET)
                } else if !is_image && is_caption(found) {
                    // Only a further shard: the first one's lists give the layout a seed.
                    (
                        "a string",
                        " (with caption_seed, one of each list is drawn)",
                    )
                } else {
                    (kind, "")
                };
                format!("is {found}, not {kind}{why}")
            }
            Err(_) => "is not there".to_owned(),
        };
        let message = format!("column '{column}' of {shard} {what}{cure}");
        return Err(mismatch(message, source, column).with("shard", shard));
    }
    Ok(())
}

pub(super) fn mismatch(message: String, source: &str, column: &str) -> Error {
    Error::new(Reason::SchemaMismatch, message)
        .with("source", source)
        .with("column", column)
}

/// Returns the error `ColumnNotFound`, listing the available columns.
pub(super) fn not_found(message: String, column: &str, available: &[&str]) -> Error {
    let available = superbatch_proto::some_of(available);
    Error::new(
        Reason::ColumnNotFound,
        format!("{message}; its columns are {available}"),
    )
    .with("column", column)
    .with("available", available)
}

fn names(schema: &Schema) -> Vec<&str> {
    schema
        .fields()
        .iter()
        .map(|field| field.name().as_str())
        .collect()
}

fn named<'a>(schema: &'a Schema, request: &SourceRequest, name: &str) -> Result<&'a Field> {
    let missing = |_| {
        not_found(
            format!("{} has no column '{name}'", request.uri),
            name,
            &names(schema),
        )
    };
    schema.field_with_name(name).map_err(missing)
}

/// The error `ColumnNotFound` if the layout does not decide. It lists the possible columns with
/// their types.
fn ambiguous_column(
    schema: &Schema,
    request: &SourceRequest,
    what: &str,
    could: impl Fn(&DataType) -> bool,
) -> Error {
    let fields = schema
        .fields()
        .iter()
        .filter(|field| could(field.data_type()));
    let typed = fields.map(|field| format!("'{}' is {}", field.name(), field.data_type()));
    let typed = superbatch_proto::some_of(&typed.collect::<Vec<_>>());
    let typed = if typed.is_empty() {
        typed
    } else {
        format!(" ({typed})")
    };
    let uri = &request.uri;
    let message = format!(
        "cannot tell which column of {uri} is the {what}{typed}; name it with {what}_column (as a \
         flag --{what}-column)"
    );
    not_found(message, what, &names(schema))
}

fn find_image<'a>(schema: &'a Schema, request: &SourceRequest) -> Result<&'a Field> {
    let by_path = request.image_root.is_some();
    let fits = |field: &&Field| {
        let kind = field.data_type();
        if by_path {
            holds_paths(kind)
        } else {
            is_binary(kind) || is_image_struct(kind)
        }
    };
    let fields = || schema.fields().iter().map(AsRef::as_ref);
    let features = hugging_face_images(schema);
    let features: Vec<&Field> = fields()
        .filter(|field: &&Field| features.contains(field.name()))
        .filter(fits)
        .collect();
    let called = |names: &[&str]| -> Vec<&'a Field> {
        let named = names.iter().map(|name| schema.field_with_name(name));
        named.filter_map(Result::ok).collect()
    };
    let mut known = called(&IMAGE_NAMES);
    let with_paths = || {
        called(&PATH_NAMES)
            .into_iter()
            .filter(|f| holds_paths(f.data_type()))
    };
    if by_path {
        // What has bytes under such a name is a thumbnail, say.
        known.retain(fits);
        known.extend(with_paths());
    }
    let is_struct = |field: &&Field| is_a_struct(field) && fits(field);
    let found = only_one(features.iter().copied())
        .or_else(|| features.into_iter().find(|field| field.name() == IMAGE))
        // A mask beside the picture may have bytes under one of img2dataset's names, so a struct is
        // preferred.
        .or_else(|| only_one(known.iter().copied().filter(is_struct)))
        .or_else(|| only_one(known.iter().copied().filter(fits)));
    match found {
        Some(field) => Ok(field),
        // The column of that name has a wrong type, which the next check reports.
        None if known.len() == 1 => Ok(known[0]),
        None if known.is_empty() => only_one(fields().filter(is_struct))
            .or_else(|| only_one(with_paths()))
            .ok_or_else(|| ambiguous_column(schema, request, "image", |_| true)),
        None => Err(ambiguous_column(schema, request, "image", |_| true)),
    }
}

fn find_caption<'a>(schema: &'a Schema, request: &SourceRequest) -> Result<&'a Field> {
    let known = CAPTION_NAMES
        .iter()
        .find_map(|name| schema.field_with_name(name).ok());
    known.ok_or_else(|| ambiguous_column(schema, request, "caption", could_be_caption))
}

/// Returns the element of an iterator that has exactly one.
fn only_one<T>(mut items: impl Iterator<Item = T>) -> Option<T> {
    let first = items.next()?;
    items.next().is_none().then_some(first)
}

/// Returns the columns that the `datasets` library wrote as its `Image` feature.
fn hugging_face_images(schema: &Schema) -> Vec<String> {
    let parsed = schema
        .metadata()
        .get("huggingface")
        .and_then(|text| serde_json::from_str::<Value>(text).ok());
    let features = parsed
        .as_ref()
        .and_then(|value| value.pointer("/info/features")?.as_object());
    let images = features
        .into_iter()
        .flatten()
        .filter(|(_, feature)| feature["_type"] == "Image");
    images.map(|(name, _)| name.clone()).collect()
}

fn is_binary(data_type: &DataType) -> bool {
    matches!(
        data_type,
        DataType::Binary | DataType::LargeBinary | DataType::BinaryView
    )
}

/// Returns whether a type is text, categories of text, or null.
fn is_text(data_type: &DataType) -> bool {
    match data_type {
        DataType::Dictionary(_, values) => is_text(values),
        DataType::Utf8 | DataType::LargeUtf8 | DataType::Utf8View | DataType::Null => true,
        _ => false,
    }
}

/// Returns the type of a list's parts; `None` for what is no list.
fn listed(data_type: &DataType) -> Option<&DataType> {
    match data_type {
        DataType::List(part) | DataType::LargeList(part) | DataType::FixedSizeList(part, _) => {
            Some(part.data_type())
        }
        _ => None,
    }
}

/// Returns whether a column's values are captions, or lists of them. Bytes may be texts.
fn is_caption(data_type: &DataType) -> bool {
    could_be_caption(data_type) || is_binary(listed(data_type).unwrap_or(data_type))
}

fn could_be_caption(data_type: &DataType) -> bool {
    is_text(listed(data_type).unwrap_or(data_type))
}

fn is_a_struct(field: &Field) -> bool {
    matches!(field.data_type(), DataType::Struct(_))
}

/// Returns whether a column holds paths of images, or the struct in which `datasets` keeps a path
/// beside the bytes.
fn holds_paths(data_type: &DataType) -> bool {
    let is_path = |field: &FieldRef| field.name() == "path" && is_text(field.data_type());
    match data_type {
        DataType::Struct(fields) => fields.iter().any(is_path),
        other => is_text(other),
    }
}

fn is_image_struct(data_type: &DataType) -> bool {
    let DataType::Struct(fields) = data_type else {
        return false;
    };
    fields
        .iter()
        .any(|field| field.name() == "bytes" && is_binary(field.data_type()))
}
