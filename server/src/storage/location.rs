//! A prefix in a store, and the operations below it.
use super::{hub, join, local};
use crate::error::{Error, Result, chain};
use bytes::Bytes;
use futures::{StreamExt, TryStreamExt};
use object_store::{
    GetOptions, GetRange, ObjectMeta, ObjectStore, ObjectStoreExt, PutPayload, WriteMultipart,
    client::{HttpError, HttpErrorKind},
    path::Path,
};
use std::{error::Error as _, sync::Arc};
use superbatch_proto::v1::Reason;
use url::Url;

/// Largest object that is written by one request, and the size of the parts of a larger one.
/// Several parts are under way at once, since one connection to S3 is slower than the network line.
pub(super) const PART_BYTES: usize = 64 << 20;
pub(super) const PARTS_AT_ONCE: usize = 4;
/// Local files whose metadata is read at the same time.
const LOOKS_AT_ONCE: usize = 32;

/// A prefix (or one object) in object storage. Keys are relative to it; `""` is the location
/// itself.
#[derive(Debug, Clone)]
pub struct Location {
    store: Arc<dyn ObjectStore>,
    path: Path,
    uri: String,
}

impl Location {
    pub(super) fn new(store: Arc<dyn ObjectStore>, path: Path, uri: &str) -> Self {
        Self {
            store,
            path,
            uri: uri.trim_end_matches('/').to_owned(),
        }
    }

    pub fn store(&self) -> &Arc<dyn ObjectStore> {
        &self.store
    }

    /// Returns the URI that this location was opened by, without a trailing slash.
    pub fn uri(&self) -> &str {
        &self.uri
    }

    /// Returns the object path of `key`.
    pub fn path(&self, key: &str) -> Path {
        join(&self.path, key)
    }

    /// Returns the location of `key` below this one.
    pub fn below(&self, key: &str) -> Self {
        Self {
            store: self.store.clone(),
            path: self.path(key),
            uri: self.uri_of(key),
        }
    }

    pub fn uri_of(&self, key: &str) -> String {
        if key.is_empty() {
            self.uri.clone()
        } else {
            format!("{}/{key}", self.uri)
        }
    }

    /// Reads an object whole.
    ///
    /// # Errors
    /// `StorageUnreachable`, also if the object does not exist; [`Location::find`] distinguishes
    /// the two.
    pub async fn get(&self, key: &str) -> Result<Bytes> {
        let read = async { self.store.get(&self.path(key)).await?.bytes().await };
        read.await.map_err(|e| self.error("read", key, e))
    }

    /// Reads an object whole; `None` if it does not exist. A missing bucket is an error, since
    /// "there is no such fact" would be the wrong conclusion from a wrong URI.
    pub async fn find(&self, key: &str) -> Result<Option<Bytes>> {
        self.find_by(key, GetOptions::default()).await
    }

    pub(super) async fn find_by(&self, key: &str, options: GetOptions) -> Result<Option<Bytes>> {
        let path = self.path(key);
        let read = async { self.store.get_opts(&path, options).await?.bytes().await };
        match read.await {
            Ok(bytes) => Ok(Some(bytes)),
            Err(object_store::Error::NotFound { source, .. })
                if !is_bucket_missing(&source.to_string()) =>
            {
                Ok(None)
            }
            Err(e) => Err(self.error("read", key, e)),
        }
    }

    /// Reads up to `bytes` of an object's end, and returns them with the object's size; `None` if
    /// there is none. If a store cannot read from the end, the whole object is read.
    pub async fn end(&self, key: &str, bytes: u64) -> Result<Option<(Bytes, u64)>> {
        let options = GetOptions {
            range: Some(GetRange::Suffix(bytes)),
            ..Default::default()
        };
        let read = async {
            let found = self.store.get_opts(&self.path(key), options).await?;
            let size = found.meta.size;
            Ok((found.bytes().await?, size))
        };
        match read.await {
            Ok(found) => Ok(Some(found)),
            Err(object_store::Error::NotFound { source, .. })
                if !is_bucket_missing(&source.to_string()) =>
            {
                Ok(None)
            }
            Err(object_store::Error::NotSupported { .. }) => {
                let whole = self.find(key).await?;
                Ok(whole.map(|bytes| (bytes.clone(), bytes.len() as u64)))
            }
            Err(e) => Err(self.error("read", key, e)),
        }
    }

    /// Reads up to `bytes` of an object's beginning; `None` if there is no object. Stores refuse a
    /// range of an object without bytes, which is such a beginning too.
    pub async fn beginning(&self, key: &str, bytes: u64) -> Result<Option<Bytes>> {
        let options = GetOptions {
            range: Some(GetRange::Bounded(0..bytes)),
            ..Default::default()
        };
        let read = async {
            let found = self.store.get_opts(&self.path(key), options).await?;
            found.bytes().await
        };
        match read.await {
            Ok(found) => Ok(Some(found)),
            Err(object_store::Error::NotFound { .. }) => Ok(None),
            Err(e) => match self.head(key).await {
                Ok(Some(meta)) if meta.size == 0 => Ok(Some(Bytes::new())),
                _ => Err(self.error("read", key, e)),
            },
        }
    }

    /// Returns an object's metadata; `None` if there is no object.
    pub async fn head(&self, key: &str) -> Result<Option<ObjectMeta>> {
        match self.store.head(&self.path(key)).await {
            Ok(meta) => Ok(Some(meta)),
            Err(object_store::Error::NotFound { .. }) => Ok(None),
            Err(e) => Err(self.error("look up", key, e)),
        }
    }

    /// Lists all objects below `key`, in no particular order, with keys relative to this location.
    pub async fn list(&self, key: &str) -> Result<Vec<(String, ObjectMeta)>> {
        let prefix = self.path(key);
        let metas: Vec<ObjectMeta> = self
            .store
            .list(Some(&prefix))
            .try_collect()
            .await
            .map_err(|e| self.error("list", key, e))?;
        let relative = |meta: ObjectMeta| {
            let parts = meta.location.prefix_match(&self.path)?;
            let key = parts
                .map(|part| part.as_ref().to_owned())
                .collect::<Vec<_>>()
                .join("/");
            Some((key, meta))
        };
        Ok(metas.into_iter().filter_map(relative).collect())
    }

    /// Returns whether a web server answers. Few of those list folders.
    pub fn is_web(&self) -> bool {
        let mut schemes = ["http:", "https:"].iter();
        schemes.any(|web| self.uri.starts_with(web))
    }

    /// Returns whether the Hugging Face hub answers. It counts requests, and limits them.
    pub fn is_hub(&self) -> bool {
        self.uri.starts_with("hf:")
    }

    /// As [`Location::list`], for folders that this service did not write. In local ones, entries
    /// that no key can name (control characters, other encodings, loops of links) are left out with
    /// a warning.
    ///
    /// # Errors
    /// `InvalidArgument` for a folder that cannot be read; those of the store.
    pub async fn list_files(&self, key: &str) -> Result<Vec<(String, ObjectMeta)>> {
        if self.is_web() {
            // Few web servers list folders (WebDAV does), and one that does not will not do so
            // later: an error that callers retry would hide that for minutes.
            return self.list(key).await.map_err(|error| {
                if is_transport(&error) {
                    return error;
                }
                let uri = self.uri_of(key);
                let message = format!(
                    "this web server does not list {uri}; name its files, as in \
                     {uri}/{{00000..00041}}.parquet"
                );
                Error::invalid("uri", message)
                    .with("uri", uri)
                    .because(error)
            });
        }
        if !self.uri.starts_with("file:") {
            return self.list(key).await;
        }
        let names = local::names(self.path(key), &self.uri_of(key)).await?;
        let looks = names.into_iter().map(|name| async move {
            let key = match key {
                "" => name,
                key => format!("{key}/{name}"),
            };
            Ok::<_, Error>(self.head(&key).await?.map(|meta| (key, meta)))
        });
        let found = futures::stream::iter(looks).buffered(LOOKS_AT_ONCE);
        found
            .try_filter_map(|found| async { Ok(found) })
            .try_collect()
            .await
    }

    /// Returns the names of the folders directly below `key`, sorted.
    pub async fn folders(&self, key: &str) -> Result<Vec<String>> {
        let listed = self.store.list_with_delimiter(Some(&self.path(key))).await;
        let listed = listed.map_err(|e| self.error("list", key, e))?;
        let mut names: Vec<String> = listed
            .common_prefixes
            .iter()
            .filter_map(|path| path.filename().map(str::to_owned))
            .collect();
        names.sort();
        Ok(names)
    }

    /// Writes an object, replacing what was there. Only for content-addressed objects: all
    /// writers write the same bytes. A large object is written in parts, since S3 takes
    /// no more than 5 GB by one request.
    pub async fn put(&self, key: &str, bytes: Bytes) -> Result<()> {
        self.put_pieces(key, bytes.into()).await
    }

    /// Does [`Self::put`] for an object that lies in pieces in memory.
    pub async fn put_pieces(&self, key: &str, pieces: PutPayload) -> Result<()> {
        let written = if pieces.content_length() <= PART_BYTES {
            self.store.put(&self.path(key), pieces).await.map(drop)
        } else {
            self.put_in_parts(key, pieces, PART_BYTES).await
        };
        written.map_err(|e| self.error("write", key, e))
    }

    async fn put_in_parts(
        &self,
        key: &str,
        pieces: PutPayload,
        part_bytes: usize,
    ) -> Result<(), object_store::Error> {
        let upload = self.store.put_multipart(&self.path(key)).await?;
        let mut write = WriteMultipart::new_with_chunk_size(upload, part_bytes);
        for piece in pieces.into_iter().flat_map(|bytes| cut(bytes, part_bytes)) {
            if let Err(cause) = write.wait_for_capacity(PARTS_AT_ONCE).await {
                // `abort` may fail too. Its error is dropped, since the first one says what
                // happened.
                drop(write.abort().await);
                return Err(cause);
            }
            write.put(piece);
        }
        write.finish().await.map(drop)
    }

    pub async fn delete(&self, key: &str) -> Result<()> {
        self.store
            .delete(&self.path(key))
            .await
            .map_err(|e| self.error("delete", key, e))
    }

    /// Deletes objects, many by one request if the store can. What is gone already is no error.
    pub async fn delete_all(&self, keys: &[String]) -> Result<()> {
        let paths: Vec<_> = keys.iter().map(|key| Ok(self.path(key))).collect();
        let mut outcomes = self
            .store
            .delete_stream(futures::stream::iter(paths).boxed());
        while let Some(outcome) = outcomes.next().await {
            match outcome {
                Ok(_) | Err(object_store::Error::NotFound { .. }) => {}
                Err(cause) => return Err(self.error("delete objects of", "", cause)),
            }
        }
        Ok(())
    }

    /// Removes the empty folders at and directly below `key` of a local disk. Object storage has
    /// none.
    pub async fn prune(&self, key: &str) {
        if self.uri.starts_with("file:") {
            local::prune(self.path(key)).await;
        }
    }

    /// Returns the error "cannot `verb` `uri`" with its cause. The reason is `StorageUnreachable`,
    /// which callers retry, or `InvalidArgument` for what no retry changes: a missing bucket, or
    /// what the hub does not give. Of a commit that the hub has lost it is `DatasetChanged`.
    pub fn error(&self, verb: &str, key: &str, cause: object_store::Error) -> Error {
        let uri = self.uri_of(key);
        if is_bucket_missing(&chain(&cause)) {
            let url = Url::parse(&uri).ok();
            let bucket = url.as_ref().and_then(Url::host_str).unwrap_or_default();
            let message = format!(
                "cannot {verb} {uri}: there is no bucket '{bucket}'; create it, or correct the URI"
            );
            return Error::invalid("uri", message)
                .with("uri", uri)
                .with("bucket", bucket);
        }
        if hub::is_commit_lost(&cause) {
            let message = format!(
                "cannot {verb} {uri}: the hub has no such commit (its history was squashed, or it \
                 never was there); start a new run on a commit that the hub has"
            );
            return Error::new(Reason::DatasetChanged, message)
                .with("shard", &uri)
                .with("uri", uri);
        }
        if let Some(why) = hub::refusal(&cause) {
            let message = format!("cannot {verb} {uri}: {why}");
            return Error::invalid("uri", message).with("uri", uri);
        }
        if matches!(cause, object_store::Error::InvalidPath { .. }) {
            let message = format!(
                "cannot {verb} {uri}: a name there cannot be read (it has an empty part, \
                 '..' or a sign of control); rename it or name another folder"
            );
            return Error::invalid("uri", message)
                .with("uri", uri)
                .because(cause);
        }
        Error::new(Reason::StorageUnreachable, format!("cannot {verb} {uri}"))
            .with("uri", uri)
            .because(cause)
    }
}

/// Returns whether no answer came, so that a later attempt may have one.
fn is_transport(error: &Error) -> bool {
    let causes = std::iter::successors(error.source(), |&cause| cause.source());
    let mut failures = causes.filter_map(|cause| cause.downcast_ref::<HttpError>());
    failures.any(|failure| {
        use HttpErrorKind::{Connect, Interrupted, Request, Timeout};
        matches!(failure.kind(), Connect | Interrupted | Request | Timeout)
    })
}

/// Cuts `bytes` into pieces of at most `size`.
fn cut(bytes: Bytes, size: usize) -> impl Iterator<Item = Bytes> {
    (0..bytes.len())
        .step_by(size)
        .map(move |at| bytes.slice(at..bytes.len().min(at + size)))
}

/// Returns whether a store's answer says that the bucket is missing, in the words of S3, Google
/// Cloud Storage and Azure. `object_store` reports a missing bucket and a missing object by the
/// same variant, so only the text distinguishes them.
pub(super) fn is_bucket_missing(answer: &str) -> bool {
    [
        "NoSuchBucket",
        "The specified bucket does not exist",
        "ContainerNotFound",
    ]
    .iter()
    .any(|sign| answer.contains(sign))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::tests::answering::answering;
    use crate::storage::{StorageConfig, Stores};

    /// Answers every request with one status and body, as a store without that bucket does.
    async fn store_that_says(
        status: &'static str,
        head: &'static str,
        body: &'static str,
    ) -> String {
        use tokio::io::{AsyncReadExt, AsyncWriteExt};
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        tokio::spawn(async move {
            while let Ok((mut socket, _)) = listener.accept().await {
                let mut request = vec![0; 1 << 16];
                let read = socket.read(&mut request).await;
                assert!(read.is_ok());
                let length = body.len();
                let answer = format!(
                    "HTTP/1.1 {status}\r\n{head}content-length: {length}\r\n\
                     connection: close\r\n\r\n{body}"
                );
                assert!(socket.write_all(answer.as_bytes()).await.is_ok());
            }
        });
        format!("http://{address}")
    }

    /// What object stores say of a bucket that is missing, as their real client passes it on.
    #[tokio::test]
    async fn a_missing_bucket_is_told_from_a_missing_object() {
        let s3 = "<Error><Code>NoSuchBucket</Code><Message>The specified bucket does not exist\
                  </Message></Error>";
        let azure = "<Error><Code>ContainerNotFound</Code><Message>The specified container does \
                     not exist.</Message></Error>";
        let azure_head = "x-ms-error-code: ContainerNotFound\r\n";
        let cases = [
            ("s3://nothing/k", "aws_endpoint", "", s3),
            ("azure://nothing/k", "azure_endpoint", azure_head, azure),
        ];
        for (uri, endpoint, head, body) in cases {
            let at = store_that_says("404 Not Found", head, body).await;
            let options = [
                (endpoint, at.as_str()),
                ("aws_allow_http", "true"),
                ("azure_allow_http", "true"),
                ("aws_region", "us-east-1"),
                ("aws_access_key_id", "a"),
                ("aws_secret_access_key", "b"),
                ("azure_storage_account_name", "a"),
                ("azure_storage_account_key", "YQ=="),
            ];
            let kind = &endpoint[..3];
            let options = options.iter().filter(|(name, _)| name.starts_with(kind));
            let config = StorageConfig {
                options: options
                    .map(|(n, v)| ((*n).to_owned(), (*v).to_owned()))
                    .collect(),
                ..Default::default()
            };
            let location = Stores::new(config).open(uri).unwrap();
            let error = location.find("").await.unwrap_err();
            assert_eq!(
                error.value("bucket"),
                Some("nothing"),
                "{uri}: {}",
                error.chain()
            );
        }
    }

    /// The real client's faults: a later attempt may be answered, a refusal stays one.
    #[tokio::test]
    async fn a_web_server_that_is_away_is_told_from_one_that_lists_nothing() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let away = format!("http://{}/pool", listener.local_addr().unwrap());
        drop(listener);
        let refuses = store_that_says("405 Method Not Allowed", "", "").await;
        for (uri, reason) in [
            (away, Reason::StorageUnreachable),
            (format!("{refuses}/pool"), Reason::InvalidArgument),
        ] {
            let mut config = StorageConfig::default();
            config.options.insert("allow_http".into(), "true".into());
            let location = Stores::new(config).open(&uri).unwrap();
            let error = location.list_files("").await.unwrap_err();
            assert_eq!(error.reason(), reason, "{}", error.chain());
        }
    }

    #[tokio::test]
    async fn an_object_begins_with_what_it_has() {
        let folder = tempfile::tempdir().unwrap();
        let local = format!("file://{}", folder.path().display());
        for uri in [local.as_str(), "memory:///state"] {
            let state = Stores::new(StorageConfig::default()).open(uri).unwrap();
            for (key, bytes, begins) in [("a", "", ""), ("b", "xy", "xy"), ("c", "wxyz", "wxy")] {
                state.put(key, bytes.into()).await.unwrap();
                let read = state.beginning(key, 3).await.unwrap();
                assert_eq!(read.as_deref(), Some(begins.as_bytes()), "{uri}/{key}");
            }
            assert_eq!(state.beginning("d", 3).await.unwrap(), None);
        }
    }

    #[tokio::test]
    async fn an_object_in_parts_is_the_same_object() {
        let state = Stores::new(StorageConfig::default())
            .open("memory:///state")
            .unwrap();
        let bytes: Bytes = (0..1000_u32).map(|n| n as u8).collect();
        // Whole parts, a short last one, and fewer bytes than a part.
        for part_bytes in [100, 64, 4096] {
            let key = format!("of/{part_bytes}");
            let pieces =
                PutPayload::from_iter([bytes.slice(..7), bytes.slice(7..400), bytes.slice(400..)]);
            state.put_in_parts(&key, pieces, part_bytes).await.unwrap();
            assert_eq!(state.get(&key).await.unwrap(), bytes);
            let read = state.get_in_parts(&key, part_bytes as u64).await.unwrap();
            assert_eq!(read.len(), 1000_usize.div_ceil(part_bytes));
            assert_eq!(read.concat(), bytes);
        }
    }

    /// Google Cloud Storage's own answers, through the client that reads them.
    #[tokio::test]
    async fn a_missing_bucket_of_google_is_told_from_a_missing_object() {
        let options = [
            ("google_base_url", "{}"),
            ("google_skip_signature", "true"),
            ("allow_http", "true"),
        ];
        let no_bucket = "<?xml version='1.0' encoding='UTF-8'?><Error><Code>NoSuchBucket</Code>\
            <Message>The specified bucket does not exist.</Message></Error>";
        let (state, _) = answering("gs://b/p", &options, "404 Not Found", no_bucket).await;
        for error in [
            state.find("k").await.unwrap_err(),
            state.get("k").await.unwrap_err(),
            state.end("k", 8).await.unwrap_err(),
        ] {
            assert_eq!(error.reason(), Reason::InvalidArgument);
            assert_eq!(error.value("bucket"), Some("b"));
        }
        let no_object = "<?xml version='1.0' encoding='UTF-8'?><Error><Code>NoSuchKey</Code>\
            <Message>The specified key does not exist.</Message></Error>";
        let (state, _) = answering("gs://b/p", &options, "404 Not Found", no_object).await;
        assert_eq!(state.find("k").await.unwrap(), None);
    }
}
