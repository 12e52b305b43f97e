//! Facts: objects that are created once and never changed. Two coordinators that decide the same
//! thing race by creating the same key; object storage lets one of them win.
use super::{Budget, Location, retried::OneAttempt};
use crate::error::{Error, Result};
use bytes::Bytes;
use object_store::{GetOptions, PutMode, PutOptions};
use superbatch_proto::v1::Reason;

/// Who created the fact.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Created {
    Ours,
    /// Another writer was first; this is what it wrote.
    Theirs(Bytes),
}

/// Returns a new writer's nonce, 32 hex digits. Two writers' facts differ by it, so a writer
/// recognises its own.
pub fn nonce() -> String {
    format!("{:032x}", rand::random::<u128>())
}

impl Location {
    /// Creates `key` unless it exists. `bytes` must hold a [`nonce`] (or be addressed by content):
    /// after "already exists" or an unknown outcome the object is read back, and equal bytes are
    /// ours.
    ///
    /// # Errors
    /// `StorageUnreachable` if the [`Budget`] of one call is spent.
    pub async fn create(&self, key: &str, bytes: Bytes) -> Result<Created> {
        self.create_within(key, bytes, Budget::default()).await
    }

    /// As [`Location::create`], within what is left of a call's budget.
    pub async fn create_within(
        &self,
        key: &str,
        bytes: Bytes,
        mut budget: Budget,
    ) -> Result<Created> {
        loop {
            match self.create_once(key, bytes.clone(), &budget).await {
                Err(error) if !is_passing(&error) => return Err(error),
                Err(error) if !budget.pause().await => return Err(budget.spent(error)),
                Err(_) => {}
                created => return created,
            }
        }
    }

    /// Writes an object unless there is one, which stays as it is. For an object that its caller
    /// reads back, whoever wrote it: "already exists" is no error, since it may be our own.
    ///
    /// # Errors
    /// Those of [`Location::error`].
    pub async fn put_new(&self, key: &str, bytes: Bytes) -> Result<()> {
        let (path, create) = (self.path(key), PutOptions::from(PutMode::Create));
        let put = self.store().put_opts(&path, bytes.into(), create);
        match put.await {
            Ok(_) | Err(object_store::Error::AlreadyExists { .. }) => Ok(()),
            Err(cause) => Err(self.error("create", key, cause)),
        }
    }

    /// Makes one attempt of [`Location::create`]. The caller decides whether there is another, and
    /// may release its locks before.
    ///
    /// # Errors
    /// `StorageUnreachable` if it is not known whether the object is there.
    pub async fn create_once(&self, key: &str, bytes: Bytes, budget: &Budget) -> Result<Created> {
        let path = self.path(key);
        let mut create = PutOptions::from(PutMode::Create);
        create.extensions.insert(OneAttempt);
        let mut read = GetOptions::default();
        read.extensions.insert(OneAttempt);
        let put = self.store().put_opts(&path, bytes.clone().into(), create);
        let cause = match budget.request(put).await {
            Some(Ok(_)) => return Ok(Created::Ours),
            Some(Err(cause)) => Some(cause),
            None => None,
        };
        let unknown = |cause: Option<object_store::Error>| match cause {
            Some(cause) => self.error("create", key, cause),
            None => {
                let uri = self.uri_of(key);
                let message = format!("cannot create {uri}: the store does not answer");
                Error::new(Reason::StorageUnreachable, message).with("uri", uri)
            }
        };
        // Every error is ambiguous, "already exists" included. A store's client repeats a request
        // whose answer was lost; if the first one had created the object, the second is answered
        // "already exists" although the object is ours. So the answer is not trusted: the object is
        // read back and its bytes decide. Without this a coordinator would take its own receipt for
        // a rival's and give its run up.
        match budget.request(self.find_by(key, read)).await {
            Some(Ok(Some(found))) if found == bytes => Ok(Created::Ours),
            Some(Ok(Some(found))) => Ok(Created::Theirs(found)),
            _ => Err(unknown(cause)),
        }
    }
}

/// Returns whether a store that failed so may do better.
pub fn is_passing(error: &Error) -> bool {
    error.reason() == Reason::StorageUnreachable
}

/// The object that holds a state's id.
const IDENTITY: &str = "identity";

/// Opens a state and returns its id. The first process creates the id; all later ones read it.
/// Refuses a store that overwrites an object on a conditional create, as some stores silently do:
/// two coordinators could then both believe that they own a run.
///
/// # Errors
/// `StorageUnsafe`, or `StorageUnreachable`, naming the setting.
pub async fn probe(state: &Location) -> Result<String> {
    let unusable = |e: Error| {
        e.about(format_args!(
            "the setting `state` is {}, which cannot be used",
            state.uri()
        ))
    };
    // A read comes first, so that an unreachable store is reported after the retries of one request
    // and not of several.
    let known = state.find(IDENTITY).await.map_err(unusable)?;
    let key = format!("probe/{}", nonce());
    let (first, second) = (Bytes::from("first"), Bytes::from("second"));
    let create = |key, bytes| state.create_within(key, bytes, Budget::of_start());
    create(&key, first).await.map_err(unusable)?;
    // A key of its own for every probe, since objects of an earlier probe would make any store look
    // safe. Documentation is no help here: compatible stores accept `If-None-Match: *` and ignore
    // it.
    let safe = matches!(create(&key, second).await?, Created::Theirs(_));
    state.delete(&key).await.map_err(unusable)?;
    if !safe {
        let message = format!(
            "the store of {} overwrites an object on a conditional create (If-None-Match: *), so \
            it cannot hold state; use \
             one that refuses, such as S3, Google Cloud Storage, Azure, or a local disk",
            state.uri()
        );
        return Err(Error::new(Reason::StorageUnsafe, message).with("uri", state.uri()));
    }
    let ours = Bytes::from(nonce());
    let id = match known {
        Some(id) => id,
        None => match create(IDENTITY, ours.clone()).await.map_err(unusable)? {
            Created::Ours => ours,
            Created::Theirs(id) => id,
        },
    };
    Ok(String::from_utf8_lossy(&id).into_owned())
}

/// Returns whether a state that was opened has been deleted while the service ran. `false` if the
/// store does not answer.
pub async fn is_deleted(state: &Location) -> bool {
    matches!(state.find(IDENTITY).await, Ok(None))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::{StorageConfig, Stores};

    #[tokio::test]
    async fn a_state_has_one_id_and_no_two_have_the_same() {
        let stores = Stores::new(StorageConfig::default());
        let [a, b] = ["memory:///a", "memory:///b"].map(|uri| stores.open(uri).unwrap());
        let id = probe(&a).await.unwrap();
        assert_eq!(probe(&a).await.unwrap(), id);
        assert_ne!(probe(&b).await.unwrap(), id);
        assert!(!is_deleted(&a).await);
        a.delete(IDENTITY).await.unwrap();
        assert!(is_deleted(&a).await && !is_deleted(&b).await);
    }

    #[tokio::test]
    async fn the_first_writer_wins_and_knows_it() {
        let state = Stores::new(StorageConfig::default())
            .open("memory:///state")
            .unwrap();
        let (a, b) = (Bytes::from("a"), Bytes::from("b"));
        assert_eq!(state.create("k", a.clone()).await.unwrap(), Created::Ours);
        assert_eq!(
            state.create("k", a.clone()).await.unwrap(),
            Created::Ours,
            "a repeated create is still ours"
        );
        let other = state.create("k", b.clone()).await.unwrap();
        assert_eq!(other, Created::Theirs(a.clone()));
        state.put_new("k", b.clone()).await.unwrap();
        assert_eq!(state.get("k").await.unwrap(), a, "what is there stays");
        state.put_new("other", b.clone()).await.unwrap();
        assert_eq!(state.get("other").await.unwrap(), b);
    }
}
