//! Who a call comes from, once its token was looked at.
use super::{Peer, audit::Audit, tokens::Entry};
use crate::error::{Error, Result};
use serde_json::Value;
use std::sync::Arc;
use superbatch_proto::v1::Reason;
use tonic::Request;

/// What the layer leaves in a call's extensions.
#[derive(Debug, Clone, Default)]
pub struct Caller {
    pub(super) peer: Peer,
    /// `None`: no tokens are asked for.
    pub(super) token: Option<Arc<Entry>>,
    pub(super) audit: Audit,
}

impl Caller {
    /// The caller of a request.
    ///
    /// # Errors
    /// `Internal` if no layer looked at it: a mistake in wiring must not let anyone in.
    pub fn of<T>(request: &Request<T>) -> Result<Self> {
        let found = request.extensions().get::<Self>().cloned();
        found.ok_or_else(|| Error::internal("a call came past the check of its token"))
    }

    /// Whether its token is for this run.
    pub fn sees(&self, run_id: &str) -> bool {
        self.token.as_ref().is_none_or(|entry| entry.is_for(run_id))
    }

    /// # Errors
    /// `PermissionDenied` if its token is not for this run, whether or not there is one.
    pub fn check_run(&self, run_id: &str) -> Result<()> {
        if self.sees(run_id) {
            return Ok(());
        }
        let message = format!(
            "this token is not for run '{run_id}'; ask the operator for one whose `runs` fit it"
        );
        let error = Error::new(Reason::PermissionDenied, message).with("run_id", run_id);
        self.note("denied", run_id, &Err::<(), _>(error.repeat()), Value::Null);
        Err(error)
    }

    /// Writes into the audit log what was done and how it ended.
    pub fn note<T>(&self, what: &'static str, run_id: &str, outcome: &Result<T>, detail: Value) {
        let who = self.token.as_ref().map(|entry| entry.name.as_str());
        self.audit
            .note(what, who, self.peer, Some(run_id), outcome, detail);
    }
}
