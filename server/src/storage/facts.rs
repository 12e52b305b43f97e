//! Facts: objects that are created once and never changed. Two coordinators that decide the same
//! thing race by creating the same key; object storage lets one of them win.
use super::Location;
use crate::error::{Error, Result};
use bytes::Bytes;
use object_store::PutMode;
use superbatch_proto::v1::Reason;

/// Attempts of a create whose outcome is unknown (time-outs, S3's 409).
const ATTEMPTS_MAX: u32 = 5;

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
    /// `StorageUnreachable` if it cannot be read back either, or after [`ATTEMPTS_MAX`] unknown
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
            // Every error is ambiguous, "already exists" included. A store's client repeats a
            // request whose answer was lost; if the first one had created the object, the second is
            // answered "already exists" although the object is ours. So the answer is not trusted:
            // the object is read back and its bytes decide. Without this a coordinator would take
            // its own receipt for a rival's and give its run up.
            match self.find(key).await {
                Ok(Some(found)) if found == bytes => return Ok(Created::Ours),
                Ok(Some(found)) => return Ok(Created::Theirs(found)),
                Ok(None) if attempt < ATTEMPTS_MAX => attempt += 1,
                // The store's client has retried for minutes, so more attempts would only hold the
                // caller's locks longer. If the create took effect in spite of the error, the next
                // call for this fact finds the object, and its bytes still say whose it is.
                Ok(None) | Err(_) => return Err(self.error("create", key, cause)),
            }
        }
    }
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
    state.create(&key, first).await.map_err(unusable)?;
    // A key of its own for every probe, since objects of an earlier probe would make any store look
    // safe. Documentation is no help here: compatible stores accept `If-None-Match: *` and ignore
    // it.
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
