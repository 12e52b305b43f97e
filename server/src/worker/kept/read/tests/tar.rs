use super::{super::*, counted};
use crate::{
    dataset::{
        SourceRequest,
        fixtures::*,
        index,
        tar_fixtures::{self, tar},
    },
    worker::inputs::row::Row,
};
use arrow::array::AsArray;
use std::sync::atomic::Ordering;
use superbatch_proto::v1::Reason;

const JSON: &[u8] = br#"{"caption": "of json", "n": 7, "gone": null}"#;
static BIG: [u8; 3 << 20] = [0; 3 << 20];

fn members() -> Vec<(&'static str, &'static [u8])> {
    vec![
        ("b/0.txt", b"first"),
        ("b/0.json", JSON),
        ("b/0.png", b"image 0"),
        ("b/0.webp", b"another"),
        ("b/1.jpg", b"no caption"),
        ("b/0.jpg", b"image 2"),
        ("b/0.mp4", &BIG),
        ("b/0.txt", b"not \xff text"),
        ("b/3.JPG", b""),
        ("b/3.txt", "vièrte".as_bytes()),
    ]
}

fn columns(names: &[&str]) -> Vec<String> {
    names.iter().map(|name| (*name).to_owned()).collect()
}

fn bytes(batch: &RecordBatch, column: &str) -> Vec<Option<Vec<u8>>> {
    let column = batch.column_by_name(column).unwrap().as_binary::<i32>();
    column
        .iter()
        .map(|value| value.map(<[u8]>::to_vec))
        .collect()
}

fn texts<'a>(batch: &'a RecordBatch, column: &str) -> Vec<Option<&'a str>> {
    batch
        .column_by_name(column)
        .unwrap()
        .as_string::<i32>()
        .iter()
        .collect()
}

#[tokio::test]
async fn a_block_of_a_tar_comes_in_the_data_schema() {
    let stores = stores();
    let manifest = indexed(&stores, &[("0.tar", tar(&members()))])
        .await
        .unwrap();
    let names = columns(&["__key__", "json[n]", "json[gone]", "json", "webp"]);
    let reader = BlockReader::new(stores, 1 << 20);
    let batch = reader.read(&manifest, 0, 0, 0, &names).await.unwrap().batch;
    assert_eq!(batch.schema(), manifest.data_schema(&names).unwrap());
    let images = ["image 0", "image 2", ""].map(|text| Some(text.as_bytes().to_vec()));
    assert_eq!(bytes(&batch, "image"), images);
    assert_eq!(
        texts(&batch, "caption"),
        [Some("first"), None, Some("vièrte")]
    );
    let invalid = (0..3).map(|row| {
        Row {
            batch: batch.clone(),
            row,
        }
        .caption_is_invalid()
    });
    assert_eq!(invalid.collect::<Vec<_>>(), [false, true, false]);
    assert_eq!(
        texts(&batch, "__key__"),
        [Some("b/0"), Some("b/0"), Some("b/3")]
    );
    assert_eq!(texts(&batch, "json[n]"), [Some("7"), None, None]);
    assert_eq!(texts(&batch, "json[gone]"), [None, None, None]);
    assert_eq!(
        texts(&batch, "json"),
        [Some(std::str::from_utf8(JSON).unwrap()), None, None]
    );
    assert_eq!(
        bytes(&batch, "webp"),
        [Some(b"another".to_vec()), None, None]
    );
}

#[tokio::test]
async fn captions_of_a_json_are_read() {
    let stores = stores();
    put(&stores, &[("0.tar", tar(&members()[..3]))]).await;
    let named = SourceRequest {
        caption_column: Some("json[caption]".into()),
        ..request("memory:///data/0.tar")
    };
    let manifest = index(&stores, None, &[named]).await.unwrap();
    let batch = BlockReader::new(stores, 0)
        .read(&manifest, 0, 0, 0, &[])
        .await
        .unwrap()
        .batch;
    assert_eq!(texts(&batch, "caption"), [Some("of json")]);
}

#[tokio::test]
async fn lists_in_a_json_are_drawn_from() {
    let stores = stores();
    let jsons: Vec<String> = (0..8)
        .map(|row| format!(r#"{{"caption": ["0 of {row}", null, "1 of {row}", "2 of {row}"]}}"#))
        .chain([r#"{"caption": []}"#.into(), r#"{"caption": "one"}"#.into()])
        .collect();
    let names: Vec<_> = (0..10)
        .map(|row| [format!("{row}.jpg"), format!("{row}.json")])
        .collect();
    let members = names.iter().zip(&jsons).flat_map(|(names, json)| {
        [
            (names[0].as_str(), &b"image"[..]),
            (names[1].as_str(), json.as_bytes()),
        ]
    });
    put(&stores, &[("0.tar", tar(&members.collect::<Vec<_>>()))]).await;
    let manifest = index(&stores, None, &[request("memory:///data")])
        .await
        .unwrap();
    let extra = ["json[caption]".to_owned()];
    let reader = BlockReader::new(stores, 0);
    let batch = reader.read(&manifest, 0, 0, 0, &extra).await.unwrap().batch;
    let drawn = texts(&batch, "caption");
    for (row, caption) in drawn[..8].iter().enumerate() {
        assert!(caption.unwrap().ends_with(&format!(" of {row}")));
    }
    let numbers = drawn[..8].iter().map(|text| &text.unwrap()[..1]);
    assert!(numbers.collect::<std::collections::BTreeSet<_>>().len() > 1);
    assert_eq!(drawn[8..], [None, Some("one")]);
    // Asked for as a column, the list comes whole.
    assert_eq!(
        texts(&batch, "json[caption]")[0],
        Some(r#"["0 of 0",null,"1 of 0","2 of 0"]"#)
    );
}

#[tokio::test]
async fn only_wanted_members_are_read_and_headers_only_once() {
    let (stores, counts) = counted();
    let state = stores.open("memory:///state").unwrap();
    put(&stores, &[("0.tar", tar(&members()))]).await;
    let sources = [request("memory:///data")];
    let manifest = index(&stores, Some(&state), &sources).await.unwrap();
    let count = |n: usize| counts[n].load(Ordering::Relaxed);
    let (gets, read) = (count(0), count(1));
    let reader = BlockReader::new(stores.clone(), 0).keeping(state.clone());
    reader.read(&manifest, 0, 0, 0, &[]).await.unwrap();
    assert_eq!(
        count(0) - gets,
        3,
        "the index, and what lies before and behind the film"
    );
    assert!(count(1) - read < 64 << 10, "{} bytes", count(1) - read);
    reader.read(&manifest, 0, 0, 0, &[]).await.unwrap();
    assert_eq!(count(0) - gets, 5, "the index is kept in memory");
    // Without the state's index, the headers are read again.
    let alone = BlockReader::new(stores, 0);
    let batch = alone.read(&manifest, 0, 0, 0, &[]).await.unwrap().batch;
    assert_eq!(batch.num_rows(), 3);
}

#[tokio::test]
async fn a_changed_tar_is_refused() {
    let stores = stores();
    let old = tar(&members());
    let manifest = indexed(&stores, &[("0.tar", old.clone())]).await.unwrap();
    let mut flipped = old.to_vec();
    flipped[600] ^= 1;
    for (new, how) in [
        (tar(&members()[..3]), "bytes, not"),
        (flipped.into(), "ETag"),
    ] {
        put(&stores, &[("0.tar", new)]).await;
        let reader = BlockReader::new(stores.clone(), 0);
        let error = reader.read(&manifest, 0, 0, 0, &[]).await.unwrap_err();
        assert_eq!(error.reason(), Reason::DatasetChanged);
        assert_eq!(error.value("shard"), Some("memory:///data/0.tar"));
        assert!(error.to_string().contains(how), "{error}");
    }
}

#[tokio::test]
async fn samples_outside_a_predicate_are_not_there() {
    let stores = stores();
    put(&stores, &[("0.tar", tar_fixtures::img2dataset(0..9))]).await;
    let asked = SourceRequest {
        predicate: Some("n in (2, 7, 8)".into()),
        ..request("memory:///data")
    };
    let manifest = index(&stores, None, &[asked]).await.unwrap();
    let batch = BlockReader::new(stores, 0)
        .read(&manifest, 0, 0, 0, &[])
        .await
        .unwrap()
        .batch;
    assert_eq!(
        texts(&batch, "caption"),
        ["caption 2", "caption 7", "caption 8"].map(Some)
    );
}
