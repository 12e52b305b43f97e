//! What the hub knows of a data set: the commit of a branch, and the files of a commit.
use super::{
    Refused,
    account::Account,
    place::{Place, Repository, is_commit},
};
use crate::storage::Budget;
use bytes::{Bytes, BytesMut};
use futures::{
    StreamExt, TryStreamExt,
    stream::{self, BoxStream},
};
use hyper::Request;
use object_store::{
    Error, Result,
    client::{HttpClient, HttpError, HttpErrorKind, HttpRequestBody},
};
use reqwest::{
    StatusCode,
    header::{HeaderMap, LINK},
};
use serde::{Deserialize, de::DeserializeOwned};
use std::{sync::Arc, time::Duration};
use url::Url;

/// Most time that a request is tried again, and the first pause, as `object_store`'s own clients
/// have them.
const RETRIED: (Duration, Duration) = (Duration::from_secs(180), Duration::from_millis(100));
/// Largest answer. A page of a listing has a thousand files, about half a megabyte.
const ANSWER_BYTES_MAX: usize = 64 << 20;
/// Most pages of a listing: ten million files.
const PAGES_MAX: usize = 10_000;

/// A client of the hub's interface.
#[derive(Debug, Clone)]
pub(super) struct Api {
    pub client: HttpClient,
    pub account: Arc<Account>,
}

/// A file or a folder of a listing.
#[derive(Debug, PartialEq, Eq, Deserialize)]
pub(super) struct Entry {
    #[serde(rename = "type")]
    pub kind: Kind,
    /// Below the data set.
    pub path: String,
    #[serde(default)]
    size: u64,
    /// Git's name of the content; of a large file that of its pointer.
    oid: Option<String>,
    lfs: Option<Lfs>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Kind {
    File,
    Directory,
    #[serde(other)]
    Other,
}

/// A large file, by its content's SHA-256.
#[derive(Debug, PartialEq, Eq, Deserialize)]
struct Lfs {
    oid: String,
    size: u64,
}

impl Entry {
    pub(super) fn size(&self) -> u64 {
        self.lfs.as_ref().map_or(self.size, |lfs| lfs.size)
    }

    /// Returns the name of the content, which reading gives as the ETag.
    pub(super) fn etag(self) -> Option<String> {
        self.lfs.map(|lfs| lfs.oid).or(self.oid)
    }
}

#[derive(Deserialize)]
struct Revision {
    sha: String,
}

/// An answer that is no access denied.
struct Answer {
    status: StatusCode,
    headers: HeaderMap,
    body: Bytes,
}

impl Api {
    /// Returns the commit that a revision names now.
    ///
    /// # Errors
    /// Those of the hub; a [`Refused`] if there is no such revision.
    pub(super) async fn commit(&self, repository: &Repository) -> Result<String> {
        if is_commit(&repository.revision) {
            return Ok(repository.revision.clone());
        }
        let Repository {
            owner,
            name,
            revision,
        } = repository;
        let (owner, name, revision) = (owner.as_str(), name.as_str(), revision.as_str());
        let parts = ["api", "datasets", owner, name, "revision", revision];
        let answer = self.get(&self.account.url(parts, "expand=sha")).await?;
        if answer.status == StatusCode::NOT_FOUND {
            return Err(no_revision(repository));
        }
        let Revision { sha } = answer.read()?;
        if is_commit(&sha) {
            Ok(sha)
        } else {
            Err(generic(Unexpected("commit")))
        }
    }

    /// Lists what lies in a folder of a commit, with all folders below it if `recursive`; nothing
    /// if there is no such folder.
    pub(super) fn entries(
        self,
        place: &Place,
        commit: &str,
        recursive: bool,
    ) -> BoxStream<'static, Result<Entry>> {
        let repository = place.repository.clone();
        let (owner, name) = (repository.owner.as_str(), repository.name.as_str());
        let parts = ["api", "datasets", owner, name, "tree", commit];
        let folder = Some(place.file.as_str()).filter(|folder| !folder.is_empty());
        let query = format!("recursive={recursive}&expand=false");
        let first = self.account.url(parts.into_iter().chain(folder), &query);
        let pages = stream::try_unfold((Some(first), 0), move |(url, page)| {
            let (api, repository) = (self.clone(), repository.clone());
            async move {
                let Some(url) = url else { return Ok(None) };
                if page == PAGES_MAX {
                    return Err(generic(Unexpected("number of pages")));
                }
                let answer = api.get(&url).await?;
                if answer.status == StatusCode::NOT_FOUND {
                    let code = answer.headers.get("x-error-code");
                    if code.is_some_and(|code| code == "RevisionNotFound") {
                        return Err(no_revision(&repository));
                    }
                    return Ok(None);
                }
                let next = answer.next(&url);
                let entries = answer.read::<Vec<Entry>>()?.into_iter().map(Ok::<_, Error>);
                Ok(Some((stream::iter(entries), (next, page + 1))))
            }
        });
        pages.try_flatten().boxed()
    }

    /// Asks until there is an answer, or one that no repetition changes.
    async fn get(&self, url: &Url) -> Result<Answer> {
        let mut budget = Budget::of(RETRIED.0, RETRIED.1);
        loop {
            let failed = match self.get_once(url).await {
                Ok(answer) if !is_passing(answer.status) => return answer.checked(),
                Ok(answer) => generic(Said(answer.status)),
                Err(error) if !is_transport(&error) => return Err(generic(error)),
                Err(error) => generic(error),
            };
            if !budget.pause().await {
                return Err(failed);
            }
        }
    }

    async fn get_once(&self, url: &Url) -> Result<Answer, HttpError> {
        let request = Request::get(url.as_str()).body(HttpRequestBody::empty());
        let request = request.map_err(|e| HttpError::new(HttpErrorKind::Unknown, e))?;
        let answer = self.client.execute(request).await?;
        let (parts, body) = answer.into_parts();
        let (mut pieces, mut whole) = (body.bytes_stream(), BytesMut::new());
        while let Some(piece) = pieces.try_next().await? {
            whole.extend_from_slice(&piece);
            if whole.len() > ANSWER_BYTES_MAX {
                return Err(HttpError::new(HttpErrorKind::Decode, Unexpected("size")));
            }
        }
        Ok(Answer {
            status: parts.status,
            headers: parts.headers,
            body: whole.freeze(),
        })
    }
}

impl Answer {
    /// Passes on what the callers understand.
    fn checked(self) -> Result<Self> {
        match self.status {
            StatusCode::OK | StatusCode::NOT_FOUND => Ok(self),
            other => Err(generic(Said(other))),
        }
    }

    fn read<T: DeserializeOwned>(&self) -> Result<T> {
        serde_json::from_slice(&self.body).map_err(generic)
    }

    /// Returns the next page of `url`. Of the link only the query is taken: a mirror may leave the
    /// hub's own host in it, and the token goes to no other than that of `url`.
    fn next(&self, url: &Url) -> Option<Url> {
        let links = self.headers.get(LINK)?.to_str().ok()?;
        let next = links.split('<').skip(1).find_map(|link| {
            let (target, about) = link.split_once('>')?;
            about.contains("rel=\"next\"").then_some(target)
        })?;
        let query = url.join(next).ok()?.query()?.to_owned();
        let mut next = url.clone();
        next.set_query(Some(&query));
        (next != *url).then_some(next)
    }
}

fn is_passing(status: StatusCode) -> bool {
    status.is_server_error()
        || matches!(
            status,
            StatusCode::TOO_MANY_REQUESTS | StatusCode::REQUEST_TIMEOUT
        )
}

fn is_transport(error: &HttpError) -> bool {
    use HttpErrorKind::{Connect, Interrupted, Request, Timeout};
    matches!(error.kind(), Connect | Interrupted | Request | Timeout)
}

fn no_revision(repository: &Repository) -> Error {
    let Repository {
        owner,
        name,
        revision,
    } = repository;
    generic(Refused(format!(
        "the data set {owner}/{name} has no branch, tag or commit '{revision}'; correct what \
         follows the @"
    )))
}

fn generic(source: impl std::error::Error + Send + Sync + 'static) -> Error {
    let source = Box::new(source);
    Error::Generic {
        store: "hub",
        source,
    }
}

#[derive(Debug, thiserror::Error)]
#[error("the hub answered {0}")]
struct Said(StatusCode);

#[derive(Debug, thiserror::Error)]
#[error("the hub's answer has an unexpected {0}")]
struct Unexpected(&'static str);

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(link: &'static str, body: &'static str) -> Answer {
        let mut headers = HeaderMap::new();
        headers.insert(LINK, reqwest::header::HeaderValue::from_static(link));
        Answer {
            status: StatusCode::OK,
            headers,
            body: Bytes::from_static(body.as_bytes()),
        }
    }

    #[test]
    fn a_next_page_is_of_the_same_listing() {
        let url = Url::parse("https://hub.example/api/datasets/o/n/tree/c?recursive=true").unwrap();
        for (link, query) in [
            (
                "<https://hub.example/x?cursor=a%3D>; rel=\"next\"",
                Some("cursor=a%3D"),
            ),
            (
                "<https://evil.example/?cursor=b>; rel=\"next\"",
                Some("cursor=b"),
            ),
            (
                "</p?q=1>; rel=\"prev\", </n?q=2,3>; rel=\"next\"",
                Some("q=2,3"),
            ),
            ("<https://hub.example/x?cursor=a>; rel=\"prev\"", None),
            // It would never end.
            ("<?recursive=true>; rel=\"next\"", None),
            ("nonsense", None),
        ] {
            let next = answer(link, "").next(&url);
            let mut expected = url.clone();
            expected.set_query(query);
            assert_eq!(next, query.map(|_| expected), "{link}");
        }
    }

    #[test]
    fn a_large_file_is_known_by_its_content_and_not_by_its_pointer() {
        let body = r#"[
            {"type": "file", "path": "a", "size": 3, "oid": "git"},
            {"type": "file", "path": "d/b", "size": 9, "oid": "pointer", "xetHash": "x",
             "lfs": {"oid": "sha256", "size": 9, "pointerSize": 130}},
            {"type": "directory", "path": "d", "size": 0, "oid": "tree"},
            {"type": "submodule", "path": "s"}]"#;
        let entries: Vec<Entry> = answer("", body).read().unwrap();
        let kinds: Vec<Kind> = entries.iter().map(|entry| entry.kind).collect();
        assert_eq!(
            kinds,
            [Kind::File, Kind::File, Kind::Directory, Kind::Other]
        );
        let known = entries
            .into_iter()
            .map(|entry| (entry.size(), entry.etag()));
        let known: Vec<_> = known.take(2).collect();
        assert_eq!(
            known,
            [(3, Some("git".to_owned())), (9, Some("sha256".to_owned()))]
        );
    }
}
