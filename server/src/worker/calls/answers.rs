//! The sending half of a streamed answer, and the task that fills it.
use crate::error::{Error, Result};
use futures::future::BoxFuture;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;

/// Messages under way to one caller; the work stops where the caller does not read.
const UNDER_WAY_MAX: usize = 4;

/// Where the messages of one call go.
pub struct Answers<T>(mpsc::Sender<Result<T, Status>>);

/// A streamed answer.
pub type AnswerStream<T> = ReceiverStream<Result<T, Status>>;

impl<T> Answers<T> {
    pub async fn send(&self, message: T) -> Result<()> {
        self.0
            .send(Ok(message))
            .await
            .map_err(|_| Error::internal("the caller has gone"))
    }
}

/// Starts `work` as a task of its own, so that a caller that reads slowly holds nothing up but its
/// own call, and drops it, with all that it holds, as soon as the caller has gone. Its error ends
/// the stream.
pub fn answer_with<T: Send + 'static>(
    work: impl FnOnce(Answers<T>) -> BoxFuture<'static, Result<()>>,
) -> AnswerStream<T> {
    let (sender, receiver) = mpsc::channel(UNDER_WAY_MAX);
    let work = work(Answers(sender.clone()));
    tokio::spawn(async move {
        tokio::select! {
            // First, or a cancelled call would be logged as a failure every other time.
            biased;
            () = sender.closed() => {}
            done = work => if let Err(error) = done {
                // Nobody to tell where the caller has gone.
                drop(sender.send(Err(error.into())).await);
            }
        }
    });
    ReceiverStream::new(receiver)
}
