//! The sending half of a streamed answer, and the task that fills it.
use crate::{
    error::{Error, Result},
    handed::Handover,
};
use futures::future::BoxFuture;
use std::time::Duration;
use superbatch_proto::v1::Reason;
use tokio::{sync::mpsc, time::timeout};
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;
use tracing::{Instrument, Span};

/// Messages that wait for one caller to read them. Each holds up to 1 MiB, and a full channel stops
/// the work of this call, so a slow caller costs a bounded amount of memory.
const UNDER_WAY_MAX: usize = 4;

/// How long a caller may leave one message unread, unless its call says otherwise. A call holds a
/// slot, a block, or rows while it sends; callers that read nothing, or a byte a second, would hold
/// them for ever, and keep-alive does not see it: such a peer answers pings.
const UNREAD_MAX: Duration = Duration::from_secs(300);

/// The sending half of one call's answer.
pub(crate) struct Answers<T> {
    sender: mpsc::Sender<Result<T, Status>>,
    /// How long the caller may leave one message unread.
    unread_max: Duration,
    /// Where rows are put for a caller in this process.
    handover: Option<Handover>,
}

/// A streamed answer.
pub(crate) type AnswerStream<T> = ReceiverStream<Result<T, Status>>;

impl<T> Answers<T> {
    /// Gives up a caller that reads no message for that long.
    #[must_use]
    pub(crate) fn each_within(self, unread_max: Duration) -> Self {
        Self { unread_max, ..self }
    }

    /// Has rows put into `handover` in the place of messages, if there is one.
    #[must_use]
    pub(crate) fn handing(self, handover: Option<Handover>) -> Self {
        Self { handover, ..self }
    }

    /// Returns where rows are put; `None` if they are sent.
    pub(crate) fn handover(&self) -> Option<&Handover> {
        self.handover.as_ref()
    }

    /// # Errors
    /// `Internal` if the caller has gone, `Overloaded` if it does not read.
    pub(crate) async fn send(&self, message: T) -> Result<()> {
        let sent = self.sender.send(Ok(message));
        let sent = timeout(self.unread_max, sent).await.map_err(|_| {
            let message = "the caller has stopped reading";
            Error::new(Reason::Overloaded, message)
        })?;
        sent.map_err(|_| Error::internal("the caller has gone"))
    }
}

/// Starts `work` as a task of its own, so that a caller that reads slowly delays only its own call.
/// The task is dropped, with all that it holds, as soon as the caller has gone. An error of `work`
/// ends the stream. The work belongs to the trace of its call.
pub(crate) fn answer_with<T: Send + 'static>(
    work: impl FnOnce(Answers<T>) -> BoxFuture<'static, Result<()>>,
) -> AnswerStream<T> {
    let (sender, receiver) = mpsc::channel(UNDER_WAY_MAX);
    let work = work(Answers {
        sender: sender.clone(),
        unread_max: UNREAD_MAX,
        handover: None,
    });
    let work = work.instrument(Span::current());
    tokio::spawn(async move {
        tokio::select! {
            // `biased` polls this branch first. A cancelled call also makes `work` fail (its sends
            // find no receiver), and a random choice would log every second cancellation as a
            // failure of this worker.
            biased;
            () = sender.closed() => {}
            done = work => if let Err(error) = done {
                // If the caller has gone, the error has no reader and is dropped.
                drop(sender.send(Err(error.into())).await);
            }
        }
    });
    ReceiverStream::new(receiver)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_caller_that_reads_nothing_is_given_up() {
        let (told, heard) = tokio::sync::oneshot::channel();
        let stream = answer_with(|answers: Answers<u64>| {
            Box::pin(async move {
                let answers = answers.each_within(Duration::from_millis(1));
                let mut sent = 0;
                let error = loop {
                    match answers.send(sent).await {
                        Ok(()) => sent += 1,
                        Err(error) => break error,
                    }
                };
                told.send((sent, error.reason())).unwrap();
                Ok(())
            })
        });
        let (sent, reason) = heard.await.unwrap();
        assert_eq!((sent, reason), (UNDER_WAY_MAX as u64, Reason::Overloaded));
        drop(stream);
    }
}
