//! Fetches one rank's share of one step, across broken streams and with rising urgency.
use super::{
    assemble::{Assembly, Batch},
    direct,
    sift::{Answer, select},
};
use crate::{Error, Result, Run, retry::Attempts};
use std::{
    future::pending,
    sync::{
        Arc,
        atomic::{AtomicI64, Ordering},
    },
    time::Duration,
};
use superbatch_proto::v1::{
    BatchHeader, Delivery, Intent, Reason, SelectBatchRequest, Ticket,
    select_batch_response::Message,
};
use tokio::{sync::watch, time::Instant};

/// The last step that the trainer has consumed, shared by the fetches of one stream of batches.
#[derive(Debug, Clone)]
pub(crate) struct Cursor(Arc<AtomicI64>);

impl Default for Cursor {
    fn default() -> Self {
        Self(Arc::new(AtomicI64::new(-1)))
    }
}

impl Cursor {
    pub(crate) fn set(&self, consumed_through: i64) {
        self.0.fetch_max(consumed_through, Ordering::AcqRel);
    }

    pub(crate) fn get(&self) -> Option<u64> {
        u64::try_from(self.0.load(Ordering::Acquire)).ok()
    }
}

/// How urgently the trainer needs a step.
#[derive(Debug, Clone)]
pub(crate) enum Urgency {
    Fixed(Intent),
    /// PREFETCH until a consumer has waited since `wanted` for `patience`, then NEED.
    Rising {
        wanted: watch::Receiver<Option<Instant>>,
        patience: Duration,
    },
}

impl Urgency {
    fn intent(&self) -> Intent {
        match self {
            Self::Fixed(intent) => *intent,
            Self::Rising { wanted, patience } => match *wanted.borrow() {
                Some(since) if since.elapsed() >= *patience => Intent::Need,
                _ => Intent::Prefetch,
            },
        }
    }

    /// Resolves when the intent has risen to NEED; never for a fixed one.
    async fn wait_until_risen(&mut self) {
        let Self::Rising { wanted, patience } = self else {
            return pending().await;
        };
        let since = match wanted.wait_for(Option::is_some).await {
            Ok(since) => *since,
            Err(_) => None,
        };
        match since {
            Some(since) => tokio::time::sleep_until(since + *patience).await,
            None => pending().await,
        }
    }

    /// Returns whether no consumer waits for the step yet, so that a failure may be kept back.
    fn is_ahead_of_need(&self) -> bool {
        matches!(self, Self::Rising { wanted, .. } if wanted.borrow().is_none())
    }

    /// Resolves when a consumer waits for the step.
    async fn wait_until_wanted(&mut self) {
        let Self::Rising { wanted, .. } = self else {
            return;
        };
        if wanted.wait_for(Option::is_some).await.is_err() {
            pending().await
        }
    }
}

/// A step to fetch.
pub(crate) struct Fetch {
    pub run: Run,
    pub step: u64,
    pub rank: u32,
    pub world_size: u32,
    pub cursor: Cursor,
    /// Batches of the steps before on which the trainer may not have trained yet.
    pub held: u32,
    pub urgency: Urgency,
    pub delivery: Delivery,
}

impl Fetch {
    /// Fetches, checks and decodes the batch. Broken streams are resumed where they broke.
    pub(crate) async fn batch(mut self) -> Result<Batch> {
        let client = self.run.client.clone();
        let mut assembly = Assembly::new(self.step);
        let mut attempts = Attempts::of(&client);
        loop {
            let (before, began) = (assembly.received(), Instant::now());
            let error = match self.attempt(&mut assembly).await {
                Ok(batch) => return Ok(batch),
                Err(error) => error,
            };
            // A stream that moved on before it broke does not use up attempts: a long batch over a
            // bad line breaks many times and still arrives.
            if assembly.received() > before {
                attempts.progressed();
            }
            match attempts.wait_before_next(&client, error, began).await {
                Ok(()) => {}
                Err(error)
                    if self.urgency.is_ahead_of_need()
                        && error.reason() != Some(Reason::EndOfData) =>
                {
                    tracing::debug!(%error, step = self.step, "not prefetched; asking again when \
                    it is wanted");
                    self.urgency.wait_until_wanted().await;
                    // A prefetch may use up all attempts while no consumer waits, for example
                    // during a restart of the service. That error would be stale when it is read,
                    // so the step is asked for again, with fresh attempts, once it is wanted.
                    attempts = Attempts::of(&client);
                }
                Err(error) => return Err(error),
            }
        }
    }

    async fn attempt(&mut self, assembly: &mut Assembly) -> Result<Batch> {
        let (batch, tickets) = self.stream(assembly).await?;
        if tickets.is_empty() {
            return Ok(batch);
        }
        match direct::complete(&self.run.client, batch, &tickets).await {
            Ok(batch) => {
                let workers = &self.run.client.link.workers;
                workers.direct.fetch_add(1, Ordering::Relaxed);
                Ok(batch)
            }
            // The coordinator serves the same rows. It is asked at once: the trainer waits.
            Err(error) => {
                tracing::warn!(%error, step = self.step, "a worker fails this batch; the \
                coordinator is asked for it");
                let workers = &self.run.client.link.workers;
                workers.fallbacks.fetch_add(1, Ordering::Relaxed);
                self.delivery = Delivery::Coordinator;
                *assembly = Assembly::new(self.step);
                self.stream(assembly).await.map(|(batch, _)| batch)
            }
        }
    }

    async fn stream(&mut self, assembly: &mut Assembly) -> Result<(Batch, Vec<Ticket>)> {
        let (header, mut answer) = self.open(assembly.received()).await?;
        assembly.begin(header)?;
        while let Some(message) = answer.message().await? {
            match message {
                Message::ArrowIpc(part) => {
                    let mut parts = answer.rows().into_iter().chain([part]);
                    parts.try_for_each(|part| assembly.extend(&part))?;
                }
                Message::Trailer(trailer) => return assembly.finish(&trailer),
                Message::Header(_) => {
                    return Err(assembly.corrupt("a second header".to_owned()));
                }
            }
        }
        Err(assembly.incomplete())
    }

    /// Asks for the step and returns with the header. If the step becomes needed while a PREFETCH
    /// is not answered yet, a second request with NEED is sent beside it, and the first answer is
    /// read. The service shares the work of both.
    async fn open(&mut self, offset: u64) -> Result<(BatchHeader, Answer)> {
        let intent = self.urgency.intent();
        let first = begin(self.request(intent, offset), self.run.clone());
        if intent == Intent::Need {
            return first.await;
        }
        let mut first = std::pin::pin!(first);
        tokio::select! {
            answer = &mut first => return answer,
            () = self.urgency.wait_until_risen() => {}
        }
        // The first request stays open until the second is answered. If it were cancelled before,
        // no call would want the step for a moment, and the service might drop its work.
        tokio::select! {
            Ok(answer) = &mut first => Ok(answer),
            answer = begin(self.request(Intent::Need, offset), self.run.clone()) => answer,
        }
    }

    fn request(&self, intent: Intent, resume_offset: u64) -> SelectBatchRequest {
        SelectBatchRequest {
            run_id: self.run.run_id().to_owned(),
            generation: self.run.generation(),
            step: self.step,
            rank: self.rank,
            world_size: self.world_size,
            incarnation: self.run.incarnation().to_owned(),
            intent: intent.into(),
            consumed_through: self.cursor.get(),
            delivery: self.delivery.into(),
            resume_offset,
            pushing_through: self.run.pushing_through(),
            held_steps: self.held,
        }
    }
}

async fn begin(request: SelectBatchRequest, run: Run) -> Result<(BatchHeader, Answer)> {
    let step = request.step;
    let mut answer = select(&run.client, request).await?;
    match answer.message().await? {
        Some(Message::Header(header)) => Ok((header, answer)),
        Some(_) => Err(Error::Corrupt {
            step,
            what: "its stream does not begin with a header".to_owned(),
        }),
        None => Err(Error::Incomplete {
            step,
            received: 0,
            expected: 0,
        }),
    }
}
