//! Announcements of pushes, before any part of them arrives.
//!
//! A trainer that fetches one batch ahead asks for the next step while its push still waits in the
//! client's queue, or is being copied. Without an announcement the service sees a trainer that
//! stands still and sends nothing, concludes that no push will come, and falls back or fails a step
//! whose weights arrive a second later. The announcement is one small call, made when the push is
//! called; it counts for its run, whatever connection or process asks for the next step.
use super::Weights;
use crate::error::Result;
use std::collections::BTreeMap;
use superbatch_proto::v1::AnnouncePushRequest;

/// Announcements that one run keeps. A trainer has one or two for each rank. Beyond this number
/// those of the oldest steps are dropped; their steps then wait for their deadlines and not for a
/// push.
const KEPT_MAX: usize = 1 << 14;

/// Announcements by (generation, step) of the push and by rank, each with the incarnation of the
/// trainer that made it.
///
/// An announcement promises nothing. If the push never comes, the steps that wait for it end by
/// their deadlines.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Announced {
    by: BTreeMap<(u32, i64), BTreeMap<u32, String>>,
    count: usize,
}

impl Announced {
    /// Returns the steps of a generation whose pushes were announced.
    pub fn steps(&self, generation: u32) -> impl Iterator<Item = i64> + '_ {
        let of_generation = (generation, i64::MIN)..=(generation, i64::MAX);
        self.by.range(of_generation).map(|((_, step), _)| *step)
    }

    /// Returns whether anything changed. The caller may hold thousands of announcements, so no
    /// copy is made to compare with.
    fn add(&mut self, request: &AnnouncePushRequest) -> bool {
        let at = (request.generation, request.step);
        let ranks = self.by.entry(at).or_default();
        let known = ranks.insert(request.rank, request.incarnation.clone());
        if known.as_ref() == Some(&request.incarnation) {
            return false;
        }
        self.count += usize::from(known.is_none());
        while self.count > KEPT_MAX
            && let Some((_, ranks)) = self.by.pop_first()
        {
            self.count -= ranks.len();
        }
        true
    }

    /// Returns whether anything changed.
    fn withdraw(&mut self, request: &AnnouncePushRequest) -> bool {
        let at = (request.generation, request.step);
        let Some(ranks) = self.by.get_mut(&at) else {
            return false;
        };
        // Not that of a newer start, which this one, going down, knows nothing of.
        if ranks.get(&request.rank) != Some(&request.incarnation) {
            return false;
        }
        ranks.remove(&request.rank);
        self.count -= 1;
        if ranks.is_empty() {
            self.by.remove(&at);
        }
        true
    }

    /// Forgets a push that was published or refused.
    pub(super) fn ended(&mut self, at: (u32, i64)) {
        self.count -= self.by.remove(&at).map_or(0, |ranks| ranks.len());
    }

    /// Returns whether anything changed.
    fn retain(&mut self, keeps: impl Fn(&str) -> bool) -> bool {
        let before = self.count;
        self.by.retain(|_, ranks| {
            ranks.retain(|_, incarnation| keeps(incarnation));
            !ranks.is_empty()
        });
        self.count = self.by.values().map(BTreeMap::len).sum();
        self.count != before
    }
}

impl Weights {
    /// Notes the announcement of a push by a rank, or its withdrawal. `generation` is the run's
    /// current one.
    ///
    /// # Errors
    /// `GenerationStale`, `PushOffCadence`: no such push may come.
    pub fn announce(&self, generation: u32, request: &AnnouncePushRequest) -> Result<()> {
        self.0
            .check_due(generation, request.generation, request.step)?;
        let at = (request.generation, request.step);
        self.0.traffic.send_if_modified(|traffic| {
            // Looked up under the lock of the traffic, since a push enters the book before it
            // leaves the traffic. An announcement that arrives late, by another connection, is
            // ignored then; otherwise it would stay for ever and make steps wait for a push that is
            // done.
            let published = self.0.book.borrow().at(at.1, at.0).is_some();
            if request.withdrawn {
                traffic.announced.withdraw(request)
            } else {
                !published && traffic.announced.add(request)
            }
        });
        Ok(())
    }

    /// Removes the announcements of earlier starts of the trainer, since their pushes will not
    /// come.
    pub fn forget_announced_by_earlier(
        &self,
        incarnation: &str,
        is_earlier: impl Fn(&str) -> bool,
    ) {
        self.0.traffic.send_if_modified(|traffic| {
            traffic
                .announced
                .retain(|by| by == incarnation || !is_earlier(by))
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(step: i64, rank: u32, incarnation: &str) -> AnnouncePushRequest {
        AnnouncePushRequest {
            step,
            rank,
            incarnation: incarnation.into(),
            ..Default::default()
        }
    }

    fn steps(announced: &Announced) -> Vec<i64> {
        announced.steps(0).collect()
    }

    #[test]
    fn a_push_is_expected_while_one_rank_means_to_bring_it() {
        let mut announced = Announced::default();
        for rank in [0, 1] {
            assert!(announced.add(&request(3, rank, "a")));
            assert!(!announced.add(&request(3, rank, "a")), "said again");
        }
        assert!(announced.withdraw(&request(3, 0, "a")));
        assert!(!announced.withdraw(&request(3, 1, "before")));
        assert_eq!(steps(&announced), [3]);
        assert!(announced.withdraw(&request(3, 1, "a")));
        assert!(steps(&announced).is_empty());
        assert_eq!(announced, Announced::default());
    }

    #[test]
    fn what_an_earlier_start_announced_ends_with_it() {
        let mut announced = Announced::default();
        announced.add(&request(3, 0, "a"));
        announced.add(&request(4, 0, "b"));
        assert!(announced.retain(|by| by == "b"));
        assert!(!announced.retain(|by| by == "b"));
        assert_eq!(steps(&announced), [4]);
        assert_eq!(announced.steps(1).count(), 0, "of another generation");
    }

    #[test]
    fn announcements_are_bounded_and_the_oldest_go_first() {
        let mut announced = Announced::default();
        (0..KEPT_MAX as i64 + 10).for_each(|step| assert!(announced.add(&request(step, 0, "a"))));
        assert_eq!(steps(&announced).len(), KEPT_MAX);
        assert_eq!(steps(&announced)[0], 10);
    }
}
