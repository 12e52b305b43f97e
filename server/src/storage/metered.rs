//! Counts the requests to an object store and the bytes read.
use crate::metrics;
use async_trait::async_trait;
use bytes::Bytes;
use futures::{
    StreamExt, TryStreamExt, future,
    stream::{self, BoxStream},
};
use object_store::{
    CopyOptions, Error, GetOptions, GetResult, GetResultPayload, ListResult, MultipartUpload,
    ObjectMeta, ObjectStore, PutMultipartOptions, PutOptions, PutPayload, PutResult, RenameOptions,
    Result, UploadPart, path::Path,
};
use std::{fmt, ops::Range, sync::Arc};

/// Wraps a store in a meter: `Stores::wrapped(config, Arc::new(metered))`. It counts how each
/// request ended, not the retries that the store's client makes by itself.
pub fn metered(store: Arc<dyn ObjectStore>) -> Arc<dyn ObjectStore> {
    Arc::new(Metered(store))
}

#[derive(Debug)]
struct Metered(Arc<dyn ObjectStore>);

impl fmt::Display for Metered {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Metered({})", self.0)
    }
}

/// Counts one ended request, and passes its result on.
fn count<T>(operation: &'static str, result: Result<T>) -> Result<T> {
    let outcome = result.as_ref().map_or_else(outcome, |_| "ok");
    metrics::object_store_requests(operation, outcome).increment(1);
    if outcome == "throttled" {
        metrics::object_store_throttled().increment(1);
    }
    result
}

fn outcome(error: &Error) -> &'static str {
    match error {
        Error::NotFound { .. } => "not_found",
        Error::AlreadyExists { .. } | Error::Precondition { .. } => "exists",
        // `object_store` keeps the HTTP status only in the error's text.
        Error::Generic { source, .. } => {
            let text = source.to_string();
            let throttled = ["429 Too Many", "503 Service", "SlowDown"]
                .iter()
                .any(|sign| text.contains(sign));
            if throttled { "throttled" } else { "error" }
        }
        _ => "error",
    }
}

/// Counts a listing, once, when it has ended or failed.
fn count_list<T: Send + 'static>(
    listing: BoxStream<'static, Result<T>>,
) -> BoxStream<'static, Result<T>> {
    let end = stream::once(future::ready(None));
    let counted = listing.map(Some).chain(end).scan(false, |failed, item| {
        let item = match item {
            Some(Ok(found)) => Some(Ok(found)),
            Some(Err(error)) => {
                *failed = true;
                Some(count("list", Err(error)))
            }
            None if *failed => None,
            None => count("list", Ok(None)).unwrap_or_default(),
        };
        future::ready(Some(item))
    });
    counted.filter_map(future::ready).boxed()
}

#[async_trait]
// The trait's default methods call other methods of the same trait. A wrapper that relied on them
// would count `get_ranges` as many gets, or bypass what the inner store overrides.
#[deny(clippy::missing_trait_methods)]
impl ObjectStore for Metered {
    async fn put_opts(
        &self,
        location: &Path,
        payload: PutPayload,
        options: PutOptions,
    ) -> Result<PutResult> {
        count("put", self.0.put_opts(location, payload, options).await)
    }

    async fn put_multipart_opts(
        &self,
        at: &Path,
        options: PutMultipartOptions,
    ) -> Result<Box<dyn MultipartUpload>> {
        let upload = count(
            "put_multipart",
            self.0.put_multipart_opts(at, options).await,
        )?;
        Ok(Box::new(MeteredUpload(upload)))
    }

    async fn get_opts(&self, location: &Path, options: GetOptions) -> Result<GetResult> {
        let operation = if options.head { "head" } else { "get" };
        let result = count(operation, self.0.get_opts(location, options).await)?;
        let payload = match result.payload {
            GetResultPayload::Stream(bytes) if operation == "get" => {
                let read = |bytes: &Bytes| {
                    metrics::object_store_bytes_read().increment(bytes.len() as u64)
                };
                GetResultPayload::Stream(bytes.inspect_ok(read).boxed())
            }
            GetResultPayload::File(..) if operation == "get" => {
                metrics::object_store_bytes_read().increment(result.range.end - result.range.start);
                result.payload
            }
            unread => unread,
        };
        Ok(GetResult { payload, ..result })
    }

    async fn get_ranges(&self, location: &Path, ranges: &[Range<u64>]) -> Result<Vec<Bytes>> {
        let read = count("get", self.0.get_ranges(location, ranges).await)?;
        metrics::object_store_bytes_read()
            .increment(read.iter().map(|bytes| bytes.len() as u64).sum());
        Ok(read)
    }

    fn delete_stream(
        &self,
        locations: BoxStream<'static, Result<Path>>,
    ) -> BoxStream<'static, Result<Path>> {
        self.0
            .delete_stream(locations)
            .map(|result| count("delete", result))
            .boxed()
    }

    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, Result<ObjectMeta>> {
        count_list(self.0.list(prefix))
    }

    fn list_with_offset(
        &self,
        prefix: Option<&Path>,
        offset: &Path,
    ) -> BoxStream<'static, Result<ObjectMeta>> {
        count_list(self.0.list_with_offset(prefix, offset))
    }

    async fn list_with_delimiter(&self, prefix: Option<&Path>) -> Result<ListResult> {
        count("list", self.0.list_with_delimiter(prefix).await)
    }

    async fn copy_opts(&self, from: &Path, to: &Path, options: CopyOptions) -> Result<()> {
        count("copy", self.0.copy_opts(from, to, options).await)
    }

    async fn rename_opts(&self, from: &Path, to: &Path, options: RenameOptions) -> Result<()> {
        count("rename", self.0.rename_opts(from, to, options).await)
    }
}

#[derive(Debug)]
struct MeteredUpload(Box<dyn MultipartUpload>);

#[async_trait]
impl MultipartUpload for MeteredUpload {
    fn put_part(&mut self, data: PutPayload) -> UploadPart {
        let part = self.0.put_part(data);
        Box::pin(async { count("put_part", part.await) })
    }

    async fn complete(&mut self) -> Result<PutResult> {
        count("put_complete", self.0.complete().await)
    }

    async fn abort(&mut self) -> Result<()> {
        count("put_abort", self.0.abort().await)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::{Created, StorageConfig, Stores, tests::answering::server};
    use metrics_exporter_prometheus::PrometheusBuilder;
    use object_store::{
        ClientOptions, RetryConfig, StaticCredentialProvider,
        aws::AmazonS3Builder,
        azure::MicrosoftAzureBuilder,
        gcp::{GcpCredential, GoogleCloudStorageBuilder},
    };
    use std::sync::atomic::Ordering;

    async fn use_a_store() {
        let state = Stores::wrapped(StorageConfig::default(), Arc::new(metered))
            .open("memory:///m")
            .unwrap();
        state.put("a/x", Bytes::from("12345")).await.unwrap();
        assert_eq!(state.get("a/x").await.unwrap(), "12345");
        assert_eq!(state.find("a/y").await.unwrap(), None);
        assert_eq!(state.head("a/x").await.unwrap().unwrap().size, 5);
        assert!(matches!(
            state.create("a/x", Bytes::from("2")).await.unwrap(),
            Created::Theirs(_)
        ));
        assert_eq!(state.list("a").await.unwrap().len(), 1);
        assert_eq!(
            state
                .store()
                .get_ranges(&state.path("a/x"), &[0..2, 3..4])
                .await
                .unwrap(),
            ["12", "4"]
        );
        state.delete("a/x").await.unwrap();
    }

    #[test]
    fn every_request_is_counted_by_how_it_ended() {
        let recorder = PrometheusBuilder::new().build_recorder();
        // On this thread alone, where the recorder is.
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_time()
            .build()
            .unwrap();
        ::metrics::with_local_recorder(&recorder, || runtime.block_on(use_a_store()));
        let page = recorder.handle().render();
        let counted = |operation: &str, outcome: &str| {
            let labels = format!("{{operation=\"{operation}\",outcome=\"{outcome}\"}} ");
            let line = page
                .lines()
                .find_map(|line| Some(line.split_once(&labels)?.1.to_owned()));
            line.map_or(0, |count| count.parse().unwrap())
        };
        assert_eq!(
            (counted("put", "ok"), counted("put", "exists")),
            (1, 1),
            "{page}"
        );
        // get, the read after the conflict, and two ranges in one.
        assert_eq!(
            (
                counted("get", "ok"),
                counted("get", "not_found"),
                counted("head", "ok")
            ),
            (3, 1, 1),
            "{page}"
        );
        assert_eq!(
            (counted("list", "ok"), counted("delete", "ok")),
            (1, 1),
            "{page}"
        );
        assert!(
            page.contains("superbatch_object_store_bytes_read_total 13\n"),
            "5 + 5 + 3 bytes: {page}"
        );
    }

    /// Clients of all three clouds at `address`, which try once.
    fn clients(address: &str) -> [Box<dyn ObjectStore>; 3] {
        let once = RetryConfig {
            max_retries: 0,
            ..RetryConfig::default()
        };
        let http = ClientOptions::new().with_allow_http(true);
        let s3 = AmazonS3Builder::new()
            .with_endpoint(address)
            .with_region("us-east-1")
            .with_bucket_name("b")
            .with_access_key_id("a")
            .with_secret_access_key("b")
            .with_client_options(http.clone())
            .with_retry(once.clone());
        let google = GoogleCloudStorageBuilder::new()
            .with_config("google_base_url".parse().unwrap(), address)
            .with_credentials(Arc::new(StaticCredentialProvider::new(GcpCredential {
                bearer: "a".into(),
            })))
            .with_bucket_name("b")
            .with_client_options(http.clone())
            .with_retry(once.clone());
        let azure = MicrosoftAzureBuilder::new()
            .with_endpoint(address.to_owned())
            .with_account("a")
            .with_container_name("b")
            .with_skip_signature(true)
            .with_client_options(http)
            .with_retry(once);
        [
            Box::new(s3.build().unwrap()),
            Box::new(google.build().unwrap()),
            Box::new(azure.build().unwrap()),
        ]
    }

    /// The clients' own words, which nothing but this test keeps as they are.
    #[tokio::test]
    async fn a_store_that_says_slow_down_is_seen() {
        let slow_down = "<Error><Code>SlowDown</Code><Message>Reduce your request rate.</Message>\
            </Error>";
        for (status, body, expected) in [
            ("503 Slow Down", slow_down, "throttled"),
            ("503 Service Unavailable", "", "throttled"),
            ("429 Too Many Requests", "", "throttled"),
            ("500 Internal Server Error", "", "error"),
            (
                "403 Forbidden",
                "<Error><Code>AccessDenied</Code></Error>",
                "error",
            ),
        ] {
            let (address, asked) = server(status, body).await;
            for store in clients(&address) {
                let key = Path::from("k");
                let errors = [
                    store.get_opts(&key, GetOptions::default()).await.map(drop),
                    store
                        .put_opts(&key, "x".into(), PutOptions::default())
                        .await
                        .map(drop),
                    store.list(None).try_next().await.map(drop),
                ];
                for error in errors {
                    let error = error.unwrap_err();
                    assert_eq!(outcome(&error), expected, "{status}: {error}");
                }
            }
            assert_eq!(
                asked.load(Ordering::Relaxed),
                9,
                "each request was made once"
            );
        }
        // Nothing listens there.
        for store in clients("http://127.0.0.1:1") {
            let error = store.list(None).try_next().await.unwrap_err();
            assert_eq!(outcome(&error), "error", "{error}");
        }
    }
}
