//! Branches and tags of the hub, held at the commits that they name when they are first looked at.
use super::{AskCommit, place};
use crate::{
    error::{Error, Result},
    storage::{Location, Stores, uri::unusable},
};
use object_store::GetOptions;
use std::collections::HashMap;

/// Commits by data set and revision. What is indexed with the same pins is of the same commits,
/// even if a branch moves meanwhile.
#[derive(Debug, Default)]
pub struct Pins(HashMap<String, String>);

impl Pins {
    /// Returns `uri`, which may be a pattern, with the commit in place of the revision. URIs of
    /// other stores stay as they are.
    ///
    /// # Errors
    /// `InvalidArgument` if it names no data set, or one that the hub does not give;
    /// `StorageUnreachable`.
    pub async fn pin(&mut self, stores: &Stores, uri: &str) -> Result<String> {
        if !uri.starts_with("hf://") {
            return Ok(uri.to_owned());
        }
        let (repository, rest) = place::split(uri).map_err(|what| unusable(uri, what))?;
        let key = repository.to_string();
        let commit = match self.0.get(&key) {
            Some(commit) => commit.clone(),
            None => {
                let named = &uri[..uri.len() - rest.len()];
                let commit = stores.open(named)?.commit().await?;
                self.0.insert(key, commit.clone());
                commit
            }
        };
        Ok(repository.at(&commit, rest))
    }
}

impl Location {
    /// Returns the commit that the revision of a data set names now.
    async fn commit(&self) -> Result<String> {
        let mut options = GetOptions {
            head: true,
            ..Default::default()
        };
        options.extensions.insert(AskCommit);
        let found = self.store().get_opts(&self.path(""), options).await;
        let found = found.map_err(|e| self.error("look up", "", e))?;
        let commit = found.meta.version;
        commit.ok_or_else(|| Error::internal("a revision without a commit"))
    }
}
