//! Where a source keeps image and caption: as img2dataset or Hugging Face datasets write them, or
//! as the run says.
use super::{SourceRequest, manifest::Layout};
use crate::error::{Error, Result};
use arrow::datatypes::{DataType, Field, Schema};
use serde_json::Value;
use superbatch_proto::v1::Reason;

/// Names that img2dataset (after its `encode_format`) and Hugging Face exports give the image
/// column.
const IMAGE_NAMES: [&str; 5] = ["jpg", "jpeg", "png", "webp", "image"];
const CAPTION_NAMES: [&str; 3] = ["caption", "text", "txt"];

/// Finds the columns of `schema`, the first shard's. What the request names wins; then the `Image`
/// feature in the `huggingface` metadata, the known names, and the only column of the right type.
///
/// # Errors
/// `ColumnNotFound` listing the columns there are; `SchemaMismatch` where a named column has
/// another type.
pub(super) fn discover(schema: &Schema, request: &SourceRequest) -> Result<Layout> {
    let image = match &request.image_column {
        Some(name) => named(schema, request, name)?,
        None => find_image(schema).ok_or_else(|| none(schema, request, "image", "image_column"))?,
    };
    let caption = match &request.caption_column {
        Some(name) => named(schema, request, name)?,
        None => find_caption(schema)
            .ok_or_else(|| none(schema, request, "caption", "caption_column"))?,
    };
    let layout = Layout {
        image_column: image.name().clone(),
        image_in_struct: matches!(image.data_type(), DataType::Struct(_)),
        caption_column: caption.name().clone(),
    };
    fits(
        schema,
        &layout,
        &request.uri,
        &request.uri,
        "; name another",
    )?;
    Ok(layout)
}

/// Whether a further shard has image and caption where `layout` says.
///
/// # Errors
/// `SchemaMismatch` naming source, shard and column.
pub(super) fn check(schema: &Schema, layout: &Layout, source: &str, shard: &str) -> Result<()> {
    fits(
        schema,
        layout,
        source,
        shard,
        "; all shards of a source need the same columns",
    )
}

fn fits(schema: &Schema, layout: &Layout, source: &str, shard: &str, cure: &str) -> Result<()> {
    let image_fits = |t: &DataType| {
        if layout.image_in_struct {
            is_image_struct(t)
        } else {
            is_binary(t)
        }
    };
    let image_kind = if layout.image_in_struct {
        "a struct with binary `bytes`"
    } else {
        "binary (or struct<bytes>)"
    };
    for (column, is_image) in [
        (&layout.image_column, true),
        (&layout.caption_column, false),
    ] {
        let kind = if is_image { image_kind } else { "a string" };
        let fits = |t: &DataType| if is_image { image_fits(t) } else { is_text(t) };
        let what = match schema.field_with_name(column) {
            Ok(field) if fits(field.data_type()) => continue,
            Ok(field) => format!("is {}, not {kind}", field.data_type()),
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

/// `ColumnNotFound`, listing what there is.
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

fn none(schema: &Schema, request: &SourceRequest, what: &str, option: &str) -> Error {
    let flag = option.replace('_', "-");
    let uri = &request.uri;
    let message = format!(
        "cannot tell which column of {uri} is the {what}; name it with {option} (as a flag \
        --{flag})"
    );
    not_found(message, what, &names(schema))
}

fn find_image(schema: &Schema) -> Option<&Field> {
    let fits = |field: &&Field| is_binary(field.data_type()) || is_image_struct(field.data_type());
    let fields = || schema.fields().iter().map(AsRef::as_ref);
    let features = hugging_face_images(schema);
    only(
        fields()
            .filter(fits)
            .filter(|field: &&Field| features.contains(field.name())),
    )
    .or_else(|| {
        IMAGE_NAMES
            .iter()
            .find_map(|name| schema.field_with_name(name).ok().filter(fits))
    })
    .or_else(|| only(fields().filter(|field: &&Field| is_image_struct(field.data_type()))))
}

fn find_caption(schema: &Schema) -> Option<&Field> {
    let fits = |field: &&Field| is_text(field.data_type());
    let known = CAPTION_NAMES
        .iter()
        .find_map(|name| schema.field_with_name(name).ok().filter(fits));
    known.or_else(|| only(schema.fields().iter().map(AsRef::as_ref).filter(fits)))
}

/// The element of an iterator that has just one.
fn only<T>(mut items: impl Iterator<Item = T>) -> Option<T> {
    let first = items.next()?;
    items.next().is_none().then_some(first)
}

/// Columns that the `datasets` library wrote as its `Image` feature.
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

fn is_text(data_type: &DataType) -> bool {
    matches!(
        data_type,
        DataType::Utf8 | DataType::LargeUtf8 | DataType::Utf8View
    )
}

fn is_image_struct(data_type: &DataType) -> bool {
    let DataType::Struct(fields) = data_type else {
        return false;
    };
    fields
        .iter()
        .any(|field| field.name() == "bytes" && is_binary(field.data_type()))
}
