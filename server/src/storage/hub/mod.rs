//! Data sets on the Hugging Face hub, as a store that is only read: `hf://datasets/OWNER/NAME`.
//!
//! Files are read through `object_store`'s client of web servers, which has ranges and repetition;
//! listings and commits come from the hub's own interface. (`opendal` has a client of the hub, but
//! with a transfer library and an HTTP client of its own, past the guard of redirects.) A path
//! below a branch is looked up at the branch's commit of this moment: what is to stay the same is
//! opened at a commit ([`Pins`]).
mod account;
mod api;
mod pins;
mod place;
mod service;

use self::{
    account::Account,
    api::{Api, Kind},
    place::Place,
    service::{HubConnector, Patient},
};
use super::{StorageConfig, connect, retried::LoggingConnector};
use crate::error::Result as Outcome;
use async_trait::async_trait;
use futures::{
    StreamExt, TryStreamExt, future,
    stream::{self, BoxStream},
};
use object_store::{
    Attributes, ClientOptions, CopyOptions, Error, GetOptions, GetResult, GetResultPayload,
    ListResult, MultipartUpload, ObjectMeta, ObjectStore, PutMultipartOptions, PutOptions,
    PutPayload, PutResult, Result,
    client::{HttpClient, HttpConnector},
    http::{HttpBuilder, HttpStore},
    path::Path,
};
pub use pins::Pins;
pub(super) use place::{is_of, path};
use std::{error::Error as StdError, fmt, sync::Arc};

/// Among the extensions of a read: what is asked for is the commit of the path's revision, which
/// is the answer's version.
#[derive(Debug, Clone, Copy)]
struct AskCommit;

/// Why the hub gives no access, or why it was not asked, for people. No repetition changes it.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct Refused(String);

/// The hub does not have the commit at which a file is asked for, which is not to say that the file
/// is missing.
#[derive(Debug, thiserror::Error)]
#[error("the hub has no such commit")]
struct CommitLost;

/// Returns what the hub refused, if that is what failed.
pub(super) fn refusal(error: &Error) -> Option<String> {
    cause::<Refused>(error).map(ToString::to_string)
}

/// Returns whether the hub has lost the commit of what was to be read.
pub(super) fn is_commit_lost(error: &Error) -> bool {
    cause::<CommitLost>(error).is_some()
}

fn cause<T: StdError + 'static>(error: &Error) -> Option<&T> {
    let mut causes = std::iter::successors(error.source(), |&cause| cause.source());
    causes.find_map(|cause| cause.downcast_ref::<T>())
}

/// Makes the store of all data sets on the hub. No connection is opened yet.
///
/// # Errors
/// `InvalidArgument` if the environment forbids the hub, or cannot be used.
pub(super) fn connect(config: &StorageConfig) -> Outcome<Arc<dyn ObjectStore>> {
    let account = Arc::new(Account::of(&config.environment)?);
    let endpoint = account.endpoint.as_str();
    connect::check_plain_http(Some(endpoint), connect::allow_http(config), "allow_http")?;
    let options = connect::all_options(config);
    let options = options.fold(ClientOptions::new(), |options, (name, value)| {
        match name.to_ascii_lowercase().parse() {
            Ok(key) => options.with_config(key, value),
            Err(_) => options,
        }
    });
    let connector = LoggingConnector::over(HubConnector {
        account: account.clone(),
        allow: config.allow_uris.clone(),
    });
    let message = format!("cannot make a client of the hub at {endpoint}");
    let unusable = |e: Error| crate::error::Error::invalid("uri", message.clone()).because(e);
    let client = connector.connect(&options).map_err(unusable)?;
    let client = HttpClient::new(Patient(client));
    let files = HttpBuilder::new()
        .with_url(endpoint)
        .with_client_options(options)
        .with_http_connector(Connected(client.clone()))
        .build();
    let files = files.map_err(unusable)?;
    let api = Api { client, account };
    Ok(Arc::new(Hub { files, api }))
}

/// A client that is made already.
#[derive(Debug)]
struct Connected(HttpClient);

impl HttpConnector for Connected {
    fn connect(&self, _: &ClientOptions) -> Result<HttpClient> {
        Ok(self.0.clone())
    }
}

#[derive(Debug)]
struct Hub {
    files: HttpStore,
    api: Api,
}

impl fmt::Display for Hub {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Hub({})", self.api.account.endpoint)
    }
}

impl Hub {
    /// Lists what lies below `prefix`.
    fn entries(&self, prefix: Option<&Path>, recursive: bool) -> BoxStream<'static, Result<Found>> {
        let found = prefix.and_then(|prefix| Some((prefix, Place::of(prefix)?)));
        let Some((prefix, place)) = found else {
            let error = Err(refused("data sets are not listed; name one"));
            return stream::once(future::ready(error)).boxed();
        };
        // Under the name by which the caller knows the data set, whatever commit that is.
        let root: Path = prefix.parts().take(2).collect();
        let api = self.api.clone();
        let listing = async move {
            let commit = api.commit(&place.repository).await?;
            Ok::<_, Error>(api.entries(&place, &commit, recursive))
        };
        let found = move |entry: api::Entry| {
            let (kind, size) = (entry.kind, entry.size());
            let location = super::join(&root, &entry.path);
            let meta = meta(location, size, entry.etag());
            future::ready(Ok(Some(Found { kind, meta })))
        };
        stream::once(listing)
            .try_flatten()
            .try_filter_map(found)
            .boxed()
    }
}

struct Found {
    kind: Kind,
    meta: ObjectMeta,
}

/// Returns what is known of a file. The hub tells no time of writing.
fn meta(location: Path, size: u64, e_tag: Option<String>) -> ObjectMeta {
    ObjectMeta {
        location,
        last_modified: Default::default(),
        size,
        e_tag,
        version: None,
    }
}

/// Returns the error `NotFound` of a file whose commit is lost: a shard of it is gone. Who reads
/// what may be missing asks [`is_commit_lost`].
fn lost_or(error: Error, location: &Path) -> Error {
    if !is_commit_lost(&error) {
        return error;
    }
    Error::NotFound {
        path: location.to_string(),
        source: error.into(),
    }
}

fn refused(why: &str) -> Error {
    Error::Generic {
        store: "hub",
        source: Box::new(Refused(why.to_owned())),
    }
}

fn only_read() -> Error {
    refused("data sets on the hub are only read, so nothing is written, copied or deleted there")
}

#[async_trait]
impl ObjectStore for Hub {
    async fn get_opts(&self, location: &Path, options: GetOptions) -> Result<GetResult> {
        let missing = || Error::NotFound {
            path: location.to_string(),
            source: "no file is named".into(),
        };
        let place = Place::of(location).ok_or_else(missing)?;
        let commit = self.api.commit(&place.repository).await?;
        if options.extensions.get::<AskCommit>().is_some() {
            let mut meta = meta(location.clone(), 0, None);
            meta.version = Some(commit);
            return Ok(GetResult {
                payload: GetResultPayload::Stream(stream::empty().boxed()),
                meta,
                range: 0..0,
                attributes: Attributes::new(),
                extensions: Default::default(),
            });
        }
        if place.file.is_empty() {
            return Err(missing());
        }
        let resolved = place.resolved(&commit)?;
        let found = self.files.get_opts(&resolved, options).await;
        let mut found = found.map_err(|error| lost_or(error, location))?;
        found.meta.location = location.clone();
        Ok(found)
    }

    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, Result<ObjectMeta>> {
        let files = |found: Found| {
            let is_file = found.kind == Kind::File;
            future::ready(Ok(is_file.then_some(found.meta)))
        };
        self.entries(prefix, true).try_filter_map(files).boxed()
    }

    async fn list_with_delimiter(&self, prefix: Option<&Path>) -> Result<ListResult> {
        let mut found = ListResult {
            common_prefixes: Vec::new(),
            objects: Vec::new(),
            extensions: Default::default(),
        };
        let mut entries = self.entries(prefix, false);
        while let Some(Found { kind, meta }) = entries.try_next().await? {
            match kind {
                Kind::File => found.objects.push(meta),
                Kind::Directory => found.common_prefixes.push(meta.location),
                Kind::Other => {}
            }
        }
        Ok(found)
    }

    async fn put_opts(&self, _: &Path, _: PutPayload, _: PutOptions) -> Result<PutResult> {
        Err(only_read())
    }

    async fn put_multipart_opts(
        &self,
        _: &Path,
        _: PutMultipartOptions,
    ) -> Result<Box<dyn MultipartUpload>> {
        Err(only_read())
    }

    fn delete_stream(
        &self,
        locations: BoxStream<'static, Result<Path>>,
    ) -> BoxStream<'static, Result<Path>> {
        locations.map(|_| Err(only_read())).boxed()
    }

    async fn copy_opts(&self, _: &Path, _: &Path, _: CopyOptions) -> Result<()> {
        Err(only_read())
    }
}

#[cfg(test)]
pub(crate) mod tests;
