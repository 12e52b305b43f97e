//! A stream of batches that are requested ahead of time.
mod assemble;
mod direct;
pub(crate) mod fetch;
pub mod fuzzing;
mod sift;

pub use assemble::Batch;

use crate::{Error, Result, Run};
use fetch::{Cursor, Fetch, Urgency};
use futures::{Stream, ready};
use std::{
    collections::VecDeque,
    future::Future,
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};
use superbatch_proto::v1::Reason;
use tokio::{sync::watch, task::JoinHandle, time::Instant};

/// The steps of a stream, its rank, and how far ahead it requests.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BatchesConfig {
    /// The rank whose shares the stream returns, below `world_size`.
    pub rank: u32,
    /// The number of ranks that share each step.
    pub world_size: u32,
    /// The first step. A trainer that resumes from a checkpoint names the step after it.
    pub start_step: u64,
    /// The step at which to end; it is not requested. If absent, the stream ends with the data.
    pub end_step: Option<u64>,
    /// Steps from one batch to the next: 1, or the number of streams that share the steps, such as
    /// the workers of a data loader.
    pub stride: u64,
    /// Batches of this stream that are requested beyond the one that the trainer has; limited by
    /// the run's `max_ahead`.
    pub prefetch: u64,
    /// Steps that the consumer takes before it trains on them, such as those in the queue of a data
    /// loader. They do not count as consumed.
    pub read_ahead: u64,
    /// How long the consumer waits for a step before the service learns that the trainer stands
    /// still. Zero, unless the consumer itself runs ahead of the trainer.
    pub need_after: Duration,
}

impl Default for BatchesConfig {
    fn default() -> Self {
        Self {
            rank: 0,
            world_size: 1,
            start_step: 0,
            end_step: None,
            stride: 1,
            prefetch: 1,
            read_ahead: 0,
            need_after: Duration::ZERO,
        }
    }
}

/// A stream of batches, in the order of their steps. It ends with the data or at `end_step`.
///
/// A request for a step says that all earlier ones are consumed. After an error the stream goes on
/// with the same step, so the caller decides whether to ask again. Dropping the stream cancels the
/// requests under way; dropping a `next()` loses nothing.
pub struct Batches {
    run: Run,
    config: BatchesConfig,
    /// The step to yield next.
    next: u64,
    cursor: Cursor,
    /// Fetches of `next` and the steps after it, in order.
    ahead: VecDeque<Ahead>,
    ended: bool,
}

/// A fetch under way. Dropping it cancels it.
struct Ahead {
    wanted: watch::Sender<Option<Instant>>,
    task: JoinHandle<Result<Batch>>,
}

impl Drop for Ahead {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Batches {
    pub(crate) fn new(run: Run, mut config: BatchesConfig) -> Result<Self> {
        if config.rank >= config.world_size {
            let message = format!(
                "rank {} is not below world_size {}",
                config.rank, config.world_size
            );
            return Err(Error::invalid("rank", message));
        }
        if config.stride == 0 {
            return Err(Error::invalid("stride", "it is 1 or more"));
        }
        let max_ahead = u64::from(run.spec().max_ahead.max(1));
        if config.read_ahead >= max_ahead {
            let needed = config.read_ahead + 1;
            let message = format!(
                "{} steps are read ahead, but the run allows less: open it with max_ahead >= \
                {needed}",
                config.read_ahead
            );
            return Err(Error::invalid("read_ahead", message));
        }
        config.prefetch = config
            .prefetch
            .min((max_ahead - 1 - config.read_ahead) / config.stride);
        let next = config.start_step;
        Ok(Self {
            run,
            config,
            next,
            cursor: Cursor::default(),
            ahead: VecDeque::new(),
            ended: false,
        })
    }

    /// Returns the step that the stream yields next.
    pub fn next_step(&self) -> u64 {
        self.next
    }

    /// Starts missing fetches, so that `next` and `prefetch` steps after it are under way.
    fn start_fetches(&mut self) {
        while self.ahead.len() as u64 <= self.config.prefetch {
            let step = self.next + self.ahead.len() as u64 * self.config.stride;
            if self.config.end_step.is_some_and(|end| step >= end) {
                break;
            }
            let (wanted, receiver) = watch::channel(None);
            // The consumer waits for this one already, so its first request says NEED at once
            // (after `need_after`).
            if self.ahead.is_empty() {
                wanted.send_replace(Some(Instant::now()));
            }
            let urgency = Urgency::Rising {
                wanted: receiver,
                patience: self.config.need_after,
            };
            let BatchesConfig {
                rank, world_size, ..
            } = self.config;
            let fetch = Fetch {
                run: self.run.clone(),
                step,
                rank,
                world_size,
                cursor: self.cursor.clone(),
                held: u32::try_from(self.config.read_ahead).unwrap_or(u32::MAX),
                urgency,
                delivery: self.run.spec().delivery(),
            };
            self.ahead.push_back(Ahead {
                wanted,
                task: tokio::spawn(fetch.batch()),
            });
        }
    }
}

impl Stream for Batches {
    type Item = Result<Batch>;

    fn poll_next(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Batch>>> {
        let this = self.get_mut();
        if this.ended {
            return Poll::Ready(None);
        }
        this.cursor
            .set(this.next as i64 - 1 - this.config.read_ahead as i64);
        this.start_fetches();
        let Some(front) = this.ahead.front_mut() else {
            this.ended = true;
            return Poll::Ready(None);
        };
        front
            .wanted
            .send_if_modified(|since| since.is_none() && since.replace(Instant::now()).is_none());
        let joined = ready!(Pin::new(&mut front.task).poll(cx));
        this.ahead.pop_front();
        match joined {
            Ok(Ok(batch)) => {
                this.next += this.config.stride;
                Poll::Ready(Some(Ok(batch)))
            }
            Ok(Err(error)) if error.reason() == Some(Reason::EndOfData) => {
                this.ended = true;
                this.ahead.clear();
                Poll::Ready(None)
            }
            Ok(Err(error)) => {
                this.ahead.clear();
                Poll::Ready(Some(Err(error)))
            }
            Err(join) if join.is_panic() => std::panic::resume_unwind(join.into_panic()),
            Err(_) => Poll::Ready(Some(Err(Error::Stopped))),
        }
    }
}
