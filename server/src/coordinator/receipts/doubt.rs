//! Receipts whose writing had no certain outcome. Pure.
//!
//! The store may have written such a receipt although it did not say so. The step is then
//! committed, and its cost belongs to the totals of every receipt that is written after it. Its own
//! commit finds out when it tries again, after a pause in which other steps commit. If those
//! started from totals without it, no receipt would hold the whole, and a coordinator that loads
//! the run would go on from too little. So each commit first settles the doubts of the others.
use super::accounts;
use superbatch_proto::v1::{Accounts, Receipt};

/// Most doubts that are kept: the steps under way of a run are fewer.
const KEPT_MAX: usize = 256;

/// One attempt to write a receipt that may have succeeded.
#[derive(Debug, Clone, PartialEq)]
pub struct Doubt {
    pub step: u64,
    pub generation: u32,
    nonce: String,
    cost: Accounts,
    /// It was found in the store, and its cost is part of the totals.
    is_counted: bool,
}

/// The doubts of one run.
#[derive(Debug, Default)]
pub struct InDoubt(Vec<Doubt>);

impl InDoubt {
    /// Adds an attempt of which it is not known whether it succeeded.
    pub fn add_doubt(&mut self, receipt: &Receipt) {
        let Some(summary) = &receipt.summary else {
            return;
        };
        if self.find(&summary.writer_nonce).is_none() && self.0.len() < KEPT_MAX {
            self.0.push(Doubt {
                step: summary.step,
                generation: summary.generation,
                nonce: summary.writer_nonce.clone(),
                cost: summary.cost.unwrap_or_default(),
                is_counted: false,
            });
        }
    }

    /// Returns the doubts to settle before the writer of `nonce` may commit.
    pub fn of_others(&self, nonce: &str) -> Vec<Doubt> {
        let open = |doubt: &&Doubt| doubt.nonce != nonce && !doubt.is_counted;
        self.0.iter().filter(open).cloned().collect()
    }

    /// Returns whether the receipt of the writer of `nonce` is part of the totals.
    pub fn is_counted(&self, nonce: &str) -> bool {
        self.find(nonce)
            .is_some_and(|doubt| self.0[doubt].is_counted)
    }

    /// Settles a doubt by the nonce of the receipt that was found at its step, and adds its cost to
    /// `totals` if the receipt is the one in doubt. Returns whether there was such a doubt.
    pub fn settle(&mut self, doubt: &Doubt, found: Option<&str>, totals: &mut Accounts) -> bool {
        let Some(place) = self.find(&doubt.nonce) else {
            return false;
        };
        let is_written = found == Some(doubt.nonce.as_str());
        match is_written {
            true if self.0[place].is_counted => {}
            true => {
                *totals = accounts::add(totals, &doubt.cost);
                self.0[place].is_counted = true;
            }
            // Its writer may try again, and adds its cost itself.
            false => drop(self.0.remove(place)),
        }
        is_written
    }

    /// Settles the doubt about a receipt that was found, if there is one. Returns whether there
    /// was.
    pub fn settle_found(&mut self, nonce: &str, totals: &mut Accounts) -> bool {
        match self.find(nonce) {
            Some(place) => {
                let doubt = self.0[place].clone();
                self.settle(&doubt, Some(nonce), totals)
            }
            None => false,
        }
    }

    /// Forgets the doubt of a commit that has ended; `is_known`: its outcome is known.
    pub fn end(&mut self, nonce: &str, is_known: bool) {
        self.0
            .retain(|doubt| doubt.nonce != nonce || !(is_known || doubt.is_counted));
    }

    fn find(&self, nonce: &str) -> Option<usize> {
        self.0.iter().position(|doubt| doubt.nonce == nonce)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use superbatch_proto::v1::ReceiptSummary;

    fn receipt(step: u64, nonce: &str, examples: u64) -> Receipt {
        Receipt {
            summary: Some(ReceiptSummary {
                step,
                writer_nonce: nonce.into(),
                cost: Some(Accounts {
                    examples_selected: examples,
                    ..Accounts::default()
                }),
                ..ReceiptSummary::default()
            }),
            ..Receipt::default()
        }
    }

    #[test]
    fn a_receipt_that_was_written_after_all_is_counted_once() {
        let (mut doubts, mut totals) = (InDoubt::default(), Accounts::default());
        for _ in 0..2 {
            doubts.add_doubt(&receipt(3, "a", 16));
        }
        assert!(doubts.of_others("a").is_empty(), "it settles its own");
        let others = doubts.of_others("b");
        assert_eq!(others.len(), 1);
        assert!(doubts.settle(&others[0], Some("a"), &mut totals));
        assert!(doubts.settle_found("a", &mut totals));
        assert!(doubts.is_counted("a") && doubts.of_others("b").is_empty());
        assert_eq!(totals.examples_selected, 16);
        doubts.end("a", false);
        assert!(!doubts.is_counted("a"));
    }

    #[test]
    fn a_receipt_that_was_not_written_counts_nothing() {
        let (mut doubts, mut totals) = (InDoubt::default(), Accounts::default());
        for (nonce, found) in [("a", None), ("b", Some("another"))] {
            doubts.add_doubt(&receipt(3, nonce, 16));
            let doubt = doubts.of_others("c").remove(0);
            assert!(!doubts.settle(&doubt, found, &mut totals));
            assert!(doubts.of_others("c").is_empty());
        }
        assert_eq!(totals, Accounts::default());
    }

    #[test]
    fn a_commit_that_failed_stays_in_doubt() {
        let mut doubts = InDoubt::default();
        doubts.add_doubt(&receipt(3, "a", 16));
        doubts.end("a", false);
        assert_eq!(doubts.of_others("b").len(), 1);
        doubts.end("a", true);
        assert!(doubts.of_others("b").is_empty());
    }
}
