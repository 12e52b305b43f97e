//! Why a call of the client failed, and whether a retry can help.
use std::{collections::HashMap, error::Error as _, time::Duration};
use superbatch_proto::{Failure, RETRIED_SECONDS, reason_name as name, v1::Reason};
use tonic::{Code, Status};

/// The result of a call of the client.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why a call failed, by what the caller can do about it.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs, reason = "each message says what its fields are")]
pub enum Error {
    /// The service refused or failed the call, with its reason.
    #[error("{0}")]
    Refused(Box<Failure>),
    /// The service could not be reached at all.
    #[error(
        "cannot connect to {uri}: is the service running there? ({})",
        chain(source)
    )]
    Connect {
        uri: String,
        source: tonic::transport::Error,
    },
    /// The call broke on the way, or was never answered.
    #[error("the call to {uri} broke ({:?}): {}; is the service running \
    there?", status.code(), chain(&**status))]
    Broken { uri: String, status: Box<Status> },
    /// Something that is not Superbatch answered the call.
    #[error("the call to the service broke ({:?}): {}{}", .0.code(), .0.message(), remedy(.0))]
    Transport(Box<Status>),
    /// A stream ended before its trailer.
    #[error("the stream of step {step} ended after {received} of {expected} bytes")]
    Incomplete {
        step: u64,
        received: u64,
        expected: u64,
    },
    /// The received data are not what was sent, or break the protocol.
    #[error("the batch of step {step} arrived damaged: {what}")]
    Corrupt { step: u64, what: String },
    /// An argument that the client itself refuses.
    #[error("{field}: {message}")]
    Invalid {
        field: &'static str,
        message: String,
    },
    /// Retries were used up, `elapsed` after the service last answered well.
    #[error("gave up after {attempts} attempt{} in {:.1} s: \
    {last}", plural(*attempts), elapsed.as_secs_f64())]
    GaveUp {
        attempts: u32,
        elapsed: Duration,
        last: Box<Error>,
    },
    /// A background task ended because its runtime shut down or its owner was dropped.
    #[error("stopped before it was done")]
    Stopped,
}

impl Error {
    /// Returns the error with what broke the connection, if the error does not say that already.
    pub(crate) fn because_of(self, fault: Option<String>) -> Self {
        match (self, fault) {
            (Self::Broken { uri, status }, Some(fault)) if !chain(&*status).contains(&fault) => {
                let text = format!("{}: {fault}", chain(&*status));
                let status = Box::new(Status::new(status.code(), text));
                Self::Broken { uri, status }
            }
            (error, _) => error,
        }
    }

    /// Returns the service's reason. If it gave none, the reason nearest to the gRPC status; `None`
    /// if there was no answer.
    pub fn reason(&self) -> Option<Reason> {
        match self {
            Self::Refused(failure) => Some(failure.reason),
            Self::Transport(status) => nearest(status),
            Self::GaveUp { last, .. } => last.reason(),
            _ => None,
        }
    }

    /// Returns the service's failure, if it gave one: reason, message and metadata.
    pub fn failure(&self) -> Option<&Failure> {
        match self {
            Self::Refused(failure) => Some(failure),
            Self::GaveUp { last, .. } => last.failure(),
            _ => None,
        }
    }

    /// Returns a name for programs: that of [`Error::reason`] without its prefix. If there is no
    /// reason, `UNAVAILABLE` (no answer), `BATCH_CORRUPT`, `INVALID_ARGUMENT` or `CANCELLED`.
    pub fn reason_name(&self) -> &'static str {
        match self {
            Self::Refused(failure) => name(failure.reason),
            Self::GaveUp { last, .. } => last.reason_name(),
            Self::Transport(status) => nearest(status).map_or("UNAVAILABLE", name),
            Self::Connect { .. } | Self::Broken { .. } | Self::Incomplete { .. } => "UNAVAILABLE",
            Self::Corrupt { .. } => "BATCH_CORRUPT",
            Self::Invalid { .. } => "INVALID_ARGUMENT",
            Self::Stopped => "CANCELLED",
        }
    }

    /// Returns values for programs, such as `field`, `column` or `tensor`.
    pub fn metadata(&self) -> HashMap<String, String> {
        match (self.failure(), self) {
            (Some(failure), _) => failure.metadata.clone(),
            (None, Self::Invalid { field, .. }) => {
                HashMap::from([("field".to_owned(), (*field).to_owned())])
            }
            _ => HashMap::new(),
        }
    }

    /// Returns whether the same call may succeed later, unchanged.
    pub fn is_retryable(&self) -> bool {
        match self {
            Self::Refused(failure) => failure.reason.is_transient(),
            Self::Transport(status) => nearest(status).is_none_or(Reason::is_transient),
            Self::Connect { .. }
            | Self::Broken { .. }
            | Self::Incomplete { .. }
            | Self::Corrupt { .. } => true,
            Self::Invalid { .. } | Self::GaveUp { .. } | Self::Stopped => false,
        }
    }

    /// Returns how long the service has tried again before it gave this answer.
    pub(crate) fn retried(&self) -> Duration {
        let seconds = match self {
            Self::Refused(failure) => failure.metadata.get(RETRIED_SECONDS),
            _ => None,
        };
        let seconds = seconds.and_then(|seconds| seconds.parse().ok());
        let retried = seconds.map(Duration::try_from_secs_f64);
        retried.and_then(Result::ok).unwrap_or_default()
    }

    /// Returns whether the call broke because the service was silent.
    pub(crate) fn is_silence(&self) -> bool {
        // hyper's type of this cause is private, so its text decides.
        matches!(self, Self::Broken { status, .. } if chain(&**status).contains("keep-alive timed \
        out"))
    }

    pub(crate) fn invalid(field: &'static str, message: impl Into<String>) -> Self {
        Self::Invalid {
            field,
            message: message.into(),
        }
    }
}

impl From<Status> for Error {
    fn from(status: Status) -> Self {
        match Failure::try_from(status) {
            Ok(failure) => Self::Refused(Box::new(failure)),
            Err(foreign) => Self::Transport(Box::new(foreign.0)),
        }
    }
}

/// Returns the reason nearest to a status without one; `None` for a broken or unanswered call.
fn nearest(status: &Status) -> Option<Reason> {
    match status.code() {
        Code::Unavailable | Code::Aborted | Code::Cancelled | Code::DeadlineExceeded => None,
        // tonic turns a broken connection into these codes too. The status then has a source on
        // this side, which an answer from the wire never has.
        Code::Unknown | Code::Internal if status.source().is_some() => None,
        Code::Unimplemented => Some(Reason::Unimplemented),
        Code::Unauthenticated => Some(Reason::Unauthenticated),
        Code::PermissionDenied => Some(Reason::PermissionDenied),
        // gRPC libraries refuse a long message with OUT_OF_RANGE or with RESOURCE_EXHAUSTED.
        // Proxies also use the latter for rate limits, so its text decides.
        Code::OutOfRange => Some(Reason::MessageTooLarge),
        Code::ResourceExhausted if status.message().contains("larger than max") => {
            Some(Reason::MessageTooLarge)
        }
        Code::ResourceExhausted => Some(Reason::Overloaded),
        _ => Some(Reason::Internal),
    }
}

fn remedy(status: &Status) -> &'static str {
    match nearest(status) {
        Some(Reason::Unimplemented) => "; what answered is no Superbatch, or an older one",
        Some(Reason::MessageTooLarge) => "; a limit between client and service is too small for it",
        _ => "",
    }
}

/// Returns whether a status stands for a call without an answer.
pub(crate) fn is_unanswered(status: &Status) -> bool {
    nearest(status).is_none()
}

fn plural(count: u32) -> &'static str {
    if count == 1 { "" } else { "s" }
}

/// Joins an error's text with its causes, each once.
fn chain(error: &(dyn std::error::Error + 'static)) -> String {
    // A status's own text has its code and details too, so only its message is used.
    let mut text = error
        .downcast_ref::<Status>()
        .map_or_else(|| error.to_string(), |status| status.message().to_owned());
    let mut next = error.source();
    while let Some(cause) = next {
        let cause_text = cause.to_string();
        if !text.contains(&cause_text) {
            text = format!("{text}: {cause_text}");
        }
        next = cause.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_faults_that_pass_are_retried() {
        let refused = |reason| Error::from(Status::from(Failure::new(reason, "x")));
        for reason in [
            Reason::NoWorkers,
            Reason::Overloaded,
            Reason::ShuttingDown,
            Reason::StorageUnreachable,
        ] {
            assert!(refused(reason).is_retryable(), "{reason:?}");
        }
        for reason in [
            Reason::WorldSizeInvalid,
            Reason::EndOfData,
            Reason::WeightsRefused,
            Reason::NeedDeadline,
        ] {
            assert!(!refused(reason).is_retryable(), "{reason:?}");
        }
    }

    #[test]
    fn a_status_of_others_is_told_by_what_can_be_done_about_it() {
        let cut = std::io::Error::new(std::io::ErrorKind::ConnectionReset, "cut");
        let cases = [
            (
                Status::unavailable("connection refused"),
                "UNAVAILABLE",
                true,
            ),
            (Status::from_error(Box::new(cut)), "UNAVAILABLE", true),
            (
                Status::deadline_exceeded("a proxy's patience"),
                "UNAVAILABLE",
                true,
            ),
            (
                Status::resource_exhausted("rate limited"),
                "OVERLOADED",
                true,
            ),
            (
                Status::resource_exhausted("Received message larger than max (5 vs. 4)"),
                "MESSAGE_TOO_LARGE",
                false,
            ),
            (
                Status::unimplemented("unknown service"),
                "UNIMPLEMENTED",
                false,
            ),
            (
                Status::internal("a bug on the other side"),
                "INTERNAL",
                false,
            ),
            (Status::unknown("no cause on this side"), "INTERNAL", false),
            (
                Status::unauthenticated("a proxy's rule"),
                "UNAUTHENTICATED",
                false,
            ),
        ];
        for (status, name, passes) in cases {
            let error = Error::from(status);
            assert_eq!(
                (error.reason_name(), error.is_retryable()),
                (name, passes),
                "{error}"
            );
        }
    }

    #[test]
    fn the_reason_survives_giving_up() {
        let failure = Failure::new(Reason::NoWorkers, "none").with("run", "r");
        let last = Box::new(Error::Refused(Box::new(failure)));
        let error = Error::GaveUp {
            attempts: 3,
            elapsed: Duration::from_secs(1),
            last,
        };
        assert_eq!(error.reason(), Some(Reason::NoWorkers));
        assert_eq!(error.reason_name(), "NO_WORKERS");
        assert_eq!(error.metadata()["run"], "r");
    }

    /// hyper's words, from hyper: a peer that accepts a connection and says nothing.
    #[tokio::test]
    async fn a_peer_that_answers_no_ping_is_known_as_silent() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let uri = format!("http://{}", listener.local_addr().unwrap());
        // The task's result holds the connection open.
        let accepted = tokio::spawn(async move { listener.accept().await });
        let each = Duration::from_millis(10);
        let channel = tonic::transport::Endpoint::from_shared(uri.clone())
            .unwrap()
            .http2_keep_alive_interval(each)
            .keep_alive_timeout(each)
            .keep_alive_while_idle(true)
            .connect_lazy();
        let mut health = tonic_health::pb::health_client::HealthClient::new(channel);
        let status = health.check(tonic_health::pb::HealthCheckRequest::default());
        let status = status.await.unwrap_err();
        assert!(is_unanswered(&status), "{status:?}");
        let error = Error::Broken {
            uri,
            status: Box::new(status),
        };
        assert!(error.is_silence(), "{error:?}");
        drop(accepted.await.unwrap());
    }
}
