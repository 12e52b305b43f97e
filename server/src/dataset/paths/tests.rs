use super::*;
use crate::{
    dataset::{
        Manifest, Mask, SourceRequest,
        fixtures::{
            batch, by_path, hugging_face_paths, img2dataset, parquet, put, request, stores,
        },
        index,
    },
    storage::hub_tests::{COMMITS, Servers},
};
use arrow::array::{ArrayRef, BinaryArray, StringArray};
use bytes::Bytes;
use proptest::prelude::*;
use std::sync::{Arc, atomic::Ordering};
use superbatch_proto::v1::Reason;

#[test]
fn a_path_leads_to_a_key_below_the_root_or_nowhere() {
    for (path, expected) in [
        ("a.jpg", Ok("a.jpg")),
        ("a/b c/ü%2f~#.jpg", Ok("a/b c/ü%2f~#.jpg")),
        ("./a/./b.jpg", Ok("a/b.jpg")),
        ("..a/b../...jpg", Ok("..a/b../...jpg")),
        ("12:30/a:b.jpg", Ok("12:30/a:b.jpg")),
        ("%2e%2e/a.jpg", Ok("%2e%2e/a.jpg")),
        ("", Err("is empty")),
        (".", Err("names no file")),
        ("./.", Err("names no file")),
        ("..", Err("leads out")),
        ("a/../b.jpg", Err("leads out")),
        ("/a.jpg", Err("absolute")),
        ("//host/a.jpg", Err("absolute")),
        ("C:/a.jpg", Err("absolute")),
        ("c:\\a.jpg", Err("absolute")),
        ("a\\..\\b.jpg", Err("backslash")),
        ("a//b.jpg", Err("an empty part")),
        ("a/", Err("an empty part")),
        ("a\0.jpg", Err("a sign of control")),
        ("a\n.jpg", Err("a sign of control")),
        ("https://x.org/a.jpg", Err("a URL")),
        ("S3://bucket/a.jpg", Err("a URL")),
        ("file:/etc/passwd", Err("a URL")),
        ("data:image/png;base64,iVBOR", Err("a URL")),
    ] {
        match (image_key(path), expected) {
            (Ok(key), Ok(expected)) => assert_eq!(key, expected, "{path:?}"),
            (Err(why), Err(says)) => assert!(why.contains(says), "{path:?}: {why}"),
            (found, _) => panic!("{path:?}: {found:?}"),
        }
    }
    let long = "x".repeat(PATH_BYTES_MAX + 1);
    let why = image_key(&long).unwrap_err();
    assert!(why.ends_with("… is longer than 1,024 bytes"), "{why}");
    assert!(why.len() < 300, "{why}");
}

proptest! {
    #[test]
    fn whatever_a_path_is_its_object_lies_below_the_root(path in r"[./\\%:a-c2eE\x00~-]{0,12}") {
        let root = stores().open("memory:///images/of").unwrap();
        if let Ok(key) = image_key(&path) {
            let at = root.path(&key);
            let below: Vec<_> = at.prefix_match(&root.path("")).unwrap().collect();
            prop_assert!(!below.is_empty());
            let names: Vec<&str> = key.split('/').collect();
            prop_assert!(names.iter().all(|name| !["", ".", ".."].contains(name)), "{:?}", key);
        }
    }

    #[test]
    fn blocks_that_are_cut_have_the_rows_of_the_whole(
        rows in 0_u32..3_000,
        kept in prop::collection::vec(any::<bool>(), 3_000),
        is_masked in any::<bool>(),
    ) {
        let mut whole = Block { rows, first_row: 7, bytes: (4, 9), mask: None };
        if is_masked {
            whole.keep(&kept[..rows as usize]);
        }
        let of = |block: &Block| -> Vec<u64> {
            (0..block.rows).map(|row| block.row_in_shard(row)).collect()
        };
        let expected = of(&whole);
        let cut = cut(vec![whole]);
        let found: Vec<u64> = cut.iter().flat_map(of).collect();
        prop_assert_eq!(found, expected);
        for block in &cut {
            prop_assert!(block.stored_rows() <= BLOCK_ROWS_MAX);
            prop_assert!(block.mask.as_ref().is_none_or(|mask| mask.count() == block.rows));
            for row in 0..block.rows {
                prop_assert_eq!(block.row_of(block.row_in_shard(row)), Some(row));
            }
        }
        let starts: Vec<u64> = cut.iter().map(|block| block.first_row).collect();
        prop_assert!(starts.is_sorted());
    }
}

fn asked(image_root: Option<&str>, image_column: Option<&str>) -> SourceRequest {
    SourceRequest {
        image_root: image_root.map(str::to_owned),
        image_column: image_column.map(str::to_owned),
        ..request("memory:///data/rows")
    }
}

/// Indexes a file beside the images `a.jpg` and `b.jpg`.
async fn indexed(file: Bytes, request: SourceRequest) -> Result<Manifest> {
    let stores = stores();
    let image = || Bytes::from("an image");
    let files = [
        ("rows/0.parquet", file),
        ("images/a.jpg", image()),
        ("images/b.jpg", image()),
    ];
    put(&stores, &files).await;
    index(&stores, None, &[request]).await
}

const ROOT: Option<&str> = Some("memory:///data/images/");

#[tokio::test]
async fn paths_are_images_only_with_a_root() {
    let paths: ArrayRef = Arc::new(StringArray::from_iter_values(["a.jpg"]));
    let bytes: ArrayRef = Arc::new(BinaryArray::from_iter([Some("i")]));
    let text: ArrayRef = Arc::new(StringArray::from_iter_values(["a"]));
    let struct_of_paths = hugging_face_paths(&[(None, Some("a.jpg"))])
        .column(0)
        .clone();
    let one = |columns: &[(&str, &ArrayRef)]| {
        let columns = columns
            .iter()
            .map(|(name, array)| (*name, (*array).clone()));
        parquet(&batch(columns.collect()), 9)
    };
    let named = |columns: &[(&str, &ArrayRef)]| {
        let columns: Vec<_> = columns
            .iter()
            .copied()
            .chain([("caption", &text)])
            .collect();
        one(&columns)
    };
    for (columns, column, expected) in [
        (vec![("image", &paths)], None, Ok("image")),
        (vec![("file_name", &paths)], None, Ok("file_name")),
        (vec![("photo", &paths)], Some("photo"), Ok("photo")),
        (
            vec![("jpg", &bytes), ("filepath", &paths)],
            None,
            Ok("filepath"),
        ),
        (vec![("image", &struct_of_paths)], None, Ok("image")),
        (vec![("picture", &struct_of_paths)], None, Ok("picture")),
        (
            vec![("image", &paths), ("file_name", &paths)],
            None,
            Err("cannot tell which"),
        ),
        (vec![("photo", &paths)], None, Err("cannot tell which")),
        (
            vec![("jpg", &bytes)],
            Some("jpg"),
            Err("is Binary, not a text with paths"),
        ),
    ] {
        let found = indexed(named(&columns), asked(ROOT, column)).await;
        match (found, expected) {
            (Ok(manifest), Ok(expected)) => {
                let layout = &manifest.sources[0].layout;
                assert_eq!(layout.image_column, expected);
                assert_eq!(layout.image_root.as_deref(), Some("memory:///data/images"));
            }
            (Err(error), Err(says)) => assert!(error.to_string().contains(says), "{error}"),
            (found, _) => panic!(
                "{columns:?}: {:?}",
                found.map(|m| m.sources[0].layout.clone())
            ),
        }
    }
    for columns in [
        vec![("image", &paths)],
        vec![("file_name", &paths)],
        vec![("image", &struct_of_paths)],
    ] {
        let error = indexed(named(&columns), asked(None, None))
            .await
            .unwrap_err();
        assert_eq!(error.reason(), Reason::SchemaMismatch);
        let message = error.to_string();
        assert!(message.contains("--image-root"), "{message}");
        assert!(message.contains("paths"), "{message}");
    }
}

#[tokio::test]
async fn urls_are_refused_with_what_to_do() {
    let urls = by_path(&["https://x.org/a.jpg", "http://y.org/b.jpg"]);
    for root in [None, ROOT] {
        let file = parquet(&urls, 9);
        let error = indexed(file, asked(root, Some("file_name")))
            .await
            .unwrap_err();
        assert_eq!(error.reason(), Reason::SchemaMismatch, "{error}");
        assert!(error.to_string().contains("img2dataset"), "{error}");
    }
}

#[tokio::test]
async fn a_root_that_no_image_lies_below_is_told_at_once() {
    let rows = || parquet(&by_path(&["a.jpg", "gone.jpg", "../b.jpg"]), 9);
    assert!(indexed(rows(), asked(ROOT, None)).await.is_ok());
    for (root, says) in [
        ("memory:///data", "there is no \"a.jpg\" in memory:///data"),
        ("memory:///data/images/a.jpg", "none of 3 images"),
        ("images", "or for data https://host/path or hf://datasets"),
    ] {
        let error = indexed(rows(), asked(Some(root), None)).await.unwrap_err();
        assert!(error.to_string().contains(says), "{root}: {error}");
        assert!(error.to_string().contains("image_root"), "{root}: {error}");
    }
    let absolute = parquet(&by_path(&["/data/a.jpg", "/data/b.jpg"]), 9);
    let error = indexed(absolute, asked(ROOT, None)).await.unwrap_err();
    assert_eq!(error.reason(), Reason::DatasetEmpty);
    assert!(
        error.to_string().contains("\"/data/a.jpg\" is absolute"),
        "{error}"
    );
}

/// What a footer says of a group's rows need not be what its columns hold.
#[tokio::test]
async fn a_column_of_fewer_paths_than_its_group_has_rows_is_not_looked_into() {
    use parquet::file::metadata::{ParquetMetaDataReader, ParquetMetaDataWriter};
    let file = parquet(&by_path(&["a.jpg", "b.jpg"]), 9);
    let metadata = ParquetMetaDataReader::new().parse_and_finish(&file);
    let metadata = metadata.unwrap();
    let groups = metadata.row_groups().iter().cloned();
    let groups = groups.map(|group| group.into_builder().set_num_rows(5).build().unwrap());
    let groups: Vec<RowGroupMetaData> = groups.collect();
    let metadata = metadata.clone().into_builder();
    let metadata = metadata.set_row_groups(groups).build();
    let tail = file.len() - 8;
    let footer = u32::from_le_bytes(file[tail..tail + 4].try_into().unwrap());
    let mut claiming = file[..tail - footer as usize].to_vec();
    let written = ParquetMetaDataWriter::new(&mut claiming, &metadata).finish();
    written.unwrap();
    let manifest = indexed(claiming.into(), asked(ROOT, None)).await.unwrap();
    assert_eq!(manifest.sources[0].shards[0].blocks[0].rows, 5);
}

#[tokio::test]
async fn a_root_on_the_hub_is_held_at_its_commit() {
    let servers = Servers::start().await;
    let stores = servers.stores(&[], "");
    let file = parquet(&by_path(&["large", "deep/small"]), 9);
    put(&stores, &[("rows/0.parquet", file)]).await;
    for (moved, root) in [
        (0, "hf://datasets/o/n/data/"),
        (1, "hf://datasets/o/n@main/data"),
    ] {
        servers.hub.moved.store(moved, Ordering::Relaxed);
        let sources = [asked(Some(root), None)];
        let manifest = index(&stores, None, &sources).await.unwrap();
        let held = format!("hf://datasets/o/n@{}/data", COMMITS[moved]);
        assert_eq!(manifest.sources[0].layout.image_root, Some(held));
    }
    // Below it a row's path would name the data set, and any revision of it.
    let sources = [asked(Some("hf://datasets/o"), None)];
    let error = index(&stores, None, &sources).await.unwrap_err();
    assert_eq!(error.reason(), Reason::InvalidArgument);
    assert!(error.to_string().contains("names no data set"), "{error}");
    assert!(error.to_string().contains("image_root"), "{error}");
}

#[tokio::test]
async fn row_groups_are_cut_into_blocks_and_keep_their_rows() {
    let paths: Vec<String> = (0..2_500).map(|_| "a.jpg".to_owned()).collect();
    let paths: Vec<&str> = paths.iter().map(String::as_str).collect();
    let file = parquet(&by_path(&paths), 2_100);
    let manifest = indexed(file.clone(), asked(ROOT, None)).await.unwrap();
    let blocks = |manifest: &Manifest| -> Vec<(u64, u32)> {
        let blocks = manifest.sources[0].blocks();
        blocks
            .map(|(_, _, block)| (block.first_row, block.rows))
            .collect()
    };
    let expected = [(0, 1024), (1024, 1024), (2048, 52), (2100, 400)];
    assert_eq!(blocks(&manifest), expected);
    // With rows that a predicate leaves out: whole pieces, and parts of one.
    let some = SourceRequest {
        predicate: Some("n >= 2000".into()),
        ..asked(ROOT, None)
    };
    let kept = indexed(file, some).await.unwrap();
    assert_eq!(blocks(&kept), [(0, 0), (1024, 48), (2048, 52), (2100, 400)]);
    assert_eq!(kept.sources[0].shards[0].outside, 2_000);
    let masked = &kept.sources[0].shards[0].blocks[1];
    assert_eq!(masked.row_in_shard(0), 2_000);
    assert_eq!(masked.mask.as_ref().map(Mask::stored), Some(1_024));
    let names = [
        manifest.sources[0].rows_digest(),
        kept.sources[0].rows_digest(),
    ];
    assert_ne!(names[0], names[1]);
}

#[tokio::test]
async fn images_in_the_file_are_not_cut_and_need_no_root() {
    let stores = stores();
    let file = parquet(&img2dataset(0..1_500), 1_400);
    put(&stores, &[("0.parquet", file)]).await;
    let manifest = index(&stores, None, &[request("memory:///data")]).await;
    let manifest = manifest.unwrap();
    let rows: Vec<u32> = manifest.sources[0]
        .blocks()
        .map(|(_, _, b)| b.rows)
        .collect();
    assert_eq!(rows, [1_400, 100]);
}

#[tokio::test]
async fn rows_that_have_neither_bytes_nor_path_are_counted() {
    let rows = [
        (Some("bytes"), Some("gone.jpg")),
        (None, Some("a.jpg")),
        (Some("bytes"), None),
        (None, None),
    ];
    let file = || parquet(&hugging_face_paths(&rows), 9);
    let manifest = indexed(file(), asked(ROOT, None)).await.unwrap();
    let layout = &manifest.sources[0].layout;
    assert!(layout.image_in_struct && layout.image_root.is_some());
    assert_eq!(manifest.sources[0].shards[0].without_image, 0, "at least");
    // Without a root the bytes are the images, as ever.
    let manifest = indexed(file(), asked(None, None)).await.unwrap();
    assert_eq!(manifest.sources[0].layout.image_root, None);
    assert_eq!(manifest.sources[0].shards[0].without_image, 2);
}

#[test]
fn an_older_build_cannot_read_a_layout_with_a_root() {
    #[derive(serde::Deserialize)]
    struct Older {
        image_column: String,
    }
    let layout = |image_root| Layout {
        image_column: "file_name".into(),
        image_root,
        caption_column: "caption".into(),
        ..Layout::default()
    };
    let stored = serde_json::to_string(&layout(None)).unwrap();
    let older: Older = serde_json::from_str(&stored).unwrap();
    assert_eq!(older.image_column, "file_name");
    let beside = layout(Some("s3://bucket/images".into()));
    let json = serde_json::to_string(&beside).unwrap();
    assert!(serde_json::from_str::<Older>(&json).is_err());
    assert_eq!(serde_json::from_str::<Layout>(&json).unwrap(), beside);
}
