//! Error reasons on the wire: one function each way between [`Failure`] and [`tonic::Status`].
use crate::v1::Reason;
use std::{collections::HashMap, fmt};
use tonic::{Code, Status};
use tonic_types::{ErrorDetails, StatusExt};

/// `ErrorInfo.domain` of every error of this service.
pub const DOMAIN: &str = "superbatch";

/// A failed call: a closed reason for programs, a message for people, and the values that a program
/// may want.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failure {
    pub reason: Reason,
    /// What was wrong, where, and what to do.
    pub message: String,
    /// Such as `rank`, `tensor`, `column`, `owner`; the comments of `Reason` say which.
    pub metadata: HashMap<String, String>,
}

impl Failure {
    pub fn new(reason: Reason, message: impl Into<String>) -> Self {
        Self {
            reason,
            message: message.into(),
            metadata: HashMap::new(),
        }
    }

    /// Adds one value for programs.
    #[must_use]
    pub fn with(mut self, key: &str, value: impl fmt::Display) -> Self {
        self.metadata.insert(key.to_owned(), value.to_string());
        self
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} [{}]", self.message, name(self.reason))
    }
}

impl std::error::Error for Failure {}

/// The reason's name on the wire: without its prefix.
pub fn name(reason: Reason) -> &'static str {
    reason.as_str_name().trim_start_matches("REASON_")
}

fn code(reason: Reason) -> Code {
    use Reason::*;
    match reason {
        InvalidArgument | RunSpecImpossible | WorldSizeInvalid | RankOutOfRange
        | ColumnNotFound | SchemaMismatch | DatasetEmpty | DatasetTooSmall | ModelInvalid
        | TokenizerMismatch | WeightsRefused | BiasMissing => Code::InvalidArgument,
        MessageTooLarge => Code::ResourceExhausted,
        Unimplemented => Code::Unimplemented,
        RunNotFound | StepNotCommitted => Code::NotFound,
        RunSpecConflict | PushConflict => Code::AlreadyExists,
        RunClosed | NotOwner | RunFailed | WorldSizeConflict | GenerationStale
        | StepBeyondAhead | WeightsMissing | PushOffCadence | StorageUnsafe | TooFewCandidates => {
            Code::FailedPrecondition
        }
        EndOfData => Code::OutOfRange,
        NeedDeadline => Code::DeadlineExceeded,
        RowChanged | DatasetChanged | TooManyBadRows => Code::DataLoss,
        UriNotAllowed => Code::PermissionDenied,
        StorageUnreachable | NoWorkers | ShuttingDown | DeviceUnavailable => Code::Unavailable,
        Overloaded => Code::ResourceExhausted,
        Unspecified | Internal => Code::Internal,
    }
}

impl From<Failure> for Status {
    fn from(failure: Failure) -> Self {
        let details = ErrorDetails::with_error_info(name(failure.reason), DOMAIN, failure.metadata);
        Status::with_error_details(code(failure.reason), failure.message, details)
    }
}

/// A status that carries no reason of this service: it comes from a proxy, the transport, or
/// another server.
#[derive(Debug, Clone)]
pub struct ParseFailure(pub Status);

impl TryFrom<Status> for Failure {
    type Error = ParseFailure;

    fn try_from(status: Status) -> Result<Self, ParseFailure> {
        let info = status
            .get_error_details()
            .error_info()
            .filter(|info| info.domain == DOMAIN)
            .cloned();
        let Some(info) = info else {
            return Err(ParseFailure(status));
        };
        match Reason::from_str_name(&format!("REASON_{}", info.reason)) {
            Some(reason) => Ok(Failure {
                reason,
                message: status.message().to_owned(),
                metadata: info.metadata,
            }),
            None => Err(ParseFailure(status)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_reason_survives_the_wire() {
        for n in 1..100 {
            let Ok(reason) = Reason::try_from(n) else {
                continue;
            };
            let failure = Failure::new(reason, "what, where, what to do").with("field", "seed");
            let back = Failure::try_from(Status::from(failure.clone()));
            assert_eq!(back.ok(), Some(failure));
        }
    }

    #[test]
    fn a_foreign_status_is_not_taken_for_ours() {
        assert!(Failure::try_from(Status::unavailable("connection refused")).is_err());
    }
}
