use super::*;
use crate::dataset::{
    Manifest, SourceRequest,
    fixtures::{self, batch, img2dataset, parquet, put, stores},
    index, tar_fixtures,
};
use arrow::array::{ArrayRef, Float64Array, Int64Array, StringArray};
use superbatch_proto::v1::Reason;

async fn manifest(stores: &Stores, request: SourceRequest) -> Manifest {
    index(stores, None, &[request]).await.unwrap()
}

async fn of(scores: &Scores, manifest: &Manifest, column: &str) -> Result<Vec<f64>> {
    let source = &manifest.sources[0];
    let values = scores.of_shard(source, &source.shards[0], column).await?;
    Ok(values.to_vec())
}

fn scores(stores: &Stores) -> Scores {
    Scores::new(stores.clone(), stores.open("memory:///state").unwrap())
}

#[tokio::test]
async fn a_column_is_read_once_and_kept() {
    let stores = stores();
    put(&stores, &[("0.parquet", parquet(&img2dataset(0..10), 4))]).await;
    let asked = SourceRequest {
        predicate: Some("uid > 6".into()),
        ..fixtures::request("memory:///data")
    };
    let manifest = manifest(&stores, asked).await;
    let expected: Vec<f64> = (0..10).map(f64::from).collect();
    assert_eq!(
        of(&scores(&stores), &manifest, "uid").await.unwrap(),
        expected
    );
    // Another process reads what is kept, also after the data is gone; a damaged one is made anew.
    let state = stores.open("memory:///state").unwrap();
    let [(key, _)] = &state.list("score-columns").await.unwrap()[..] else {
        panic!("one column is kept")
    };
    let kept = state.get(key).await.unwrap();
    state.put(key, kept.slice(1..)).await.unwrap();
    assert_eq!(
        of(&scores(&stores), &manifest, "uid").await.unwrap(),
        expected
    );
    assert_eq!(state.get(key).await.unwrap(), kept);
    stores
        .open("memory:///data/0.parquet")
        .unwrap()
        .delete("")
        .await
        .unwrap();
    assert_eq!(
        of(&scores(&stores), &manifest, "uid").await.unwrap(),
        expected
    );
    let error = of(&scores(&stores), &manifest, "url").await.unwrap_err();
    assert_eq!(error.reason(), Reason::DatasetChanged);
}

#[tokio::test]
async fn what_is_no_column_of_numbers_is_refused() {
    let stores = stores();
    put(&stores, &[("0.parquet", parquet(&img2dataset(0..4), 4))]).await;
    let of_parquet = manifest(&stores, fixtures::request("memory:///data")).await;
    put(&stores, &[("1.tar", tar_fixtures::img2dataset(0..4))]).await;
    let of_tar = manifest(&stores, fixtures::request("memory:///data/1.tar")).await;
    for (manifest, column, reason, says) in [
        (&of_parquet, "urls", Reason::ColumnNotFound, "'urls'"),
        (&of_parquet, "url", Reason::SchemaMismatch, "Utf8"),
        (&of_tar, "m", Reason::ColumnNotFound, "entry 'm'"),
        (&of_tar, "caption", Reason::SchemaMismatch, "'caption 0'"),
    ] {
        let checked = scores(&stores);
        let checked = checked.check(&manifest.sources[0], column).await;
        let error = checked.unwrap_err();
        assert_eq!(error.reason(), reason, "{error}");
        assert!(error.to_string().contains(says), "{error}");
    }
    let found = of(&scores(&stores), &of_tar, "n").await.unwrap();
    assert_eq!(found, [0.0, 1.0, 2.0, 3.0]);
}

#[tokio::test]
async fn a_tar_without_any_json_has_no_values_and_refuses_no_source() {
    let stores = stores();
    let cut = tar_fixtures::tar(&[("a.jpg", b"i"), ("a.txt", b"t")]);
    let tars = [("0.tar", cut), ("1.tar", tar_fixtures::img2dataset(0..3))];
    put(&stores, &tars).await;
    let both = manifest(&stores, fixtures::request("memory:///data")).await;
    let (scores, source) = (scores(&stores), &both.sources[0]);
    scores.check(source, "n").await.unwrap();
    let missing = scores.check(source, "m").await.unwrap_err();
    assert_eq!(missing.reason(), Reason::ColumnNotFound);
    let first = scores.of_shard(source, &source.shards[0], "n").await;
    assert!(first.unwrap()[0].is_nan());
    let second = scores.of_shard(source, &source.shards[1], "n").await;
    assert_eq!(*second.unwrap(), [0.0, 1.0, 2.0]);
}

#[tokio::test]
async fn files_beside_the_data_are_joined_by_id() {
    let stores = stores();
    let beside = stores.open("memory:///beside").unwrap();
    let file = |ids: ArrayRef, values: Vec<Option<f64>>| {
        let values: ArrayRef = Arc::new(Float64Array::from(values));
        parquet(
            &batch(vec![
                ("uid", ids.clone()),
                ("key", ids),
                ("aesthetic", values),
            ]),
            8,
        )
    };
    let ids: ArrayRef = Arc::new(Int64Array::from(vec![3, 0, 99, 2]));
    let values = vec![Some(5.5), Some(4.0), Some(1.0), None];
    beside.put("a.parquet", file(ids, values)).await.unwrap();
    put(&stores, &[("0.parquet", parquet(&img2dataset(0..4), 4))]).await;
    let asked = |uri: &str, id_column: Option<&str>| SourceRequest {
        scores: Some("memory:///beside/a.parquet".into()),
        id_column: id_column.map(str::to_owned),
        ..fixtures::request(uri)
    };
    let joined = manifest(&stores, asked("memory:///data", None)).await;
    let found = of(&scores(&stores), &joined, "aesthetic").await.unwrap();
    assert_eq!((found[0], found[3]), (4.0, 5.5));
    assert!(found[1].is_nan() && found[2].is_nan());
    // A tar's keys are a column `key` beside it, as img2dataset writes them.
    let keys: ArrayRef = Arc::new(StringArray::from(vec!["000000001", "000000001"]));
    let values = vec![Some(7.0), Some(7.0)];
    beside
        .put("a.parquet", file(keys.clone(), values))
        .await
        .unwrap();
    put(&stores, &[("1.tar", tar_fixtures::img2dataset(0..3))]).await;
    let of_tar = manifest(&stores, asked("memory:///data/1.tar", Some("__key__"))).await;
    assert_eq!(
        of(&scores(&stores), &of_tar, "aesthetic").await.unwrap()[1],
        7.0
    );
    // Other files than those that were indexed, and two values of one id.
    let anew = Scores::new(stores.clone(), stores.open("memory:///other").unwrap());
    let error = of(&anew, &joined, "aesthetic").await.unwrap_err();
    assert_eq!(error.reason(), Reason::DatasetChanged);
    let values = vec![Some(7.0), Some(8.0)];
    beside.put("a.parquet", file(keys, values)).await.unwrap();
    let of_tar = manifest(&stores, asked("memory:///data/1.tar", Some("__key__"))).await;
    let error = of(&anew, &of_tar, "aesthetic").await.unwrap_err();
    assert!(error.to_string().contains("2 rows, 1 ids"), "{error}");
}

#[test]
fn joins_are_bounded_and_the_one_used_longest_ago_goes() {
    let key = |name: &str| ["uri", "id", name].map(str::to_owned);
    let mut joins = Joins::default();
    for (name, rows) in [("a", 3), ("b", 3), ("c", 3)] {
        let join = Arc::new(vec![(Id::default(), 0.0); rows]);
        used(&mut joins, key(name)).set(join).unwrap();
    }
    // One that is being made has no rows yet.
    used(&mut joins, key("d"));
    used(&mut joins, key("a"));
    forget_oldest(&mut joins, 6);
    let names: Vec<&str> = joins.iter().map(|(key, _)| key[2].as_str()).collect();
    assert_eq!(names, ["c", "d", "a"]);
    assert_eq!(used(&mut joins, key("c")).get().unwrap().len(), 3);
    forget_oldest(&mut joins, 1);
    assert_eq!(joins.len(), 1);
    assert_eq!(joins[0].0, key("c"), "the last one stays");
}

#[test]
fn scores_of_too_many_rows_are_refused_before_they_are_kept() {
    check_rows(8, 8, "memory:///scores").unwrap();
    let error = check_rows(9, 8, "memory:///scores").unwrap_err();
    assert_eq!(error.value("field"), Some("sources.scores"));
    assert!(error.to_string().contains("column of the data"), "{error}");
}

#[tokio::test]
async fn a_file_of_too_many_rows_is_refused_by_its_footer_alone() {
    let stores = stores();
    let mut bytes = parquet(&img2dataset(0..9), 9).to_vec();
    // Its rows are damaged, so that reading any of them would fail.
    let footer = bytes.len() - 8;
    let length = u32::from_le_bytes(bytes[footer..footer + 4].try_into().unwrap());
    bytes[4..footer - length as usize].fill(0);
    let size = bytes.len() as u64;
    put(&stores, &[("0.parquet", bytes.into())]).await;
    let location = stores.open("memory:///data/0.parquet").unwrap();
    let file = ShardFile::new(location, size, None);
    let read = |most| {
        let check = move |rows| check_rows(rows, most, "memory:///scores");
        ids::numbered(&file, "uid", None, check)
    };
    let error = read(8).await.unwrap_err();
    assert_eq!(error.value("field"), Some("sources.scores"));
    let error = read(9).await.unwrap_err();
    assert_eq!(
        error.value("field"),
        Some("sources"),
        "its rows are damaged"
    );
}
