use crate::{
    dataset::{
        Manifest, SourceRequest,
        fixtures::{self, batch, parquet, put, stores},
        index, tar_fixtures,
    },
    error::Error,
    storage::Stores,
};
use arrow::{
    array::{ArrayRef, BinaryArray, Float32Array, Int64Array, ListArray, RecordBatch, StringArray},
    datatypes::Int64Type,
};
use bytes::Bytes;
use std::sync::Arc;
use superbatch_proto::v1::Reason;

/// Ten rows of a pool: similarity n / 10, English but for every third, row 4 without either.
fn pool() -> RecordBatch {
    let rows = 0..10_i64;
    let language = |n: i64| (n != 4).then_some(if n % 3 == 2 { "de" } else { "en" });
    let lists = rows.clone().map(|n| Some(vec![Some(n)]));
    let columns: Vec<(&str, ArrayRef)> = vec![
        (
            "jpg",
            Arc::new(BinaryArray::from_iter(
                rows.clone().map(|n| Some(n.to_string())),
            )),
        ),
        (
            "caption",
            Arc::new(StringArray::from_iter_values(
                rows.clone().map(|n| n.to_string()),
            )),
        ),
        (
            "similarity",
            Arc::new(Float32Array::from_iter(
                rows.clone().map(|n| (n != 4).then_some(n as f32 / 10.0)),
            )),
        ),
        (
            "language",
            Arc::new(StringArray::from_iter(rows.clone().map(language))),
        ),
        (
            "id",
            Arc::new(Int64Array::from_iter_values(rows.clone().map(|n| 100 + n))),
        ),
        (
            "uid",
            Arc::new(StringArray::from_iter_values(
                rows.map(|n| format!("{n:032x}")),
            )),
        ),
        (
            "faces",
            Arc::new(ListArray::from_iter_primitive::<Int64Type, _, _>(lists)),
        ),
    ];
    batch(columns)
}

fn request(predicate: Option<&str>, allow: Option<&str>) -> SourceRequest {
    SourceRequest {
        predicate: predicate.map(str::to_owned),
        allow: allow.map(str::to_owned),
        ..fixtures::request("memory:///data")
    }
}

async fn indexed(stores: &Stores, request: SourceRequest) -> Result<Manifest, Error> {
    put(stores, &[("0.parquet", parquet(&pool(), 4))]).await;
    index(stores, None, &[request]).await
}

/// Rows of the first shard that are candidates, by their numbers in it.
fn kept(manifest: &Manifest) -> Vec<u64> {
    let blocks = &manifest.sources[0].shards[0].blocks;
    let rows = blocks
        .iter()
        .flat_map(|block| (0..block.rows).map(|row| block.row_in_shard(row)));
    rows.collect()
}

#[tokio::test]
async fn rows_outside_a_predicate_are_no_candidates_and_are_counted() {
    let stores = stores();
    for (text, expected) in [
        ("similarity >= 0.3 and language = 'en'", &[3, 6, 7, 9][..]),
        (
            "language = 'en' and not similarity < 0.6 or id = 100",
            &[0, 6, 7, 9],
        ),
        ("language is null", &[4]),
        ("similarity = 0.3", &[3]),
        ("id between 104 and 105.5", &[4, 5]),
        ("0.75 < similarity", &[8, 9]),
        ("language not in ('en')", &[2, 5, 8]),
        ("id < 1000", &[0, 1, 2, 3, 4, 5, 6, 7, 8, 9]),
    ] {
        let manifest = indexed(&stores, request(Some(text), None)).await;
        let manifest = Arc::new(manifest.unwrap());
        assert_eq!(kept(&manifest), expected, "{text}");
        let shard = &manifest.sources[0].shards[0];
        assert_eq!(manifest.rows() + shard.outside, 10, "{text}");
        let stated = manifest.sources[0].kept_by.as_ref().unwrap();
        assert_eq!(stated.predicate.as_deref(), Some(text));
        // As it is kept in the state.
        let state = stores.open("memory:///state").unwrap();
        let digest = manifest.save(&state).await.unwrap();
        assert_eq!(Manifest::load(&state, &digest).await.unwrap(), *manifest);
    }
}

/// Row groups of ids 100 to 103, 104 to 107, 108 and 109, whose contents are damaged: to read any
/// of them would fail.
#[tokio::test]
async fn row_groups_that_statistics_decide_are_not_read() {
    let stores = stores();
    let mut bytes = parquet(&pool(), 4).to_vec();
    let footer = bytes.len() - 8;
    let length = u32::from_le_bytes(bytes[footer..footer + 4].try_into().unwrap());
    bytes[4..footer - length as usize].fill(0);
    put(&stores, &[("0.parquet", bytes.into())]).await;
    for (text, expected) in [
        ("id > 107", &[8, 9][..]),
        ("id < 104 or id >= 108", &[0, 1, 2, 3, 8, 9]),
        ("id between 104 and 107 and id < 200", &[4, 5, 6, 7]),
    ] {
        let manifest = index(&stores, None, &[request(Some(text), None)]).await;
        assert_eq!(kept(&manifest.unwrap()), expected, "{text}");
    }
    let undecided = index(&stores, None, &[request(Some("id > 108"), None)]).await;
    let error = undecided.unwrap_err();
    assert!(error.to_string().contains("0.parquet"), "{error}");
}

#[tokio::test]
async fn what_can_never_be_compared_is_refused_with_column_type_and_place() {
    let stores = stores();
    for (text, reason, says) in [
        (
            "id > 3 and similarty > 1",
            Reason::ColumnNotFound,
            "'similarty' (where, at character 12)",
        ),
        (
            "language > 3",
            Reason::SchemaMismatch,
            "'language' (at character 1) of memory:///data/0.parquet is Utf8, and is compared \
             with 3",
        ),
        ("faces = 3", Reason::SchemaMismatch, "List"),
        ("id >", Reason::InvalidArgument, "at character 5"),
        (
            "similarity > 7",
            Reason::DatasetEmpty,
            "where leaves out 10 of them",
        ),
    ] {
        let error = indexed(&stores, request(Some(text), None))
            .await
            .unwrap_err();
        assert_eq!(error.reason(), reason, "{error}");
        assert!(error.to_string().contains(says), "{error}");
    }
}

/// As `numpy.save` writes DataComp's subsets: the halves of each uid.
fn npy(uids: &[u128]) -> Bytes {
    let header = format!(
        "{{'descr': [('f0', '<u8'), ('f1', '<u8')], 'fortran_order': False, 'shape': ({},), }}\n",
        uids.len()
    );
    let halves = uids
        .iter()
        .flat_map(|uid| [(uid >> 64) as u64, *uid as u64]);
    let data = halves.flat_map(u64::to_le_bytes).collect::<Vec<_>>();
    let length = (header.len() as u16).to_le_bytes();
    [b"\x93NUMPY\x01\x00", &length[..], header.as_bytes(), &data]
        .concat()
        .into()
}

#[tokio::test]
async fn only_listed_ids_are_candidates() {
    let stores = stores();
    let lists = stores.open("memory:///lists").unwrap();
    lists.put("a.npy", npy(&[2, 7, 1 << 70])).await.unwrap();
    let ids: ArrayRef = Arc::new(Int64Array::from_iter_values([103, 104, 999]));
    lists
        .put("a.parquet", parquet(&batch(vec![("id", ids)]), 8))
        .await
        .unwrap();
    let manifest = indexed(&stores, request(None, Some("memory:///lists/a.npy")))
        .await
        .unwrap();
    assert_eq!(kept(&manifest), [2, 7]);
    let stated = manifest.sources[0].kept_by.clone().unwrap().allow.unwrap();
    assert_eq!((stated.ids, stated.id_column.as_str()), (3, "uid"));
    let both = SourceRequest {
        id_column: Some("id".to_owned()),
        ..request(Some("similarity > 0"), Some("memory:///lists/a.parquet"))
    };
    let manifest = indexed(&stores, both.clone()).await.unwrap();
    assert_eq!(
        (kept(&manifest), manifest.sources[0].shards[0].outside),
        (vec![3], 9)
    );
    for (column, says) in [
        ("key", "no column 'key'"),
        ("similarity", "Float32"),
        ("faces", "List"),
    ] {
        let asked = SourceRequest {
            id_column: Some(column.to_owned()),
            ..both.clone()
        };
        let error = indexed(&stores, asked).await.unwrap_err();
        assert!(
            error.to_string().contains(says) || column == "similarity",
            "{error}"
        );
    }
}

#[tokio::test]
async fn samples_of_a_tar_are_kept_by_their_json() {
    let stores = stores();
    put(&stores, &[("0.tar", tar_fixtures::img2dataset(0..9))]).await;
    let asked = |text: &str| {
        let request = request(Some(text), None);
        let stores = stores.clone();
        async move { index(&stores, None, &[request]).await }
    };
    let manifest = asked("n > 2 and \"json[n]\" <= 6 and __key__ <> '000000005'")
        .await
        .unwrap();
    assert_eq!(kept(&manifest), [3, 4, 6]);
    let shard = &manifest.sources[0].shards[0];
    assert_eq!((shard.outside, shard.left_out), (6, 0));
    let error = asked("m > 2").await.unwrap_err();
    assert!(
        error.to_string().contains("entry 'm'") && error.to_string().contains("caption"),
        "{error}"
    );
    let error = asked("n > 'x'").await.unwrap_err();
    assert!(
        error.to_string().contains("0 in sample 000000000"),
        "{error}"
    );
}

/// A tar that was cut off before its first JSON, or a small one in which nothing has the entry.
#[tokio::test]
async fn a_tar_without_the_entry_refuses_no_source() {
    let stores = stores();
    let cut = tar_fixtures::tar(&[("a.jpg", b"i"), ("a.txt", b"t")]);
    put(
        &stores,
        &[("0.tar", cut), ("1.tar", tar_fixtures::img2dataset(0..9))],
    )
    .await;
    let rows = |text: &str| {
        let request = request(Some(text), None);
        let stores = stores.clone();
        async move {
            let manifest = index(&stores, None, &[request]).await.unwrap();
            let shards = manifest.sources[0].shards.iter();
            let rows = shards.map(|s| s.blocks.iter().map(|b| b.rows).sum::<u32>());
            rows.collect::<Vec<_>>()
        }
    };
    assert_eq!(rows("n > 2").await, [0, 6]);
    assert_eq!(rows("n is null").await, [1, 0], "what it lacks is null");
}

/// img2dataset's Parquet writer keeps failed downloads as rows.
#[tokio::test]
async fn failed_downloads_are_no_candidates() {
    let stores = stores();
    let status = |n: i64| {
        if n % 4 == 1 {
            "failed_to_download"
        } else {
            "success"
        }
    };
    let image = |n: i64| (n % 4 != 1).then(|| n.to_string());
    let columns: Vec<(&str, ArrayRef)> = vec![
        ("jpg", Arc::new(BinaryArray::from_iter((0..10).map(image)))),
        (
            "caption",
            Arc::new(StringArray::from_iter_values(
                (0..10).map(|n| n.to_string()),
            )),
        ),
        (
            "status",
            Arc::new(StringArray::from_iter_values((0..10).map(status))),
        ),
        (
            "error_message",
            Arc::new(StringArray::from_iter((0..10).map(|_| None::<&str>))),
        ),
        (
            "similarity",
            Arc::new(Float32Array::from_iter_values((0..10).map(|n| n as f32))),
        ),
    ];
    put(&stores, &[("0.parquet", parquet(&batch(columns), 4))]).await;
    let manifest = index(&stores, None, &[request(None, None)]).await.unwrap();
    let shard = &manifest.sources[0].shards[0];
    assert_eq!(kept(&manifest), [0, 2, 3, 4, 6, 7, 8]);
    assert_eq!(
        (shard.not_downloaded, shard.without_image, shard.outside),
        (3, 0, 0)
    );
    let manifest = index(&stores, None, &[request(Some("similarity > 4"), None)])
        .await
        .unwrap();
    let shard = &manifest.sources[0].shards[0];
    assert_eq!(kept(&manifest), [6, 7, 8]);
    assert_eq!((shard.not_downloaded, shard.outside), (3, 4));
}
