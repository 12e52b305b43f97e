//! What the state keeps of data sets, so that it is read once: indexes of tars, and score columns.
//! Whatever is missing or damaged is made anew when it is needed.
use super::{
    Format, Manifest, ShardFile,
    scores::{self, COLUMNS},
    tar::{self, INDEXES},
};
use crate::{
    error::Result,
    storage::{Location, Stores},
};
use std::collections::BTreeSet;

/// The folders in which it lies.
pub const FOLDERS: [&str; 2] = [INDEXES, COLUMNS];

/// Returns the keys of what the runs on a data set read there, if their score columns are
/// `columns`.
///
/// # Errors
/// `InvalidArgument` if a source's store cannot be opened.
pub fn keys(
    stores: &Stores,
    manifest: &Manifest,
    columns: &BTreeSet<String>,
) -> Result<BTreeSet<String>> {
    let mut keys = BTreeSet::new();
    for source in &manifest.sources {
        let root = stores.open(&source.root_uri)?;
        for shard in &source.shards {
            let file = ShardFile::new(root.below(&shard.path), shard.size, shard.etag.clone());
            if source.layout.format == Format::Tar {
                keys.extend(tar::kept_key(&file));
            }
            let of = |column: &String| scores::kept_key(source, &file, column);
            keys.extend(columns.iter().filter_map(of));
        }
    }
    Ok(keys)
}

/// Returns whether the object at `key` is there and cannot be read.
///
/// # Errors
/// `StorageUnreachable`.
pub async fn is_damaged(state: &Location, key: &str) -> Result<bool> {
    let Some(bytes) = state.find(key).await? else {
        return Ok(false);
    };
    Ok(if key.starts_with(INDEXES) {
        !tar::is_whole(bytes).await?
    } else {
        !scores::is_whole(&bytes)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dataset::{
        fixtures::{put, request, stores},
        index, tar_fixtures,
    };
    use bytes::Bytes;

    #[tokio::test]
    async fn what_is_kept_of_a_data_set_is_found_by_its_manifest() {
        let stores = stores();
        let state = stores.open("memory:///state").unwrap();
        put(&stores, &[("0.tar", tar_fixtures::img2dataset(0..4))]).await;
        let asked = request("memory:///data");
        let manifest = index(&stores, Some(&state), &[asked]).await.unwrap();
        let (source, columns) = (&manifest.sources[0], BTreeSet::from(["n".to_owned()]));
        let scores = scores::Scores::new(stores.clone(), state.clone());
        scores
            .of_shard(source, &source.shards[0], "n")
            .await
            .unwrap();
        let mut there = BTreeSet::new();
        for folder in FOLDERS {
            let listed = state.list(folder).await.unwrap().into_iter();
            there.extend(listed.map(|(key, _)| key));
        }
        assert_eq!(keys(&stores, &manifest, &columns).unwrap(), there);
        assert_eq!(there.len(), 2);
        for key in &there {
            assert!(!is_damaged(&state, key).await.unwrap(), "{key}");
            let whole = state.get(key).await.unwrap();
            let cut = Bytes::copy_from_slice(&whole[..whole.len() - 5]);
            state.put(key, cut).await.unwrap();
            assert!(is_damaged(&state, key).await.unwrap(), "{key}");
        }
    }
}
