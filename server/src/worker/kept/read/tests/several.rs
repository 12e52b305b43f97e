//! Several captions a row.
use super::{super::*, captions};
use crate::{
    dataset::{SourceRequest, fixtures::*, index},
    worker::inputs::row::Row,
};
use arrow::{
    array::{Array, ArrayRef, AsArray, BinaryArray},
    compute::cast,
    datatypes::{DataType, Field},
};
use bytes::Bytes;

/// Eight rows with captions, and four without.
fn lists() -> ArrayRef {
    let texts: Vec<Vec<String>> = (0..8)
        .map(|row| (0..4).map(|n| format!("caption {n} of {row}")).collect())
        .collect();
    let mut rows: Vec<Vec<Option<&str>>> = texts
        .iter()
        .map(|row| {
            let row = row.iter().map(|text| Some(text.as_str()));
            row.chain([None]).collect()
        })
        .collect();
    rows.extend([vec![], vec![None, None], vec![Some("")]]);
    let mut rows: Vec<Option<&[Option<&str>]>> = rows.iter().map(|row| Some(&row[..])).collect();
    rows.push(None);
    several(&rows)
}

fn file(captions: ArrayRef) -> Bytes {
    let images = (0..captions.len()).map(|n| Some(format!("image {n}")));
    let image: ArrayRef = Arc::new(BinaryArray::from_iter(images));
    parquet(&batch(vec![("jpg", image), ("captions", captions)]), 100)
}

async fn read(file: Bytes, caption_seed: Option<u64>, extra: &[String]) -> Arc<RecordBatch> {
    let stores = stores();
    put(&stores, &[("0.parquet", file)]).await;
    let asked = SourceRequest {
        caption_seed,
        ..request("memory:///data")
    };
    let manifest = index(&stores, None, &[asked]).await.unwrap();
    let reader = BlockReader::new(stores, 1 << 20);
    let read = reader.read(&manifest, 0, 0, 0, extra).await;
    read.unwrap().batch
}

#[tokio::test]
async fn one_caption_of_each_list_is_drawn_by_the_seed() {
    let first = read(file(lists()), None, &[]).await;
    let drawn = captions(&first);
    for (row, caption) in drawn[..8].iter().enumerate() {
        let (start, end) = caption.unwrap().split_at(8);
        assert!(
            start == "caption " && end.ends_with(&format!(" of {row}")),
            "{caption:?}"
        );
    }
    assert_eq!(drawn[8..], [None, None, Some(""), None]);
    let numbers = |drawn: &[Option<&str>]| -> Vec<char> {
        let number = |text: &Option<&str>| text.unwrap().chars().nth(8).unwrap();
        drawn[..8].iter().map(number).collect()
    };
    let first = numbers(&drawn);
    assert!(first.iter().any(|number| *number != first[0]), "{first:?}");
    let another = read(file(lists()), Some(1), &[]).await;
    assert_ne!(numbers(&captions(&another)), first);
}

#[tokio::test]
async fn a_row_without_a_caption_says_why() {
    let batch = read(file(lists()), None, &[]).await;
    let none = (0..12).map(|row| {
        let row = Row {
            batch: batch.clone(),
            row,
        };
        assert!(!row.caption_is_invalid());
        (row.caption().is_none(), row.has_no_caption())
    });
    let none: Vec<_> = none.collect();
    assert_eq!(none[..8], [(false, false); 8]);
    assert_eq!(
        none[8..],
        [(true, true), (true, true), (false, false), (true, false)]
    );
}

#[tokio::test]
async fn lists_of_any_kind_give_the_same_captions_and_come_whole_if_asked_for() {
    let extra = ["captions".to_owned()];
    let first = read(file(lists()), None, &extra).await;
    let whole = first.column(2);
    assert_eq!(whole.len(), 12);
    assert_eq!(whole.as_list::<i32>().value(3).len(), 5);
    let of = |part| Arc::new(Field::new("element", part, true));
    for kind in [
        DataType::LargeList(of(DataType::LargeUtf8)),
        DataType::List(of(DataType::Utf8View)),
        DataType::List(of(DataType::Dictionary(
            Box::new(DataType::Int32),
            Box::new(DataType::Utf8),
        ))),
    ] {
        let column = cast(&lists(), &kind).unwrap();
        let found = read(file(column), None, &[]).await;
        assert_eq!(captions(&found), captions(&first), "{kind}");
    }
}

#[tokio::test]
async fn a_text_in_a_list_that_is_none_costs_its_row_if_it_is_drawn() {
    let first = read(file(lists()), None, &[]).await;
    let drawn = captions(&first)[2].unwrap();
    for text in ["caption 0 of 2", "caption 1 of 2"] {
        let mut bytes = file(lists()).to_vec();
        let at = bytes.windows(text.len()).position(|b| b == text.as_bytes());
        bytes[at.unwrap()] = 0xFF;
        let found = read(bytes.into(), None, &["captions".to_owned()]).await;
        let row = Row {
            batch: found.clone(),
            row: 2,
        };
        // The list has changed, so the draw may be another one.
        match row.caption() {
            Some(caption) => assert!(caption.ends_with(" of 2") && caption != text),
            None => assert!(row.caption_is_invalid(), "{drawn}"),
        }
        let others = [0, 1, 3, 4, 5, 6, 7];
        let all = |batch: &RecordBatch| others.map(|n| captions(batch)[n].unwrap().to_owned());
        assert_eq!(all(&found), all(&first));
    }
    // Alone in its list, it is drawn.
    let mut bytes = file(several(&[Some(&[Some("alone")]), Some(&[Some("good")])])).to_vec();
    let at = bytes.windows(5).position(|b| b == b"alone").unwrap();
    bytes[at] = 0xFF;
    let batch = read(bytes.into(), None, &[]).await;
    let rows = [0, 1].map(|row| Row {
        batch: batch.clone(),
        row,
    });
    assert!(rows[0].caption_is_invalid() && !rows[0].has_no_caption());
    assert_eq!(rows[1].caption(), Some("good"));
}
