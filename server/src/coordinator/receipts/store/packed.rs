//! Receipts in packs, or in objects of their own if their pack is damaged and nothing rests on it.
use super::{FOLDER_STEPS, Receipts, folder, key, parse};
use crate::{
    coordinator::receipts::packs::Pack,
    error::{Error, Result},
};
use std::collections::BTreeSet;
use superbatch_proto::v1::{Reason, Receipt, ReceiptSummary};

impl Receipts {
    /// Returns the receipt of a step that a pack has.
    pub(super) async fn packed(&self, pack: &Pack, step: u64) -> Result<Receipt> {
        match self.packs.receipt(pack, step).await {
            Err(damage) if is_damage(&damage) => self.beside(pack, step, damage).await,
            read => read,
        }
    }

    /// As [`Self::packed`], without the rows.
    pub(super) async fn packed_summary(
        &self,
        pack: &Pack,
        step: u64,
    ) -> Result<Option<ReceiptSummary>> {
        match self.packs.summary(pack, step).await {
            Err(damage) if is_damage(&damage) => Ok(self.beside(pack, step, damage).await?.summary),
            read => read,
        }
    }

    /// Reads the object of a receipt whose pack is damaged, if it is sure to be the one that was
    /// packed. Objects are deleted only after their pack was read back whole. So if all are there,
    /// none was deleted, and the pack was damaged from the first. If any is gone, another may have
    /// been created anew by a former owner, and is not the decision.
    ///
    /// # Errors
    /// `damage` if an object is gone; `StorageUnreachable`; `Internal` if the object is damaged
    /// too.
    async fn beside(&self, pack: &Pack, step: u64, damage: Error) -> Result<Receipt> {
        let mut there = BTreeSet::new();
        for number in pack.first / FOLDER_STEPS..=pack.last / FOLDER_STEPS {
            let listed = self.run.list(&folder(number)).await?;
            there.extend(listed.iter().filter_map(|(key, _)| parse(key)));
        }
        let is_there = |step| there.contains(&(step, pack.generation));
        if !(pack.first..=pack.last).all(is_there) {
            return Err(damage);
        }
        let key = key(step, pack.generation);
        match self.run.find(&key).await? {
            Some(bytes) => self.single(&key, bytes).await,
            None => Err(damage),
        }
    }
}

fn is_damage(error: &Error) -> bool {
    error.reason() == Reason::Internal
}
