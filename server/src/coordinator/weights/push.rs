//! One push that is under way: which streams bring it, and which may not.
use super::{ModelShape, publish::conflict, staging::Staged, streams::Answer};
use crate::error::{Error, Result};
use std::{collections::BTreeMap, sync::Arc};
use superbatch_proto::v1::{PushStart, Reason};
use tokio::{sync::watch, time::Instant};

/// Most starts of the trainer that one push remembers as replaced.
const REPLACED_KEPT: usize = 16;

/// Ranks that a message names.
const RANKS_SHOWN: usize = 16;

pub struct Push {
    pub id: String,
    /// The start of the trainer that brings it.
    pub incarnation: String,
    /// Starts of the trainer that had asked for a step when this one joined.
    asked_before: usize,
    /// Starts of the trainer from which newer ones took this push over.
    replaced: Vec<String>,
    /// The version whose tensors stand where none are pushed.
    pub base: Option<u64>,
    /// `None` once the push is whole and is being published.
    pub staged: Option<Staged>,
    pub streams: BTreeMap<u64, Rank>,
    pub started: Instant,
    pub answer: watch::Sender<Answer>,
}

pub struct Rank {
    pub rank: u32,
    pub ended: bool,
    /// The client's number for this push. 0: it gave none.
    sender: u64,
    /// How often the client has sent this push before.
    attempt: u32,
    /// Says which other stream took this one's place.
    superseded: watch::Sender<Option<String>>,
}

impl Rank {
    /// Returns whether this stream was sent after the one of `start`, which arrives late. The
    /// streams of one sender may come by two connections, and after a pause of this process both
    /// are read at once.
    fn was_sent_after(&self, start: &PushStart) -> bool {
        let is_numbered = start.sender != 0;
        let is_same = self.rank == start.rank && self.sender == start.sender;
        is_numbered && is_same && self.attempt > start.attempt
    }

    fn supersede(self, why: &str) {
        self.superseded.send_replace(Some(why.to_owned()));
    }
}

impl Push {
    /// Returns the ranks that have brought a part of it, for people.
    pub fn ranks(&self) -> String {
        let has_part = |stream: u64| {
            let mut slots = self.staged.iter().flat_map(|staged| staged.slots.values());
            slots.any(|slot| slot.done && slot.stream == stream)
        };
        let streams = self.streams.iter().filter(|(stream, _)| has_part(**stream));
        let mut ranks: Vec<u32> = streams.map(|(_, rank)| rank.rank).collect();
        ranks.sort_unstable();
        let shown = ranks.iter().take(RANKS_SHOWN).map(u32::to_string);
        let more = (ranks.len() > RANKS_SHOWN).then(|| "…".to_owned());
        shown.chain(more).collect::<Vec<_>>().join(", ")
    }

    /// `known` are the starts of the trainer that have asked for a step, in their order.
    pub(super) fn new(
        start: &PushStart,
        known: &[String],
        shape: Arc<ModelShape>,
        bytes_max: u64,
    ) -> Self {
        Self {
            id: start.push_id.clone(),
            incarnation: start.incarnation.clone(),
            asked_before: known.len(),
            replaced: Vec::new(),
            base: start.base_version,
            staged: Some(Staged::new(shape, start.expected_parts, bytes_max)),
            streams: BTreeMap::new(),
            started: Instant::now(),
            answer: watch::Sender::new(None),
        }
    }

    /// Refuses a stream that was sent before one that has joined.
    ///
    /// # Errors
    /// `PushConflict`.
    pub(super) fn check_late(&self, start: &PushStart) -> Result<()> {
        if self.streams.values().any(|rank| rank.was_sent_after(start)) {
            return Err(late(start));
        }
        Ok(())
    }

    /// Adds a stream. An older stream of the same rank counts as broken: a client sends a rank once
    /// at a time. Its connection may be dead without a sign, and its parts would overlap the new
    /// ones.
    ///
    /// `known` are the starts of the trainer that have asked for a step, in their order.
    pub(super) fn join(
        &mut self,
        stream: u64,
        start: &PushStart,
        known: &[String],
    ) -> Result<watch::Receiver<Option<String>>> {
        if self.id != start.push_id {
            return Err(conflict(start.step, &self.id));
        }
        self.check_base(start)?;
        if let Some(staged) = &mut self.staged {
            let is_newer = self.incarnation != start.incarnation;
            let current = (self.incarnation.as_str(), self.asked_before);
            let is_older = is_newer && !takes_over(known, current, &start.incarnation);
            if is_older || self.replaced.contains(&start.incarnation) {
                return Err(straggler(start, &self.incarnation));
            }
            // Ranks of one start agree on the parts. If each counted its own only, and the newest
            // count were taken, they would throw one another's parts away without end.
            let other = self.streams.values().find(|other| other.rank != start.rank);
            let has_other_parts = staged.expected() != start.expected_parts;
            if let (false, true, Some(other)) = (is_newer, has_other_parts, other) {
                return Err(counts_differ(start, staged.expected(), other.rank));
            }
            // Ranks of a start that was replaced may still hold streams. They can never make the
            // push whole, since a rank of theirs is gone, and parts of two starts are no weights of
            // any step. So the newer start begins the push again.
            if is_newer || has_other_parts {
                staged.begin_again(start.expected_parts);
                let why = taken_over(start, &self.incarnation);
                for old in std::mem::take(&mut self.streams).into_values() {
                    old.supersede(&why);
                }
            }
            if is_newer {
                self.base = start.base_version;
                self.asked_before = known.len();
                let old = std::mem::replace(&mut self.incarnation, start.incarnation.clone());
                self.replaced.push(old);
                let more = self.replaced.len().saturating_sub(REPLACED_KEPT);
                self.replaced.drain(..more);
            }
            if start.expected_parts == 0
                && self.streams.values().any(|other| other.rank != start.rank)
            {
                let message = "expected_parts is 0, so one stream brings all parts, and another \
                rank sends it already";
                return Err(Error::new(Reason::PushConflict, message).with("rank", start.rank));
            }
            let older = self
                .streams
                .extract_if(.., |_, other| other.rank == start.rank);
            for (stream, old) in older {
                staged.drop_stream(stream);
                old.supersede(&sent_again(start));
            }
        }
        let (superseded, superseding) = watch::channel(None);
        let rank = Rank {
            rank: start.rank,
            ended: self.staged.is_none(),
            sender: start.sender,
            attempt: start.attempt,
            superseded,
        };
        self.streams.insert(stream, rank);
        Ok(superseding)
    }
}

/// Returns whether a push goes over from the trainer's start `current`, which joined when so many
/// starts had asked for a step, to another one. A trainer that resumes pushes before it asks for
/// its first step, so an unknown start is newer than all that had asked when it joined: those may
/// still send what broke when they ended. One that asked later is newer than it.
fn takes_over(known: &[String], (current, asked_before): (&str, usize), other: &str) -> bool {
    let place = |incarnation| known.iter().position(|known| known == incarnation);
    match (place(current), place(other)) {
        (_, None) => true,
        (None, Some(other)) => other >= asked_before,
        (Some(current), Some(other)) => current < other,
    }
}

fn straggler(start: &PushStart, newest: &str) -> Error {
    let (step, rank) = (start.step, start.rank);
    let message = format!(
        "the push of step {step} is brought by the trainer's start '{newest}', which replaced \
        incarnation '{}'; rank {rank} is a straggler and should stop",
        start.incarnation
    );
    Error::new(Reason::WorldSizeConflict, message)
        .with("rank", rank)
        .with("step", step)
}

fn taken_over(start: &PushStart, current: &str) -> String {
    let (step, rank, incarnation) = (start.step, start.rank, &start.incarnation);
    if incarnation == current {
        return format!(
            "rank {rank} began the push of step {step} again, with expected_parts {}",
            start.expected_parts
        );
    }
    format!(
        "rank {rank} of the trainer's start '{incarnation}' took the push of step {step} over from \
        incarnation '{current}'"
    )
}

fn sent_again(start: &PushStart) -> String {
    format!(
        "a newer stream of rank {} brings the push of step {}; one process pushes the weights of \
        a rank, one push at a time",
        start.rank, start.step
    )
}

fn late(start: &PushStart) -> Error {
    let (step, rank) = (start.step, start.rank);
    let message = format!(
        "rank {rank} has sent the push of step {step} again since this stream, which arrives late"
    );
    Error::new(Reason::PushConflict, message).with("rank", rank)
}

fn counts_differ(start: &PushStart, known: u32, other: u32) -> Error {
    let message = format!(
        "rank {} expects {} parts in the push of step {}, and rank {other} expects {known}; \
        expected_parts counts the parts of all ranks together: add up the ranks' counts (with \
        torch.distributed, all_reduce) and give the sum on each rank. A trainer that was started \
        anew with another world size names a new incarnation",
        start.rank, start.expected_parts, start.step
    );
    Error::new(Reason::PushConflict, message)
        .with("rank", start.rank)
        .with("expected_parts", known)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_starts_that_asked_only_a_later_one_takes_a_push_from_one_that_has_not() {
        let known = ["a", "b"].map(str::to_owned);
        for (current, asked_before, other, over) in [
            ("b", 2, "c", true),
            ("c", 2, "b", false),
            ("c", 2, "a", false),
            ("a", 0, "b", true),
            ("b", 0, "a", false),
            ("c", 2, "d", true),
            // "c" joined after "a" had asked, and "b" asked after that.
            ("c", 1, "b", true),
            ("c", 1, "a", false),
        ] {
            assert_eq!(
                takes_over(&known, (current, asked_before), other),
                over,
                "{current} {asked_before} {other}"
            );
        }
    }
}
