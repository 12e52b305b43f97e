//! Object storage: opening URIs, keys below them, and facts that are written once.
mod budget;
mod connect;
mod copy;
mod deadline;
mod disk;
mod disk_cache;
mod draft;
mod facts;
mod guard;
mod hub;
mod local;
mod location;
mod metered;
mod named;
mod options;
mod parts;
mod retried;
mod uri;

use self::{
    deadline::Deadlines,
    uri::{below, leaves_folder, parse_uri},
};
use crate::{
    blocking::blocking,
    bounds::URI_BYTES_MAX,
    error::{Error, Result},
};
pub use budget::Budget;
pub use disk_cache::DiskCache;
pub use draft::{Draft, FLUSHED_WITHIN};
pub use facts::Created;
pub use facts::is_deleted;
pub use facts::is_passing;
pub use facts::nonce;
pub use facts::probe;
pub use hub::Pins;
#[cfg(test)]
pub(crate) use hub::tests as hub_tests;
pub use location::Location;
pub use metered::metered;
pub use named::Found;
use object_store::{ObjectStore, path::Path};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::{
    collections::{BTreeMap, HashMap},
    fmt,
    path::PathBuf,
    sync::{Arc, Mutex},
};
use superbatch_proto::v1::Reason;
pub use uri::can_hold_state;
use url::Url;

/// Which storage may be used, and how it is reached.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct StorageConfig {
    /// URI prefixes that requests may name for data and models. If this is empty, everything is
    /// allowed on loopback.
    pub allow_uris: Vec<String>,
    /// Options of the object store client, such as `aws_endpoint`, `aws_region` or
    /// `aws_allow_http`. Credentials are found the standard way (environment, web identity,
    /// instance metadata); what is given here comes before them. `timeout` is how long one attempt
    /// of a request may take (30 s if it is not given), and `connect_timeout` its connection (5
    /// s).
    #[serde(deserialize_with = "options::plain_values")]
    pub options: BTreeMap<String, String>,
    /// Longest wait for the answer to a request, in seconds, with all attempts that the store's
    /// client makes: up to 11, with waits between them that grow from 0.1 s to 15 s, none later
    /// than 180 s after the first. A store that refuses connections is so given up after a few
    /// seconds.
    pub answer_timeout_seconds: f64,
    /// Longest wait for more bytes in the middle of an object that is read, in seconds. A local
    /// file is read in one piece, for which the answer's timeout holds.
    pub stall_timeout_seconds: f64,
    /// Most memory for ids, in bytes: for a source's `allow` while it is indexed (16 for each id),
    /// and for the files beside sources (`scores`) that are in use (24 for each of their rows and
    /// column). What would take more is refused.
    pub ids_bytes_max: u64,
    /// Options from the environment, credentials among them; never printed.
    #[serde(skip)]
    pub environment: BTreeMap<String, String>,
}

impl StorageConfig {
    /// Refuses options that no store knows.
    ///
    /// # Errors
    /// `InvalidArgument`, naming the field.
    pub fn validate(&self) -> Result<()> {
        options::check(self.options.keys())
    }

    /// Replaces the values of keys, tokens and passwords by "(hidden)", before the settings are
    /// printed.
    pub fn hide_secrets(&mut self) {
        let secrets = self
            .options
            .iter_mut()
            .filter(|(name, _)| options::is_secret(name));
        secrets.for_each(|(_, value)| *value = "(hidden)".to_owned());
    }
}

impl Default for StorageConfig {
    fn default() -> Self {
        Self {
            allow_uris: Vec::new(),
            options: BTreeMap::new(),
            answer_timeout_seconds: 240.0,
            stall_timeout_seconds: 60.0,
            ids_bytes_max: 4 << 30,
            environment: BTreeMap::new(),
        }
    }
}

/// Wraps each store that is opened. Requests are counted, and faults injected in tests, by such a
/// wrapper.
pub type Wrap = Arc<dyn Fn(Arc<dyn ObjectStore>) -> Arc<dyn ObjectStore> + Send + Sync>;

/// Opens URIs. Cheap to clone. One client per bucket is kept, and `memory:` is one store per
/// `Stores`. Some keep what is read of remote shards on disk.
#[derive(Clone)]
pub struct Stores(Arc<Inner>, Option<DiskCache>);

struct Inner {
    config: StorageConfig,
    wrap: Option<Wrap>,
    open: Mutex<HashMap<String, Arc<dyn ObjectStore>>>,
}

impl fmt::Debug for Stores {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Not the whole configuration: it has credentials.
        f.debug_struct("Stores")
            .field("allow_uris", &self.0.config.allow_uris)
            .finish_non_exhaustive()
    }
}

impl Stores {
    pub fn new(config: StorageConfig) -> Self {
        Self::build(config, None)
    }

    /// As [`Stores::new`], with every store wrapped by `wrap`.
    pub fn wrapped(config: StorageConfig, wrap: Wrap) -> Self {
        Self::build(config, Some(wrap))
    }

    fn build(config: StorageConfig, wrap: Option<Wrap>) -> Self {
        let open = Mutex::default();
        Self(Arc::new(Inner { config, wrap, open }), None)
    }

    /// Returns these stores with a cache in `folder`, for blocks of remote shards.
    ///
    /// # Errors
    /// `InvalidArgument` if another process has the folder, or it cannot be used.
    pub async fn caching_in(&self, folder: PathBuf, bytes_max: u64) -> Result<Self> {
        let place = options::place(connect::all_options(&self.0.config));
        let open = move || DiskCache::open(folder, bytes_max, place);
        let cache = blocking("opening the disk cache", open).await?;
        Ok(Self(self.0.clone(), Some(cache)))
    }

    /// Returns [`StorageConfig::ids_bytes_max`].
    pub fn ids_bytes_max(&self) -> u64 {
        self.0.config.ids_bytes_max
    }

    /// Returns the cache on disk for blocks of remote shards, if there is one.
    pub fn disk_cache(&self) -> Option<&DiskCache> {
        self.1.as_ref()
    }

    /// Opens a URI from a request. Refuses it with `UriNotAllowed` unless the allow-list holds it.
    pub fn open_allowed(&self, uri: &str) -> Result<Location> {
        self.allow(uri)?;
        self.open(uri)
    }

    /// Checks that a request may name `uri`, which may be a pattern.
    ///
    /// # Errors
    /// `UriNotAllowed`.
    pub fn allow(&self, uri: &str) -> Result<()> {
        let allow = &self.0.config.allow_uris;
        // Only whole folders before the first wildcard are known: "data*" also matches "database".
        // So the folder that holds the wildcard must be allowed, not the text before it.
        let plain = match uri.find(['{', '*', '?', '[']) {
            Some(at) => uri[..at].rsplit_once('/').map_or("", |(folder, _)| folder),
            None => uri,
        };
        let is_metadata = || Url::parse(uri).is_ok_and(|url| guard::is_metadata(&url));
        if leaves_folder(uri)
            || is_metadata()
            || !(allow.is_empty() || allow.iter().any(|p| below(plain, p)))
        {
            let message = format!(
                "{uri} is not below any prefix of storage.allow_uris; ask the operator to add it"
            );
            return Err(Error::new(Reason::UriNotAllowed, message).with("uri", uri));
        }
        Ok(())
    }

    /// Opens a URI that another process names in a call. It must lie below the operator's own
    /// `state` or be on the allow-list.
    ///
    /// # Errors
    /// As [`Stores::open_allowed`].
    pub fn open_named(&self, uri: &str, state: &Location) -> Result<Location> {
        if !leaves_folder(uri) && below(uri, state.uri()) {
            self.open(uri)
        } else {
            self.open_allowed(uri)
        }
    }

    /// Opens a URI from the operator's own settings: `file:///…`, `s3://bucket/…`, `memory:///…`,
    /// `http(s)://…`, `hf://datasets/…`.
    ///
    /// # Errors
    /// `InvalidArgument` if it is no such URI. No connection is opened yet.
    pub fn open(&self, uri: &str) -> Result<Location> {
        if uri.len() > URI_BYTES_MAX {
            let message = format!(
                "a URI of {} bytes is too long; at most {URI_BYTES_MAX}",
                uri.len()
            );
            return Err(Error::invalid("uri", message));
        }
        let (url, kind, path) = parse_uri(uri)?;
        let key = format!("{}://{}", url.scheme(), url.authority());
        let mut open = self.0.open.lock().expect("no panic while held");
        let store = match open.get(&key) {
            Some(store) => store.clone(),
            None => {
                self.0.config.validate()?;
                let store = connect::connect(&kind, &url, &self.0.config)?;
                let store = self
                    .0
                    .wrap
                    .as_ref()
                    .map_or(store.clone(), |wrap| wrap(store));
                // The deadline is the outermost layer, so that it also ends a request that hangs
                // inside another wrapper.
                let store = Deadlines::new(&self.0.config).around(store);
                open.insert(key, store.clone());
                store
            }
        };
        Ok(Location::new(store, path, uri))
    }
}

/// Joins `base` and `key` to one object path. A key is a name as it is stored, never an encoded
/// one. Characters that no path can hold are encoded, which gives a path at which no object lies.
pub(crate) fn join(base: &Path, key: &str) -> Path {
    let whole = match (base.as_ref(), key) {
        (base, "") => base.to_owned(),
        ("", key) => key.to_owned(),
        (base, key) => format!("{base}/{key}"),
    };
    Path::parse(&whole)
        .unwrap_or_else(|_| Path::from_iter(base.parts().chain(Path::from(key).parts())))
}

#[cfg(test)]
mod tests {
    pub(super) mod answering;

    use super::*;

    #[test]
    fn requests_stay_below_the_allow_list() {
        let config = StorageConfig {
            allow_uris: vec!["memory:///data/".into()],
            ..Default::default()
        };
        let stores = Stores::new(config);
        assert!(
            stores
                .open_allowed("memory:///data/a/{0..3}.parquet")
                .is_ok()
        );
        for good in [
            "memory:///data/a",
            "memory:///data/a/{0..3}.tar",
            "memory:///data/*",
        ] {
            stores.allow(good).unwrap();
        }
        for bad in [
            "memory:///database/a",
            "memory:///data/../secret",
            "memory:///data*/x.parquet",
            "memory:///data{,base}/x.parquet",
            "file:///etc/passwd",
        ] {
            let error = stores.open_allowed(bad).map(drop).unwrap_err();
            assert_eq!(error.reason(), Reason::UriNotAllowed, "{bad}");
        }
    }

    #[test]
    fn what_a_call_names_lies_in_the_state_or_is_allowed() {
        let config = StorageConfig {
            allow_uris: vec!["memory:///data".into()],
            ..Default::default()
        };
        let stores = Stores::new(config);
        let state = stores.open("memory:///state").unwrap();
        for good in [
            "memory:///state/runs/r/snapshots/d.safetensors",
            "memory:///data/model",
        ] {
            assert!(stores.open_named(good, &state).is_ok(), "{good}");
        }
        for bad in [
            "memory:///state/../secret",
            "memory:///state/%2e%2e/secret",
            "memory:///statement",
            "file:///etc/passwd",
        ] {
            let error = stores.open_named(bad, &state).map(drop).unwrap_err();
            assert_eq!(error.reason(), Reason::UriNotAllowed, "{bad}");
        }
        let long = format!("memory:///data/{}", "a/".repeat(1 << 20));
        let error = stores.open_allowed(&long).map(drop).unwrap_err();
        assert_eq!(error.reason(), Reason::InvalidArgument);
    }

    #[test]
    fn two_slashes_are_told_of_the_third() {
        let stores = Stores::new(StorageConfig::default());
        for (uri, meant) in [
            ("file://pool", "file:///pool"),
            ("file://data/x", "file:///data/x"),
            ("memory://x", "memory:///x"),
        ] {
            let error = stores.open(uri).map(drop).unwrap_err().chain();
            assert!(
                error.ends_with(&format!("write three slashes, as in {meant}")),
                "{error}"
            );
        }
    }

    #[test]
    fn memory_is_one_store() {
        let stores = Stores::new(StorageConfig::default());
        let (a, b) = (
            stores.open("memory:///x").unwrap(),
            stores.open("memory:///y").unwrap(),
        );
        assert!(Arc::ptr_eq(a.store(), b.store()));
    }
}
