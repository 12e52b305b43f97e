//! Workers that fail for a reason that may be theirs alone: a mount, a credential or a network that
//! others have.
use super::worker::Worker;
use crate::error::{Error, Result};
use superbatch_proto::v1::Reason;

/// Workers that have to say the same before it is believed, where there are more.
const ENOUGH: usize = 3;

/// Who was asked for one piece of work in vain.
#[derive(Debug, Default)]
pub struct Unable {
    workers: Vec<Worker>,
    said: Option<Error>,
    /// The log knows.
    told: bool,
}

impl Unable {
    /// Notes that `worker` could not do it.
    ///
    /// # Errors
    /// `error` itself where no other worker would do better: it is no such reason, or enough
    /// workers have said so.
    pub fn note(&mut self, worker: &Worker, error: Error) -> Result<()> {
        let may_be_its_own = matches!(
            error.reason(),
            // Its own settings: no endpoint, no region, another store's bucket.
            Reason::InvalidArgument
                | Reason::StorageUnreachable
                | Reason::DatasetChanged
                | Reason::ModelInvalid
                | Reason::Internal
        );
        self.workers.push(worker.clone());
        if !may_be_its_own || self.workers.len() >= ENOUGH {
            return Err(error);
        }
        (self.said, self.told) = (Some(error), false);
        Ok(())
    }

    /// The worker of `live` whose turn it is, among those that have not been asked in vain. `live`
    /// is not empty.
    ///
    /// # Errors
    /// What the last one said, where there is no other.
    pub fn other(&mut self, mut live: Vec<Worker>, turn: usize) -> Result<Worker> {
        live.retain(|worker| !self.workers.iter().any(|asked| asked.is(worker)));
        if live.is_empty() {
            return Err(self
                .said
                .take()
                .unwrap_or_else(|| Error::new(Reason::NoWorkers, "all scoring workers failed")));
        }
        let worker = live.swap_remove(turn % live.len());
        if let (Some(error), Some(unable), false) = (&self.said, self.workers.last(), self.told) {
            let (from, to) = (&unable.address, &worker.address);
            tracing::warn!(
                worker = from,
                to,
                error = error.chain(),
                "a worker fails; another one does its work"
            );
            self.told = true;
        }
        Ok(worker)
    }
}

/// Whether another worker may do better: this one is gone or going, or its device is.
pub fn is_lost(error: &Error) -> bool {
    matches!(
        error.reason(),
        Reason::NoWorkers | Reason::ShuttingDown | Reason::DeviceUnavailable
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::coordinator::workers::pool::{Home, Pool};
    use std::time::{Duration, Instant};
    use superbatch_proto::v1::RegisterRequest;

    fn live(workers: u16) -> Vec<Worker> {
        let (pool, now) = (
            Pool::new(Duration::from_secs(10), Duration::ZERO, Home::default()),
            Instant::now(),
        );
        for port in 1..=workers {
            let address = format!("http://127.0.0.1:{port}");
            pool.register(
                &RegisterRequest {
                    address,
                    ..Default::default()
                },
                now,
            )
            .unwrap();
        }
        pool.live(now)
    }

    /// Workers that are asked until the failure is believed, and what is believed.
    fn asked(workers: u16, reason: Reason) -> (usize, Reason) {
        let (live, mut unable) = (live(workers), Unable::default());
        let mut asked = Vec::new();
        loop {
            let worker = match unable.other(live.clone(), asked.len()) {
                Ok(worker) => worker,
                Err(error) => return (asked.len(), error.reason()),
            };
            assert!(!asked.contains(&worker.address), "nobody is asked twice");
            asked.push(worker.address.clone());
            if let Err(error) = unable.note(&worker, Error::new(reason, "it cannot")) {
                return (asked.len(), error.reason());
            }
        }
    }

    #[tokio::test]
    async fn several_workers_have_to_say_so() {
        for (workers, expected) in [(1, 1), (2, 2), (3, 3), (8, ENOUGH)] {
            for reason in [Reason::StorageUnreachable, Reason::InvalidArgument] {
                assert_eq!(asked(workers, reason), (expected, reason));
            }
            assert_eq!(
                asked(workers, Reason::TokenizerMismatch).0,
                1,
                "that is nobody's own"
            );
        }
    }
}
