//! Claims on blocks whose reference embeddings are being computed, so that one slice computes them
//! although several steps and workers need them.
//!
//! Storage alone would settle such a race too: the first object wins, and the other worker reads
//! it. But both would have computed. Steps that are prepared ahead begin at the same moment and
//! share the blocks at their seams, so the loss would be the rule, and the accounts of a run would
//! depend on how many workers it has and on their timing.
use crate::coordinator::plan::candidate::Candidate;
use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard},
    time::Duration,
};
use tokio::sync::watch;

/// Source, shard, block.
type Block = (u32, u32, u32);

/// The blocks of a run that have reference embeddings or soon will: some tens of bytes for each
/// block.
#[derive(Debug, Clone, Default)]
pub struct Claims(Arc<Mutex<HashMap<Block, State>>>);

#[derive(Debug)]
enum State {
    /// The channel closes when the claim ends.
    UnderWay(watch::Receiver<()>),
    Made,
}

/// The blocks that one slice is to compute. If it is dropped before [`Claim::made`], its blocks are
/// free again.
#[derive(Debug)]
pub struct Claim {
    claims: Claims,
    mine: Vec<Block>,
    earlier: Vec<watch::Receiver<()>>,
    /// Dropped after `Claim`'s own `drop` has run, as fields are. So the waiting slices wake only
    /// when the blocks have their new state; otherwise they could find the old state and wait for a
    /// claim that is gone.
    _open: watch::Sender<()>,
}

impl Claims {
    /// Claims the blocks of `candidates` (canonical order) that are not claimed yet. All of them
    /// are claimed under one lock and only earlier claims are waited for, so two claims can never
    /// wait for each other.
    pub fn claim(&self, candidates: &[Candidate]) -> Claim {
        let (open, ends) = watch::channel(());
        let (mut mine, mut earlier) = (Vec::new(), Vec::new());
        let mut states = self.states();
        for block in candidates
            .chunk_by(|a, b| block_of(a) == block_of(b))
            .map(|run| block_of(&run[0]))
        {
            match states.get(&block) {
                None => {
                    states.insert(block, State::UnderWay(ends.clone()));
                    mine.push(block);
                }
                Some(State::UnderWay(other)) => earlier.push(other.clone()),
                Some(State::Made) => {}
            }
        }
        drop(states);
        Claim {
            claims: self.clone(),
            mine,
            earlier,
            _open: open,
        }
    }

    fn states(&self) -> MutexGuard<'_, HashMap<Block, State>> {
        self.0.lock().expect("no panic while held")
    }
}

impl Claim {
    /// Waits until earlier claims on its blocks have ended, for at most `patience`: a worker that
    /// hangs must not hold up other steps. If a claim failed or takes longer, its blocks are not
    /// claimed again: at worst two slices compute them, and the sidecar keeps the first result.
    pub async fn wait(&mut self, patience: Duration) {
        let ended = async {
            for mut earlier in self.earlier.drain(..) {
                while earlier.changed().await.is_ok() {}
            }
        };
        let _ = tokio::time::timeout(patience, ended).await;
    }

    /// Notes that the claimed blocks are in the sidecar.
    pub fn made(mut self) {
        let mine = std::mem::take(&mut self.mine);
        self.claims
            .states()
            .extend(mine.into_iter().map(|block| (block, State::Made)));
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        let mut states = self.claims.states();
        for block in &self.mine {
            states.remove(block);
        }
    }
}

fn block_of(candidate: &Candidate) -> Block {
    (candidate.source, candidate.shard, candidate.block)
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures::{FutureExt, poll};
    use std::pin::pin;

    fn candidates(blocks: impl IntoIterator<Item = u32>) -> Vec<Candidate> {
        blocks
            .into_iter()
            .map(|block| Candidate {
                source: 0,
                shard: 0,
                block,
                row: 0,
                position: 0,
            })
            .collect()
    }

    const LONG: Duration = Duration::from_secs(3600);

    fn ready(claim: &mut Claim) -> bool {
        claim.wait(LONG).now_or_never().is_some()
    }

    #[tokio::test]
    async fn a_block_is_made_by_the_first_that_wants_it() {
        let claims = Claims::default();
        let mut first = claims.claim(&candidates([1, 1, 2]));
        let mut second = claims.claim(&candidates([2, 3]));
        assert!(ready(&mut first), "nobody came before it");
        assert_eq!(
            (&first.mine, &second.mine),
            (&vec![(0, 0, 1), (0, 0, 2)], &vec![(0, 0, 3)])
        );
        {
            let mut waits = pin!(second.wait(LONG));
            assert!(poll!(&mut waits).is_pending());
            first.made();
            assert!(poll!(&mut waits).is_ready());
        }
        second.made();
        let mut third = claims.claim(&candidates([1, 2, 3]));
        assert!(ready(&mut third) && third.mine.is_empty(), "all is made");
    }

    #[tokio::test]
    async fn what_came_to_nothing_is_free_again_and_holds_nobody_up() {
        let claims = Claims::default();
        let first = claims.claim(&candidates([1]));
        let mut second = claims.claim(&candidates([1]));
        drop(first);
        assert!(ready(&mut second));
        assert_eq!(claims.claim(&candidates([1])).mine, [(0, 0, 1)]);
    }

    #[tokio::test]
    async fn a_claim_that_never_ends_is_waited_for_with_patience() {
        let claims = Claims::default();
        let first = claims.claim(&candidates([1]));
        claims
            .claim(&candidates([1]))
            .wait(Duration::from_millis(1))
            .await;
        assert_eq!(first.mine, [(0, 0, 1)], "still its own");
    }
}
