//! Decides which rank may ask for which step: incarnations, world sizes, cursors. Pure: a function
//! of the requests so far.
use crate::{
    bounds::{LABEL_BYTES_MAX, check_bytes},
    error::{Error, Result},
};
use std::collections::{BTreeMap, BTreeSet};
use superbatch_proto::v1::Reason;

/// The fields by which a rank describes itself when it asks for a step.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Asking {
    pub step: u64,
    pub rank: u32,
    pub world_size: u32,
    pub incarnation: String,
    /// The rank cannot go on without the step. It has consumed all steps before this one, except
    /// those that it holds.
    pub need: bool,
    pub consumed_through: Option<u64>,
    /// Batches of the steps just before this one on which the rank may not have trained yet.
    pub held: u32,
}

impl Asking {
    /// Returns the newest step that this rank has consumed: by its own claim, or because it stands
    /// still for the next step.
    pub fn claims_consumed(&self) -> Option<u64> {
        // A rank cannot have consumed the step that it asks for, nor the steps that it holds. A
        // claim beyond that is cut down: it would let a faulty trainer drop batches that it still
        // needs.
        let before = self
            .step
            .checked_sub(1)
            .and_then(|before| before.checked_sub(u64::from(self.held)));
        match self.consumed_through {
            Some(claimed) => before.map(|before| before.min(claimed)),
            None => before.filter(|_| self.need),
        }
    }
}

/// Checks the id of one start of a trainer, which is kept for the run's life.
///
/// # Errors
/// `InvalidArgument` for an id that is too long.
pub fn check_incarnation(incarnation: &str) -> Result<()> {
    check_bytes("incarnation", incarnation, LABEL_BYTES_MAX)
}

/// The limits within which a rank may ask.
#[derive(Debug, Clone, Copy)]
pub struct Bounds {
    /// The newest committed step.
    pub committed: Option<u64>,
    pub max_ahead: u32,
}

/// The ranks of one run, in its current generation.
#[derive(Debug, Clone, Default)]
pub struct Members {
    /// All starts of the trainer in order of appearance. The last one runs now.
    incarnations: Vec<String>,
    /// The newest committed step when the current trainer started. It may resume anywhere up to
    /// there.
    floor: Option<u64>,
    /// World sizes of the steps that were asked for, fixed by the first request of each.
    pinned: BTreeMap<u64, u32>,
    /// The newest step that each rank has consumed.
    consumed: BTreeMap<u32, u64>,
    world_size: u32,
}

impl Members {
    /// Returns the ranks of a run that was committed through `floor` before this process loaded it,
    /// by the trainers `incarnations`.
    pub fn new(incarnations: Vec<String>, floor: Option<u64>) -> Self {
        Self {
            incarnations,
            floor,
            ..Self::default()
        }
    }

    /// Returns all starts of the trainer, in order of appearance.
    pub fn known(&self) -> &[String] {
        &self.incarnations
    }

    pub fn knows(&self, incarnation: &str) -> bool {
        self.incarnations.iter().any(|known| known == incarnation)
    }

    /// Checks that an incarnation which pushes, or announces a push, is not one that another has
    /// replaced. An unknown one may be a new start that pushes before it asks for its first step.
    ///
    /// # Errors
    /// `WorldSizeConflict`.
    pub fn check_pushing(&self, incarnation: &str) -> Result<()> {
        match self.incarnations.last() {
            Some(newest) if newest != incarnation && self.knows(incarnation) => {
                Err(straggler(incarnation, &self.replaced()))
            }
            _ => Ok(()),
        }
    }

    /// Checks that a new start of the trainer would be admitted, before it is made durable.
    ///
    /// # Errors
    /// `StepBeyondAhead`.
    pub fn check_new(&self, asking: &Asking, bounds: Bounds) -> Result<()> {
        check_ahead(asking.step, (bounds.committed, COMMITTED), bounds.max_ahead)
    }

    /// Admits a request or refuses it. Returns whether a new start of the trainer takes over with
    /// it.
    ///
    /// # Errors
    /// `WorldSizeConflict` for a late rank of an earlier incarnation, or if the world size differs
    /// from that of the step's first request; `StepBeyondAhead`.
    pub fn admit(&mut self, asking: &Asking, bounds: Bounds) -> Result<bool> {
        let new = match self
            .incarnations
            .iter()
            .position(|known| *known == asking.incarnation)
        {
            Some(place) if place + 1 < self.incarnations.len() => {
                return Err(self.straggler_error(asking));
            }
            known => known.is_none(),
        };
        // A rank cannot have consumed a step that is not committed. Without this bound, one wrong
        // claim would move the window of steps ahead to any place.
        let claims = asking.claims_consumed();
        let claimed = claims.min(bounds.committed);
        // The window of `max_ahead` steps begins after the newest of: the step at which the current
        // trainer may resume, the step that some rank has consumed, and this rank's own claim. A
        // new trainer has consumed nothing yet, so everything committed is open to it.
        let base = if new {
            (bounds.committed, COMMITTED)
        } else {
            let bounded_by = if claims > claimed {
                COMMITTED
            } else {
                CONSUMED
            };
            let claim = (claimed, bounded_by);
            let known = [(self.floor, RESUMED), (self.frontier(), CONSUMED), claim];
            known
                .into_iter()
                .max_by_key(|(step, _)| *step)
                .unwrap_or(claim)
        };
        check_ahead(asking.step, base, bounds.max_ahead)?;
        if new {
            self.incarnations.push(asking.incarnation.clone());
            // A new trainer may have another world size, and it may go back behind what the old one
            // has consumed.
            self.pinned.clear();
            self.consumed.clear();
            self.floor = bounds.committed;
        }
        let pinned = *self.pinned.entry(asking.step).or_insert(asking.world_size);
        if pinned != asking.world_size {
            let message = format!(
                "step {} was opened by a trainer of {pinned} ranks, and rank {} now asks as one \
                of {}; a trainer that was \
                 started anew names a new incarnation",
                asking.step, asking.rank, asking.world_size
            );
            return Err(conflict(asking, message));
        }
        self.world_size = asking.world_size;
        self.note_consumed(asking.rank, claimed);
        Ok(new)
    }

    fn straggler_error(&self, asking: &Asking) -> Error {
        straggler(&asking.incarnation, &self.replaced())
            .with("rank", asking.rank)
            .with("step", asking.step)
    }

    /// Returns the error for calls of an earlier incarnation that still wait when a new one
    /// arrives.
    pub fn taken_over(&self) -> Error {
        Error::new(Reason::WorldSizeConflict, self.replaced())
    }

    fn replaced(&self) -> String {
        let newest = self.incarnations.last().map_or("", String::as_str);
        format!(
            "the trainer was started anew as incarnation '{newest}'; this rank is a straggler and \
            should stop"
        )
    }

    fn note_consumed(&mut self, rank: u32, claimed: Option<u64>) {
        if let Some(step) = claimed {
            let known = self.consumed.entry(rank).or_insert(step);
            *known = step.max(*known);
        }
        if let Some(done) = self.consumed_by_all() {
            self.pinned = self.pinned.split_off(&done.saturating_add(1));
        }
    }

    /// Returns the newest step that some rank has consumed.
    pub fn frontier(&self) -> Option<u64> {
        self.consumed.values().copied().max()
    }

    /// Returns the newest step that all ranks have consumed: the delivered cursor.
    pub fn consumed_by_all(&self) -> Option<u64> {
        let all: BTreeSet<u32> = self
            .consumed
            .keys()
            .copied()
            .filter(|rank| *rank < self.world_size)
            .collect();
        let whole = self.world_size > 0 && all.len() == self.world_size as usize;
        whole
            .then(|| {
                all.iter()
                    .filter_map(|rank| self.consumed.get(rank))
                    .copied()
                    .min()
            })
            .flatten()
    }

    /// Forgets cursors and world sizes after a rewind to `to_step`. Incarnations stay known, so
    /// late ranks of old ones stay refused.
    pub fn rewound(&mut self, to_step: u64) {
        self.pinned.clear();
        self.consumed.clear();
        self.floor = to_step.checked_sub(1);
    }
}

/// Descriptions of the step beyond which only `max_ahead` more may be asked for.
const COMMITTED: &str = "is the newest committed step, and nobody can have consumed more";
const CONSUMED: &str = "is the newest step that a rank has consumed";
const RESUMED: &str = "was the newest step when this trainer began or the run was taken back";

/// Checks that `step` is at most `max_ahead` beyond `from`, which comes with its description.
///
/// # Errors
/// `StepBeyondAhead`.
fn check_ahead(step: u64, from: (Option<u64>, &str), max_ahead: u32) -> Result<()> {
    let newest_allowed = last_allowed(from.0, max_ahead);
    if step <= newest_allowed {
        return Ok(());
    }
    let from = from.0.map_or("no step is consumed so far".to_owned(), |s| {
        format!("step {s} {}", from.1)
    });
    let message = format!(
        "step {step} is too far ahead: {from}; with max_ahead {max_ahead}, step {newest_allowed} \
        is the newest that may be \
         asked for; resume at the step after your checkpoint's"
    );
    Err(Error::new(Reason::StepBeyondAhead, message)
        .with("step", step)
        .with("newest_allowed", newest_allowed))
}

/// Returns the newest step that may be asked for and prepared.
pub fn last_allowed(consumed: Option<u64>, max_ahead: u32) -> u64 {
    consumed
        .map_or(0, |s| s.saturating_add(1))
        .saturating_add(u64::from(max_ahead.max(1)) - 1)
}

fn straggler(incarnation: &str, replaced: &str) -> Error {
    let message = format!("incarnation '{incarnation}': {replaced}");
    Error::new(Reason::WorldSizeConflict, message)
}

fn conflict(asking: &Asking, message: String) -> Error {
    Error::new(Reason::WorldSizeConflict, message)
        .with("rank", asking.rank)
        .with("step", asking.step)
}

#[cfg(test)]
mod tests {
    use super::*;

    const FAR: Bounds = Bounds {
        committed: Some(100),
        max_ahead: 2,
    };

    fn asking(step: u64, rank: u32, world_size: u32, incarnation: &str) -> Asking {
        Asking {
            step,
            rank,
            world_size,
            incarnation: incarnation.into(),
            need: true,
            consumed_through: None,
            held: 0,
        }
    }

    fn prefetch(step: u64, consumed_through: Option<u64>) -> Asking {
        Asking {
            need: false,
            consumed_through,
            ..asking(step, 0, 1, "a")
        }
    }

    #[test]
    fn the_first_request_pins_the_world_size() {
        let mut members = Members::default();
        members.admit(&asking(3, 0, 2, "a"), FAR).unwrap();
        members.admit(&asking(3, 1, 2, "a"), FAR).unwrap();
        let error = members.admit(&asking(3, 2, 4, "a"), FAR).unwrap_err();
        assert_eq!(error.reason(), Reason::WorldSizeConflict);
        members.admit(&asking(4, 0, 4, "a"), FAR).unwrap();
    }

    #[test]
    fn a_new_incarnation_takes_over_and_the_old_one_is_refused() {
        let mut members = Members::default();
        assert!(members.admit(&asking(3, 0, 2, "a"), FAR).unwrap());
        assert!(members.admit(&asking(3, 0, 4, "b"), FAR).unwrap());
        assert!(!members.admit(&asking(3, 1, 4, "b"), FAR).unwrap());
        assert_eq!(
            members
                .admit(&asking(3, 1, 2, "a"), FAR)
                .unwrap_err()
                .reason(),
            Reason::WorldSizeConflict
        );
        let mut after_a_restart = Members::new(vec!["a".into(), "b".into()], Some(3));
        assert!(
            after_a_restart.admit(&asking(3, 1, 2, "a"), FAR).is_err(),
            "stragglers are remembered"
        );
        assert!(!after_a_restart.admit(&asking(3, 1, 4, "b"), FAR).unwrap());
    }

    #[test]
    fn a_replaced_incarnation_pushes_no_more_and_an_unknown_one_may() {
        let mut members = Members::default();
        members.check_pushing("").unwrap();
        members.admit(&asking(3, 0, 2, "a"), FAR).unwrap();
        members.check_pushing("a").unwrap();
        members.check_pushing("b").unwrap();
        members.admit(&asking(3, 0, 4, "b"), FAR).unwrap();
        members.check_pushing("b").unwrap();
        let error = members.check_pushing("a").unwrap_err();
        assert_eq!(error.reason(), Reason::WorldSizeConflict);
        assert!(error.to_string().contains("anew as incarnation 'b'"));
    }

    #[test]
    fn the_delivered_cursor_is_the_slowest_ranks() {
        let mut members = Members::default();
        members.admit(&asking(5, 0, 2, "a"), FAR).unwrap();
        assert_eq!(
            (members.frontier(), members.consumed_by_all()),
            (Some(4), None)
        );
        members.admit(&asking(3, 1, 2, "a"), FAR).unwrap();
        assert_eq!(
            (members.frontier(), members.consumed_by_all()),
            (Some(4), Some(2))
        );
    }

    #[test]
    fn a_prefetch_does_not_widen_its_own_window() {
        let mut members = Members::default();
        let bounds = |committed| Bounds {
            committed,
            max_ahead: 2,
        };
        let beyond = |result: Result<bool>| result.unwrap_err().reason() == Reason::StepBeyondAhead;
        members.admit(&prefetch(1, None), bounds(None)).unwrap();
        assert!(beyond(members.admit(&prefetch(2, None), bounds(None))));
        assert!(
            beyond(members.admit(&prefetch(2, None), bounds(Some(1)))),
            "committed is not consumed"
        );
        members
            .admit(&prefetch(2, Some(0)), bounds(Some(1)))
            .unwrap();
        assert!(
            beyond(members.admit(&prefetch(4, Some(3)), bounds(Some(1)))),
            "nobody consumes what is not committed"
        );
        assert!(beyond(
            members.admit(&prefetch(u64::MAX, Some(u64::MAX)), bounds(Some(1)))
        ));
        let newcomer = |step| members.check_new(&asking(step, 0, 1, "b"), bounds(Some(1)));
        assert!(newcomer(3).is_ok() && newcomer(4).is_err());
    }

    #[test]
    fn a_trainer_resumes_anywhere_up_to_what_is_committed() {
        let mut members = Members::new(vec!["a".into()], Some(5));
        let bounds = Bounds {
            committed: Some(5),
            max_ahead: 2,
        };
        members.admit(&prefetch(7, None), bounds).unwrap();
        assert!(members.admit(&prefetch(8, None), bounds).is_err());
        members.rewound(3);
        let bounds = Bounds {
            committed: Some(2),
            max_ahead: 2,
        };
        members.admit(&prefetch(4, None), bounds).unwrap();
        assert!(members.admit(&prefetch(5, None), bounds).is_err());
    }

    #[test]
    fn a_refusal_says_what_its_window_is_counted_from() {
        let bounds = |committed| Bounds {
            committed,
            max_ahead: 2,
        };
        let refused = |members: &mut Members, asking: Asking, committed, wanted: &str| {
            let error = members.admit(&asking, bounds(committed)).unwrap_err();
            assert_eq!(error.reason(), Reason::StepBeyondAhead);
            assert!(error.to_string().contains(wanted), "{error}");
        };
        let mut members = Members::default();
        refused(
            &mut members,
            asking(2, 0, 2, "a"),
            None,
            "no step is consumed so far",
        );
        members.admit(&asking(0, 0, 2, "a"), bounds(None)).unwrap();
        refused(
            &mut members,
            asking(9, 0, 2, "a"),
            Some(1),
            "step 1 is the newest committed step",
        );
        refused(
            &mut members,
            prefetch(9, Some(1)),
            Some(3),
            "step 1 is the newest step that a rank has consumed",
        );
        refused(
            &mut members,
            asking(9, 0, 2, "b"),
            Some(1),
            "step 1 is the newest committed step",
        );
        let mut resumed = Members::new(vec!["a".into()], Some(5));
        refused(
            &mut resumed,
            prefetch(9, Some(1)),
            Some(6),
            "step 5 was the newest step when this trainer began",
        );
    }

    #[test]
    fn a_rank_has_not_consumed_what_it_holds() {
        let claims = |consumed_through, held| {
            let asking = Asking {
                consumed_through,
                held,
                ..asking(4, 0, 1, "a")
            };
            asking.claims_consumed()
        };
        assert_eq!([claims(None, 0), claims(None, 1)], [Some(3), Some(2)]);
        assert_eq!([claims(Some(3), 2), claims(Some(0), 2)], [Some(1), Some(0)]);
        assert_eq!(claims(None, 4), None);
    }

    #[test]
    fn a_loader_that_reads_ahead_says_what_is_consumed() {
        let mut members = Members::default();
        members
            .admit(
                &Asking {
                    consumed_through: Some(2),
                    ..asking(4, 0, 1, "a")
                },
                FAR,
            )
            .unwrap();
        assert_eq!(members.frontier(), Some(2));
        members
            .admit(
                &Asking {
                    consumed_through: Some(0),
                    ..asking(0, 0, 1, "b")
                },
                FAR,
            )
            .unwrap();
        assert_eq!(
            members.frontier(),
            None,
            "step 0 cannot be consumed by who asks for it"
        );
    }
}
