"""Exceptions of the package."""

from __future__ import annotations

from collections.abc import Mapping

#: The page with the cause and the remedy of each reason, in the documentation of this version.
PAGE = "docs/errors.md"


class Error(Exception):
    """A call that failed.

    `reason` is a name for programs: one of the protocol's closed set, such as "WORLD_SIZE_INVALID"
    or "COLUMN_NOT_FOUND", or of the client's own: "UNAVAILABLE" (no answer), "BATCH_CORRUPT",
    "INVALID_ARGUMENT", "CANCELLED". What others answered, such as a proxy, has the nearest of them:
    "UNIMPLEMENTED", "MESSAGE_TOO_LARGE", "OVERLOADED", else "INTERNAL". `metadata` holds the values
    that a program may want, such as `field`, `column` or `tensor`. `help` names the reason's entry
    in the documentation, with its cause and remedy; tracebacks show it. Faults that pass were tried
    again before they are raised; the rest can never pass unchanged.
    """

    reason: str = "INTERNAL"
    metadata: Mapping[str, str] = {}

    def __init__(
        self,
        message: str = "",
        reason: str | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.reason = reason or type(self).reason
        self.metadata = dict(type(self).metadata if metadata is None else metadata)
        self.add_note(f"cause and remedy: {self.help}")

    @property
    def help(self) -> str:
        """Where the documentation says what to do, such as "docs/errors.md#column_not_found"."""
        return f"{PAGE}#{self.reason.lower()}"

    def __reduce__(self):
        return type(self), (str(self), self.reason, self.metadata)


class Unavailable(Error):
    """The service cannot be reached, or cannot serve now; the same call may succeed later."""

    reason = "UNAVAILABLE"


class EndOfData(Error):
    """The step lies beyond the last epoch. Iterating over batches ends there instead of raising
    this.
    """

    reason = "END_OF_DATA"


class NeedDeadline(Error):
    """The step could not be served in time, for want of weights for example. The same step may be
    asked for again.
    """

    reason = "NEED_DEADLINE"


class WeightsRefused(Error):
    """A push failed verification, and the old weights serve on; `metadata["tensor"]` names the
    first bad tensor.
    """

    reason = "WEIGHTS_REFUSED"


class InvalidArgument(Error):
    """An argument that can never be right, or not together with others; `metadata["field"]` names
    it.
    """

    reason = "INVALID_ARGUMENT"


class WorkerFailed(Error):
    """A call failed in a worker of a `DataLoader` that is not made by `SelectedBatches.loader`.

    torch hands over an error's class and its text alone, so `metadata` is empty. A failure whose
    reason has no class becomes this; its text names the reason.
    """

    reason = "WORKER_FAILED"


_CLASSES = {
    "UNAVAILABLE": Unavailable,
    "NO_WORKERS": Unavailable,
    "OVERLOADED": Unavailable,
    "SHUTTING_DOWN": Unavailable,
    "STORAGE_UNREACHABLE": Unavailable,
    "END_OF_DATA": EndOfData,
    "NEED_DEADLINE": NeedDeadline,
    "WEIGHTS_REFUSED": WeightsRefused,
    "INVALID_ARGUMENT": InvalidArgument,
}


def from_reason(reason: str, message: str, metadata: Mapping[str, str]) -> Error:
    """The exception for a reason."""
    return _CLASSES.get(reason, Error)(message, reason, metadata)


def invalid(field: str, message: str) -> Error:
    """An argument that the client itself refuses."""
    return InvalidArgument(f"{field}: {message}", metadata={"field": field})


def for_worker(error: Error) -> Error:
    """The error, for a worker to raise whose loader keeps the class and the text alone."""
    return WorkerFailed(f"{error.reason}: {error}") if type(error) is Error else error
