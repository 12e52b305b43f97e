//! The server's error type: a closed [`Reason`] for programs, a message for people, and its cause.
use std::{error::Error as StdError, fmt};
use superbatch_proto::{Failure, v1::Reason};
use tonic::{Code, Status};

pub type Result<T, E = Error> = std::result::Result<T, E>;

type Cause = Box<dyn StdError + Send + Sync>;

/// What failed, where, and what to do about it.
///
/// Make it where the fault is known: `Error::new(Reason::ColumnNotFound, "…").with("column",
/// name).because(source)`. Only code that ends an error's way up logs it; otherwise one fault would
/// be logged at every level.
#[derive(Debug)]
pub struct Error {
    failure: Box<Failure>,
    cause: Option<Cause>,
}

impl Error {
    pub fn new(reason: Reason, message: impl Into<String>) -> Self {
        Self {
            failure: Box::new(Failure::new(reason, message)),
            cause: None,
        }
    }

    /// Makes an error for a broken invariant or a failure that no user can correct.
    pub fn internal(message: impl Into<String>) -> Self {
        Self::new(Reason::Internal, message)
    }

    /// Makes an error for a request field that is missing or malformed.
    pub fn invalid(field: &str, message: impl Into<String>) -> Self {
        Self::new(Reason::InvalidArgument, message).with("field", field)
    }

    /// Adds a value for programs; the comments of `Reason` in the protocol say which go with which
    /// reason.
    #[must_use]
    pub fn with(mut self, key: &str, value: impl fmt::Display) -> Self {
        *self.failure = self.failure.with(key, value);
        self
    }

    /// Keeps the cause; its text is appended when the chain is printed.
    #[must_use]
    pub fn because(mut self, cause: impl Into<Cause>) -> Self {
        self.cause = Some(cause.into());
        self
    }

    /// Puts the subject before the message.
    #[must_use]
    pub fn about(mut self, what: impl fmt::Display) -> Self {
        self.failure.message = format!("{what}: {}", self.failure.message);
        self
    }

    /// Returns the same failure for another waiting call. Causes, which cannot be cloned, become
    /// part of the message.
    #[must_use]
    pub fn repeat(&self) -> Self {
        let failure = Failure {
            message: self.chain(),
            ..(*self.failure).clone()
        };
        Self {
            failure: Box::new(failure),
            cause: None,
        }
    }

    pub fn reason(&self) -> Reason {
        self.failure.reason
    }

    /// Returns a value that [`Error::with`] added.
    pub fn value(&self, key: &str) -> Option<&str> {
        self.failure.metadata.get(key).map(String::as_str)
    }

    /// Returns the message and all its causes in one line. A cause that another one quotes is not
    /// repeated.
    pub fn chain(&self) -> String {
        chain(self)
    }
}

/// Returns an error and all its causes in one line. A cause that another one quotes is not
/// repeated.
pub fn chain(error: &dyn StdError) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        let said = cause.to_string();
        if !text.contains(&said) {
            text.push_str(": ");
            text.push_str(&said);
        }
        next = cause.source();
    }
    text
}

/// A status of the transport. The text of a status is a dump of all its causes, each of which
/// quotes the next, so it is formatted here.
#[derive(Debug)]
struct Foreign(Status);

impl fmt::Display for Foreign {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0.message() {
            "" => self.0.code().fmt(f),
            message => f.write_str(message),
        }
    }
}

impl StdError for Foreign {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        self.0.source()
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.failure.message)
    }
}

impl StdError for Error {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        self.cause
            .as_deref()
            .map(|cause| cause as &(dyn StdError + 'static))
    }
}

impl From<Failure> for Error {
    fn from(failure: Failure) -> Self {
        Self {
            failure: Box::new(failure),
            cause: None,
        }
    }
}

/// Turns a status into an error. Failures of another Superbatch process keep their reason; any
/// other status gets the reason `otherwise`.
pub fn from_status(status: Status, otherwise: Reason) -> Error {
    match Failure::try_from(status) {
        Ok(failure) => failure.into(),
        Err(foreign) => {
            // The transport's code for a message over its limit. Sending it again would not help,
            // so it must not become a transient reason.
            let too_large = foreign.0.code() == Code::OutOfRange;
            let foreign = Foreign(foreign.0);
            Error::new(
                if too_large {
                    Reason::MessageTooLarge
                } else {
                    otherwise
                },
                foreign.to_string(),
            )
            .because(foreign)
        }
    }
}

impl From<Error> for Status {
    fn from(error: Error) -> Self {
        if error.reason() == Reason::Internal {
            tracing::error!(error = error.chain(), "internal error");
        }
        let message = error.chain();
        Failure {
            message,
            ..*error.failure
        }
        .into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_refused_connection_is_said_once() {
        let nobody = tokio::net::TcpListener::bind("127.0.0.1:0")
            .await
            .unwrap()
            .local_addr()
            .unwrap();
        let channel = tonic::transport::Endpoint::from_shared(format!("http://{nobody}"))
            .unwrap()
            .connect_lazy();
        let mut client =
            superbatch_proto::v1::selection_service_client::SelectionServiceClient::new(channel);
        let status = client
            .list_runs(superbatch_proto::v1::ListRunsRequest {})
            .await
            .unwrap_err();
        let said = from_status(status, Reason::NoWorkers).chain();
        assert_eq!(said.matches("refused").count(), 1, "{said}");
        assert!(!said.contains(['{', '"']), "no dump: {said}");
    }

    #[test]
    fn a_chain_reads_as_one_sentence_and_survives_the_wire() {
        let io = std::io::Error::other("disk on fire");
        let error = Error::new(Reason::StorageUnreachable, "cannot read s3://b/x")
            .with("uri", "s3://b/x")
            .because(io);
        let back = from_status(error.into(), Reason::Internal);
        assert_eq!(back.reason(), Reason::StorageUnreachable);
        assert_eq!(back.to_string(), "cannot read s3://b/x: disk on fire");
        assert_eq!(back.value("uri"), Some("s3://b/x"));
    }
}
