//! Images that lie beside the rows' file.
use super::{super::*, captions, counted};
use crate::{
    dataset::{SourceRequest, fixtures::*, index},
    storage::hub_tests::{COMMITS, LARGE, Servers},
    worker::inputs::{images, row::Row},
};
use arrow::array::{Array, AsArray};
use bytes::Bytes;
use std::sync::atomic::Ordering;
use superbatch_proto::v1::{
    BadRowReason::{self, ImageMissing, ImageNull, ImagePathInvalid, ImageTooLarge},
    Reason,
};

/// Indexes a file of rows beside some images, below `memory:///data/images`.
async fn indexed_beside(stores: &Stores, file: Bytes, images: &[(&str, &str)]) -> Manifest {
    put(stores, &[("rows/0.parquet", file)]).await;
    for (path, image) in images {
        let at = format!("images/{path}");
        put(stores, &[(at.as_str(), Bytes::from((*image).to_owned()))]).await;
    }
    let asked = SourceRequest {
        image_root: Some("memory:///data/images".into()),
        ..request("memory:///data/rows")
    };
    index(stores, None, &[asked]).await.unwrap()
}

/// A row's image, or the reason and what is said.
type Found = Result<String, (BadRowReason, String)>;

fn found(pieces: &[WithImages]) -> Vec<Found> {
    let rows = pieces.iter().flat_map(|piece| {
        piece.rows.iter().map(|(row, _)| {
            let row = Row {
                batch: piece.batch.clone(),
                row: *row as usize,
            };
            match row.image() {
                Some(image) => Ok(String::from_utf8(image.to_vec()).unwrap()),
                None => {
                    let fault = row.image_fault();
                    Err((fault.reason, fault.detail))
                }
            }
        })
    });
    rows.collect()
}

#[tokio::test]
async fn only_the_images_of_the_wanted_rows_are_read() {
    let (stores, counts) = counted();
    let paths: Vec<String> = (0..3_000)
        .map(|row| format!("{}/{row}.jpg", row % 7))
        .collect();
    let names: Vec<&str> = paths.iter().map(String::as_str).collect();
    let images = paths.iter().map(|path| (path.as_str(), path.as_str()));
    let images: Vec<_> = images.collect();
    // One row group, as pandas writes it.
    let manifest = indexed_beside(&stores, parquet(&by_path(&names), 3_000), &images).await;
    let reader = BlockReader::new(stores, 1 << 20);
    let gets = || counts[0].load(Ordering::Relaxed);
    let before = gets();
    let block = reader
        .read(&manifest, 0, 0, 1, &["n".to_owned()])
        .await
        .unwrap();
    assert_eq!(block.batch.num_rows(), 1_024);
    assert_eq!(gets() - before, 2, "the footer and the columns");
    assert!(block.has_images_beside() && block.batch.column(0).null_count() == 1_024);
    assert_eq!(captions(&block.batch)[9], Some("caption 1033"));
    let pieces = reader.with_images(&block, &[1_000, 3, 4]).await.unwrap();
    assert_eq!(gets() - before, 5, "three images");
    let wanted: [Found; 3] = [2_024, 1_027, 1_028].map(|row| Ok(paths[row].clone()));
    assert_eq!(found(&pieces), wanted);
    // The other columns are shared, and so is the block with the next call.
    assert!(Arc::ptr_eq(
        pieces[0].batch.column(1),
        block.batch.column(1)
    ));
    let again = reader.read(&manifest, 0, 0, 1, &["n".to_owned()]).await;
    assert!(Arc::ptr_eq(&again.unwrap().batch, &block.batch));
    let last = reader.read(&manifest, 0, 0, 2, &[]).await.unwrap();
    assert_eq!(last.batch.num_rows(), 952);
    let end = reader.with_images(&last, &[951]).await.unwrap();
    let expected: [Found; 1] = [Ok(paths[2_999].clone())];
    assert_eq!(found(&end), expected);
}

#[tokio::test]
async fn a_row_without_its_image_says_why() {
    let stores = stores();
    let bad = [
        "gone.jpg",
        "../rows/0.parquet",
        "https://x.org/a.jpg",
        "/a.jpg",
        "a\\b",
        "deep",
    ];
    let names: Vec<&str> = ["a.jpg"]
        .into_iter()
        .chain(bad)
        .chain(["large.jpg"])
        .collect();
    let images = [
        ("a.jpg", "image a"),
        ("large.jpg", "twelve bytes"),
        ("deep/b.jpg", "b"),
    ];
    let manifest = indexed_beside(&stores, parquet(&by_path(&names), 9), &images).await;
    let reader = BlockReader::new(stores, 0).reading_images(11, 3);
    let block = reader.read(&manifest, 0, 0, 0, &[]).await.unwrap();
    let rows: Vec<u32> = (0..8).rev().collect();
    let pieces = reader.with_images(&block, &rows).await.unwrap();
    let mut found = found(&pieces);
    found.reverse();
    let expected = [
        (ImageMissing, "\"gone.jpg\" in memory:///data/images"),
        (
            ImagePathInvalid,
            "\"../rows/0.parquet\" leads out of image_root",
        ),
        (ImagePathInvalid, "is a URL"),
        (ImagePathInvalid, "\"/a.jpg\" is absolute"),
        (ImagePathInvalid, "backslash"),
        (ImageMissing, "\"deep\""),
        (ImageTooLarge, "\"large.jpg\" has 12 bytes, the limit is 11"),
    ];
    assert_eq!(found[0], Ok("image a".to_owned()));
    for (found, (reason, says)) in found[1..].iter().zip(expected) {
        let (at, detail) = found.as_ref().unwrap_err();
        assert!(*at == reason && detail.contains(says), "{says}: {found:?}");
    }
}

#[tokio::test]
async fn more_images_than_are_held_together_are_refused_with_what_to_do() {
    let stores = stores();
    let images = ["a.jpg", "b.jpg", "c.jpg"].map(|path| (path, "ten bytes!"));
    let rows = by_path(&images.map(|(path, _)| path));
    let manifest = indexed_beside(&stores, parquet(&rows, 9), &images).await;
    let mut reader = BlockReader::new(stores, 0);
    reader.images.together_bytes_max = 25;
    let block = reader.read(&manifest, 0, 0, 0, &[]).await.unwrap();
    let pieces = reader.with_images(&block, &[0, 2]).await.unwrap();
    assert_eq!(found(&pieces).len(), 2);
    let error = reader.with_images(&block, &[0, 1, 2]).await.unwrap_err();
    assert_eq!(error.reason(), Reason::InvalidArgument);
    assert_eq!(error.value("uri"), Some("memory:///data/images"));
    assert!(error.to_string().contains("micro_batch_rows"), "{error}");
}

/// Neither a branch that moves nor a commit that is lost makes a hole.
#[tokio::test]
async fn images_on_the_hub_are_those_of_the_commit_that_was_indexed() {
    let servers = Servers::start().await;
    let stores = servers.stores(&[], "");
    let file = parquet(&by_path(&["large", "deep/small", "none"]), 9);
    put(&stores, &[("rows/0.parquet", file)]).await;
    let asked = SourceRequest {
        image_root: Some("hf://datasets/o/n/data".into()),
        ..request("memory:///data/rows")
    };
    let manifest = index(&stores, None, &[asked]).await.unwrap();
    servers.hub.moved.store(1, Ordering::Relaxed);
    let reader = BlockReader::new(stores, 0);
    let block = reader.read(&manifest, 0, 0, 0, &[]).await.unwrap();
    let pieces = reader.with_images(&block, &[0, 1, 2]).await.unwrap();
    let found = found(&pieces);
    assert_eq!(found[..2], [Ok(LARGE.to_owned()), Ok("small".to_owned())]);
    assert!(matches!(found[2], Err((ImageMissing, _))), "{:?}", found[2]);
    let at_commit = format!("/{}/", COMMITS[0]);
    let asked = servers.cdn.asked();
    assert!(!asked.is_empty(), "a large file comes from the CDN");
    for (_, uri, _) in asked {
        assert!(uri.starts_with(&at_commit), "{uri}");
    }
    servers.hub.lost.store(true, Ordering::Relaxed);
    for row in [0, 2] {
        let error = reader.with_images(&block, &[row]).await.unwrap_err();
        assert_eq!(error.reason(), Reason::DatasetChanged, "{}", error.chain());
    }
    // As a shard at that commit is told.
    let root = reader
        .stores
        .open(&format!("hf://datasets/o/n@{}/data", COMMITS[0]));
    let shard = ShardFile::new(root.unwrap().below("large"), 10, Some("sha".to_owned()));
    let error = shard
        .ranges(std::slice::from_ref(&(2..5)))
        .await
        .unwrap_err();
    assert_eq!(error.reason(), Reason::DatasetChanged, "{}", error.chain());
}

#[tokio::test]
async fn bytes_win_where_a_struct_has_both() {
    let stores = stores();
    let rows = [
        (None, Some("a.jpg")),
        // A path of three bytes behind a null is not taken for a text that is no UTF-8.
        (Some("bytes"), Some("gon")),
        (None, None),
    ];
    let file = parquet(&hugging_face_paths(&rows), 9);
    let manifest = indexed_beside(&stores, file, &[("a.jpg", "image a")]).await;
    let reader = BlockReader::new(stores, 0);
    let block = reader.read(&manifest, 0, 0, 0, &[]).await.unwrap();
    let pieces = reader.with_images(&block, &[0, 1, 2]).await.unwrap();
    let null = (ImageNull, "the image is null".to_owned());
    let expected: [Found; 3] = [Ok("image a".into()), Ok("bytes".into()), Err(null)];
    assert_eq!(found(&pieces), expected);
    let places = reader.image_places(&manifest, 0, 0, 0, &[]).await.unwrap();
    let uris: Vec<_> = places.into_iter().map(|place| place.uri).collect();
    let uri = Some("memory:///data/images/a.jpg".to_owned());
    assert_eq!(uris, [uri, None, None]);
}

#[tokio::test]
async fn a_path_that_is_no_text_costs_its_row() {
    let names = ["a.jpg", "b.jpg", "c.jpg"];
    let structs: Vec<_> = names.iter().map(|name| (None, Some(*name))).collect();
    for rows in [by_path(&names), hugging_face_paths(&structs)] {
        let stores = stores();
        let mut file = parquet(&rows, 9).to_vec();
        let (good, bad) = (b"b.jpg".as_slice(), b"\xff.jpg");
        let places: Vec<usize> = (0..file.len() - good.len())
            .filter(|at| file[*at..].starts_with(good))
            .collect();
        for at in places {
            file[at..at + bad.len()].copy_from_slice(bad);
        }
        let images = [("a.jpg", "image a"), ("c.jpg", "image c")];
        let manifest = indexed_beside(&stores, file.into(), &images).await;
        let reader = BlockReader::new(stores, 0);
        let block = reader.read(&manifest, 0, 0, 0, &[]).await.unwrap();
        assert_eq!(captions(&block.batch)[1], Some("caption 1"));
        let pieces = reader.with_images(&block, &[0, 2]).await.unwrap();
        let expected: [Found; 2] = ["image a", "image c"].map(|image| Ok(image.to_owned()));
        assert_eq!(found(&pieces), expected);
        let piece = &reader.with_images(&block, &[1]).await.unwrap()[0];
        let column = piece.batch.column(0).as_binary::<i32>();
        let fault = images::fault(column, 1);
        let says = "the image's path is not UTF-8";
        assert_eq!(fault, Some((ImagePathInvalid, says)));
    }
}

#[tokio::test]
async fn rows_that_a_predicate_leaves_out_are_not_read() {
    let (stores, counts) = counted();
    let paths: Vec<String> = (0..1_500).map(|row| format!("{row}.jpg")).collect();
    let names: Vec<&str> = paths.iter().map(String::as_str).collect();
    put(
        &stores,
        &[("rows/0.parquet", parquet(&by_path(&names), 1_500))],
    )
    .await;
    for path in &paths {
        put(
            &stores,
            &[(format!("images/{path}").as_str(), Bytes::from(path.clone()))],
        )
        .await;
    }
    let asked = SourceRequest {
        image_root: Some("memory:///data/images".into()),
        predicate: Some("n between 1000 and 1099".into()),
        ..request("memory:///data/rows")
    };
    let manifest = index(&stores, None, &[asked]).await.unwrap();
    let reader = BlockReader::new(stores, 0);
    let mut rows = Vec::new();
    let before = counts[0].load(Ordering::Relaxed);
    for (_, number, about) in manifest.sources[0].blocks().filter(|(_, _, b)| b.rows > 0) {
        let block = reader.read(&manifest, 0, 0, number, &[]).await.unwrap();
        assert_eq!(block.batch.num_rows(), about.rows as usize);
        let all: Vec<u32> = (0..about.rows).collect();
        let pieces = reader.with_images(&block, &all).await.unwrap();
        for image in pieces
            .iter()
            .flat_map(|piece| piece.batch.column(0).as_binary::<i32>())
        {
            rows.push(String::from_utf8(image.unwrap().to_vec()).unwrap());
        }
    }
    assert_eq!(rows, paths[1_000..1_100]);
    assert_eq!(counts[0].load(Ordering::Relaxed) - before, 1 + 2 + 100);
}

/// A path cannot make the service read what lies outside, whatever a store makes of names.
#[tokio::test]
async fn local_paths_stay_below_their_root() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    std::fs::create_dir_all(at("images/%2e%2e")).unwrap();
    std::fs::create_dir_all(at("rows")).unwrap();
    std::fs::write(at("secret"), b"secret").unwrap();
    std::fs::write(at("images/a.jpg"), b"image a").unwrap();
    std::fs::write(at("images/%2e%2e/b.jpg"), b"image b").unwrap();
    let names = [
        "a.jpg",
        "../secret",
        "%2e%2e/secret",
        "%2e%2e/b.jpg",
        "a.jpg/../../secret",
    ];
    std::fs::write(at("rows/0.parquet"), parquet(&by_path(&names), 9)).unwrap();
    let stores = stores();
    let uri = |name: &str| url::Url::from_file_path(at(name)).unwrap().to_string();
    let asked = SourceRequest {
        image_root: Some(uri("images")),
        ..request(&uri("rows"))
    };
    let manifest = index(&stores, None, &[asked]).await.unwrap();
    let reader = BlockReader::new(stores, 0);
    let block = reader.read(&manifest, 0, 0, 0, &[]).await.unwrap();
    let pieces = reader.with_images(&block, &[0, 1, 2, 3, 4]).await.unwrap();
    let images: Vec<_> = pieces[0]
        .batch
        .column(0)
        .as_binary::<i32>()
        .iter()
        .collect();
    let expected = [Some(&b"image a"[..]), None, None, Some(b"image b"), None];
    assert_eq!(images, expected);
}
