//! A run in the hands of a call: what a call may do to a run, and what its answer says of the run.
use super::{open_runs::OpenRuns, run::Run};
use crate::{
    coordinator::released,
    error::{Error, Result},
};
use futures::Stream;
use std::sync::Arc;
use superbatch_proto::{
    OWNER,
    v1::{
        AnnouncePushRequest, Phase, PushStart, PushWeightsRequest, Reason, ReportLossesRequest,
        RewindMode, RunSpec, WeightsVersion,
    },
};
use tokio::time::Instant;
use tonic::Status;

/// A run that is not put to sleep while this lives.
///
/// Whatever may find out that another coordinator owns the run is a method of the lease, because
/// then the run has to leave memory: a call that forgot it would be answered from memory for ever.
pub struct Lease {
    run: Arc<Run>,
    open: Arc<OpenRuns>,
}

impl Lease {
    pub fn new(run: Arc<Run>, open: Arc<OpenRuns>) -> Self {
        let mut count = run.calls.count();
        (count.under_way, count.changed) = (count.under_way + 1, Instant::now());
        drop(count);
        Self { run, open }
    }

    /// Returns the run, for what no other coordinator can change.
    pub fn run(&self) -> &Arc<Run> {
        &self.run
    }

    /// # Errors
    /// Those of [`Run::rewind`].
    pub async fn rewind(&self, to_step: u64, mode: RewindMode) -> Result<u32> {
        let answer = self.run.rewind(to_step, mode).await;
        self.after_write(answer)
    }

    /// # Errors
    /// Those of [`Run::append_phases`].
    pub async fn append_phases(&self, phases: Vec<Phase>) -> Result<Arc<RunSpec>> {
        let answer = self.run.append_phases(phases).await;
        self.after_write(answer)
    }

    /// # Errors
    /// Those of [`Run::close`].
    pub async fn close(&self) -> Result<()> {
        let answer = self.run.close().await;
        self.after_write(answer)
    }

    /// # Errors
    /// Those of [`Run::roll_back_weights`].
    pub async fn roll_back_weights(&self, version: u64) -> Result<(WeightsVersion, u64)> {
        let answer = self.run.roll_back_weights(version).await;
        self.after_write(answer)
    }

    /// # Errors
    /// Those of [`Run::report_losses`].
    pub async fn report_losses(&self, request: &ReportLossesRequest) -> Result<()> {
        self.run.calls.train();
        // Not as other calls that write: a report that failed is brought again by its trainer, and
        // a run that is let go for it would lose all steps under way.
        self.after(self.run.report_losses(request).await)
    }

    /// Takes a rank's stream of weights, until the push is published.
    ///
    /// # Errors
    /// Those of [`Run::check_push`] and of the weights.
    pub async fn push<S>(&self, start: PushStart, stream: S) -> Result<WeightsVersion>
    where
        S: Stream<Item = Result<PushWeightsRequest, Status>> + Unpin + Send + 'static,
    {
        let run = &self.run;
        run.calls.train();
        let checked = run.check_push(start.generation, start.step, &start.incarnation);
        self.after(checked.await)?;
        let (generation, known) = run.trainers();
        let published = run.weights.push(generation, &known, start, stream).await?;
        // If another coordinator has taken the run over in the meantime, it may not know of this
        // push. NOT_OWNER names it, and the trainer pushes there again, where the fact is found.
        self.after(run.owner.check().await)?;
        Ok(published)
    }

    /// Announces a rank's push, or withdraws the announcement.
    ///
    /// # Errors
    /// Those of [`Run::check_push`].
    pub async fn announce_push(&self, request: &AnnouncePushRequest) -> Result<()> {
        self.run.calls.train();
        let (generation, step) = (request.generation, request.step);
        let checked = self.run.check_push(generation, step, &request.incarnation);
        self.after(checked.await)?;
        self.run.weights.announce(self.run.generation(), request)
    }

    /// Passes on what the run answered. If another coordinator owns it, it is let go, so that the
    /// next call looks again.
    pub fn after<T>(&self, answer: Result<T>) -> Result<T> {
        match answer {
            Err(error) if error.reason() == Reason::NotOwner => {
                self.open.release(&self.run);
                self.open.report_twin(&self.run, &error);
                // The new owner is this process, which has loaded the run again: the caller may
                // ask here again.
                let ours = error
                    .value(OWNER)
                    .is_some_and(|by| self.open.is_own_address(by));
                Err(if ours { released() } else { error })
            }
            answer => answer,
        }
    }

    /// As [`Lease::after`], of a call that writes a fact. If it is not known whether the fact is
    /// there, the run is let go: the next call reads what is.
    fn after_write<T>(&self, answer: Result<T>) -> Result<T> {
        use Reason::{GenerationStale, RunSpecConflict, StorageUnreachable};
        let unknown = |e: &Error| {
            matches!(
                e.reason(),
                GenerationStale | RunSpecConflict | StorageUnreachable
            )
        };
        if answer.as_ref().is_err_and(unknown) {
            self.open.release(&self.run);
        }
        self.after(answer)
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        let mut count = self.run.calls.count();
        (count.under_way, count.changed) = (count.under_way - 1, Instant::now());
    }
}
