"""What went wrong, as a client sees it."""

from __future__ import annotations

from typing import Any

import grpc
from google.rpc import error_details_pb2, status_pb2

from protos.causal_forcing.v1 import video_pb2 as pb

RETRYABLE_CODES = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.ABORTED)
"""Codes of errors that may pass."""

FINAL_REASONS = ("SESSION_ENDED_BY_OPERATOR",)
"""Reasons with such a code that do not: a person wanted it so."""


class VideoServiceError(Exception):
    """Raised when a session fails.

    Attributes:
        code: The gRPC status code.
        reason: Stable UPPER_SNAKE name; empty when the transport failed and no server said one.
        message: Text for people.
        retry_after_s: When to come back, if that makes sense.
        field: The field of an invalid request, or empty.
        error_id: Names the failure in the server's log, or empty.
    """

    def __init__(
        self,
        code: grpc.StatusCode,
        message: str,
        *,
        reason: str = "",
        retry_after_s: float | None = None,
        field: str = "",
        error_id: str = "",
    ) -> None:
        super().__init__(f"{code.name} {reason}: {message}" if reason else f"{code.name}: {message}")
        self.code = code
        self.message = message
        self.reason = reason
        self.retry_after_s = retry_after_s
        self.field = field
        self.error_id = error_id

    @property
    def is_retryable(self) -> bool:
        """Whether the same request may work later: what it needs is gone, full or was lost, and nobody forbids it."""
        return self.code in RETRYABLE_CODES and self.reason not in FINAL_REASONS

    @classmethod
    def from_proto(cls, error: pb.Error) -> VideoServiceError:
        """Return the error that a server sent as its last message."""
        return cls._from_details(error.status, error.reason, error.error_id)

    @classmethod
    def from_call(cls, error: grpc.aio.AioRpcError) -> VideoServiceError:
        """Return the error that a call ended with, with the details that came behind it, if any did."""
        trailing: Any = error.trailing_metadata() or ()
        for key, value in trailing:
            if key == "grpc-status-details-bin":
                return cls._from_details(status_pb2.Status.FromString(value))
        return cls.from_status(error.code(), error.details() or "")

    @classmethod
    def from_status(cls, code: grpc.StatusCode, details: str) -> VideoServiceError:
        """Return the error of a call that ended without a last message."""
        reason, separator, message = details.partition(": ")
        if separator and reason.replace("_", "").isupper():
            return cls(code, message, reason=reason)
        return cls(code, details)

    @classmethod
    def _from_details(cls, status: status_pb2.Status, reason: str = "", error_id: str = "") -> VideoServiceError:
        code = next(code for code in grpc.StatusCode if code.value[0] == status.code)
        info, retry = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
        retry_after_s = None
        for detail in status.details:
            detail.Unpack(info)
            if detail.Unpack(retry):
                retry_after_s = retry.retry_delay.ToNanoseconds() / 1e9
        reason = reason or info.reason
        message, field = status.message.removeprefix(f"{reason}: "), info.metadata.get("field", "")
        return cls(code, message, reason=reason, retry_after_s=retry_after_s, field=field, error_id=error_id)
