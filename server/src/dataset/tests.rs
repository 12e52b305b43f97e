use super::{fixtures::*, *};
use crate::{blocking::tests::needs_a_thread, error::Error};
use arrow::{
    array::{
        ArrayRef, Int32Array, Int64Array, LargeBinaryArray, LargeStringArray, RecordBatch,
        StringArray,
    },
    datatypes::DataType,
};
use bytes::Bytes;
use std::sync::Arc;
use superbatch_proto::v1::Reason;

/// `img2dataset` files with one column replaced.
fn with_column(name: &str, array: ArrayRef) -> RecordBatch {
    let old = img2dataset(0..array.len() as u32);
    let schema = old.schema();
    let column = |field: &str, old: &ArrayRef| {
        if field == name {
            array.clone()
        } else {
            old.clone()
        }
    };
    batch(
        schema
            .fields()
            .iter()
            .zip(old.columns())
            .map(|(f, a)| (f.name().as_str(), column(f.name(), a)))
            .collect(),
    )
}

fn failure<T>(result: Result<T, Error>) -> Error {
    result.map(drop).unwrap_err()
}

#[tokio::test]
async fn img2dataset_shards_are_indexed_in_order_of_their_paths() {
    let files = [
        ("00001.parquet", parquet(&img2dataset(10..17), 3)),
        ("00000.parquet", parquet(&img2dataset(0..10), 4)),
        ("_metadata", Bytes::from("none of ours")),
        (".hidden.parquet", Bytes::from("none of ours")),
    ];
    let manifest = indexed(&stores(), &files).await.unwrap();
    let source = &manifest.sources[0];
    assert_eq!(manifest.rows(), 17);
    assert_eq!(
        (
            source.layout.image_column.as_str(),
            source.layout.image_in_struct
        ),
        ("jpg", false)
    );
    assert_eq!(source.layout.caption_column, "caption");
    let paths: Vec<&str> = source
        .shards
        .iter()
        .map(|shard| shard.path.as_str())
        .collect();
    assert_eq!(paths, ["00000.parquet", "00001.parquet"]);
    let blocks: Vec<_> = source
        .blocks()
        .map(|(s, b, block)| (s, b, block.first_row, block.rows))
        .collect();
    assert_eq!(
        blocks,
        [
            (0, 0, 0, 4),
            (0, 1, 4, 4),
            (0, 2, 8, 2),
            (1, 0, 0, 3),
            (1, 1, 3, 3),
            (1, 2, 6, 1)
        ]
    );
    for shard in &source.shards {
        let ends: Vec<_> = shard.blocks.iter().map(|block| block.bytes).collect();
        assert!(
            ends.windows(2).all(|pair| pair[0].1 <= pair[1].0) && ends[0].0 == 4,
            "{ends:?}"
        );
        assert!(ends.last().unwrap().1 < shard.size);
    }
}

#[tokio::test]
async fn hugging_face_files_name_their_image_in_the_metadata() {
    let manifest = indexed(
        &stores(),
        &[("a/train-0.parquet", parquet(&hugging_face(0..5), 5))],
    )
    .await
    .unwrap();
    let layout = &manifest.sources[0].layout;
    assert_eq!(
        (layout.image_column.as_str(), layout.image_in_struct),
        ("photo", true)
    );
    assert_eq!(layout.caption_column, "text");
    let schema = manifest
        .output_schema(&["uid".into(), "thumb".into()])
        .unwrap();
    let names: Vec<&str> = schema
        .fields()
        .iter()
        .map(|field| field.name().as_str())
        .collect();
    assert_eq!(names[..4], ["image", "caption", "uid", "thumb"]);
    assert_eq!(schema.field(2).data_type(), &DataType::Int64);
    assert_eq!(
        schema.field(3).data_type(),
        hugging_face(0..1).column(2).data_type()
    );
    assert_eq!(names[4], "_superbatch_id");
}

#[tokio::test]
async fn what_the_request_names_wins() {
    let stores = stores();
    put(&stores, &[("x.parquet", parquet(&hugging_face(0..2), 2))]).await;
    let mut named = request("memory:///data/x.parquet");
    named.image_column = Some("thumb".into());
    let manifest = index(&stores, None, &[named.clone()]).await.unwrap();
    assert_eq!(manifest.sources[0].layout.image_column, "thumb");

    named.caption_column = Some("uid".into());
    let error = failure(index(&stores, None, &[named.clone()]).await);
    assert_eq!(
        (error.reason(), error.value("column")),
        (Reason::SchemaMismatch, Some("uid"))
    );
    assert!(
        error
            .to_string()
            .contains("is Int64, not a string or a list of strings (classes are targets"),
        "{error}"
    );
    assert!(
        error.to_string().ends_with("; name another"),
        "there are no other shards: {error}"
    );

    named.image_column = Some("nope".into());
    let error = failure(index(&stores, None, &[named]).await);
    assert_eq!(
        (error.reason(), error.value("available")),
        (Reason::ColumnNotFound, Some("uid, photo, thumb, text"))
    );
}

#[tokio::test]
async fn one_data_set_may_be_named_in_three_ways() {
    let stores = stores();
    put(
        &stores,
        &[
            ("8.parquet", parquet(&img2dataset(0..3), 3)),
            ("10.parquet", parquet(&img2dataset(3..5), 3)),
        ],
    )
    .await;
    let mut shards = Vec::new();
    for uri in [
        "memory:///data",
        "memory:///data/{8,10}.parquet",
        "memory:///data/*.parquet",
    ] {
        let manifest = index(&stores, None, &[request(uri)]).await.unwrap();
        assert_eq!(manifest.sources[0].root_uri, "memory:///data");
        shards.push(manifest.sources[0].shards.clone());
    }
    assert!(shards[0] == shards[1] && shards[1] == shards[2] && shards[0].len() == 2);
}

#[tokio::test]
async fn what_is_missing_or_empty_is_told_apart() {
    let stores = stores();
    put(
        &stores,
        &[
            ("d/readme.md", Bytes::from("hi")),
            ("e.parquet", parquet(&img2dataset(0..0), 1)),
        ],
    )
    .await;
    for (uri, reason) in [
        ("memory:///data/none.parquet", Reason::DatasetEmpty),
        ("memory:///nowhere", Reason::DatasetEmpty),
        ("memory:///data/d", Reason::DatasetEmpty),
        ("memory:///data/x*.parquet", Reason::DatasetEmpty),
        ("memory:///data/e.parquet", Reason::DatasetEmpty),
        ("memory:///data/d/readme.md", Reason::InvalidArgument),
    ] {
        let error = failure(index(&stores, None, &[request(uri)]).await);
        assert_eq!(error.reason(), reason, "{uri}: {}", error.chain());
    }
    let error = failure(index(&stores, None, &[request("memory:///data/d/readme.md")]).await);
    assert_eq!(
        error.value("shard"),
        Some("memory:///data/d/readme.md"),
        "the bad file is named"
    );
    let says = |error: Error, text: &str| assert_eq!(error.to_string(), text);
    let folder = failure(index(&stores, None, &[request("memory:///data/d")]).await);
    says(
        folder,
        "no file at memory:///data/d ends in .parquet or .tar; there is 1 other file: readme.md",
    );
    for name in [
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
        "tokenizer.json",
    ] {
        put(
            &stores,
            &[(format!("m/{name}").as_str(), Bytes::from("{}"))],
        )
        .await;
    }
    let model = failure(index(&stores, None, &[request("memory:///data/m/")]).await);
    let names = "config.json, model.safetensors, preprocessor_config.json, …";
    says(
        model,
        &format!(
            "no file at memory:///data/m ends in .parquet or .tar; there are 4 other files: {names}"
        ),
    );
    let pattern = failure(index(&stores, None, &[request("memory:///data/m/x*.parquet")]).await);
    says(
        pattern,
        &format!(
            "nothing at memory:///data/m matches memory:///data/m/x*.parquet; there are 4 other \
            files: {names}"
        ),
    );
}

#[tokio::test]
async fn formats_that_are_not_read_are_named() {
    for (file, are) in [
        ("shard.00000.mds.zstd", "MosaicML's MDS is"),
        ("pool.lance/data/0.lance", "Lance is"),
        ("data-00000-of-00002.arrow", "Arrow files"),
        ("train.tfrecord-00000-of-00010", "TFRecords are"),
    ] {
        let stores = stores();
        put(&stores, &[(file, Bytes::from("x"))]).await;
        let error = failure(index(&stores, None, &[request("memory:///data")]).await);
        let text = error.to_string();
        assert!(text.contains(are), "{text}");
        assert!(
            text.contains("not read: write the rows as Parquet"),
            "{text}"
        );
    }
}

#[tokio::test]
async fn shards_must_agree_on_image_and_caption() {
    let words = Arc::new(StringArray::from_iter_values(["no bytes"]));
    let files = [
        ("0.parquet", parquet(&img2dataset(0..4), 4)),
        ("1.parquet", parquet(&with_column("jpg", words), 4)),
    ];
    let error = failure(indexed(&stores(), &files).await);
    assert_eq!(error.reason(), Reason::SchemaMismatch);
    assert_eq!(error.value("shard"), Some("memory:///data/1.parquet"));
    assert_eq!(
        (error.value("source"), error.value("column")),
        (Some("memory:///data"), Some("jpg"))
    );
    assert!(
        error
            .to_string()
            .ends_with("all shards of a source need the same columns"),
        "{error}"
    );
}

#[tokio::test]
async fn wider_types_of_image_and_caption_are_taken() {
    let images = Arc::new(LargeBinaryArray::from_iter([Some("a"), None]));
    let captions = Arc::new(LargeStringArray::from_iter_values(["x", "y"]));
    let wide = batch(vec![("webp", images), ("caption", captions)]);
    let manifest = indexed(&stores(), &[("0.parquet", parquet(&wide, 9))])
        .await
        .unwrap();
    let schema = manifest.data_schema(&[]).unwrap();
    assert_eq!(
        (schema.field(0).data_type(), schema.field(1).data_type()),
        (&DataType::Binary, &DataType::Utf8)
    );
}

#[tokio::test]
async fn an_extra_column_is_refused_only_where_it_is_asked_for() {
    let words = Arc::new(StringArray::from_iter_values(["7"]));
    let files = [
        ("0.parquet", parquet(&img2dataset(0..4), 4)),
        ("1.parquet", parquet(&with_column("uid", words), 4)),
    ];
    let manifest = indexed(&stores(), &files).await.unwrap();
    assert!(manifest.data_schema(&["url".into()]).is_ok());
    let error = failure(manifest.data_schema(&["uid".into()]));
    assert_eq!(
        (error.reason(), error.value("shard")),
        (Reason::SchemaMismatch, Some("1.parquet"))
    );
    let error = failure(manifest.data_schema(&["nope".into()]));
    assert_eq!(
        (error.reason(), error.value("available")),
        (Reason::ColumnNotFound, Some("caption, jpg, uid, url"))
    );
    for taken in ["caption", "_superbatch_id"] {
        assert_eq!(
            failure(manifest.data_schema(&[taken.into()])).reason(),
            Reason::InvalidArgument
        );
    }
    assert_eq!(
        failure(manifest.data_schema(&["url".into(), "url".into()])).reason(),
        Reason::InvalidArgument
    );
}

#[tokio::test]
async fn sources_must_agree_on_extra_columns() {
    let stores = stores();
    let words = Arc::new(StringArray::from_iter_values(["7"]));
    put(&stores, &[("a/0.parquet", parquet(&img2dataset(0..4), 4))]).await;
    put(
        &stores,
        &[("b/0.parquet", parquet(&with_column("uid", words), 4))],
    )
    .await;
    let sources = [request("memory:///data/a"), request("memory:///data/b")];
    let manifest = index(&stores, None, &sources).await.unwrap();
    let error = failure(manifest.data_schema(&["uid".into()]));
    assert_eq!(
        (error.reason(), error.value("source")),
        (Reason::SchemaMismatch, Some("memory:///data/b"))
    );
}

#[tokio::test]
async fn columns_that_cannot_be_told_are_asked_for() {
    let ids: ArrayRef = Arc::new(Int64Array::from_iter_values([1]));
    let words: ArrayRef = Arc::new(StringArray::from_iter_values(["x"]));
    let image: ArrayRef = Arc::new(LargeBinaryArray::from_iter([Some("a")]));
    let two = batch(vec![
        ("jpg", image),
        ("a", words.clone()),
        ("b", words.clone()),
    ]);
    let error = failure(indexed(&stores(), &[("0.parquet", parquet(&two, 1))]).await);
    assert_eq!(
        (error.reason(), error.value("column")),
        (Reason::ColumnNotFound, Some("caption"))
    );
    assert!(
        error
            .to_string()
            .contains("name it with caption_column (as a flag --caption-column)"),
        "{error}"
    );
    let none = batch(vec![("id", ids), ("caption", words)]);
    let error = failure(indexed(&stores(), &[("0.parquet", parquet(&none, 1))]).await);
    assert_eq!(
        (error.reason(), error.value("column")),
        (Reason::ColumnNotFound, Some("image"))
    );
}

#[tokio::test]
async fn an_error_of_many_columns_names_some() {
    let words: ArrayRef = Arc::new(StringArray::from_iter_values(["x"]));
    let image: ArrayRef = Arc::new(LargeBinaryArray::from_iter([Some("a")]));
    let names: Vec<String> = (0..249).map(|n| format!("{n:0>200}")).collect();
    let texts = names.iter().map(|name| (name.as_str(), words.clone()));
    let wide = batch([("jpg", image)].into_iter().chain(texts).collect());
    let error = failure(indexed(&stores(), &[("0.parquet", parquet(&wide, 1))]).await);
    assert_eq!(error.reason(), Reason::ColumnNotFound);
    let message = error.to_string();
    assert!(message.len() < 8_000, "{} bytes", message.len());
    assert!(message.contains("… and 225 more)"), "the texts: {message}");
    assert!(
        message.ends_with("… and 226 more"),
        "all columns: {message}"
    );
}

#[tokio::test]
async fn a_manifest_survives_its_storage() {
    let stores = stores();
    let manifest = indexed(&stores, &[("0.parquet", parquet(&hugging_face(0..3), 2))])
        .await
        .map(Arc::new)
        .unwrap();
    let state = stores.open("memory:///state").unwrap();
    let digest = manifest.save(&state).await.unwrap();
    assert_eq!(Manifest::load(&state, &digest).await.unwrap(), *manifest);
}

#[test]
fn a_manifest_is_encoded_off_the_threads_of_calls() {
    let manifest = Arc::new(Manifest {
        version: Manifest::VERSION,
        sources: Vec::new(),
    });
    let state = stores().open("memory:///state").unwrap();
    let digest = needs_a_thread(manifest.save(&state)).unwrap();
    let loaded = needs_a_thread(Manifest::load(&state, &digest)).unwrap();
    assert_eq!(loaded, *manifest);
}

#[test]
fn a_content_hash_is_that_of_length_image_and_caption_in_a_row() {
    let bytes: Vec<u8> = (0..=250).cycle().take(200_000).collect();
    // Around the bytes that are hashed first, chunks of 1 KiB, and eight of them.
    let around = [
        0, 1_016, 1_024, 8_192, 16_376, 16_384, 24_576, 60_000, 199_990,
    ];
    for length in around.into_iter().flat_map(|middle| middle..middle + 10) {
        let image = &bytes[..length];
        let whole = [
            &(length as u64).to_le_bytes()[..],
            image,
            "a cáption".as_bytes(),
        ]
        .concat();
        let expected = blake3::hash(&whole);
        let found = content_hash(image, "a cáption");
        assert_eq!(found, expected.as_bytes()[..16], "{length}");
    }
}

#[test]
fn a_content_hash_tells_image_from_caption() {
    assert_ne!(content_hash(b"ab", "c"), content_hash(b"a", "bc"));
    let mut plain = 2u64.to_le_bytes().to_vec();
    plain.extend(b"abc");
    assert_eq!(
        content_hash(b"ab", "c"),
        blake3::hash(&plain).as_bytes()[..16]
    );
}

#[tokio::test]
async fn shards_that_write_a_column_differently_are_cast_to_what_holds_all() {
    let narrow = Arc::new(Int32Array::from_iter_values([7]));
    let nulls = Arc::new(arrow::array::NullArray::new(1));
    let large = Arc::new(LargeStringArray::from_iter_values(["https://x"]));
    let files = [
        ("0.parquet", parquet(&img2dataset(0..1), 4)),
        ("1.parquet", parquet(&with_column("uid", narrow), 4)),
        ("2.parquet", parquet(&with_column("caption", nulls), 4)),
        ("3.parquet", parquet(&with_column("url", large), 4)),
    ];
    let manifest = indexed(&stores(), &files).await.unwrap();
    let schema = manifest.data_schema(&["uid".into(), "url".into()]).unwrap();
    assert_eq!(schema.field(2).data_type(), &DataType::Int64);
    assert_eq!(schema.field(3).data_type(), &DataType::LargeUtf8);
}

#[tokio::test]
async fn a_column_that_is_named_as_the_layouts_name_it_decides() {
    use arrow::array::{BinaryArray, DictionaryArray, ListArray};
    let list: ArrayRef = Arc::new(ListArray::from_iter_primitive::<
        arrow::datatypes::Int64Type,
        _,
        _,
    >([Some([Some(1)])]));
    let texts = several(&[Some(&[Some("a"), None])]);
    let text: ArrayRef = Arc::new(StringArray::from_iter_values(["a"]));
    let bytes: ArrayRef = Arc::new(BinaryArray::from_iter([Some("i")]));
    let category: DictionaryArray<arrow::datatypes::Int32Type> = ["a"].into_iter().collect();
    let category: ArrayRef = Arc::new(category);
    let photo = hugging_face(0..1).column(1).clone();
    for (columns, expected) in [
        (
            vec![("jpg", &bytes), ("caption", &list), ("filename", &text)],
            Err("is List(Int64), not a string or a list of strings"),
        ),
        (
            vec![("jpg", &bytes), ("captions", &texts), ("filename", &text)],
            Ok("jpg, captions"),
        ),
        (
            vec![("jpg", &bytes), ("alt", &texts)],
            Err("('alt' is List(Utf8))"),
        ),
        (
            vec![("image", &photo), ("file_name", &text)],
            Err("('file_name' is Utf8)"),
        ),
        (
            vec![("jpg", &bytes), ("image", &bytes), ("text", &text)],
            Err("which column"),
        ),
        (
            vec![("image", &text), ("text", &text)],
            Err("name the folder that they begin in with image_root"),
        ),
        (
            vec![("jpg", &bytes), ("caption", &bytes)],
            Err("--caption-column"),
        ),
        (
            vec![("jpg", &bytes), ("caption", &text), ("caption", &text)],
            Err("rename them"),
        ),
        (
            vec![("png", &bytes), ("image", &photo), ("text", &text)],
            Ok("image, text"),
        ),
        (
            vec![("jpg", &bytes), ("caption", &category)],
            Ok("jpg, caption"),
        ),
        (
            vec![("jpg", &bytes), ("url", &text), ("text", &text)],
            Ok("jpg, text"),
        ),
    ] {
        let columns = columns
            .into_iter()
            .map(|(name, array)| (name, array.clone()))
            .collect();
        let batch = batch(columns);
        let found = indexed(&stores(), &[("0.parquet", parquet(&batch, 1))]).await;
        let found = found.map(|manifest| {
            let Layout {
                image_column,
                caption_column,
                ..
            } = &manifest.sources[0].layout;
            format!("{image_column}, {caption_column}")
        });
        match (found, expected) {
            (Ok(found), Ok(expected)) => assert_eq!(found, expected),
            (Err(error), Err(says)) => assert!(error.to_string().contains(says), "{says}: {error}"),
            (found, expected) => panic!("{expected:?}: {found:?}"),
        }
    }
}

#[test]
fn an_older_build_cannot_read_a_layout_with_lists_of_captions() {
    #[derive(serde::Deserialize)]
    struct Older {
        caption_column: String,
    }
    let one = Layout {
        image_column: "jpg".into(),
        caption_column: "caption".into(),
        ..Layout::default()
    };
    let json = serde_json::to_string(&one).unwrap();
    let as_ever = r#"{"image_column":"jpg","image_in_struct":false,"caption_column":"caption"}"#;
    assert_eq!(json, as_ever, "names of manifests depend on it");
    let older: Older = serde_json::from_str(&json).unwrap();
    assert_eq!(older.caption_column, one.caption_column);
    let drawn = Layout {
        caption_seed: Some(7),
        ..one
    };
    let json = serde_json::to_string(&drawn).unwrap();
    assert!(serde_json::from_str::<Older>(&json).is_err());
    assert_eq!(serde_json::from_str::<Layout>(&json).unwrap(), drawn);
}

#[tokio::test]
async fn lists_of_captions_give_the_layout_a_seed() {
    let texts = several(&[Some(&[Some("a"), Some("b")])]);
    let with = |column: ArrayRef| {
        let image: ArrayRef = Arc::new(arrow::array::BinaryArray::from_iter([Some("i")]));
        parquet(&batch(vec![("jpg", image), ("caption", column)]), 1)
    };
    let (lists, one) = (
        with(texts),
        with(Arc::new(StringArray::from_iter_values(["a"]))),
    );
    let asked = |caption_seed| SourceRequest {
        caption_seed,
        ..request("memory:///data")
    };
    let stores = stores();
    let files = [("0.parquet", lists.clone()), ("1.parquet", one.clone())];
    put(&stores, &files).await;
    let mut digests = Vec::new();
    for (given, expected) in [(None, 0), (Some(0), 0), (Some(7), 7)] {
        let manifest = index(&stores, None, &[asked(given)]).await.unwrap();
        assert_eq!(manifest.sources[0].layout.caption_seed, Some(expected));
        digests.push(manifest.sources[0].rows_digest());
    }
    assert!(digests[0] == digests[1] && digests[1] != digests[2]);
    // A first shard without lists gives none: the second is refused, unless the run names one.
    put(&stores, &[("0.parquet", one), ("1.parquet", lists)]).await;
    let error = index(&stores, None, &[asked(None)]).await.unwrap_err();
    assert_eq!(error.reason(), Reason::SchemaMismatch);
    assert_eq!(error.value("shard"), Some("memory:///data/1.parquet"));
    assert!(error.to_string().contains("with caption_seed"), "{error}");
    assert!(index(&stores, None, &[asked(Some(1))]).await.is_ok());
}

#[tokio::test]
async fn an_encrypted_file_is_told_as_such() {
    let files = [(
        "0.parquet",
        Bytes::from_static(b"PARE encrypted \x08\0\0\0PARE"),
    )];
    let error = failure(indexed(&stores(), &files).await);
    assert!(error.to_string().contains("encrypted"), "{error}");
}

#[tokio::test]
async fn rows_without_an_image_are_counted_from_the_statistics() {
    let files = [("0.parquet", parquet(&img2dataset(0..10), 4))];
    let manifest = indexed(&stores(), &files).await.unwrap();
    assert_eq!(manifest.sources[0].shards[0].without_image, 2);
    assert_eq!(manifest.rows(), 10, "they are candidates");
}

#[tokio::test]
async fn sources_are_found_however_they_are_named() {
    let stores = stores();
    let file = |row| parquet(&img2dataset(row..row + 1), 1);
    let files = [
        ("a/0 ~#%[x].parquet", file(0)),
        ("a/sub/lang=zh%3AHans/1.parquet", file(1)),
        ("b/pool.parquet/_SUCCESS", Bytes::new()),
        ("b/pool.parquet/part-0.parquet", file(2)),
        ("b/_split=0/3.parquet", file(3)),
        ("state/runs/4.parquet", file(4)),
        (
            "list.txt",
            Bytes::from("a/0%20~%23%25%5Bx%5D.parquet\n\nmemory:///data/b/_*/?.parquet\n"),
        ),
    ];
    put(&stores, &files).await;
    let state = stores.open("memory:///data/state").unwrap();
    for (uri, expected) in [
        (
            "memory:///data/a",
            "a: 0 ~#%[x].parquet sub/lang=zh%3AHans/1.parquet",
        ),
        (
            "memory:///data/a/0%20~%23%25%5Bx%5D.parquet",
            "a: 0 ~#%[x].parquet",
        ),
        (
            "memory:///data/**/lang=*/*.parquet",
            ": a/sub/lang=zh%3AHans/1.parquet",
        ),
        (
            "memory:///data/b/pool.parquet",
            "b: pool.parquet/part-0.parquet",
        ),
        (
            "memory:///data/b",
            "b: _split=0/3.parquet pool.parquet/part-0.parquet",
        ),
        (
            "memory:///data/a/sub::memory:///data/b/pool.parquet",
            ": a/sub/lang=zh%3AHans/1.parquet \
          b/pool.parquet/part-0.parquet",
        ),
        (
            "memory:///data/list.txt",
            ": a/0 ~#%[x].parquet b/_split=0/3.parquet",
        ),
        (
            "memory:///data",
            ": a/0 ~#%[x].parquet a/sub/lang=zh%3AHans/1.parquet \
          b/_split=0/3.parquet b/pool.parquet/part-0.parquet",
        ),
    ] {
        let manifest = index(&stores, Some(&state), &[request(uri)]).await;
        let manifest = manifest.unwrap_or_else(|e| panic!("{uri}: {}", e.chain()));
        let source = &manifest.sources[0];
        let paths: Vec<_> = source
            .shards
            .iter()
            .map(|shard| shard.path.as_str())
            .collect();
        let root = source
            .root_uri
            .strip_prefix("memory:///data")
            .unwrap()
            .trim_matches('/');
        assert_eq!(format!("{root}: {}", paths.join(" ")), expected, "{uri}");
    }
    let config = crate::storage::StorageConfig {
        allow_uris: vec!["memory:///data".into()],
        ..Default::default()
    };
    let strict = crate::storage::Stores::new(config);
    let root = strict.open("memory:///data").unwrap();
    root.put("far.txt", Bytes::from("file:///etc"))
        .await
        .unwrap();
    let error = failure(index(&strict, None, &[request("memory:///data/far.txt")]).await);
    assert_eq!(error.reason(), Reason::UriNotAllowed);
}

#[tokio::test]
async fn rows_are_named_alike_whatever_a_run_weighs_them_by() {
    let stores = stores();
    put(&stores, &[("0.parquet", parquet(&img2dataset(0..10), 4))]).await;
    let digest = async |change: fn(&mut SourceRequest)| {
        let mut asked = request("memory:///data");
        change(&mut asked);
        let manifest = index(&stores, None, &[asked]).await.unwrap();
        (manifest.digest(), manifest.sources[0].rows_digest())
    };
    let (manifest, rows) = digest(|_| {}).await;
    let (weighted, same) = digest(|asked| asked.weight = 3.0).await;
    assert!(weighted != manifest && same == rows);
    let others = [
        digest(|asked| asked.predicate = Some("uid > 6".into()))
            .await
            .1,
        digest(|asked| asked.caption_column = Some("url".into()))
            .await
            .1,
    ];
    assert!(others.iter().all(|other| *other != rows) && others[0] != others[1]);
}

/// Where values repeat, a few bytes are any number of rows, each of which takes memory.
#[tokio::test]
async fn more_rows_than_a_files_bytes_can_hold_are_refused() {
    let stores = stores();
    let rows: ArrayRef = Arc::new(Int64Array::from(vec![7; 3 << 20]));
    let bytes = parquet(&batch(vec![("jpg", rows)]), 1 << 20);
    assert!(bytes.len() < 64 << 10, "{} bytes", bytes.len());
    let error = failure(indexed(&stores, &[("0.parquet", bytes)]).await);
    assert_eq!(error.value("shard"), Some("memory:///data/0.parquet"));
    assert!(error.to_string().contains("3145728 rows"), "{error}");
}
