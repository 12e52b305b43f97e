//! One rank's stream of a push: its parts are staged as they arrive.
use super::{
    Inner,
    publish::Whole,
    staging::{Receiving, Staged},
    streams::{Answer, At},
};
use crate::{
    error::{Error, Result, from_status},
    metrics,
};
use futures::{Stream, StreamExt};
use std::{future::pending, sync::Arc, time::Duration};
use superbatch_proto::v1::{
    PushStart, PushWeightsRequest, Reason, WeightsVersion, push_weights_request::Message,
};
use tokio::{sync::watch, time::timeout};
use tonic::Status;
use tracing::Instrument;

/// One stream's membership in a push. If it is dropped early (the connection broke), the stream's
/// parts are removed from the staging area.
pub struct Member {
    pub inner: Arc<Inner>,
    pub at: At,
    pub stream: u64,
    pub answer: watch::Receiver<Answer>,
    /// The text that says which stream took this one's place; `None` until one does.
    pub superseded: watch::Receiver<Option<String>>,
    /// The file from which this process reads its parts, which have no checksums then; `None` if a
    /// trainer sends them.
    pub reads: Option<String>,
}

/// Why a stream ended too early.
pub enum Fault {
    /// Only this stream broke. The client may send it again.
    Broken(Error),
    /// Its content makes the whole push invalid.
    Refused(Error),
}

/// Returns the fault for a stream that the transport ended.
fn fault_of_transport(status: Status) -> Fault {
    let error = from_status(status, Reason::InvalidArgument);
    match error.reason() {
        Reason::MessageTooLarge | Reason::WeightsRefused => Fault::Refused(error),
        // Of a push by URI: the store did not answer. The client may ask again.
        Reason::StorageUnreachable => Fault::Broken(error),
        _ => Fault::Broken(Error::invalid(
            "stream",
            format!("the stream broke: {error}"),
        )),
    }
}

/// Reads the first message of a push, its start.
///
/// # Errors
/// `InvalidArgument` if another message comes first, or none within `silence`.
pub async fn read_start<S>(messages: &mut S, silence: Duration) -> Result<PushStart>
where
    S: Stream<Item = Result<PushWeightsRequest, Status>> + Unpin,
{
    let first = timeout(silence, messages.next()).await.map_err(|_| {
        let seconds = silence.as_secs_f64();
        Error::invalid(
            "start",
            format!("a push began with silence, for {seconds} s"),
        )
    })?;
    let first = first
        .transpose()
        .map_err(|status| from_status(status, Reason::InvalidArgument))?;
    match first.and_then(|first| first.message) {
        Some(Message::Start(start)) => Ok(start),
        _ => Err(Error::invalid("start", "a push begins with PushStart")),
    }
}

impl Member {
    /// Waits for the push's answer, or for a newer stream of this rank that takes over.
    pub async fn wait_for_answer(&self) -> Result<WeightsVersion> {
        let mut answer = self.answer.clone();
        let superseded = async {
            let mut superseded = self.superseded.clone();
            let why = superseded.wait_for(Option::is_some).await.ok();
            match why.and_then(|why| why.clone()) {
                Some(why) => why,
                // The push was answered.
                None => pending().await,
            }
        };
        tokio::select! {
            biased;
            why = superseded => Err(Error::new(Reason::PushConflict, why)),
            found = answer.wait_for(Option::is_some) => match found.ok().and_then(
                |answer| answer.clone(),
            ) {
                Some(Ok(version)) => Ok(version),
                Some(Err(status)) => Err(from_status(status, Reason::Internal)),
                None => Err(Error::internal("the push was given up")),
            },
        }
    }

    pub async fn receive<S>(&self, mut messages: S) -> Result<(), Fault>
    where
        S: Stream<Item = Result<PushWeightsRequest, Status>> + Send + Unpin,
    {
        let silence = self.inner.spec.push_deadline;
        let broken = |message: String| Fault::Broken(Error::invalid("stream", message));
        let mut open: Option<Receiving> = None;
        loop {
            let next = timeout(silence, messages.next()).await;
            let next = next.map_err(|_| Fault::Broken(self.silent(silence)))?;
            let message = match next.transpose().map_err(fault_of_transport)? {
                Some(message) => message.message,
                None if open.as_ref().is_none_or(Receiving::may_end) => return Ok(()),
                None => return Err(broken("the stream ended inside of a part".into())),
            };
            self.take(&mut open, message).map_err(Fault::Refused)?;
        }
    }

    /// Returns the error for a stream that brought nothing for so long.
    fn silent(&self, silence: Duration) -> Error {
        let Some(uri) = &self.reads else {
            let message = format!("the stream was silent for {silence:?}");
            return Error::invalid("stream", message);
        };
        let message = format!(
            "the store sent nothing of {uri} for {silence:?} (coordinator.push_deadline_seconds); \
            push it again"
        );
        Error::new(Reason::StorageUnreachable, message).with("uri", uri)
    }

    /// Handles one message. `open` is the part whose bytes are awaited. The bytes are copied and
    /// hashed here, without the lock of the staging area: under it, ranks would send one after
    /// another. Only a part's place and its end are the area's.
    fn take(&self, open: &mut Option<Receiving>, message: Option<Message>) -> Result<()> {
        match message {
            Some(Message::Part(header)) => {
                if let Some(part) = open.take() {
                    self.staged(|staged| staged.add_received(part))?;
                }
                let part = self.staged(|staged| staged.reserve(self.stream, header))?;
                *open = Some(if self.reads.is_some() {
                    part.unchecked()
                } else {
                    part
                });
            }
            Some(Message::Data(bytes)) => {
                metrics::weight_push_bytes().increment(bytes.len() as u64);
                let part = open
                    .as_mut()
                    .ok_or_else(|| Error::invalid("data", "data came before a part's header"))?;
                part.take(&bytes)?;
            }
            Some(Message::Start(_)) => {
                return Err(Error::invalid(
                    "start",
                    "a push has one start, its first message",
                ));
            }
            None => return Err(Error::invalid("message", "an empty message in a push")),
        }
        match open.take_if(|part| part.is_full()) {
            Some(part) => self.staged(|staged| staged.add_received(part)),
            None => Ok(()),
        }
    }

    fn staged<T>(&self, change: impl FnOnce(&mut Staged) -> Result<T>) -> Result<T> {
        let mut staging = self.inner.lock();
        let push = staging
            .pushes
            .get_mut(&self.at)
            .filter(|push| push.streams.contains_key(&self.stream));
        match push.and_then(|push| push.staged.as_mut()) {
            Some(staged) => change(staged),
            None => Err(Error::new(
                Reason::PushConflict,
                "this stream's push was answered already",
            )),
        }
    }

    /// Notes that this stream has sent everything. The last stream to end starts the publication.
    pub fn end(&self) {
        let mut staging = self.inner.lock();
        let Some(push) = staging.pushes.get_mut(&self.at) else {
            return;
        };
        if let Some(rank) = push.streams.get_mut(&self.stream) {
            rank.ended = true;
        }
        let whole = push.streams.values().all(|rank| rank.ended)
            && push.staged.as_ref().is_some_and(Staged::is_whole);
        let Some(staged) = push.staged.take_if(|_| whole) else {
            return;
        };
        let (inner, (generation, step)) = (self.inner.clone(), self.at);
        let whole = Whole {
            generation,
            step,
            push_id: push.id.clone(),
            base: push.base,
            staged,
            started: push.started,
        };
        let span = tracing::info_span!("push", run = inner.spec.run_id);
        // A task of its own, which the stream does not own. Publishing takes minutes, and the
        // client may break off in between: the push must then still be published, since
        // other ranks had the answer that their parts arrived. The client asks again with the same
        // push_id and gets the version.
        self.inner.tasks.spawn(async move {
            let answer = inner.publish(whole).instrument(span).await;
            inner.answer(&mut inner.lock(), (generation, step), answer);
        });
    }

    /// Refuses the whole push, unless it is being published already or this stream no longer
    /// belongs to it. `why` gets the ranks whose streams bring the push.
    pub fn refuse(&self, why: impl FnOnce(&Staged, &str) -> Error) {
        let mut staging = self.inner.lock();
        let push = staging
            .pushes
            .get(&self.at)
            .filter(|push| push.streams.contains_key(&self.stream));
        let why = push.and_then(|push| Some(why(push.staged.as_ref()?, &push.ranks())));
        if let Some(why) = why {
            self.inner.answer(&mut staging, self.at, Err(why));
        }
    }
}

impl Drop for Member {
    fn drop(&mut self) {
        let mut staging = self.inner.lock();
        let Some(push) = staging.pushes.get_mut(&self.at) else {
            return;
        };
        if push.streams.remove(&self.stream).is_none() {
            return;
        }
        let Some(staged) = &mut push.staged else {
            return;
        };
        staged.drop_stream(self.stream);
        metrics::weight_push_failures("BROKEN").increment(1);
        if push.streams.is_empty() {
            staging.pushes.remove(&self.at);
            self.inner.publish_traffic(&staging, None);
        }
    }
}
