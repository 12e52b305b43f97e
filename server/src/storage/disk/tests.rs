use crate::storage::{Budget, Created, Location, StorageConfig, Stores};
use std::{collections::BTreeSet, fs, path::Path};

fn opened(folder: &Path) -> Location {
    let uri = url::Url::from_file_path(folder).unwrap();
    let stores = Stores::new(StorageConfig::default());
    stores.open(uri.as_str()).unwrap()
}

/// Names of all that lies directly in a folder, whatever it is called.
fn names(folder: &Path) -> BTreeSet<String> {
    let entries = fs::read_dir(folder).unwrap().map(Result::unwrap);
    entries
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .collect()
}

#[tokio::test]
async fn the_first_of_many_creates_a_file_in_folders_that_were_missing() {
    let folder = tempfile::tempdir().unwrap();
    let at = opened(folder.path());
    let created = (0..16_u8).map(|writer| {
        let at = at.clone();
        tokio::spawn(async move {
            let bytes = vec![writer; 1 << 16];
            at.create("a/b/c.json", bytes.into()).await.unwrap()
        })
    });
    let created = futures::future::join_all(created).await;
    let created: Vec<Created> = created.into_iter().map(Result::unwrap).collect();
    let winners = (0..16_u8).zip(&created);
    let winners: Vec<u8> = winners
        .filter(|(_, created)| **created == Created::Ours)
        .map(|(writer, _)| writer)
        .collect();
    let [winner] = winners[..] else {
        panic!("one creates it: {winners:?}")
    };
    let stored = at.get("a/b/c.json").await.unwrap();
    assert_eq!(stored, vec![winner; 1 << 16]);
    for theirs in created.iter().filter(|created| **created != Created::Ours) {
        assert_eq!(*theirs, Created::Theirs(stored.clone()));
    }
    let left = names(&folder.path().join("a/b"));
    assert_eq!(left, ["c.json".to_owned()].into());
}

#[tokio::test]
async fn a_create_that_fails_leaves_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let at = opened(folder.path());
    fs::write(folder.path().join("file"), "x").unwrap();
    // A folder cannot lie below a file, and the name of a file has at most 255 bytes.
    let long = format!("new/folder/{}", "x".repeat(254));
    for key in ["file/below/a.json", &long] {
        let budget = Budget::default();
        let failed = at.create_once(key, "x".into(), &budget).await;
        assert!(failed.is_err(), "{key}");
    }
    assert_eq!(names(folder.path()), ["file".to_owned()].into());
    // What was removed is made again.
    let created = at.create("new/folder/a.json", "x".into()).await.unwrap();
    assert_eq!(created, Created::Ours);
    assert_eq!(
        names(&folder.path().join("new/folder")),
        ["a.json".to_owned()].into()
    );
}
