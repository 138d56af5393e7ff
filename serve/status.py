"""The one place where an exception becomes what a client sees: a gRPC code, a stable reason, a text, and details.

| exception | code | reason |
|---|---|---|
| InvalidRequest | INVALID_ARGUMENT | its own, e.g. INVALID_PROMPT; the field is named |
| SessionStateError | FAILED_PRECONDITION | its own, e.g. CONFIG_NOT_FIRST |
| NoCapacity | RESOURCE_EXHAUSTED | its own, e.g. NO_SESSION_SLOT; with a time to retry |
| ClientGone | ABORTED | CLIENT_SILENT, CLIENT_TOO_SLOW |
| EndedByOperator | ABORTED | SESSION_ENDED_BY_OPERATOR |
| NoSuchSession | NOT_FOUND | NO_SUCH_SESSION |
| Unauthenticated | UNAUTHENTICATED | BAD_CREDENTIALS |
| NotAllowed | PERMISSION_DENIED | its own, e.g. NOT_SESSION_OWNER |
| Unavailable | UNAVAILABLE | GENERATOR_LOST, REPLICA_DRAINING, ...; with a time to retry |
| DeviceFault, OutOfMemory, NonFiniteOutput | UNAVAILABLE | DEVICE_FAULT; the metadata has the cause |
| BackPressureError (Serve) | RESOURCE_EXHAUSTED | NO_SESSION_SLOT |
| RayActorError (Ray) | UNAVAILABLE | REPLICA_LOST |
| anything else | INTERNAL | UNEXPECTED; the text is only an id that is also in the log |

The engine's texts never hold prompts, and a text that we did not write (a traceback, another library's message) never
leaves the process.
"""

from __future__ import annotations

import traceback
import uuid
from dataclasses import dataclass, field

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.rpc import error_details_pb2, status_pb2
from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError

from causal_forcing.errors import (
    BadCheckpoint,
    CausalForcingError,
    DeviceFault,
    InvalidRequest,
    NoCapacity,
    NonFiniteOutput,
    OutOfMemory,
    SessionStateError,
)
from protos.causal_forcing.v1 import video_pb2 as pb

from .errors import ClientGone, EndedByOperator, NoSuchSession, NotAllowed, Unauthenticated, Unavailable
from .logs import LOGGER

DOMAIN = "causal-forcing"
"""Domain of our reasons in ``google.rpc.ErrorInfo``."""

RETRY_AFTER_S = 2.0
"""What a client is told to wait where nothing better is known."""

MAX_CAUSES = 5
"""Causes of an unexpected error that are logged."""

MAX_DETAILS = 1000
"""Longest status text; trailers are limited to a few kilobytes."""

DEVICE_FAULT = "DEVICE_FAULT"
"""Reason of every failure of a device."""

_CODES: dict[type[CausalForcingError], grpc.StatusCode] = {
    InvalidRequest: grpc.StatusCode.INVALID_ARGUMENT,
    SessionStateError: grpc.StatusCode.FAILED_PRECONDITION,
    NoCapacity: grpc.StatusCode.RESOURCE_EXHAUSTED,
    ClientGone: grpc.StatusCode.ABORTED,
    EndedByOperator: grpc.StatusCode.ABORTED,
    NoSuchSession: grpc.StatusCode.NOT_FOUND,
    Unauthenticated: grpc.StatusCode.UNAUTHENTICATED,
    NotAllowed: grpc.StatusCode.PERMISSION_DENIED,
    Unavailable: grpc.StatusCode.UNAVAILABLE,
    DeviceFault: grpc.StatusCode.UNAVAILABLE,
    OutOfMemory: grpc.StatusCode.UNAVAILABLE,
    NonFiniteOutput: grpc.StatusCode.UNAVAILABLE,
    BadCheckpoint: grpc.StatusCode.INTERNAL,
}

_DEVICE_FAULTS = (DeviceFault, OutOfMemory, NonFiniteOutput)


def new_error_id() -> str:
    """Return a name for one failure."""
    return uuid.uuid4().hex[:12]


@dataclass(frozen=True)
class Failure:
    """What a client is told about an error; a value that crosses process boundaries.

    Attributes:
        code: Name of the gRPC status code.
        reason: Stable UPPER_SNAKE name.
        message: Text for people.
        metadata: Short machine-readable facts.
        retry_after_s: When a retry makes sense, in seconds; None where it does not.
        error_id: Names the failure in the log.
    """

    code: str
    reason: str
    message: str
    metadata: dict[str, str] = field(default_factory=dict)
    retry_after_s: float | None = None
    error_id: str = field(default_factory=new_error_id)

    @property
    def details(self) -> str:
        """Text of the call's status."""
        return f"{self.reason}: {self.message}"[:MAX_DETAILS]

    @property
    def status_code(self) -> grpc.StatusCode:
        """The gRPC status code."""
        return grpc.StatusCode[self.code]

    def to_proto(self) -> pb.Error:
        """Return the message that precedes the status."""
        status = status_pb2.Status(code=self.status_code.value[0], message=self.details)
        info = error_details_pb2.ErrorInfo(reason=self.reason, domain=DOMAIN, metadata=self.metadata)
        details: list[error_details_pb2.ErrorInfo | error_details_pb2.BadRequest | error_details_pb2.RetryInfo] = [info]
        if "field" in self.metadata:
            violation = error_details_pb2.BadRequest.FieldViolation(
                field=self.metadata["field"], description=self.message, reason=self.reason
            )
            details.append(error_details_pb2.BadRequest(field_violations=[violation]))
        if self.retry_after_s is not None:
            delay = duration_pb2.Duration()
            delay.FromMilliseconds(round(self.retry_after_s * 1000))
            details.append(error_details_pb2.RetryInfo(retry_delay=delay))
        for detail in details:
            packed = any_pb2.Any()
            packed.Pack(detail)
            status.details.append(packed)
        return pb.Error(status=status, reason=self.reason, error_id=self.error_id)


GATEWAY_LOST = Failure(
    code="UNAVAILABLE",
    reason="GATEWAY_LOST",
    message="the process that served this call died; start a new session",
    error_id="",
)
"""Set on every call before its first message: what the client gets when the gateway cannot speak any more."""


def failure_of(error: BaseException) -> Failure:
    """Return what a client is told about an error, and log what it is not told."""
    if isinstance(error, FailedElsewhere):
        return error.failure
    known = _known(error)
    if known is None:
        error_id = new_error_id()
        LOGGER.error("error %s: %s", error_id, _where(error))
        message = f"an unexpected error; please report its id, {error_id}"
        return Failure("INTERNAL", "UNEXPECTED", message, error_id=error_id)
    code = next(code for kind, code in _CODES.items() if isinstance(known, kind))
    reason, metadata = known.reason, dict(known.metadata)
    is_fault = isinstance(known, _DEVICE_FAULTS)
    if is_fault:
        reason, metadata["cause"] = DEVICE_FAULT, known.reason
    can_retry = known.retryable or is_fault  # the replica is replaced, so even a lack of memory may be over
    retry = float(metadata.pop("retry_after_s", RETRY_AFTER_S)) if can_retry else None
    failure = Failure(code.name, reason, known.message, metadata, retry)
    shown = f"{reason}: {metadata['field']}" if isinstance(known, InvalidRequest) else failure.details
    LOGGER.warning("error %s: %s", failure.error_id, shown)  # never a client's own value, which may be a prompt
    return failure


class FailedElsewhere(Exception):
    """Raised for a failure that another process has already described and logged; :func:`failure_of` returns that."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.details)
        self.failure = failure


def _where(error: BaseException) -> str:
    """Return the kinds of an error and its causes, and where each was raised; their texts may hold a prompt."""
    parts: list[str] = []
    cause: BaseException | None = error
    while cause is not None and len(parts) < MAX_CAUSES:
        frames = traceback.extract_tb(cause.__traceback__)
        parts.append(
            " < ".join([type(cause).__name__, *(f"{f.filename}:{f.lineno} {f.name}" for f in reversed(frames))])
        )
        cause = cause.__cause__ or (None if cause.__suppress_context__ else cause.__context__)
    return "; from ".join(parts)


def _known(error: BaseException) -> CausalForcingError | None:
    """Return the error of our tree that this one is, wraps, or stands for."""
    cause = getattr(error, "cause", None)  # Ray wraps what a replica raised
    for candidate in (error, cause):
        if isinstance(candidate, CausalForcingError) and any(isinstance(candidate, kind) for kind in _CODES):
            return candidate
    if isinstance(error, BackPressureError):
        return NoCapacity("too many calls are waiting")
    if isinstance(error, RayActorError):
        return Unavailable("a process of the service died; start a new session", reason="REPLICA_LOST")
    return None
