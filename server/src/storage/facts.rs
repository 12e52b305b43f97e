//! Facts: objects that are created once and never changed. Object storage settles every race.
use super::Location;
use crate::error::{Error, Result};
use bytes::Bytes;
use object_store::PutMode;
use superbatch_proto::v1::Reason;

/// Unknown outcomes (time-outs, S3's 409) of a create that are read back and tried again.
const ATTEMPTS_MAX: u32 = 5;

/// Who created the fact.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Created {
    Ours,
    /// Another writer was first; this is what it wrote.
    Theirs(Bytes),
}

/// A fresh writer's nonce, 32 hex digits. It makes two writers' facts differ, so that a writer
/// knows its own.
pub fn nonce() -> String {
    format!("{:032x}", rand::random::<u128>())
}

impl Location {
    /// Creates `key` unless it exists. `bytes` must hold a [`nonce`] (or be addressed by content):
    /// after "already exists" or an unknown outcome the object is read back, and equal bytes are
    /// ours.
    ///
    /// # Errors
    /// `StorageUnreachable` where it cannot be read back either, or after [`ATTEMPTS_MAX`] unknown
    /// outcomes.
    pub async fn create(&self, key: &str, bytes: Bytes) -> Result<Created> {
        let path = self.path(key);
        let mut attempt = 1;
        loop {
            let cause = match self
                .store()
                .put_opts(&path, bytes.clone().into(), PutMode::Create.into())
                .await
            {
                Ok(_) => return Ok(Created::Ours),
                Err(cause) => cause,
            };
            match self.find(key).await {
                Ok(Some(found)) if found == bytes => return Ok(Created::Ours),
                Ok(Some(found)) => return Ok(Created::Theirs(found)),
                Ok(None) if attempt < ATTEMPTS_MAX => attempt += 1,
                // The store's client has tried again already, for minutes. Where the object was
                // created in spite of it all, whoever asks next finds it.
                Ok(None) | Err(_) => return Err(self.error("create", key, cause)),
            }
        }
    }
}

/// The object that holds a state's id.
const IDENTITY: &str = "identity";

/// Opens a state: refuses a store that overwrites on a conditional create, as some do silently,
/// since state on it would be lost in a race. Gives the state's id, the same for all who use it:
/// whoever comes first makes it.
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
    // A read comes first: where nothing can be reached it is said after one request.
    let known = state.find(IDENTITY).await.map_err(unusable)?;
    let key = format!("probe/{}", nonce());
    let (first, second) = (Bytes::from("first"), Bytes::from("second"));
    state.create(&key, first).await.map_err(unusable)?;
    let safe = matches!(state.create(&key, second).await?, Created::Theirs(_));
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
        None => match state
            .create(IDENTITY, ours.clone())
            .await
            .map_err(unusable)?
        {
            Created::Ours => ours,
            Created::Theirs(id) => id,
        },
    };
    Ok(String::from_utf8_lossy(&id).into_owned())
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
        assert_eq!(state.create("k", b).await.unwrap(), Created::Theirs(a));
    }
}
