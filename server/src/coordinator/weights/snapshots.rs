//! The files of weights: their keys, the versions to which they belong, and which may be deleted.
//!
//! Every upload gets a key of its own, although the digest alone would name its content. With
//! shared keys, a coordinator that was paused, lost the run, and then went on to delete an old
//! version could delete the file that the new owner has just published with the same weights. With
//! keys of their own it can delete only its own uploads.
use super::{Book, publish::Fact};
use crate::{
    error::Result,
    storage::{Location, nonce},
};
use std::{
    collections::BTreeMap,
    time::{Duration, SystemTime},
};

/// Folder of the weights files, below the run.
pub(super) const SNAPSHOTS: &str = "snapshots";

/// A file of this age that belongs to no version is left from a push that was never published. A
/// younger one may belong to a push that is being verified at this moment, perhaps by another
/// coordinator.
const ORPHANED_AFTER: Duration = Duration::from_secs(24 * 3600);

/// Returns a key for one more upload of these weights.
pub(super) fn new_key(digest: &str) -> String {
    format!("{SNAPSHOTS}/{digest}.{}.safetensors", nonce())
}

/// Returns the key that earlier versions of this program gave to all uploads of these weights.
pub(super) fn shared_key(digest: &str) -> String {
    format!("{SNAPSHOTS}/{digest}.safetensors")
}

/// Returns the digest in a key.
pub fn digest_of(key: &str) -> Option<&str> {
    let name = key.strip_prefix(SNAPSHOTS)?.strip_prefix('/')?;
    name.strip_suffix(".safetensors")?.split('.').next()
}

/// The weights files of a run, with the time of writing (seconds since 1970).
#[derive(Debug, Default)]
pub(super) struct Listed(BTreeMap<String, i64>);

impl Listed {
    /// # Errors
    /// `StorageUnreachable`.
    pub(super) async fn read(run: &Location) -> Result<Self> {
        let listed = run.list(SNAPSHOTS).await?.into_iter();
        Ok(Self(
            listed
                .map(|(key, meta)| (key, meta.last_modified.timestamp()))
                .collect(),
        ))
    }

    /// Returns their keys, rising.
    pub(super) fn keys(&self) -> impl Iterator<Item = &String> {
        self.0.keys()
    }

    /// Returns the key of a version's weights: its own, or that of another upload of the same
    /// bytes.
    pub(super) fn find(&self, fact: &Fact) -> Option<String> {
        let own = fact.snapshot_key();
        if self.0.contains_key(&own) {
            return Some(own);
        }
        let same = |key: &&String| digest_of(key) == Some(&fact.digest);
        self.0.keys().find(same).cloned()
    }

    /// Returns the files of pushes that were never published.
    pub(super) fn orphans(&self, book: &Book, now: SystemTime) -> Vec<String> {
        let now = now
            .duration_since(SystemTime::UNIX_EPOCH)
            .map_or(0, |since| since.as_secs() as i64);
        let old = |written: i64| now.saturating_sub(written) > ORPHANED_AFTER.as_secs() as i64;
        self.0
            .iter()
            .filter(|(key, written)| old(**written) && !book.holds(key))
            .map(|(key, _)| key.clone())
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_uploads_of_the_same_weights_never_share_a_name() {
        let [a, b] = [new_key("d1"), new_key("d1")];
        assert_ne!(a, b);
        assert_eq!([digest_of(&a), digest_of(&b)], [Some("d1"); 2]);
        assert_eq!(digest_of(&shared_key("d2")), Some("d2"));
        assert_eq!(digest_of("pushes/0/1.json"), None);
    }

    #[test]
    fn only_what_was_never_published_and_is_old_is_an_orphan() {
        let day = ORPHANED_AFTER.as_secs() as i64;
        let listed = Listed(
            [
                ("snapshots/old.x.safetensors", 0),
                ("snapshots/new.x.safetensors", day),
            ]
            .map(|(key, written)| (key.to_owned(), written))
            .into(),
        );
        let at = |seconds: i64| SystemTime::UNIX_EPOCH + Duration::from_secs(seconds as u64);
        let book = Book::default();
        assert_eq!(listed.orphans(&book, at(day)), [""; 0]);
        assert_eq!(
            listed.orphans(&book, at(day + 1)),
            ["snapshots/old.x.safetensors"]
        );
    }
}
