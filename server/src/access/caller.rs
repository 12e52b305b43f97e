//! The caller of a call, after the check of its token.
use super::{Access, Peer, tokens::Entry};
use crate::error::{Error, Result};
use serde_json::Value;
use std::sync::Arc;
use superbatch_proto::v1::Reason;
use tonic::Request;

/// The caller, which the layer puts into a call's extensions.
#[derive(Clone)]
pub struct Caller {
    pub(super) peer: Peer,
    /// `None` if the process requires no tokens.
    pub(super) token: Option<Arc<Entry>>,
    /// What admitted it.
    pub(super) access: Access,
}

impl Caller {
    /// Returns the caller of a request.
    ///
    /// # Errors
    /// `Internal` if the layer was not in front of the service. A mistake in wiring must refuse
    /// calls, not admit them.
    pub fn of<T>(request: &Request<T>) -> Result<Self> {
        let found = request.extensions().get::<Self>().cloned();
        found.ok_or_else(|| Error::internal("a call came past the check of its token"))
    }

    /// Returns whether the caller's token is for this run.
    pub fn may_see(&self, run_id: &str) -> bool {
        self.token.as_ref().is_none_or(|entry| entry.is_for(run_id))
    }

    /// # Errors
    /// `PermissionDenied` if the token is not for this run, whether or not the run exists: the
    /// answer must not reveal which runs exist. `Overloaded` after many refusals of this caller.
    pub fn check_run(&self, run_id: &str) -> Result<()> {
        if self.may_see(run_id) {
            return Ok(());
        }
        let message = format!(
            "this token is not for run '{run_id}'; ask the operator for one whose `runs` fit it"
        );
        let error = Error::new(Reason::PermissionDenied, message).with("run_id", run_id);
        Err(self
            .access
            .refused(error, self.peer, self.who(), Some(run_id)))
    }

    /// Returns the token's name.
    fn who(&self) -> Option<&str> {
        self.token.as_ref().map(|entry| entry.name.as_str())
    }

    /// Writes an act and its outcome into the audit log.
    pub fn record<T>(&self, what: &'static str, run_id: &str, outcome: &Result<T>, detail: Value) {
        self.access
            .audit()
            .record(what, self.who(), self.peer, Some(run_id), outcome, detail);
    }
}
