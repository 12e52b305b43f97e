//! The messages of a batch that is sent. A rank that stops reading lets go of them after a while:
//! unread, a batch would stay in memory for as long as the connection lives, and each batch that is
//! asked for again besides.
use crate::error::Error;
use std::{
    sync::{Arc, Mutex, PoisonError, Weak},
    time::Duration,
};
use superbatch_proto::v1::{Reason, select_batch_response::Message};
use tokio::{task::AbortHandle, time::Instant};
use tonic::Status;

/// How long a rank may leave a message of a batch unread. Clients read a batch whole before they
/// hand it on, so only a process or a network that stands still takes so long. One that goes on
/// asks again, and gets the rest.
pub const UNREAD_MAX: Duration = Duration::from_secs(120);

/// The messages of one answer. Clones share them, and each message is taken once: by tonic, or by
/// the body that takes the place of tonic's.
#[derive(Clone)]
pub struct Answer(Arc<Mutex<Watched>>);

type Messages = Box<dyn Iterator<Item = Message> + Send>;

struct Watched {
    /// `None` once the reader was given up.
    messages: Option<Messages>,
    /// When the reader asked last.
    asked: Instant,
    unread_max: Duration,
    /// Whether the trailer, or the error for a reader that was given up, was taken.
    is_over: bool,
    watch: Option<AbortHandle>,
}

impl Answer {
    pub fn new(messages: impl Iterator<Item = Message> + Send + 'static) -> Self {
        Self(Arc::new(Mutex::new(Watched {
            messages: Some(Box::new(messages)),
            asked: Instant::now(),
            unread_max: Duration::MAX,
            is_over: false,
            watch: None,
        })))
    }

    /// Drops what is left of the messages once the reader asks for none for that long.
    #[must_use]
    pub fn each_within(self, unread_max: Duration) -> Self {
        let watch = tokio::spawn(watch(Arc::downgrade(&self.0), unread_max));
        let mut watched = lock(&self.0);
        watched.unread_max = unread_max;
        watched.watch = Some(watch.abort_handle());
        drop(watched);
        self
    }
}

fn lock(watched: &Mutex<Watched>) -> std::sync::MutexGuard<'_, Watched> {
    watched.lock().unwrap_or_else(PoisonError::into_inner)
}

async fn watch(watched: Weak<Mutex<Watched>>, unread_max: Duration) {
    let mut until = Instant::now() + unread_max;
    loop {
        tokio::time::sleep_until(until).await;
        let Some(watched) = watched.upgrade() else {
            return;
        };
        let mut watched = lock(&watched);
        until = watched.asked + unread_max;
        if until <= Instant::now() {
            watched.messages = None;
            return;
        }
    }
}

impl Iterator for Answer {
    type Item = Result<Message, Status>;

    fn next(&mut self) -> Option<Self::Item> {
        let mut watched = lock(&self.0);
        watched.asked = Instant::now();
        if let Some(messages) = &mut watched.messages {
            let next = messages.next();
            if matches!(next, Some(Message::Trailer(_))) {
                // The batch is whole: that nobody asks for more is no failure.
                (watched.messages, watched.is_over) = (None, true);
            }
            return next.map(Ok);
        }
        if std::mem::replace(&mut watched.is_over, true) {
            return None;
        }
        let message = format!(
            "the batch was left unread for {} s; ask for it again",
            watched.unread_max.as_secs_f64()
        );
        Some(Err(Error::new(Reason::Overloaded, message).into()))
    }
}

impl Drop for Watched {
    fn drop(&mut self) {
        if let Some(watch) = &self.watch {
            watch.abort();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::from_status;
    use bytes::Bytes;
    use tokio::sync::oneshot;

    /// Messages that say when they are let go of.
    struct Parts(usize, Option<oneshot::Sender<()>>);

    impl Iterator for Parts {
        type Item = Message;

        fn next(&mut self) -> Option<Message> {
            self.0 = self.0.checked_sub(1)?;
            Some(Message::ArrowIpc(Bytes::from_static(b"rows")))
        }
    }

    impl Drop for Parts {
        fn drop(&mut self) {
            if let Some(told) = self.1.take() {
                told.send(()).unwrap();
            }
        }
    }

    #[tokio::test]
    async fn a_rank_that_reads_nothing_lets_go_of_its_batch() {
        let (told, gone) = oneshot::channel();
        let answer = Answer::new(Parts(9, Some(told)));
        let mut answer = answer.each_within(Duration::from_millis(1));
        gone.await.unwrap();
        let refused = answer.next().unwrap().unwrap_err();
        let refused = from_status(refused, Reason::Internal);
        assert_eq!(refused.reason(), Reason::Overloaded);
        assert!(answer.next().is_none());
    }

    #[tokio::test]
    async fn who_reads_gets_all() {
        let answer = Answer::new(Parts(3, None)).each_within(UNREAD_MAX);
        assert_eq!(answer.filter_map(Result::ok).count(), 3);
    }

    #[test]
    fn each_message_is_taken_once() {
        let mut taken = Answer::new(Parts(3, None));
        let shared = taken.clone();
        assert!(taken.next().is_some());
        assert_eq!(shared.count(), 2);
        assert!(taken.next().is_none());
    }
}
