//! The store against a server that speaks as the hub does. `tests/python/test_hub.py` has a whole
//! run on one that the hub's own client uses too.
use super::*;
use crate::storage::{StorageConfig, Stores, can_hold_state};
use axum::{
    Router,
    body::Body,
    extract::{Request, State},
    response::Response,
};
use object_store::GetRange;
use std::sync::{
    Mutex,
    atomic::{AtomicBool, AtomicUsize, Ordering},
};
use superbatch_proto::v1::Reason;

pub(crate) const COMMITS: [&str; 2] = [
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    "bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb",
];
pub(crate) const LARGE: &str = "0123456789";

/// What is asked of a server: method, path with query, and token.
type Asked = Mutex<Vec<(String, String, Option<String>)>>;

#[derive(Default)]
pub(crate) struct Fake {
    cdn: String,
    /// How often the branch has moved.
    pub(crate) moved: AtomicUsize,
    /// Whether the commits are lost.
    pub(crate) lost: AtomicBool,
    /// How many requests are still refused as too many.
    throttled: AtomicUsize,
    asked: Asked,
}

impl Fake {
    fn note(&self, request: &Request) -> String {
        let token = request.headers().get("authorization");
        let token = token.map(|token| token.to_str().unwrap().to_owned());
        let uri = request.uri().to_string();
        let mut asked = self.asked.lock().unwrap();
        asked.push((request.method().to_string(), uri.clone(), token));
        uri
    }

    pub(crate) fn asked(&self) -> Vec<(String, String, Option<String>)> {
        std::mem::take(&mut *self.asked.lock().unwrap())
    }
}

fn answer(status: u16, headers: &[(&str, &str)], body: impl Into<Body>) -> Response {
    let builder = Response::builder().status(status);
    let builder = headers.iter().fold(builder, |builder, (name, value)| {
        builder.header(*name, *value)
    });
    builder.body(body.into()).unwrap()
}

async fn hub(State(fake): State<Arc<Fake>>, request: Request) -> Response {
    let uri = fake.note(&request);
    let less = |left: usize| left.checked_sub(1);
    let (set, get) = (Ordering::Relaxed, Ordering::Relaxed);
    if fake.throttled.fetch_update(set, get, less).is_ok() {
        return answer(429, &[("retry-after", "0")], "");
    }
    if uri.contains("/o/gated/") {
        return answer(401, &[("x-error-code", "GatedRepo")], "");
    }
    if uri.contains("/o/none/") {
        return answer(401, &[("x-error-code", "RepoNotFound")], "");
    }
    let (path, query) = uri.split_once('?').unwrap_or((uri.as_str(), ""));
    if let Some(revision) = path.strip_prefix("/api/datasets/o/n/revision/") {
        let commit = COMMITS[fake.moved.load(Ordering::Relaxed)];
        return match revision {
            "main" | "dev%2Fx" => answer(200, &[], format!(r#"{{"sha":"{commit}"}}"#)),
            _ => answer(404, &[("x-error-code", "RevisionNotFound")], ""),
        };
    }
    if let Some(listed) = path.strip_prefix("/api/datasets/o/n/tree/") {
        let Some((_, "data")) = listed.split_once('/') else {
            return answer(404, &[("x-error-code", "EntryNotFound")], "");
        };
        if query.contains("cursor=2") {
            let page = r#"[{"type":"file","path":"data/deep/small","size":5,"oid":"git"}]"#;
            return answer(200, &[], page);
        }
        let page = r#"[{"type":"file","path":"data/large","size":10,"oid":"pointer",
            "lfs":{"oid":"sha","size":10,"pointerSize":1}},
            {"type":"directory","path":"data/deep","size":0,"oid":"tree"}]"#;
        let next = format!("<https://elsewhere.example{path}?{query}&cursor=2>; rel=\"next\"");
        return answer(200, &[("link", next.as_str())], page);
    }
    let file = path
        .strip_prefix("/datasets/o/n/resolve/")
        .unwrap_or_default();
    if !file.is_empty() && fake.lost.load(Ordering::Relaxed) {
        return answer(
            404,
            &[("x-error-code", "RevisionNotFound")],
            "Invalid rev id",
        );
    }
    match file.split_once('/') {
        Some((_, "data/unexplained")) => answer(404, &[], ""),
        Some((commit, "data/not-in-cdn")) => {
            let to = format!("{}/{commit}/none?signature=s", fake.cdn);
            answer(302, &[("location", to.as_str())], "")
        }
        Some((commit, "data/large")) => {
            let to = format!("{}/{commit}/large?signature=s", fake.cdn);
            let linked = [("x-linked-etag", "\"sha\""), ("x-linked-size", "10")];
            answer(
                302,
                &[&linked[..], &[("location", to.as_str())]].concat(),
                "",
            )
        }
        Some((_, "data/deep/small")) => {
            let to = "/api/resolve-cache/small?etag=git";
            answer(307, &[("location", to)], "")
        }
        _ if path == "/api/resolve-cache/small" => content(&request, "\"git\"", "small"),
        _ => answer(404, &[("x-error-code", "EntryNotFound")], "Entry not found"),
    }
}

/// Answers with the whole of a file, or the range that is asked for: hub and CDN both give ranges.
fn content(request: &Request, etag: &str, whole: &'static str) -> Response {
    let range = request
        .headers()
        .get("range")
        .map(|range| range.to_str().unwrap());
    let Some((first, last)) = range.and_then(|r| r.strip_prefix("bytes=")?.split_once('-')) else {
        return answer(200, &[("etag", etag)], whole);
    };
    let (first, last): (usize, usize) = (first.parse().unwrap(), last.parse().unwrap());
    let range = format!("bytes {first}-{last}/{}", whole.len());
    let headers = [("etag", etag), ("content-range", range.as_str())];
    answer(206, &headers, &whole[first..=last])
}

async fn cdn(State(fake): State<Arc<Fake>>, request: Request) -> Response {
    let uri = fake.note(&request);
    if uri.ends_with("/none?signature=s") {
        return answer(404, &[], "NoSuchKey of signature=s");
    }
    assert!(uri.ends_with("/large?signature=s"), "{uri}");
    content(&request, "\"own\"", LARGE)
}

async fn served(fake: Fake, handler: fn(Arc<Fake>) -> Router) -> (Arc<Fake>, String) {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = format!("http://{}", listener.local_addr().unwrap());
    let fake = Arc::new(fake);
    let router = handler(fake.clone());
    tokio::spawn(axum::serve(listener, router).into_future());
    (fake, address)
}

/// A hub with the data set `o/n`, which has the files `data/large` and `data/deep/small`, and its
/// CDN.
pub(crate) struct Servers {
    pub(crate) hub: Arc<Fake>,
    pub(crate) cdn: Arc<Fake>,
    endpoint: String,
}

impl Servers {
    pub(crate) async fn start() -> Self {
        let of_cdn = |fake: Arc<Fake>| -> Router { Router::new().fallback(cdn).with_state(fake) };
        let (cdn, address) = served(Fake::default(), of_cdn).await;
        let fake = Fake {
            cdn: address,
            ..Fake::default()
        };
        let of_hub = |fake: Arc<Fake>| -> Router { Router::new().fallback(hub).with_state(fake) };
        let (hub, endpoint) = served(fake, of_hub).await;
        Self { hub, cdn, endpoint }
    }

    pub(crate) fn stores(&self, allow: &[&str], token: &str) -> Stores {
        let pairs = |pairs: &[(&str, &str)]| {
            let pair = |(name, value): &(&str, &str)| ((*name).to_owned(), (*value).to_owned());
            pairs.iter().map(pair).collect()
        };
        Stores::new(StorageConfig {
            allow_uris: allow.iter().map(|uri| (*uri).to_owned()).collect(),
            options: pairs(&[("allow_http", "true")]),
            environment: pairs(&[("hf_endpoint", self.endpoint.as_str()), ("hf_token", token)]),
            ..StorageConfig::default()
        })
    }
}

#[tokio::test]
async fn files_are_listed_and_read_and_the_token_stays_at_the_hub() {
    let servers = Servers::start().await;
    let stores = servers.stores(&[], "secret");
    let root = stores.open("hf://datasets/o/n@dev%2Fx/data").unwrap();
    let mut files = root.list_files("").await.unwrap();
    files.sort_by(|a, b| a.0.cmp(&b.0));
    let known = |(path, meta): &(String, ObjectMeta)| (path.clone(), meta.size, meta.e_tag.clone());
    let known: Vec<_> = files.iter().map(known).collect();
    let file = |path: &str, size: u64, etag: &str| (path.to_owned(), size, Some(etag.to_owned()));
    assert_eq!(
        known,
        [file("deep/small", 5, "git"), file("large", 10, "sha")]
    );
    for (path, meta) in &files {
        let found = root.head(path).await.unwrap().unwrap();
        let etag = format!("\"{}\"", meta.e_tag.as_ref().unwrap());
        assert_eq!((found.size, found.e_tag), (meta.size, Some(etag)), "{path}");
        assert_eq!(found.location, meta.location);
    }
    assert!(
        servers.cdn.asked().is_empty(),
        "the hub itself tells what there is"
    );
    // From the CDN, and by a redirect within the hub.
    for (path, size, etag, bytes) in [
        ("large", 10, "\"sha\"", &LARGE[2..5]),
        ("deep/small", 5, "\"git\"", "all"),
    ] {
        let range = GetOptions {
            range: Some(GetRange::Bounded(2..5)),
            ..GetOptions::default()
        };
        let read = root.store().get_opts(&root.path(path), range).await;
        let read = read.unwrap();
        assert_eq!(
            (read.meta.size, read.meta.e_tag.as_deref()),
            (size, Some(etag))
        );
        assert_eq!(read.bytes().await.unwrap(), bytes);
    }
    assert_eq!(root.get("deep/small").await.unwrap(), "small");
    assert_eq!(root.find("none").await.unwrap(), None);
    assert!(root.list_files("none").await.unwrap().is_empty());
    assert_eq!(root.folders("").await.unwrap(), ["deep"]);
    let bearer = Some("Bearer secret".to_owned());
    assert!(
        servers
            .hub
            .asked()
            .iter()
            .all(|(_, _, token)| *token == bearer)
    );
    let asked = servers.cdn.asked();
    assert!(
        !asked.is_empty() && asked.iter().all(|(_, _, token)| token.is_none()),
        "{asked:?}"
    );
}

#[tokio::test]
async fn redirects_leave_the_hub_for_what_is_allowed_alone() {
    let servers = Servers::start().await;
    let read = async |allow: &[&str]| {
        let stores = servers.stores(allow, "");
        let at = stores.open_allowed("hf://datasets/o/n@main/data/large")?;
        at.get("").await
    };
    let error = read(&["hf://datasets/o"]).await.unwrap_err();
    assert_eq!(error.reason(), Reason::InvalidArgument, "{}", error.chain());
    assert!(
        error.chain().contains("not below any prefix"),
        "{}",
        error.chain()
    );
    assert!(!error.chain().contains("signature"), "{}", error.chain());
    assert!(servers.cdn.asked().is_empty());
    assert_eq!(
        read(&["hf://datasets/o/n", servers.hub.cdn.as_str()])
            .await
            .unwrap(),
        LARGE
    );
    let error = read(&["hf://datasets/o/n@v1"]).await.unwrap_err();
    assert_eq!(error.reason(), Reason::UriNotAllowed);
}

#[tokio::test]
async fn a_branch_that_moves_is_held_at_its_commit() {
    let servers = Servers::start().await;
    let stores = servers.stores(&[], "");
    let uri = "hf://datasets/o/n/data/{large,*}.parquet";
    let pinned = |commit: usize| {
        let commit = COMMITS[commit];
        format!("hf://datasets/o/n@{commit}/data/{{large,*}}.parquet")
    };
    let mut pins = Pins::default();
    assert_eq!(pins.pin(&stores, uri).await.unwrap(), pinned(0));
    servers.hub.moved.store(1, Ordering::Relaxed);
    let again = format!("{}@main", &uri[..17]);
    assert_eq!(again, "hf://datasets/o/n@main");
    assert!(
        pins.pin(&stores, &again)
            .await
            .unwrap()
            .ends_with(COMMITS[0])
    );
    let mut later = Pins::default();
    assert_eq!(later.pin(&stores, uri).await.unwrap(), pinned(1));
    assert_eq!(later.pin(&stores, &pinned(0)).await.unwrap(), pinned(0));
    for other in ["s3://b/{0..3}.tar", "file:///a"] {
        assert_eq!(later.pin(&stores, other).await.unwrap(), other);
    }
    servers.hub.asked();
    let at = format!("hf://datasets/o/n@{}/data/large", COMMITS[0]);
    assert_eq!(stores.open(&at).unwrap().get("").await.unwrap(), LARGE);
    let asked = servers.cdn.asked();
    assert!(
        asked[0].1.starts_with(&format!("/{}/", COMMITS[0])),
        "{asked:?}"
    );
    assert_eq!(servers.hub.asked().len(), 1, "a commit is not looked up");
}

#[tokio::test]
async fn a_hub_that_is_asked_too_often_is_asked_again() {
    let servers = Servers::start().await;
    let stores = servers.stores(&[], "");
    let uri = format!("hf://datasets/o/n@{}/data", COMMITS[0]);
    let root = stores.open(&uri).unwrap();
    servers.hub.throttled.store(2, Ordering::Relaxed);
    assert_eq!(root.list_files("").await.unwrap().len(), 2);
    servers.hub.throttled.store(2, Ordering::Relaxed);
    assert_eq!(root.get("large").await.unwrap(), LARGE);
    assert_eq!(
        servers.hub.asked().len(),
        2 + 2 + 2 + 1,
        "two pages and a file"
    );
}

/// Else the rows of all images would be holes, which are kept.
#[tokio::test]
async fn only_what_its_commit_lacks_is_a_missing_file() {
    let servers = Servers::start().await;
    let stores = servers.stores(&[], "");
    let uri = format!("hf://datasets/o/n@{}/data", COMMITS[0]);
    let root = stores.open(&uri).unwrap();
    let found = root.find_at_most("none", 9).await.unwrap();
    assert_eq!(found, crate::storage::Found::Nothing);
    for name in ["unexplained", "not-in-cdn"] {
        let error = root.find_at_most(name, 9).await.unwrap_err();
        let said = error.chain();
        assert_eq!(error.reason(), Reason::StorageUnreachable, "{said}");
        assert!(
            said.contains("404") && !said.contains("signature"),
            "{said}"
        );
    }
    servers.hub.lost.store(true, Ordering::Relaxed);
    for (name, error) in [
        ("large", root.find_at_most("large", 9).await.unwrap_err()),
        ("none", root.find_at_most("none", 9).await.unwrap_err()),
        ("large", root.is_there("large").await.unwrap_err()),
        ("deep/small", root.get("deep/small").await.unwrap_err()),
    ] {
        assert_eq!(error.reason(), Reason::DatasetChanged, "{}", error.chain());
        assert!(error.to_string().contains("no such commit"), "{error}");
        assert_eq!(error.value("shard"), Some(format!("{uri}/{name}").as_str()));
    }
}

#[tokio::test]
async fn what_the_hub_denies_is_told_with_what_to_do() {
    let servers = Servers::start().await;
    for (uri, token, says) in [
        ("hf://datasets/o/gated/x", "", "accept them at"),
        ("hf://datasets/o/gated@v1/x", "secret", "accept its terms"),
        ("hf://datasets/o/none/x", "", "there is no"),
        (
            "hf://datasets/o/n@gone/x",
            "",
            "no branch, tag or commit 'gone'",
        ),
        ("hf://datasets", "", "data sets are not listed"),
    ] {
        let stores = servers.stores(&[], token);
        let error = stores.open(uri).unwrap().list("").await.unwrap_err();
        assert_eq!(error.reason(), Reason::InvalidArgument, "{}", error.chain());
        assert!(error.chain().contains(says), "{uri}: {}", error.chain());
        assert!(!error.chain().contains("secret"), "{}", error.chain());
    }
    let stores = servers.stores(&[], "");
    let at = stores.open("hf://datasets/o/n").unwrap();
    let error = at.put("x", "x".into()).await.unwrap_err();
    assert!(error.chain().contains("only read"), "{}", error.chain());
    for (uri, says) in [
        ("hf://o/n", "names a model of the hub"),
        (
            "hf://datasets/o/n",
            "names data on the Hugging Face hub, which is only read",
        ),
    ] {
        let error = can_hold_state(uri).unwrap_err();
        assert!(error.chain().contains(says), "{}", error.chain());
    }
}
