//! The sending half of a streamed answer, and the task that fills it.
use crate::error::{Error, Result};
use futures::future::BoxFuture;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;

/// Messages that wait for one caller to read them. Each holds up to 1 MiB, and a full channel stops
/// the work of this call, so a slow caller costs a bounded amount of memory.
const UNDER_WAY_MAX: usize = 4;

/// The sending half of one call's answer.
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

/// Starts `work` as a task of its own, so that a caller that reads slowly delays only its own call.
/// The task is dropped, with all that it holds, as soon as the caller has gone. An error of `work`
/// ends the stream.
pub fn answer_with<T: Send + 'static>(
    work: impl FnOnce(Answers<T>) -> BoxFuture<'static, Result<()>>,
) -> AnswerStream<T> {
    let (sender, receiver) = mpsc::channel(UNDER_WAY_MAX);
    let work = work(Answers(sender.clone()));
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
