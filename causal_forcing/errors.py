"""The one exception tree of the engine and the service.

    CausalForcingError
    ├── InvalidRequest        the caller asked for something that is not allowed (names field, value, allowed)
    ├── SessionStateError     the call does not fit the state the session is in
    ├── NoCapacity            every slot, or every byte, is taken
    ├── BadCheckpoint         a weight file is damaged, unsafe, or belongs to another model
    ├── DownloadFailed        a weight file could not be fetched
    ├── OutOfMemory           the device cannot hold what was asked for
    ├── DeviceFault           the device failed while computing
    └── NonFiniteOutput       the model produced NaN or infinity

``ValueError`` and ``assert`` stay for programmers' mistakes; all that a user or an operator can cause is one of these.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar


class CausalForcingError(Exception):
    """Base of every error a caller can meet.

    Attributes:
        reason: Stable UPPER_SNAKE name that clients may switch on.
        retryable: Whether the same request can succeed later without being changed.
        metadata: Short machine-readable facts (never prompts), e.g. ``{"field": "height"}``.
    """

    default_reason: ClassVar[str] = "UNEXPECTED"
    retryable: ClassVar[bool] = False

    def __init__(self, message: str, *, reason: str | None = None, metadata: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.reason = reason or self.default_reason
        self.metadata: dict[str, str] = dict(metadata or {})

    def __reduce__(self) -> tuple[object, ...]:
        """Pickle by value, so that the error crosses process boundaries with its reason and metadata."""
        return _rebuild, (type(self), self.message, self.reason, self.metadata)


def _rebuild(kind: type[CausalForcingError], message: str, reason: str, metadata: dict[str, str]) -> CausalForcingError:
    error = kind.__new__(kind)
    CausalForcingError.__init__(error, message, reason=reason, metadata=metadata)
    return error


class InvalidRequest(CausalForcingError):
    """Raised when a value given by the user is not allowed.

    The message always has the form ``field: got VALUE; ALLOWED``.
    """

    default_reason = "INVALID_REQUEST"

    def __init__(self, field: str, value: object, allowed: str, *, reason: str | None = None) -> None:
        shown = _shorten(value)
        super().__init__(
            f"{field}: got {shown}; {allowed}",
            reason=reason,
            metadata={"field": field, "value": shown, "allowed": allowed},
        )


class SessionStateError(CausalForcingError):
    """Raised when a call does not fit the state of its session (ended, failed, full, no prompt yet)."""

    default_reason = "SESSION_STATE"


class NoCapacity(CausalForcingError):
    """Raised when no slot or no memory is free for another session."""

    default_reason = "NO_SESSION_SLOT"
    retryable = True


class BadCheckpoint(CausalForcingError):
    """Raised when a weight file is truncated, unsafe, incomplete, non-finite, or of another model."""

    default_reason = "BAD_CHECKPOINT"


class DownloadFailed(CausalForcingError):
    """Raised when a weight file could not be fetched: no network, no such file, no permission."""

    default_reason = "DOWNLOAD_FAILED"
    retryable = True


class OutOfMemory(CausalForcingError):
    """Raised when a device has less memory than the arithmetic says is needed, or runs out of it."""

    default_reason = "OUT_OF_MEMORY"


class DeviceFault(CausalForcingError):
    """Raised when the device failed while computing; the session cannot continue on it."""

    default_reason = "DEVICE_FAULT"
    retryable = True


class NonFiniteOutput(CausalForcingError):
    """Raised when generated latents or pixels contain NaN or infinity."""

    default_reason = "NON_FINITE_OUTPUT"
    retryable = True


def _shorten(value: object, limit: int = 80) -> str:
    text = repr(value)
    return text if len(text) <= limit else f"{text[:limit]}... ({len(text)} characters)"
