//! Objects that rows of data name: they may not be there, or be anything.
use super::{
    hub,
    location::{Location, is_bucket_missing},
};
use crate::error::{Result, chain};
use bytes::Bytes;
use object_store::{GetOptions, ObjectStoreExt};
use std::{error::Error, io};

/// What lies at a name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Found {
    Whole(Bytes),
    Nothing,
    /// It has so many bytes, and was not read.
    TooLarge(u64),
}

impl Location {
    /// Reads an object of at most `bytes_max` bytes whole.
    ///
    /// # Errors
    /// Those of the store. A missing bucket is one, so is a commit that the hub has lost, and a
    /// missing object is none.
    pub async fn find_at_most(&self, key: &str, bytes_max: u64) -> Result<Found> {
        let (store, path) = (self.store(), self.path(key));
        let read = async {
            let found = store.get_opts(&path, GetOptions::default()).await?;
            let size = found.meta.size;
            if size > bytes_max {
                return Ok(Found::TooLarge(size));
            }
            Ok(Found::Whole(found.bytes().await?))
        };
        match read.await {
            Err(cause) if is_nothing(&cause) => Ok(Found::Nothing),
            found => found.map_err(|cause| self.error("read", key, cause)),
        }
    }

    /// Returns whether an object is there.
    ///
    /// # Errors
    /// As [`Location::find_at_most`].
    pub async fn is_there(&self, key: &str) -> Result<bool> {
        match self.store().head(&self.path(key)).await {
            Ok(_) => Ok(true),
            Err(cause) if is_nothing(&cause) => Ok(false),
            Err(cause) => Err(self.error("look up", key, cause)),
        }
    }
}

/// Returns whether a store says that nothing can lie at a name. Of local files a name may also go
/// through a file, or have a part that is too long: a row could otherwise name something that every
/// attempt fails to read, and so end its run.
fn is_nothing(cause: &object_store::Error) -> bool {
    if let object_store::Error::NotFound { source, .. } = cause {
        return !is_bucket_missing(&source.to_string()) && !hub::is_commit_lost(cause);
    }
    let causes = std::iter::successors(cause.source(), |&cause| cause.source());
    let mut kinds = causes.filter_map(|cause| Some(cause.downcast_ref::<io::Error>()?.kind()));
    let is_no_name = |kind| {
        use io::ErrorKind::{InvalidFilename, IsADirectory, NotADirectory, NotFound};
        matches!(
            kind,
            InvalidFilename | IsADirectory | NotADirectory | NotFound
        )
    };
    // `object_store` keeps names such as `a#1` of local files for itself.
    kinds.any(is_no_name) || chain(cause).contains("Filenames containing trailing")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::{StorageConfig, Stores, tests::answering::answering};
    use superbatch_proto::v1::Reason;

    #[tokio::test]
    async fn a_name_at_which_no_file_can_lie_is_no_fault_of_the_store() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("a.jpg"), b"twelve bytes").unwrap();
        std::fs::create_dir(folder.path().join("folder")).unwrap();
        let uri = url::Url::from_file_path(folder.path()).unwrap();
        let root = Stores::new(StorageConfig::default())
            .open(uri.as_str())
            .unwrap();
        let found = root.find_at_most("a.jpg", 12).await.unwrap();
        assert_eq!(found, Found::Whole("twelve bytes".into()));
        let large = root.find_at_most("a.jpg", 11).await.unwrap();
        assert_eq!(large, Found::TooLarge(12));
        let long = "x".repeat(300);
        for name in [
            "b.jpg",
            "a.jpg/b.jpg",
            "folder",
            "a#1",
            "%2e%2e/a",
            long.as_str(),
        ] {
            let found = root.find_at_most(name, 12).await;
            assert_eq!(found.unwrap(), Found::Nothing, "{name}");
            assert!(!root.is_there(name).await.unwrap(), "{name}");
        }
        assert!(root.is_there("a.jpg").await.unwrap());
    }

    /// A missing bucket would make each row a bad one, under a reason that hides what is wrong.
    #[tokio::test]
    async fn a_missing_bucket_is_no_missing_object() {
        let options = [
            ("google_base_url", "{}"),
            ("google_skip_signature", "true"),
            ("allow_http", "true"),
        ];
        let no_bucket = "<?xml version='1.0'?><Error><Code>NoSuchBucket</Code></Error>";
        let (root, _) = answering("gs://b/p", &options, "404 Not Found", no_bucket).await;
        let error = root.find_at_most("k", 9).await.unwrap_err();
        assert_eq!(error.value("bucket"), Some("b"));
        let no_object = "<?xml version='1.0'?><Error><Code>NoSuchKey</Code></Error>";
        let (root, _) = answering("gs://b/p", &options, "404 Not Found", no_object).await;
        let found = root.find_at_most("k", 9).await.unwrap();
        assert_eq!(found, Found::Nothing);
        // What may not be read may be there.
        let (root, _) = answering("gs://b/p", &options, "403 Forbidden", "").await;
        for error in [
            root.find_at_most("k", 9).await.unwrap_err(),
            root.is_there("k").await.unwrap_err(),
        ] {
            assert_eq!(error.reason(), Reason::StorageUnreachable, "{error}");
            assert_eq!(error.value("uri"), Some("gs://b/p/k"));
        }
    }
}
