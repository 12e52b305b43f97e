//! Error reasons on the wire: one function each way between [`Failure`] and [`tonic::Status`].
use crate::v1::Reason;
use std::{collections::HashMap, fmt};
use tonic::{Code, Status};
use tonic_types::{ErrorDetails, StatusExt};

/// `ErrorInfo.domain` of every error of this service.
pub const DOMAIN: &str = "superbatch";

/// A failed call: a closed reason for programs, a message for people, and values for programs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failure {
    pub reason: Reason,
    /// What was wrong, where, and what to do.
    pub message: String,
    /// Such as `rank`, `tensor`, `column`, `owner`; the comments of `Reason` say which.
    pub metadata: HashMap<String, String>,
}

impl Reason {
    /// Returns whether the same call may succeed later, unchanged.
    pub fn is_transient(self) -> bool {
        matches!(
            self,
            Self::NoWorkers | Self::Overloaded | Self::ShuttingDown | Self::StorageUnreachable
        )
    }
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

/// Returns the reason's name on the wire, without its prefix.
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
        RunNotFound | StepNotCommitted | RowsNotKept => Code::NotFound,
        RunSpecConflict | PushConflict => Code::AlreadyExists,
        RunClosed | NotOwner | RunFailed | WorldSizeConflict | GenerationStale
        | StepBeyondAhead | WeightsMissing | PushOffCadence | StorageUnsafe | TooFewCandidates => {
            Code::FailedPrecondition
        }
        EndOfData => Code::OutOfRange,
        NeedDeadline => Code::DeadlineExceeded,
        RowChanged | DatasetChanged | TooManyBadRows => Code::DataLoss,
        UriNotAllowed | PermissionDenied | TicketRefused => Code::PermissionDenied,
        Unauthenticated => Code::Unauthenticated,
        StorageUnreachable | NoWorkers | ShuttingDown | DeviceUnavailable => Code::Unavailable,
        Overloaded => Code::ResourceExhausted,
        Unspecified | Internal => Code::Internal,
    }
}

/// Bytes of a message on the wire, and of all values of its metadata. Both travel in HTTP/2
/// headers, encoded to up to three times their size and the message twice: beyond 16 KiB peers
/// break the connection, and the caller never sees the cause.
const MESSAGE_BYTES_MAX: usize = 2048;
const METADATA_BYTES_MAX: usize = 1536;

/// Shortens `text` to at most `bytes_max` bytes. Keeps its beginning, which says what was wrong and
/// where, and its end, which says the cause or what to do.
fn shortened(text: &str, bytes_max: usize) -> String {
    if text.len() <= bytes_max {
        return text.to_owned();
    }
    let note = |left_out: usize| format!(" [… {left_out} bytes left out …] ");
    let room = bytes_max.saturating_sub(note(text.len()).len());
    let begin = text.floor_char_boundary(room / 3 * 2);
    let end = text.ceil_char_boundary(text.len() - (room - room / 3 * 2));
    format!("{}{}{}", &text[..begin], note(end - begin), &text[end..])
}

/// Shortens the values of metadata, each to an equal share of the room.
fn shortened_values(metadata: HashMap<String, String>) -> HashMap<String, String> {
    let whole: usize = metadata
        .iter()
        .map(|(key, value)| key.len() + value.len())
        .sum();
    if whole <= METADATA_BYTES_MAX {
        return metadata;
    }
    let share = METADATA_BYTES_MAX / metadata.len().max(1);
    metadata
        .into_iter()
        .map(|(key, value)| {
            let value = shortened(&value, share.saturating_sub(key.len()));
            (key, value)
        })
        .collect()
}

/// Every error becomes a status here, so that none is too long to arrive.
impl From<Failure> for Status {
    fn from(failure: Failure) -> Self {
        let message = shortened(&failure.message, MESSAGE_BYTES_MAX);
        let metadata = shortened_values(failure.metadata);
        let details = ErrorDetails::with_error_info(name(failure.reason), DOMAIN, metadata);
        Status::with_error_details(code(failure.reason), message, details)
    }
}

/// Joins the items of a list for a message: as many as a person reads, and the number of the
/// others.
pub fn some_of<T: AsRef<str>>(items: &[T]) -> String {
    const NAMED_MAX: usize = 24;
    const NAME_BYTES_MAX: usize = 80;
    let named = items.iter().take(NAMED_MAX);
    let mut text = named
        .map(|item| shortened(item.as_ref(), NAME_BYTES_MAX))
        .collect::<Vec<_>>()
        .join(", ");
    if items.len() > NAMED_MAX {
        text.push_str(&format!(", … and {} more", items.len() - NAMED_MAX));
    }
    text
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
    fn the_longest_error_fits_into_headers_and_keeps_both_ends() {
        let long = "ü%".repeat(100_000);
        let failure = Failure::new(
            Reason::ColumnNotFound,
            format!("there is no column 'captoin' in {long}; name another"),
        )
        .with("column", "captoin")
        .with("available", &long)
        .with("uri", &long);
        let headers = Status::from(failure)
            .into_http::<()>()
            .into_parts()
            .0
            .headers;
        let bytes: usize = headers
            .iter()
            .map(|(name, value)| name.as_str().len() + value.len() + 32)
            .sum();
        assert!(bytes < 16 << 10, "{bytes} bytes");
        let back = Failure::try_from(Status::from_header_map(&headers).unwrap()).unwrap();
        assert!(back.message.starts_with("there is no column 'captoin'"));
        assert!(back.message.ends_with("; name another"));
        assert!(back.message.contains("bytes left out"));
    }

    #[test]
    fn a_list_is_told_as_far_as_people_read_it() {
        assert_eq!(some_of(&["a", "b"]), "a, b");
        let many: Vec<String> = (0..236).map(|n| format!("c{n}")).collect();
        let listed = some_of(&many);
        assert!(
            listed.starts_with("c0, c1, ") && listed.ends_with("c23, … and 212 more"),
            "{listed}"
        );
    }

    #[test]
    fn a_foreign_status_is_not_taken_for_ours() {
        assert!(Failure::try_from(Status::unavailable("connection refused")).is_err());
    }
}
