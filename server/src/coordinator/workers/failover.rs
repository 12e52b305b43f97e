//! Workers that fail for a reason that may be theirs alone: a missing mount, credential or network
//! that other workers have.
//!
//! One error does not tell whose fault it is. If the first one failed the step, a single worker
//! with a broken mount would fail every step of which it gets a slice. If each error were tried on
//! all workers, a damaged file would cost a hundred attempts before it was named, and content that
//! crashes its worker would take down one after the other. So there are two bounds: how many
//! workers must say the same before it is believed, and how many may be lost under one piece of
//! work.
use super::{pool::Pool, worker::Worker};
use crate::error::{Error, Result};
use superbatch_proto::v1::Reason;

/// Workers that must fail before the error is believed, if there are more workers. One worker may
/// have a broken mount, two may share a broken host. Asking all of a hundred workers would make
/// each error of the data take minutes.
const ENOUGH: usize = 3;
/// Workers that one piece of work may lose before it fails. Without a bound, work whose content
/// crashes workers would take down all of them, one after the other.
const LOST_MAX: usize = 5;

/// The workers that could not do one piece of work.
#[derive(Debug, Default)]
struct Unable {
    workers: Vec<Worker>,
    /// What the last of them answered.
    error: Option<Error>,
    is_logged: bool,
}

impl Unable {
    /// Notes that `worker` could not do the work.
    ///
    /// # Errors
    /// `error` itself if no other worker would do better: its reason is not the worker's own, or
    /// enough workers have failed.
    fn note(&mut self, worker: &Worker, error: Error) -> Result<()> {
        let may_be_its_own = matches!(
            error.reason(),
            // Caused by the worker's own settings: no endpoint, no region, another store's bucket.
            Reason::InvalidArgument
                | Reason::StorageUnreachable
                | Reason::DatasetChanged
                | Reason::ModelInvalid
                // Rows without end.
                | Reason::MessageTooLarge
                | Reason::Internal
        );
        self.workers.push(worker.clone());
        if !may_be_its_own || self.workers.len() >= ENOUGH {
            return Err(error);
        }
        (self.error, self.is_logged) = (Some(error), false);
        Ok(())
    }

    /// Returns the worker of `live` whose turn it is, among those that have not failed. `live` is
    /// not empty.
    ///
    /// # Errors
    /// The last worker's error, if there is no other worker.
    fn other(&mut self, mut live: Vec<Worker>, turn: usize) -> Result<Worker> {
        live.retain(|worker| !self.workers.iter().any(|asked| asked.is(worker)));
        if live.is_empty() {
            return Err(self
                .error
                .take()
                .unwrap_or_else(|| Error::new(Reason::NoWorkers, "all scoring workers failed")));
        }
        let worker = live.swap_remove(turn % live.len());
        if let (Some(error), Some(unable), false) =
            (&self.error, self.workers.last(), self.is_logged)
        {
            let (from, to) = (&unable.address, &worker.address);
            tracing::warn!(
                worker = from,
                to,
                error = error.chain(),
                "a worker fails; another one does its work"
            );
            self.is_logged = true;
        }
        Ok(worker)
    }
}

/// One piece of work, until a worker has done it: who was lost under it, who was unable, and whose
/// turn it is.
pub struct Failover<'a> {
    pool: &'a Pool,
    /// What the name of the worker's device begins with.
    device: &'a str,
    /// The first worker's place among those that live; each in its turn if absent.
    first: Option<usize>,
    asked: usize,
    unable: Unable,
    lost: usize,
    /// Why the last one was lost.
    last: Option<Error>,
}

impl<'a> Failover<'a> {
    pub fn new(pool: &'a Pool) -> Self {
        Self {
            pool,
            device: "",
            first: None,
            asked: 0,
            unable: Unable::default(),
            lost: 0,
            last: None,
        }
    }

    /// Asks only workers on such a device.
    #[must_use]
    pub fn on(self, device: &'a str) -> Self {
        Self { device, ..self }
    }

    /// Begins with the worker of that turn, so that the pieces of one step are spread.
    #[must_use]
    pub fn from_turn(self, turn: usize) -> Self {
        Self {
            first: Some(turn),
            ..self
        }
    }

    /// Returns the worker whose turn it is.
    ///
    /// # Errors
    /// `NoWorkers` if there is none, because of the one that was lost; the last worker's error if
    /// all have failed.
    pub async fn worker(&mut self) -> Result<Worker> {
        let live = match self.pool.wait_on(self.device).await {
            Ok(live) => live,
            Err(none) => {
                return Err(match self.last.take() {
                    Some(lost) => none.because(lost),
                    None => none,
                });
            }
        };
        let turn = self.first.unwrap_or_else(|| self.pool.next_turn());
        let turn = turn.wrapping_add(self.asked);
        self.asked += usize::from(self.first.is_some());
        self.unable.other(live, turn)
    }

    /// Notes that `worker` did not do it.
    ///
    /// # Errors
    /// `error` itself if another one would not do better, or enough were lost.
    pub fn failed(&mut self, worker: &Worker, error: Error) -> Result<()> {
        if !is_lost(&error) {
            return self.unable.note(worker, error);
        }
        self.pool.lost(worker);
        self.lost += 1;
        if self.lost >= LOST_MAX {
            return Err(error);
        }
        tracing::warn!(
            worker = worker.address,
            error = error.chain(),
            "a worker is lost; another one does its work"
        );
        self.last = Some(error);
        Ok(())
    }
}

/// Returns whether the worker itself is lost: it is gone, shutting down, or its device fails.
/// Another worker may then do better.
fn is_lost(error: &Error) -> bool {
    matches!(
        error.reason(),
        Reason::NoWorkers | Reason::ShuttingDown | Reason::DeviceUnavailable
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::coordinator::workers::pool::Home;
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
            for reason in [
                Reason::StorageUnreachable,
                Reason::InvalidArgument,
                Reason::MessageTooLarge,
            ] {
                assert_eq!(asked(workers, reason), (expected, reason));
            }
            assert_eq!(
                asked(workers, Reason::TokenizerMismatch).0,
                1,
                "that is nobody's own"
            );
        }
    }

    /// Each call names a worker that is there; none may take down more of them than that.
    #[tokio::test]
    async fn one_piece_of_work_takes_a_few_workers_with_it_at_most() {
        for (workers, expected) in [(2_usize, 2), (8, LOST_MAX)] {
            let (lease, now) = (Duration::from_secs(3600), Instant::now());
            let pool = Pool::new(lease, Duration::ZERO, Home::default());
            for port in 1..=workers {
                let address = format!("http://127.0.0.1:{port}");
                let request = RegisterRequest {
                    address,
                    ..Default::default()
                };
                pool.register(&request, now).unwrap();
            }
            let mut failover = Failover::new(&pool);
            let mut lost = 0;
            let ended = loop {
                let worker = match failover.worker().await {
                    Ok(worker) => worker,
                    Err(none) => break none,
                };
                lost += 1;
                let gone = Error::new(Reason::NoWorkers, format!("loss {lost}"));
                if let Err(error) = failover.failed(&worker, gone) {
                    break error;
                }
            };
            assert_eq!(lost, expected);
            assert_eq!(ended.reason(), Reason::NoWorkers);
            assert!(ended.chain().contains(&format!("loss {lost}")), "{ended}");
            let left = workers - lost;
            assert_eq!(pool.live(Instant::now()).len(), left, "others live on");
        }
    }
}
