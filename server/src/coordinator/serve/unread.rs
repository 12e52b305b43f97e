//! Batches that are sent: a rank that stops reading lets go of its own after a while. Unread, it
//! would stay in memory for as long as the connection lives, and each batch that is asked for again
//! besides.
use crate::error::Error;
use futures::{Stream, stream::BoxStream};
use std::{
    pin::Pin,
    sync::{Arc, Mutex, PoisonError, Weak},
    task::{Context, Poll},
    time::Duration,
};
use superbatch_proto::v1::Reason;
use tokio::{task::AbortHandle, time::Instant};
use tonic::Status;

/// How long a rank may leave a message of a batch unread. Clients read a batch whole before they
/// hand it on, so only a process or a network that stands still takes so long. One that goes on
/// asks again, and gets the rest.
pub const UNREAD_MAX: Duration = Duration::from_secs(120);

/// Messages, as long as somebody reads them.
pub struct EachWithin<T> {
    watched: Arc<Mutex<Watched<T>>>,
    unread_max: Duration,
    watch: AbortHandle,
}

struct Watched<T> {
    /// `None` once the reader was given up.
    messages: Option<BoxStream<'static, T>>,
    /// When the reader asked last.
    asked: Instant,
    is_told: bool,
}

/// Passes `messages` on, and drops what is left of them once the reader asks for none for that
/// long.
pub fn each_within<T: Send + 'static>(
    messages: impl Stream<Item = T> + Send + 'static,
    unread_max: Duration,
) -> EachWithin<T> {
    let watched = Arc::new(Mutex::new(Watched {
        messages: Some(Box::pin(messages)),
        asked: Instant::now(),
        is_told: false,
    }));
    let watch = tokio::spawn(watch(Arc::downgrade(&watched), unread_max));
    EachWithin {
        watched,
        unread_max,
        watch: watch.abort_handle(),
    }
}

async fn watch<T>(watched: Weak<Mutex<Watched<T>>>, unread_max: Duration) {
    let mut until = Instant::now() + unread_max;
    loop {
        tokio::time::sleep_until(until).await;
        let Some(watched) = watched.upgrade() else {
            return;
        };
        let mut watched = watched.lock().unwrap_or_else(PoisonError::into_inner);
        until = watched.asked + unread_max;
        if until <= Instant::now() {
            watched.messages = None;
            return;
        }
    }
}

impl<T> Stream for EachWithin<T> {
    type Item = Result<T, Status>;

    fn poll_next(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let mut watched = self.watched.lock().unwrap_or_else(PoisonError::into_inner);
        watched.asked = Instant::now();
        if let Some(messages) = &mut watched.messages {
            return messages
                .as_mut()
                .poll_next(context)
                .map(|next| next.map(Ok));
        }
        if std::mem::replace(&mut watched.is_told, true) {
            return Poll::Ready(None);
        }
        let message = format!(
            "the batch was left unread for {} s; ask for it again",
            self.unread_max.as_secs_f64()
        );
        let error = Error::new(Reason::Overloaded, message);
        Poll::Ready(Some(Err(error.into())))
    }
}

impl<T> Drop for EachWithin<T> {
    fn drop(&mut self) {
        self.watch.abort();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::from_status;
    use futures::{StreamExt, stream};
    use tokio::sync::oneshot;

    /// A message that says when it is let go of.
    struct Message(Option<oneshot::Sender<()>>);

    impl Drop for Message {
        fn drop(&mut self) {
            if let Some(told) = self.0.take() {
                told.send(()).unwrap();
            }
        }
    }

    #[tokio::test]
    async fn a_rank_that_reads_nothing_lets_go_of_its_batch() {
        let (told, gone) = oneshot::channel();
        let batch = vec![Message(None), Message(Some(told))];
        let mut stream = each_within(stream::iter(batch), Duration::from_millis(1));
        assert!(stream.next().await.unwrap().is_ok());
        gone.await.unwrap();
        let refused = stream.next().await.unwrap().err().unwrap();
        let refused = from_status(refused, Reason::Internal);
        assert_eq!(refused.reason(), Reason::Overloaded);
        assert!(stream.next().await.is_none());
    }

    #[tokio::test]
    async fn who_reads_gets_all() {
        let mut stream = each_within(stream::iter(0..3), UNREAD_MAX);
        for number in 0..3 {
            assert_eq!(stream.next().await.unwrap().unwrap(), number);
        }
        assert!(stream.next().await.is_none());
    }
}
