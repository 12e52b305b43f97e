//! Uploads weights in the background, in order, with a bounded queue.
use super::{Push, announce::Announced};
use crate::{Error, Result, Run};
use std::sync::{Arc, Mutex, PoisonError};
use superbatch_proto::v1::WeightsVersion;
use tokio::{
    sync::{mpsc, oneshot},
    task::JoinHandle,
};

/// Uploads pushes one after the other while the trainer goes on. No push is dropped, because an
/// exact lag needs each of them: if the queue is full, [`Pusher::push`] waits.
///
/// A push that fails does not stop later ones. Its error is returned by the next call, once.
/// Dropping the pusher abandons pushes that are not uploaded yet: flush first.
pub struct Pusher {
    run: Run,
    queue: mpsc::Sender<Job>,
    failed: Arc<Mutex<Option<Error>>>,
    task: JoinHandle<()>,
}

enum Job {
    Push { push: Push, announced: Announced },
    Flush(oneshot::Sender<Option<WeightsVersion>>),
}

/// A place for one push in the queue. The service expects the push until the slot is dropped
/// unused.
pub struct Slot {
    announced: Announced,
    permit: mpsc::OwnedPermit<Job>,
}

impl Slot {
    /// Queues the push, which must be of the step and the rank of the reservation.
    pub fn push(self, push: Push) {
        let announced = self.announced;
        self.permit.send(Job::Push { push, announced });
    }
}

impl Pusher {
    /// Starts uploading on the current runtime. At most `queued_max` (at least 1) pushes wait
    /// besides the one that is under way.
    pub fn start(run: &Run, queued_max: usize) -> Self {
        let (queue, jobs) = mpsc::channel(queued_max.max(1));
        let failed = Arc::new(Mutex::new(None));
        let task = tokio::spawn(upload(run.clone(), jobs, failed.clone()));
        Self {
            run: run.clone(),
            queue,
            failed,
            task,
        }
    }

    /// Announces that `rank` pushes the weights of `step`, and waits for a place in the queue.
    /// Reserve before copying the weights, so that no more copies exist than the queue holds.
    ///
    /// Fails with the error of an earlier push, if that was not returned yet.
    pub async fn reserve(&self, step: i64, rank: u32) -> Result<Slot> {
        self.check_failed()?;
        let announced = self.run.announce_push(step, rank).await;
        let permit = self
            .queue
            .clone()
            .reserve_owned()
            .await
            .map_err(|_| Error::Stopped)?;
        self.check_failed()?;
        Ok(Slot { announced, permit })
    }

    /// Queues a push; waits while the queue is full. Fails as [`Pusher::reserve`] does, and then
    /// nothing is queued.
    pub async fn push(&self, push: Push) -> Result<()> {
        self.reserve(push.step, push.rank).await?.push(push);
        Ok(())
    }

    /// Waits until all pushes queued so far are published. Returns the newest version published by
    /// this pusher.
    pub async fn flush(&self) -> Result<Option<WeightsVersion>> {
        let (done, version) = oneshot::channel();
        self.queue
            .send(Job::Flush(done))
            .await
            .map_err(|_| Error::Stopped)?;
        let version = version.await.map_err(|_| Error::Stopped)?;
        self.check_failed()?;
        Ok(version)
    }

    fn check_failed(&self) -> Result<()> {
        match self
            .failed
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take()
        {
            Some(error) => Err(error),
            None => Ok(()),
        }
    }
}

impl Drop for Pusher {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn upload(run: Run, mut jobs: mpsc::Receiver<Job>, failed: Arc<Mutex<Option<Error>>>) {
    let mut newest = None;
    while let Some(job) = jobs.recv().await {
        match job {
            Job::Push { push, announced } => match super::push(&run, push, announced).await {
                Ok(version) => newest = Some(version),
                // The first error is kept: later ones are often its consequence.
                Err(error) => drop(
                    failed
                        .lock()
                        .unwrap_or_else(PoisonError::into_inner)
                        .get_or_insert(error),
                ),
            },
            // Fails if the caller of `flush` has gone.
            Job::Flush(done) => drop(done.send(newest.clone())),
        }
    }
}
