//! Turns at a computation: one request has it, a few wait, and more are refused.
use crate::error::{Error, Result};
use std::sync::Arc;
use superbatch_proto::v1::Reason;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

pub(super) struct Turns {
    /// The request that has the turn, and those that wait.
    queue: Arc<Semaphore>,
    alone: Arc<Semaphore>,
    refusal: String,
}

/// Held while a request has the turn.
pub(super) struct Turn {
    _place: OwnedSemaphorePermit,
    _alone: OwnedSemaphorePermit,
}

impl Turn {
    /// Does `work` to its end, even if the request is given up meanwhile: what computes cannot be
    /// stopped half-way, and the next request would hold its memory beside it.
    ///
    /// # Errors
    /// Those of `work`; `Internal` for a panic.
    pub(super) async fn spend_on<T: Send + 'static>(
        self,
        work: impl Future<Output = Result<T>> + Send + 'static,
    ) -> Result<T> {
        let done = tokio::spawn(async move {
            let done = work.await;
            drop(self);
            done
        });
        let done = done.await;
        done.map_err(|e| Error::internal("a computation of the run page panicked").because(e))?
    }
}

impl Turns {
    /// Makes turns for which up to `waiting` requests wait, each of which holds next to nothing.
    /// `refusal` tells the others what to do.
    pub(super) fn new(waiting: usize, refusal: &str) -> Self {
        Self {
            queue: Arc::new(Semaphore::new(1 + waiting)),
            alone: Arc::new(Semaphore::new(1)),
            refusal: format!("{waiting} requests wait for one that is computed; {refusal}"),
        }
    }

    /// Waits for the turn. Requests have it in the order in which they came.
    ///
    /// # Errors
    /// `Overloaded` where too many wait.
    pub(super) async fn take(&self) -> Result<Turn> {
        let place = self.queue.clone().try_acquire_owned();
        let place = place.map_err(|_| Error::new(Reason::Overloaded, &self.refusal))?;
        let alone = self.alone.clone().acquire_owned().await;
        let alone = alone.map_err(|e| Error::internal("the run page stopped").because(e))?;
        Ok(Turn {
            _place: place,
            _alone: alone,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures::{FutureExt, future::join_all};
    use tokio::sync::oneshot;

    const WAITING: usize = 3;

    #[tokio::test]
    async fn one_has_the_turn_a_few_wait_and_more_are_refused() {
        let turns = Turns::new(WAITING, "try again later");
        let first = turns.take().await.unwrap();
        let mut waiting: Vec<_> = (0..WAITING).map(|_| Box::pin(turns.take())).collect();
        for one in &mut waiting {
            assert!(one.as_mut().now_or_never().is_none(), "it waits");
        }
        let refused = turns.take().await.err().unwrap();
        assert_eq!(refused.reason(), Reason::Overloaded);
        let told = "3 requests wait for one that is computed; try again later";
        assert_eq!(refused.to_string(), told);
        drop(first);
        let done = join_all(waiting.into_iter().map(|one| one.map(|turn| turn.is_ok())));
        assert_eq!(done.await, [true; WAITING]);
        turns.take().await.unwrap();
    }

    #[tokio::test]
    async fn work_whose_request_is_given_up_keeps_the_turn_to_its_end() {
        let turns = Turns::new(WAITING, "try again later");
        let (end, ended) = oneshot::channel::<()>();
        let first = turns.take().await.unwrap();
        let mut work = Box::pin(first.spend_on(async { Ok(ended.await.is_ok()) }));
        assert!(work.as_mut().now_or_never().is_none(), "it computes");
        drop(work);
        let mut next = Box::pin(turns.take());
        assert!(next.as_mut().now_or_never().is_none(), "it waits");
        end.send(()).unwrap();
        let next = next.await.unwrap();
        assert_eq!(next.spend_on(async { Ok(7) }).await.unwrap(), 7);
    }
}
