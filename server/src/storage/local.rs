//! Lists the files of a local folder. `object_store` ends a listing with an error at the first
//! entry that it cannot name, and real data folders hold such entries.
use crate::error::{Error, Result};
use object_store::path::Path;
use std::{fs, io, path::PathBuf};

/// Most entries that one warning names.
const NAMED_MAX: usize = 3;

/// Returns all files below `folder`, relative to it; none if it is no folder. Links are followed.
///
/// # Errors
/// `InvalidArgument` naming what cannot be read.
pub(super) async fn names(folder: Path, uri: &str) -> Result<Vec<String>> {
    let root = std::path::Path::new("/").join(folder.as_ref());
    let walked = tokio::task::spawn_blocking(move || walk(root)).await;
    let walked = walked.map_err(|e| Error::internal("listing a folder panicked").because(e))?;
    let (names, foreign) = walked.map_err(|(path, cause)| {
        let message = format!(
            "cannot list {}; make it readable, or move it away",
            path.display()
        );
        Error::invalid("uri", message)
            .with("uri", uri)
            .because(cause)
    })?;
    if !foreign.is_empty() {
        let first = foreign
            .iter()
            .take(NAMED_MAX)
            .map(|path| format!("{path:?}"));
        let first = first.collect::<Vec<_>>().join(", ");
        let count = foreign.len();
        tracing::warn!(
            uri,
            count,
            first,
            "entries that no URI can name are left out"
        );
    }
    Ok(names)
}

/// Removes `folder` and the folders directly in it, as far as they are empty. What cannot be
/// removed stays: an empty folder costs a little room and no more.
pub(super) async fn prune(folder: Path) {
    let root = std::path::Path::new("/").join(folder.as_ref());
    let pruned = tokio::task::spawn_blocking(move || {
        // A folder that holds anything is not removed by this call, whenever it came.
        for entry in fs::read_dir(&root).into_iter().flatten().flatten() {
            drop(fs::remove_dir(entry.path()));
        }
        drop(fs::remove_dir(&root));
    });
    drop(pruned.await);
}

type Walked = (Vec<String>, Vec<PathBuf>);

/// Names, and the entries that cannot be named: those in other encodings or with control
/// characters, and links to a folder that contains them.
fn walk(root: PathBuf) -> Result<Walked, (PathBuf, io::Error)> {
    // Each folder on the stack carries the real paths of the folders above it. A link to one of
    // them would be walked without end. A set of all visited folders would be wrong: two links to
    // one folder are two prefixes of data, and both are wanted.
    let (mut names, mut foreign) = (Vec::new(), Vec::new());
    let mut folders = match fs::canonicalize(&root) {
        Ok(real) if real.is_dir() => vec![(root, String::new(), vec![real])],
        _ => Vec::new(),
    };
    while let Some((folder, name, above)) = folders.pop() {
        let at = |cause| (folder.clone(), cause);
        for entry in fs::read_dir(&folder).map_err(at)? {
            let path = entry.map_err(at)?.path();
            let Some(last) = path.file_name().and_then(|last| last.to_str()) else {
                foreign.push(path);
                continue;
            };
            let key = match name.as_str() {
                "" => last.to_owned(),
                name => format!("{name}/{last}"),
            };
            // A link whose target is missing is left out. So is a file that was deleted since the
            // folder was read, but without a warning.
            let Ok(meta) = fs::metadata(&path) else {
                let is_link = fs::symlink_metadata(&path).is_ok_and(|meta| meta.is_symlink());
                foreign.extend(is_link.then_some(path));
                continue;
            };
            if !can_be_named(last) {
                foreign.push(path);
            } else if meta.is_dir() {
                let real = fs::canonicalize(&path).map_err(|cause| (path.clone(), cause))?;
                if above.contains(&real) {
                    foreign.push(path)
                } else {
                    let above = above.iter().cloned().chain([real]).collect();
                    folders.push((path, key, above));
                }
            } else if meta.is_file() {
                names.push(key);
            }
        }
    }
    Ok((names, foreign))
}

/// Returns whether `object_store` can name a file. It uses names that end in # and a number for
/// uploads that are not finished, and hides them.
fn can_be_named(name: &str) -> bool {
    let unfinished = name.split_once('#').is_some_and(|(_, number)| {
        !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit())
    });
    !unfinished && Path::parse(name).is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::{StorageConfig, Stores};
    use std::{ffi::OsStr, os::unix::ffi::OsStrExt};

    #[tokio::test]
    async fn entries_that_no_key_can_name_are_left_out() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &[u8]| folder.path().join(OsStr::from_bytes(name));
        for name in [
            &b"a.tar"[..],
            b"Icon\r",
            b"caf\xe9.tar",
            b"\xc3\xa9 ~#%?[x].tar",
            b"x#12",
        ] {
            fs::write(at(name), "x").unwrap();
        }
        fs::create_dir(at(b"lang=zh%3AHans")).unwrap();
        fs::write(at(b"lang=zh%3AHans/b.tar"), "x").unwrap();
        let folder_of_rows = at(b"lang=zh%3AHans");
        std::os::unix::fs::symlink(&folder_of_rows, folder_of_rows.join("loop")).unwrap();
        std::os::unix::fs::symlink("loop", at(b"loop")).unwrap();
        let uri = url::Url::from_file_path(folder.path()).unwrap();
        let root = Stores::new(StorageConfig::default())
            .open(uri.as_str())
            .unwrap();
        let mut found = root.list_files("").await.unwrap();
        found.sort_by(|a, b| a.0.cmp(&b.0));
        let names: Vec<_> = found
            .iter()
            .map(|(name, meta)| (name.as_str(), meta.size))
            .collect();
        assert_eq!(
            names,
            [
                ("a.tar", 1),
                ("lang=zh%3AHans/b.tar", 1),
                ("é ~#%?[x].tar", 1)
            ]
        );
        for (name, _) in &found {
            assert_eq!(root.get(name).await.unwrap(), "x", "{name}");
            assert_eq!(root.below(name).get("").await.unwrap(), "x", "{name}");
        }
        let below = root.list_files("lang=zh%3AHans").await.unwrap();
        assert_eq!(below.len(), 1, "{below:?}");
        assert!(root.list_files("nothing").await.unwrap().is_empty());
    }
}
