//! Who may ask for which step: incarnations, world sizes, cursors. Pure: a function of the requests so far.
use crate::error::{Error, Result};
use std::collections::{BTreeMap, BTreeSet, HashMap};
use superbatch_proto::v1::Reason;

/// What a rank says of itself when it asks for a step.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Asking {
    pub step: u64,
    pub rank: u32,
    pub world_size: u32,
    pub incarnation: String,
    /// The trainer stands still: all steps before this one are consumed.
    pub need: bool,
    pub consumed_through: Option<u64>,
}

impl Asking {
    /// The newest step that this rank has consumed, by its own word or because it stands still for the next.
    pub fn known_consumed(&self) -> Option<u64> {
        // A rank cannot have consumed the step that it asks for.
        let claimed = self.consumed_through.map(|step| step.min(self.step));
        claimed.max(self.need.then(|| self.step.checked_sub(1)).flatten())
    }
}

/// The ranks of one run, in its current generation.
#[derive(Debug, Default)]
pub struct Members {
    /// In order of appearance; the last one is the trainer that runs now.
    incarnations: Vec<String>,
    /// World size that opened a step in the current incarnation.
    pinned: BTreeMap<u64, u32>,
    /// By rank: the newest step it has consumed.
    consumed: HashMap<u32, u64>,
    world_size: u32,
}

impl Members {
    /// Admits a request, or says why not.
    ///
    /// # Errors
    /// `WorldSizeConflict` for a straggler of an earlier incarnation, or a world size that differs from the one the step was
    /// opened with.
    pub fn admit(&mut self, asking: &Asking) -> Result<()> {
        match self.incarnations.iter().position(|known| *known == asking.incarnation) {
            Some(place) if place + 1 < self.incarnations.len() => {
                let message = format!(
                    "incarnation '{}' of the trainer was replaced by '{}'; this rank is a straggler and should stop",
                    asking.incarnation,
                    self.incarnations.last().map_or("", String::as_str)
                );
                return Err(conflict(asking, message));
            }
            Some(_) => {}
            None => {
                self.incarnations.push(asking.incarnation.clone());
                self.pinned.clear();
                self.consumed.clear();
            }
        }
        let pinned = *self.pinned.entry(asking.step).or_insert(asking.world_size);
        if pinned != asking.world_size {
            let message = format!(
                "step {} was opened by a trainer of {pinned} ranks, and rank {} now asks as one of {}",
                asking.step, asking.rank, asking.world_size
            );
            return Err(conflict(asking, message));
        }
        self.world_size = asking.world_size;
        self.note_consumed(asking);
        Ok(())
    }

    fn note_consumed(&mut self, asking: &Asking) {
        if let Some(step) = asking.known_consumed() {
            let known = self.consumed.entry(asking.rank).or_insert(step);
            *known = step.max(*known);
        }
        if let Some(done) = self.consumed_by_all() {
            self.pinned = self.pinned.split_off(&done.saturating_add(1));
        }
    }

    /// The newest step that some rank has consumed.
    pub fn frontier(&self) -> Option<u64> {
        self.consumed.values().copied().max()
    }

    /// The newest step that all ranks have consumed: the delivered cursor.
    pub fn consumed_by_all(&self) -> Option<u64> {
        let all: BTreeSet<u32> = self.consumed.keys().copied().filter(|rank| *rank < self.world_size).collect();
        let whole = self.world_size > 0 && all.len() == self.world_size as usize;
        whole.then(|| all.iter().filter_map(|rank| self.consumed.get(rank)).copied().min()).flatten()
    }

    /// Forgets cursors and pins: a rewind took the run elsewhere. Incarnations stay known, so stragglers stay refused.
    pub fn rewound(&mut self) {
        self.pinned.clear();
        self.consumed.clear();
    }
}

/// Whether `step` may be asked for: at most `max_ahead` beyond what is consumed or committed.
///
/// # Errors
/// `StepBeyondAhead`.
pub fn check_ahead(step: u64, frontier: Option<u64>, committed: Option<u64>, max_ahead: u32) -> Result<()> {
    let newest_allowed = last_allowed(frontier, committed, max_ahead);
    if step <= newest_allowed {
        return Ok(());
    }
    let base = frontier.max(committed).map_or("nothing".to_owned(), |s| format!("step {s}"));
    let message = format!(
        "step {step} is too far ahead: {base} is consumed or committed so far, and max_ahead is {max_ahead}, so step \
         {newest_allowed} is the newest that may be asked for; resume at the step after your checkpoint's"
    );
    Err(Error::new(Reason::StepBeyondAhead, message).with("step", step).with("newest_allowed", newest_allowed))
}

/// The newest step that may be asked for and prepared.
pub fn last_allowed(frontier: Option<u64>, committed: Option<u64>, max_ahead: u32) -> u64 {
    frontier.max(committed).map_or(0, |s| s.saturating_add(1)).saturating_add(u64::from(max_ahead.max(1)) - 1)
}

fn conflict(asking: &Asking, message: String) -> Error {
    Error::new(Reason::WorldSizeConflict, message).with("rank", asking.rank).with("step", asking.step)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn asking(step: u64, rank: u32, world_size: u32, incarnation: &str) -> Asking {
        Asking { step, rank, world_size, incarnation: incarnation.into(), need: true, consumed_through: None }
    }

    #[test]
    fn the_first_request_pins_the_world_size() {
        let mut members = Members::default();
        members.admit(&asking(3, 0, 2, "a")).unwrap();
        members.admit(&asking(3, 1, 2, "a")).unwrap();
        let error = members.admit(&asking(3, 2, 4, "a")).unwrap_err();
        assert_eq!(error.reason(), Reason::WorldSizeConflict);
        members.admit(&asking(4, 0, 4, "a")).unwrap();
    }

    #[test]
    fn a_new_incarnation_takes_over_and_the_old_one_is_refused() {
        let mut members = Members::default();
        members.admit(&asking(3, 0, 2, "a")).unwrap();
        members.admit(&asking(3, 0, 4, "b")).unwrap();
        assert_eq!(members.admit(&asking(3, 1, 2, "a")).unwrap_err().reason(), Reason::WorldSizeConflict);
    }

    #[test]
    fn the_delivered_cursor_is_the_slowest_ranks() {
        let mut members = Members::default();
        members.admit(&asking(5, 0, 2, "a")).unwrap();
        assert_eq!((members.frontier(), members.consumed_by_all()), (Some(4), None));
        members.admit(&asking(3, 1, 2, "a")).unwrap();
        assert_eq!((members.frontier(), members.consumed_by_all()), (Some(4), Some(2)));
    }

    #[test]
    fn steps_ahead_are_bounded() {
        assert!(check_ahead(1, None, None, 2).is_ok());
        assert_eq!(check_ahead(2, None, None, 2).unwrap_err().reason(), Reason::StepBeyondAhead);
        assert!(check_ahead(7, Some(4), Some(5), 2).is_ok());
        assert!(check_ahead(8, Some(4), Some(5), 2).is_err());
    }
}
