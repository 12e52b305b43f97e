//! The part of a run that changes while it is open.
use crate::{
    coordinator::{
        facts::{chain::Chain, trail::Trail},
        receipts::doubt::InDoubt,
        trainer::{
            cell::Cell,
            ranks::{Bounds, Members},
        },
    },
    error::{Error, Result},
};
use std::collections::BTreeMap;
use superbatch_proto::v1::{Accounts, Reason, RunState};

/// The state behind one lock. The lock is never held over an `await`: all ranks of a run take it.
pub struct State {
    pub chain: Chain,
    /// Number of additions of phases so far.
    pub appended: u32,
    /// Steps from this one on are not started, because their phases are being written.
    pub appending_from: Option<u64>,
    pub closed: bool,
    pub failure: Option<String>,
    pub totals: Accounts,
    /// Receipts of which this process does not know whether they were written.
    pub in_doubt: InDoubt,
    /// Committed steps of the current trajectory.
    pub committed: Trail,
    pub members: Members,
    pub cells: BTreeMap<u64, Cell>,
}

impl State {
    pub fn run_state(&self) -> RunState {
        run_state(self.failure.is_some(), self.closed)
    }

    pub fn bounds(&self, max_ahead: u32) -> Bounds {
        Bounds {
            committed: self.committed.newest(),
            max_ahead,
        }
    }

    pub fn check_open(&self) -> Result<()> {
        if let Some(why) = &self.failure {
            return Err(failed(why));
        }
        if self.closed {
            return Err(closed());
        }
        Ok(())
    }

    pub fn check_generation(&self, asked: u32) -> Result<()> {
        let current = self.chain.current();
        if asked == current {
            return Ok(());
        }
        if asked > current {
            return Err(Error::invalid(
                "generation",
                format!("the run's newest generation is {current}, not {asked}"),
            ));
        }
        Err(stale(asked, current))
    }

    /// Ends all steps with `error` for waiting calls.
    pub fn end_all(&mut self, error: &Error) {
        for (_, cell) in std::mem::take(&mut self.cells) {
            cell.end(error);
        }
    }
}

pub fn run_state(failed: bool, closed: bool) -> RunState {
    match (failed, closed) {
        (true, _) => RunState::Failed,
        (false, true) => RunState::Closed,
        (false, false) => RunState::Open,
    }
}

/// Returns the error for all calls of a failed run, including the call in which it failed.
pub fn failed(why: &str) -> Error {
    Error::new(Reason::RunFailed, format!("the run failed: {why}"))
}

pub fn closed() -> Error {
    Error::new(Reason::RunClosed, "the run is closed; open another one")
}

pub fn stale(asked: u32, current: u32) -> Error {
    let message = format!(
        "the run was rewound: generation {asked} is over, {current} goes on; open the run again"
    );
    Error::new(Reason::GenerationStale, message).with("generation", current)
}
