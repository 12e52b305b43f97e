//! Targets of a loss, and texts in the place of images.
use super::super::*;
use crate::{
    dataset::{SourceRequest, fixtures::*, index},
    worker::inputs::row::Row,
};
use arrow::{
    array::{ArrayRef, AsArray, Int64Array, StringArray},
    datatypes::Int64Type,
};
use bytes::Bytes;
use superbatch_proto::v1::Reason;

fn file() -> Bytes {
    let texts = [Some("a text of 0"), Some("a text of 1"), None, Some("")];
    let text: ArrayRef = Arc::new(StringArray::from_iter(texts));
    let label: ArrayRef = Arc::new(Int64Array::from_iter([Some(7), Some(-1), Some(2), None]));
    let price: ArrayRef = Arc::new(arrow::array::Float64Array::from_iter_values([0.5; 4]));
    parquet(
        &batch(vec![("text", text), ("label", label), ("price", price)]),
        100,
    )
}

fn asked(text: &str, target: &str) -> SourceRequest {
    SourceRequest {
        image_column: Some(text.to_owned()),
        is_text: true,
        caption_column: Some(target.to_owned()),
        is_target: true,
        ..request("memory:///data")
    }
}

type Read = Result<(Manifest, Arc<RecordBatch>)>;

async fn read(file: Bytes, asked: SourceRequest, extra: &[String]) -> Read {
    let stores = stores();
    put(&stores, &[("0.parquet", file)]).await;
    let manifest = index(&stores, None, &[asked]).await?;
    let reader = BlockReader::new(stores, 1 << 20);
    let read = reader.read(&manifest, 0, 0, 0, extra).await?;
    Ok((manifest, read.batch))
}

fn rows(batch: &Arc<RecordBatch>) -> Vec<(Option<Vec<u8>>, Option<String>)> {
    let row = |row| {
        let row = Row {
            batch: batch.clone(),
            row,
        };
        let image = row.image().map(<[u8]>::to_vec);
        (image, row.caption().map(str::to_owned))
    };
    (0..batch.num_rows()).map(row).collect()
}

#[tokio::test]
async fn a_class_is_a_target_as_text_and_a_column_of_its_own_type() {
    let extra = ["label".to_owned()];
    let (manifest, batch) = read(file(), asked("text", "label"), &extra).await.unwrap();
    assert!(manifest.sources[0].has_texts());
    let row = |text: Option<&str>, target: Option<&str>| {
        let text = text.map(|text| text.as_bytes().to_vec());
        (text, target.map(str::to_owned))
    };
    assert_eq!(
        rows(&batch),
        [
            row(Some("a text of 0"), Some("7")),
            row(Some("a text of 1"), Some("-1")),
            row(None, Some("2")),
            row(Some(""), None),
        ]
    );
    assert_eq!(batch.column(2).as_primitive::<Int64Type>().value(0), 7);
}

#[tokio::test]
async fn the_target_of_a_language_model_is_its_text() {
    let (_, batch) = read(file(), asked("text", "text"), &[]).await.unwrap();
    for (text, target) in rows(&batch) {
        assert_eq!(text, target.map(String::into_bytes));
    }
}

#[tokio::test]
async fn a_text_that_is_none_costs_its_row() {
    let mut file = file().to_vec();
    let (good, bad) = (b"a text of 1".as_slice(), b"a text \xFFf 1");
    let at = file.windows(good.len()).position(|bytes| bytes == good);
    let at = at.unwrap();
    file[at..at + bad.len()].copy_from_slice(bad);
    let (_, batch) = read(file.into(), asked("text", "label"), &[])
        .await
        .unwrap();
    let rows = rows(&batch);
    assert_eq!(rows[0].0.as_deref(), Some(b"a text of 0".as_slice()));
    // The bytes go on, and a model that reads texts makes a hole of them.
    assert_eq!(rows[1].0.as_deref(), Some(bad.as_slice()));
    assert_eq!(rows[1].1.as_deref(), Some("-1"));
}

#[tokio::test]
async fn columns_of_other_types_are_refused() {
    for (text, target, column) in [("label", "label", "label"), ("text", "price", "price")] {
        let error = read(file(), asked(text, target), &[]).await.unwrap_err();
        assert_eq!(error.reason(), Reason::SchemaMismatch);
        assert_eq!(error.value("column"), Some(column), "{error}");
    }
}
