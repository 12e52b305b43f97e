//! Losses that a trainer reports of the examples it trained on: a score column of later steps.
//!
//! Reports are facts, numbered in the order in which they came; of an example the last one counts.
//! Those that come while one is written are written together. Now and then all that is known is
//! written into one object, which only saves reads.
mod stored;
mod waiting;

use crate::{
    blocking::blocking,
    error::{Error, Result},
    storage::{Created, Location},
};
use bytes::Bytes;
use std::{
    collections::HashMap,
    sync::{Arc, Mutex, RwLock},
};
use stored::{Stored, decoded, encoded, report_key};
use superbatch_proto::v1::Reason;
use tokio::sync::OnceCell;
use tokio_util::task::TaskTracker;
use waiting::{Report, Waiting, fitting};

/// The name by which a phase's `score_columns` mean them.
pub use superbatch_proto::columns::LOSS as COLUMN;

/// Examples of a run whose losses are held, in memory and in its summaries.
const EXAMPLES_MAX: usize = 1 << 24;
/// Reports between two summaries, at least and at most. Between them, the next one comes if a
/// quarter as many losses were reported as the last one holds: so all summaries together are a few
/// times as large as the reports.
const SUMMARISED_EVERY: (u64, u64) = (256, 1 << 14);
/// Tries of one report where another writer takes its number.
const TRIES: usize = 8;

/// An example: the numbers of its source and shard, and its row in the shard.
pub type Example = (u32, u32, u64);
/// An example with its loss.
pub type Loss = (Example, f32);

/// The newest loss of each example.
type Table = Arc<RwLock<HashMap<Example, f32>>>;

/// The reported losses of one run, read when they are first needed.
#[derive(Debug)]
pub struct Losses {
    run: Location,
    opened: OnceCell<Opened>,
    waiting: Mutex<Waiting>,
    /// Summaries that are being written.
    summaries: TaskTracker,
    examples_max: usize,
}

#[derive(Debug)]
struct Opened {
    table: Table,
    /// Held while a report is written. Reads of losses do not wait for it.
    written: tokio::sync::Mutex<Written>,
}

/// How far reports are written. Numbers have no gaps, so that a former owner's report is found.
#[derive(Debug)]
struct Written {
    next: u64,
    summarised: usize,
    reports_since: u64,
    losses_since: usize,
}

impl Losses {
    pub fn new(run: Location) -> Self {
        Self {
            run,
            opened: OnceCell::new(),
            waiting: Mutex::default(),
            summaries: TaskTracker::new(),
            examples_max: EXAMPLES_MAX,
        }
    }

    /// Returns the newest loss of each example; NaN where none was reported.
    ///
    /// # Errors
    /// `StorageUnreachable`; `Internal` if a report cannot be read.
    pub async fn of(&self, examples: Vec<Example>) -> Result<Vec<f64>> {
        let table = self.opened().await?.table.clone();
        blocking("reading losses", move || {
            let table = table.read().expect("no panic while held");
            let losses = examples.iter().map(|example| table.get(example));
            Ok(losses
                .map(|loss| loss.map_or(f64::NAN, |loss| f64::from(*loss)))
                .collect())
        })
        .await
    }

    /// Stores losses. When it returns, they are durable.
    ///
    /// # Errors
    /// `Overloaded` if the run would hold too many, or if too many wait to be written;
    /// `StorageUnreachable`.
    pub async fn report(&self, losses: Vec<Loss>) -> Result<()> {
        let opened = self.opened().await?;
        let mut answered = {
            let mut waiting = self.waiting.lock().expect("no panic while held");
            waiting.add(losses)?
        };
        let mut written = opened.written.lock().await;
        loop {
            // The call before this one may have written it, too.
            use tokio::sync::oneshot::error::TryRecvError::{Closed, Empty};
            match answered.try_recv() {
                Ok(answer) => return answer,
                Err(Closed) => return Err(Error::internal("a report of losses was dropped")),
                Err(Empty) => {}
            }
            let reports = {
                let mut waiting = self.waiting.lock().expect("no panic while held");
                waiting.take()
            };
            self.write_together(opened, &mut written, reports).await;
        }
    }

    async fn opened(&self) -> Result<&Opened> {
        let read = async || {
            let Stored {
                losses,
                next,
                summarised,
                reports_since,
                losses_since,
            } = stored::read(&self.run).await?;
            Ok(Opened {
                table: Arc::new(RwLock::new(losses)),
                written: tokio::sync::Mutex::new(Written {
                    next,
                    summarised,
                    reports_since,
                    losses_since,
                }),
            })
        };
        self.opened.get_or_try_init(read).await
    }

    /// Writes reports as one, and answers each.
    async fn write_together(&self, opened: &Opened, written: &mut Written, reports: Vec<Report>) {
        let (losses, answers): (Vec<_>, Vec<_>) = reports
            .into_iter()
            .map(|report| (report.losses, report.answer))
            .unzip();
        let (table, max) = (opened.table.clone(), self.examples_max);
        let fit = blocking("joining reports of losses", move || {
            let table = table.read().expect("no panic while held");
            let (all, fits) = fitting(&table, &losses, max);
            let bytes = encoded(all.iter().copied());
            Ok((all, bytes, fits))
        });
        let (fits, outcome) = match fit.await {
            Ok((all, _, fits)) if all.is_empty() => (fits, Ok(())),
            Ok((all, bytes, fits)) => (fits, self.write(opened, written, all, bytes).await),
            Err(error) => (vec![true; answers.len()], Err(error)),
        };
        for (answer, fits) in answers.into_iter().zip(fits) {
            let answered = match &outcome {
                _ if !fits => Err(self.full()),
                Ok(()) => Ok(()),
                Err(error) => Err(error.repeat()),
            };
            // A call that went away needs no answer.
            drop(answer.send(answered));
        }
    }

    fn full(&self) -> Error {
        let max = self.examples_max;
        let message = format!(
            "the run would hold losses of more than {max} examples, which is the most; report only \
            examples of which losses were reported before"
        );
        Error::new(Reason::Overloaded, message).with("examples_max", max)
    }

    async fn write(
        &self,
        opened: &Opened,
        written: &mut Written,
        losses: Vec<Loss>,
        bytes: Bytes,
    ) -> Result<()> {
        for _ in 0..TRIES {
            let key = report_key(written.next);
            let theirs = match self.run.create(&key, bytes.clone()).await? {
                Created::Ours => None,
                Created::Theirs(theirs) => Some(decoded(&theirs, &self.run.uri_of(&key))?),
            };
            let Some(theirs) = theirs else {
                insert(&opened.table, written, losses).await?;
                self.summarise_if_due(opened, written);
                return Ok(());
            };
            // A former owner of the run was first: its report came before this one.
            insert(&opened.table, written, theirs).await?;
        }
        let message = "another coordinator reports losses of this run at the same time; try again";
        Err(Error::new(Reason::Overloaded, message))
    }

    /// Begins to write all that is known, if that is due. A failure is only logged: the reports are
    /// complete without it.
    fn summarise_if_due(&self, opened: &Opened, written: &mut Written) {
        if !written.is_due() || !self.summaries.is_empty() {
            return;
        }
        let (run, table, next) = (self.run.clone(), opened.table.clone(), written.next);
        (written.reports_since, written.losses_since) = (0, 0);
        written.summarised = table.read().expect("no panic while held").len();
        self.summaries.spawn(async move {
            let all = blocking("summarising losses", move || {
                let table = table.read().expect("no panic while held");
                Ok(encoded(table.iter().map(|(at, loss)| (*at, *loss))))
            });
            let done = async { stored::summarise(&run, next, all.await?).await };
            if let Err(error) = done.await {
                let (run, error) = (run.uri(), error.chain());
                tracing::warn!(run, next, error, "losses are not summarised for now");
            }
        });
    }
}

impl Written {
    fn is_due(&self) -> bool {
        let (at_least, at_most) = SUMMARISED_EVERY;
        let is_worth_it = self.losses_since >= self.summarised / 4;
        self.reports_since >= at_most || self.reports_since >= at_least && is_worth_it
    }
}

/// Notes the report of the next number.
async fn insert(table: &Table, written: &mut Written, losses: Vec<Loss>) -> Result<()> {
    let (table, count) = (table.clone(), losses.len());
    blocking("noting losses", move || {
        table.write().expect("no panic while held").extend(losses);
        Ok(())
    })
    .await?;
    written.next += 1;
    written.reports_since += 1;
    written.losses_since += count;
    Ok(())
}

#[cfg(test)]
mod tests;
