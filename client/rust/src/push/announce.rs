//! Announces to the service the weights that this process will push.
use crate::{Run, retry};
use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};
use superbatch_proto::v1::AnnouncePushRequest;
use tokio::{sync::oneshot, time::timeout};

/// How long a push waits for the service to acknowledge its announcement. Otherwise a request for
/// the next step, perhaps by another process's connection, could arrive before the announcement,
/// and the service would take the run for stalled. An unreachable service gets the announcement
/// later.
const HEARD_WITHIN: Duration = Duration::from_secs(1);

/// A push by generation and step.
type Named = (u32, i64);

/// Pushes that were begun or queued, by all handles of a run.
#[derive(Debug, Default)]
pub(crate) struct Pushes(Mutex<PushState>);

#[derive(Debug, Default)]
struct PushState {
    /// Pushes that were called for, queued or are under way, with the rank. Several ranks of one
    /// process may push the same step.
    on_their_way: Vec<(Named, u32)>,
    /// The newest published push.
    published: Option<Named>,
}

impl Pushes {
    /// Returns the newest step of a generation whose push was begun, queued or published.
    pub(crate) fn newest(&self, generation: u32) -> Option<i64> {
        let pushes = self.lock();
        let coming = pushes.on_their_way.iter().map(|(push, _)| push);
        coming
            .chain(&pushes.published)
            .filter(|(of, _)| *of == generation)
            .map(|(_, step)| *step)
            .max()
    }

    /// Returns whether this process has published a push of this step or of a later one.
    pub(crate) fn has_published(&self, generation: u32, step: i64) -> bool {
        self.lock()
            .published
            .is_some_and(|(of, newest)| of == generation && newest >= step)
    }

    fn on_their_way_now(&self) -> Vec<(Named, u32)> {
        self.lock().on_their_way.clone()
    }

    fn lock(&self) -> MutexGuard<'_, PushState> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Run {
    /// Announces the push of `step`: to the service, which then counts it for requests of every
    /// connection, and in later requests of this run. The announcement holds until the push is
    /// published or the returned value is dropped.
    pub(crate) async fn announce_push(&self, step: i64, rank: u32) -> Announced {
        let push = (self.generation(), step);
        let (published, ended) = oneshot::channel();
        let pushes = self.pushes().clone();
        pushes.lock().on_their_way.push((push, rank));
        let announced = Announced {
            pushes,
            push,
            rank,
            published: Some(published),
        };
        let (heard, hearing) = oneshot::channel();
        tokio::spawn(announce_and_withdraw(
            self.clone(),
            push,
            rank,
            heard,
            ended,
        ));
        // If the service does not answer in time, the push goes on: the announcement is only a
        // hint, and the task withdraws it later.
        drop(timeout(HEARD_WITHIN, hearing).await);
        announced
    }

    /// Announces all pushes under way once more: a service that has restarted has lost the
    /// announcements, which it keeps in memory only.
    pub(crate) async fn announce_again(&self) {
        for (push, rank) in self.pushes().on_their_way_now() {
            let request = self.announcement(push, rank);
            if let Err(error) = self.client.api().announce_push(request).await {
                tracing::debug!(%error, "the service does not hear of a push");
                return;
            }
        }
    }

    fn announcement(&self, (generation, step): Named, rank: u32) -> AnnouncePushRequest {
        AnnouncePushRequest {
            run_id: self.run_id().to_owned(),
            generation,
            step,
            rank,
            incarnation: self.incarnation().to_owned(),
            withdrawn: false,
        }
    }
}

/// Announces a push to the service, and withdraws it if it comes to nothing.
async fn announce_and_withdraw(
    run: Run,
    push: Named,
    rank: u32,
    heard: oneshot::Sender<()>,
    published: oneshot::Receiver<()>,
) {
    let say = |withdrawn| {
        let (client, request) = (&run.client, run.announcement(push, rank));
        let request = AnnouncePushRequest {
            withdrawn,
            ..request
        };
        async move {
            let attempt = || {
                let (mut api, request) = (client.api(), request.clone());
                async move { Ok(api.announce_push(request).await?) }
            };
            if let Err(error) = retry::call(client, attempt).await {
                // If the push fails too, its own error reports that.
                tracing::debug!(%error, "the service does not hear of a push");
            }
        }
    };
    say(false).await;
    // Fails if the caller no longer waits.
    let _ = heard.send(());
    if published.await.is_err() {
        say(true).await;
    }
}

/// An announced push. Dropping it withdraws the announcement, unless the push was published: no
/// step should wait for weights that were refused or abandoned.
pub(crate) struct Announced {
    pushes: Arc<Pushes>,
    push: Named,
    rank: u32,
    published: Option<oneshot::Sender<()>>,
}

impl Announced {
    pub(crate) fn generation(&self) -> u32 {
        self.push.0
    }

    pub(crate) fn published(mut self) {
        let mut pushes = self.pushes.lock();
        pushes.published = pushes.published.max(Some(self.push));
        drop(pushes);
        // Fails if the runtime has shut down, and the task with it.
        let _ = self.published.take().map(|published| published.send(()));
    }
}

impl Drop for Announced {
    fn drop(&mut self) {
        let mut pushes = self.pushes.lock();
        let ours = (self.push, self.rank);
        if let Some(at) = pushes.on_their_way.iter().position(|push| *push == ours) {
            pushes.on_their_way.swap_remove(at);
        }
    }
}
