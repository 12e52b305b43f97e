//! For tests: small Parquet files in a memory store, in the layouts that are read in place.
use super::{Manifest, SourceRequest, index};
use crate::storage::{StorageConfig, Stores};
use arrow::{
    array::{
        Array, ArrayRef, BinaryArray, Int64Array, ListBuilder, RecordBatch, StringArray,
        StringBuilder, StructArray,
    },
    datatypes::{DataType, Field, Schema},
};
use bytes::Bytes;
use parquet::{arrow::ArrowWriter, file::properties::WriterProperties};
use std::{collections::HashMap, sync::Arc};

pub(crate) fn stores() -> Stores {
    Stores::new(StorageConfig::default())
}

pub(crate) fn request(uri: &str) -> SourceRequest {
    SourceRequest::new(uri)
}

/// Returns the file's bytes, with row groups of at most `block_rows` rows.
pub(crate) fn parquet(batch: &RecordBatch, block_rows: usize) -> Bytes {
    let properties = WriterProperties::builder()
        .set_max_row_group_row_count(Some(block_rows))
        .build();
    let mut writer = ArrowWriter::try_new(Vec::new(), batch.schema(), Some(properties))
        .expect("a schema that Parquet can hold");
    writer
        .write(batch)
        .expect("memory takes the rows of the schema's own batch");
    writer.into_inner().expect("memory takes the footer").into()
}

pub(crate) fn batch(columns: Vec<(&str, ArrayRef)>) -> RecordBatch {
    let columns = columns.into_iter().map(|(name, array)| (name, array, true));
    RecordBatch::try_from_iter_with_nullable(columns).expect("columns of one length")
}

/// As img2dataset writes it; every fourth download failed.
pub(crate) fn img2dataset(rows: std::ops::Range<u32>) -> RecordBatch {
    let image = |row: u32| (row % 4 != 3).then(|| format!("image {row}").into_bytes());
    batch(vec![
        (
            "uid",
            Arc::new(Int64Array::from_iter_values(rows.clone().map(i64::from))),
        ),
        (
            "caption",
            Arc::new(StringArray::from_iter_values(
                rows.clone().map(|row| format!("caption {row}")),
            )),
        ),
        (
            "url",
            Arc::new(StringArray::from_iter_values(
                rows.clone().map(|row| format!("https://x/{row}")),
            )),
        ),
        ("jpg", Arc::new(BinaryArray::from_iter(rows.map(image)))),
    ])
}

/// Rows whose images lie beside the file, as COCO's and ImageFolder's exports are.
pub(crate) fn by_path(paths: &[&str]) -> RecordBatch {
    let rows = 0..paths.len() as i64;
    let captions = rows.clone().map(|row| format!("caption {row}"));
    batch(vec![
        (
            "file_name",
            Arc::new(StringArray::from_iter_values(paths.iter().copied())),
        ),
        ("caption", Arc::new(StringArray::from_iter_values(captions))),
        ("n", Arc::new(Int64Array::from_iter_values(rows))),
    ])
}

/// As Hugging Face datasets writes images that it has not embedded: `struct<bytes, path>`.
pub(crate) fn hugging_face_paths(rows: &[(Option<&str>, Option<&str>)]) -> RecordBatch {
    let bytes: ArrayRef = Arc::new(BinaryArray::from_iter(rows.iter().map(|row| row.0)));
    let path: ArrayRef = Arc::new(StringArray::from_iter(rows.iter().map(|row| row.1)));
    let field =
        |name, array: &ArrayRef| Arc::new(Field::new(name, array.data_type().clone(), true));
    let image = StructArray::from(vec![
        (field("bytes", &bytes), bytes),
        (field("path", &path), path),
    ]);
    let captions = (0..rows.len()).map(|row| format!("caption {row}"));
    batch(vec![
        ("image", Arc::new(image)),
        ("caption", Arc::new(StringArray::from_iter_values(captions))),
    ])
}

/// Makes a column of several captions a row.
pub(crate) fn several(rows: &[Option<&[Option<&str>]>]) -> ArrayRef {
    let mut lists = ListBuilder::new(StringBuilder::new());
    for row in rows {
        lists.append_option(row.map(|captions| captions.iter().copied()));
    }
    Arc::new(lists.finish())
}

/// As Hugging Face datasets writes it: the feature types are in the schema's metadata.
pub(crate) fn hugging_face(rows: std::ops::Range<u32>) -> RecordBatch {
    let bytes: ArrayRef = Arc::new(BinaryArray::from_iter(
        rows.clone().map(|row| Some(format!("image {row}"))),
    ));
    let path: ArrayRef = Arc::new(StringArray::from_iter(rows.clone().map(|_| None::<&str>)));
    let field =
        |name, array: &ArrayRef| Arc::new(Field::new(name, array.data_type().clone(), true));
    let photo = StructArray::from(vec![
        (field("bytes", &bytes), bytes),
        (field("path", &path), path),
    ]);
    let text = StringArray::from_iter_values(rows.clone().map(|row| format!("caption {row}")));
    let thumb = photo.clone();
    let uid = Int64Array::from_iter_values(rows.map(i64::from));
    let features = r#"{"info": {"features": {
        "uid": {"dtype": "int64", "_type": "Value"}, "photo": {"_type": "Image"},
        "text": {"dtype": "string", "_type": "Value"}, "thumb": {"bytes": {}, "path": {}}}}}"#;
    let schema = Schema::new(vec![
        Field::new("uid", DataType::Int64, true),
        Field::new("photo", photo.data_type().clone(), true),
        Field::new("thumb", thumb.data_type().clone(), true),
        Field::new("text", DataType::Utf8, true),
    ])
    .with_metadata(HashMap::from([(
        "huggingface".to_owned(),
        features.to_owned(),
    )]));
    let columns: Vec<ArrayRef> = vec![
        Arc::new(uid),
        Arc::new(photo),
        Arc::new(thumb),
        Arc::new(text),
    ];
    RecordBatch::try_new(Arc::new(schema), columns).expect("the columns are those of the schema")
}

/// Writes files below `memory:///data` and indexes that folder.
pub(crate) async fn indexed(
    stores: &Stores,
    files: &[(&str, Bytes)],
) -> crate::error::Result<Manifest> {
    put(stores, files).await;
    index(stores, None, &[request("memory:///data")]).await
}

pub(crate) async fn put(stores: &Stores, files: &[(&str, Bytes)]) {
    let root = stores.open("memory:///data").expect("a valid URI");
    for (path, bytes) in files {
        root.put(path, bytes.clone())
            .await
            .expect("memory takes an object");
    }
}
