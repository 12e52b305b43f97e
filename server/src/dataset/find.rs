//! Finds the files of a source: named, listed or matched.
use super::{
    counted,
    manifest::Format,
    pattern::{self, Keys, Part, Pattern, SHARD_ENDINGS},
};
use crate::{
    error::{Error, Result},
    storage::{Location, Stores},
};
use futures::{StreamExt, TryStreamExt};
use object_store::ObjectMeta;
use std::collections::{BTreeSet, HashMap};
use superbatch_proto::v1::Reason;

/// Files that are looked up at the same time.
const FILES_AT_ONCE: usize = 16;
/// Endings of shards, tars first: img2dataset writes Parquet files of metadata beside its tars.
const ENDINGS: [&str; 2] = [".tar", ".parquet"];
/// Endings of compressed tars, which are not read: a member inside cannot be read by range.
const COMPRESSED: [&str; 5] = [".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst"];

/// What is in the names of files of formats that people have and that are not read, and what they
/// are.
const NOT_READ: [(&str, &str); 4] = [
    (".mds", "MosaicML's MDS is"),
    (".lance", "Lance is"),
    (".arrow", "Arrow files (save_to_disk of datasets) are"),
    (".tfrecord", "TFRecords are"),
];

/// The shards of a source, in the order of their paths below the root.
#[derive(Debug)]
pub(super) struct FoundFiles {
    pub root_uri: String,
    pub files: Vec<(String, ObjectMeta)>,
    pub format: Format,
}

/// Finds the files that `pattern` names. Files in `state` are no data.
///
/// # Errors
/// `DatasetEmpty` naming the files there; `InvalidArgument` for files of two formats.
pub(super) async fn find(
    stores: &Stores,
    state: Option<&Location>,
    pattern: Pattern,
    uri: &str,
) -> Result<FoundFiles> {
    let Pattern { root_uri, parts } = pattern;
    let root = stores.open(&root_uri)?;
    let own = state.and_then(|state| below(state.uri(), &root_uri));
    let mut files = Vec::new();
    let mut exact = Vec::new();
    for Part { folder, keys } in parts {
        if let Keys::Exact(keys) = &keys {
            exact.extend(keys.iter().map(|key| joined(&folder, key)));
            continue;
        }
        let mut all = root.list_files(&folder).await?;
        all.retain(|(path, _)| !path.is_empty());
        if all.is_empty()
            && keys == Keys::Folder
            && let Some(meta) = itself(&root, &folder).await?
        {
            // The URI looked like a folder's, but a file is there.
            if !folder.is_empty() {
                files.push((folder, meta));
                continue;
            }
            let (above, file) = root_uri
                .trim_end_matches('/')
                .rsplit_once('/')
                .unwrap_or_default();
            let file = pattern::decoded(uri, file)?;
            let format = format_of(&file);
            return Ok(FoundFiles {
                root_uri: above.to_owned(),
                files: vec![(file, meta)],
                format,
            });
        }
        all.retain(|(path, _)| !own.as_ref().is_some_and(|own| is_in(path, own)));
        files.extend(wanted(all, &folder, &keys, &root, uri)?);
    }
    files.extend(named(&root, exact, uri).await?);
    files.sort_by(|a, b| a.0.cmp(&b.0));
    files.dedup_by(|a, b| a.0 == b.0);
    let format = files
        .first()
        .map_or(Format::Parquet, |(path, _)| format_of(path));
    if let Some((other, _)) = files.iter().find(|(path, _)| format_of(path) != format) {
        let message = format!(
            "{uri} names both Parquet files and tars, such as {other}; name them as two sources"
        );
        return Err(Error::invalid("sources", message).with("uri", uri));
    }
    Ok(FoundFiles {
        root_uri,
        files,
        format,
    })
}

fn format_of(path: &str) -> Format {
    if path.ends_with(".tar") || is_compressed(path) {
        Format::Tar
    } else {
        Format::Parquet
    }
}

fn is_shard(path: &str) -> bool {
    ENDINGS.iter().any(|ending| path.ends_with(ending)) || is_compressed(path)
}

fn is_compressed(path: &str) -> bool {
    COMPRESSED.iter().any(|ending| path.ends_with(ending))
}

fn joined(folder: &str, key: &str) -> String {
    match (folder, key) {
        ("", key) => key.to_owned(),
        (folder, "") => folder.to_owned(),
        (folder, key) => format!("{folder}/{key}"),
    }
}

/// Returns the path of `uri` below `root`.
fn below(uri: &str, root: &str) -> Option<String> {
    let rest = uri.strip_prefix(root.trim_end_matches('/'))?;
    let rest = rest.strip_prefix('/')?.trim_matches('/');
    pattern::decoded(uri, rest)
        .ok()
        .filter(|rest| !rest.is_empty())
}

fn is_in(path: &str, folder: &str) -> bool {
    path.strip_prefix(folder)
        .is_some_and(|rest| rest.starts_with('/'))
}

/// Returns the object at `folder` itself.
async fn itself(root: &Location, folder: &str) -> Result<Option<ObjectMeta>> {
    match root.path(folder).as_ref() {
        "" => Ok(None),
        _ => root.head(folder).await,
    }
}

pub(super) fn nothing_found(at: &str, source: &str) -> Error {
    let message = format!(
        "there is nothing at {at}; give the URI of a Parquet file or a tar, or of a folder that \
         holds some"
    );
    Error::new(Reason::DatasetEmpty, message).with("source", source)
}

/// Finds files that are named one by one. A name that is a folder stands for the shards in it:
/// Spark and pandas write folders named `pool.parquet`.
async fn named(root: &Location, keys: Vec<String>, uri: &str) -> Result<Vec<(String, ObjectMeta)>> {
    let (mut files, keys) = listed(root, keys).await?;
    let looks = keys.into_iter().map(|key| {
        let root = root.clone();
        async move {
            if let Some(meta) = root.head(&key).await? {
                return Ok::<_, Error>(vec![(key, meta)]);
            }
            // A web server that lacks a file would be blamed for listing no folders.
            let all = if root.is_web() && is_shard(&key) {
                Vec::new()
            } else {
                root.list_files(&key).await?
            };
            if all.is_empty() {
                Err(nothing_found(&root.uri_of(&key), uri))
            } else {
                wanted(all, &key, &Keys::Folder, &root, uri)
            }
        }
    });
    let found: Vec<Vec<_>> = futures::stream::iter(looks)
        .buffered(FILES_AT_ONCE)
        .try_collect()
        .await?;
    files.extend(found.into_iter().flatten());
    Ok(files)
}

/// Finds named files in the listings of their folders, where single looks would be too many for the
/// hub's limits. Returns those that are there, and the other names.
async fn listed(
    root: &Location,
    keys: Vec<String>,
) -> Result<(Vec<(String, ObjectMeta)>, Vec<String>)> {
    if !root.is_hub() || keys.len() <= FILES_AT_ONCE {
        return Ok((Vec::new(), keys));
    }
    let folder = |key: &String| {
        key.rsplit_once('/')
            .map_or("", |(folder, _)| folder)
            .to_owned()
    };
    let folders: BTreeSet<String> = keys.iter().map(folder).collect();
    let (mut listed, mut there) = (Vec::<String>::new(), HashMap::new());
    for folder in folders {
        // A listing has the folders below too.
        let is_known = |above: &String| above.is_empty() || is_in(&folder, above);
        if !listed.iter().any(is_known) {
            there.extend(root.list_files(&folder).await?);
            listed.push(folder);
        }
    }
    let look = |key: String| match there.remove(&key) {
        Some(meta) => Ok((key, meta)),
        None => Err(key),
    };
    let (found, others): (Vec<_>, Vec<_>) = keys.into_iter().map(look).partition(Result::is_ok);
    Ok((
        found.into_iter().flatten().collect(),
        others.into_iter().filter_map(Result::err).collect(),
    ))
}

/// Returns the files below `folder` that match `keys`.
fn wanted(
    all: Vec<(String, ObjectMeta)>,
    folder: &str,
    keys: &Keys,
    root: &Location,
    uri: &str,
) -> Result<Vec<(String, ObjectMeta)>> {
    let at = root.uri_of(folder);
    if all.is_empty() && matches!(keys, Keys::Folder) {
        return Err(nothing_found(&at, uri));
    }
    let relative = |path: &str| path[folder.len()..].trim_start_matches('/').to_owned();
    let mut others: Vec<String> = all.iter().map(|(path, _)| relative(path)).collect();
    let fits = |path: &str| match keys {
        Keys::Globs(globs) => globs.iter().any(|glob| pattern::matches(glob, path)),
        _ => !is_hidden(path),
    };
    let mut files: Vec<_> = all
        .into_iter()
        .filter(|(path, _)| fits(&relative(path)))
        .collect();
    let ends = |path: &str, ending: &str| path.ends_with(ending);
    // img2dataset writes a Parquet file of metadata, and statistics, beside each tar. They have no
    // images, so in such a folder only the tars are shards.
    let found = ENDINGS
        .into_iter()
        .find(|e| files.iter().any(|(p, _)| ends(p, e)));
    match (found, keys) {
        (Some(ending), _) => files.retain(|(path, _)| ends(path, ending)),
        (None, Keys::Globs(_)) => {}
        (None, _) => files.retain(|(path, _)| is_compressed(path)),
    }
    if files.is_empty() {
        others.sort();
        return Err(none_of(&others, &at, uri, matches!(keys, Keys::Globs(_))));
    }
    Ok(files)
}

/// Returns whether a file is hidden. Writers leave `_metadata`, `_SUCCESS` and dot files beside
/// their shards; `_lang=de` is a folder of rows (a Hive partition).
fn is_hidden(path: &str) -> bool {
    let hidden =
        |name: &str| name.starts_with('.') || (name.starts_with('_') && !name.contains('='));
    path.split('/').any(hidden)
}

/// Returns the error if no object matches. It names the first few, so that a wrong folder is
/// recognised.
fn none_of(others: &[String], at: &str, source: &str, is_pattern: bool) -> Error {
    const NAMED_MAX: usize = 3;
    let first = others.iter().take(NAMED_MAX).map(String::as_str);
    let first = first.collect::<Vec<_>>().join(", ");
    let more = if others.len() > NAMED_MAX {
        ", …"
    } else {
        ""
    };
    let what = if is_pattern {
        format!("nothing at {at} matches {source}")
    } else {
        format!("no file at {at} ends in {}", SHARD_ENDINGS.join(" or "))
    };
    let verb = if others.len() == 1 { "is" } else { "are" };
    let there = if others.is_empty() {
        "there is nothing else".to_owned()
    } else {
        format!(
            "there {verb} {}: {first}{more}",
            counted(others.len(), "other file")
        )
    };
    let name = |path: &str| path.rsplit('/').next().unwrap_or_default().to_owned();
    let is_one = |part: &str| others.iter().any(|path| name(path).contains(part));
    let foreign = NOT_READ.iter().find(|(part, _)| is_one(part));
    let cure = foreign.map_or_else(String::new, |(_, are)| {
        format!("; {are} not read: write the rows as Parquet files (to_parquet) or tars")
    });
    Error::new(Reason::DatasetEmpty, format!("{what}; {there}{cure}")).with("source", source)
}
