//! Pushes of changed tensors only: the others are those of an older version.
use super::{Inner, look::not_kept, part::Part, push::Push, staging::Staged};
use crate::error::{Error, Result};
use std::collections::{BTreeMap, BTreeSet};
use superbatch_proto::v1::{PushStart, Reason};

/// The place of a part that no stream sent.
const NO_SLOT: u64 = u64::MAX;

impl Staged {
    /// Returns the learner's tensors of which no part was pushed.
    fn absent(&self) -> BTreeSet<String> {
        let is_absent = |name: &&String| self.tensors.get(*name).is_none_or(BTreeMap::is_empty);
        let names = self.shape.tensors.keys();
        names.filter(is_absent).cloned().collect()
    }

    fn add_of_base(&mut self, name: &str, part: Part) {
        let parts = self.tensors.entry(name.to_owned()).or_default();
        parts.insert(NO_SLOT, part);
    }
}

impl Push {
    /// Checks that a rank builds on the version that the others build on.
    ///
    /// # Errors
    /// `PushConflict`.
    pub(super) fn check_base(&self, start: &PushStart) -> Result<()> {
        if self.base == start.base_version || self.incarnation != start.incarnation {
            return Ok(());
        }
        let message = "the ranks of this push differ in base_version; give all the same";
        Err(Error::new(Reason::PushConflict, message).with("rank", start.rank))
    }
}

impl Inner {
    /// Checks that the weights of a push's base are there.
    ///
    /// # Errors
    /// `WeightsMissing`, with the `version`.
    pub(super) fn check_base(&self, version: u64) -> Result<()> {
        let book = self.book.borrow();
        let kept = book
            .kept(version)
            .is_some_and(|kept| !kept.snapshot_uri.is_empty());
        if kept {
            return Ok(());
        }
        let (known, newest) = (book.is_known(version), book.last_version());
        Err(not_kept(version, known, newest))
    }

    /// Adds the tensors of version `base` of which no part was pushed.
    ///
    /// # Errors
    /// `WeightsMissing` if the base is no longer kept; `WeightsRefused` if its file is damaged;
    /// `StorageUnreachable`.
    pub(super) async fn fill(&self, staged: &mut Staged, base: u64) -> Result<()> {
        let absent = staged.absent();
        if absent.is_empty() {
            return Ok(());
        }
        let (_, file) = self.file_of(base).await?;
        for tensor in file.tensors.iter().filter(|t| absent.contains(&t.name)) {
            let part = Part {
                dtype: tensor.dtype,
                start: vec![0; tensor.shape.len()],
                extent: tensor.shape.clone(),
                bytes: file.read(tensor).await?.into(),
            };
            staged.add_of_base(&tensor.name, part);
        }
        Ok(())
    }
}
