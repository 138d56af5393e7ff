"""The one mapping from exceptions to what a client sees."""

from __future__ import annotations

import logging
import pickle

import grpc
import pytest
from google.rpc import error_details_pb2
from ray.exceptions import ActorDiedError, RayTaskError
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
from serve.errors import ClientGone, EndedByOperator, NoSuchSession, NotAllowed, Unauthenticated, Unavailable
from serve.status import _CODES, GATEWAY_LOST, FailedElsewhere, Failure, failure_of

SECRET = "Traceback: /home/operator/secret.py said 'a private prompt'"

TABLE = [
    (InvalidRequest("height", 7, "must be 64"), "INVALID_ARGUMENT", "INVALID_REQUEST", False),
    (InvalidRequest("p", "", "must be text", reason="INVALID_PROMPT"), "INVALID_ARGUMENT", "INVALID_PROMPT", False),
    (SessionStateError("no", reason="CONFIG_NOT_FIRST"), "FAILED_PRECONDITION", "CONFIG_NOT_FIRST", False),
    (SessionStateError("no", reason="CONFIG_REPEATED"), "FAILED_PRECONDITION", "CONFIG_REPEATED", False),
    (SessionStateError("over", reason="SESSION_ENDED"), "FAILED_PRECONDITION", "SESSION_ENDED", False),
    (NoCapacity("a limit", reason="QUOTA_EXCEEDED"), "RESOURCE_EXHAUSTED", "QUOTA_EXCEEDED", True),
    (NoCapacity("full"), "RESOURCE_EXHAUSTED", "NO_SESSION_SLOT", True),
    (BackPressureError(num_queued_requests=3, max_queued_requests=2), "RESOURCE_EXHAUSTED", "NO_SESSION_SLOT", True),
    (ClientGone("silent"), "ABORTED", "CLIENT_SILENT", True),
    (ClientGone("slow", reason="CLIENT_TOO_SLOW"), "ABORTED", "CLIENT_TOO_SLOW", True),
    (EndedByOperator("ended"), "ABORTED", "SESSION_ENDED_BY_OPERATOR", False),
    (NoSuchSession("gone"), "NOT_FOUND", "NO_SUCH_SESSION", False),
    (Unauthenticated("who?"), "UNAUTHENTICATED", "BAD_CREDENTIALS", False),
    (NotAllowed("no"), "PERMISSION_DENIED", "REMOTE_PEER", False),
    (NotAllowed("no", reason="NOT_SESSION_OWNER"), "PERMISSION_DENIED", "NOT_SESSION_OWNER", False),
    (NotAllowed("no", reason="NOT_OPERATOR"), "PERMISSION_DENIED", "NOT_OPERATOR", False),
    (NotAllowed("no", reason="TENANT_BANNED"), "PERMISSION_DENIED", "TENANT_BANNED", False),
    (Unavailable("leaving", reason="REPLICA_DRAINING"), "UNAVAILABLE", "REPLICA_DRAINING", True),
    (Unavailable("died", reason="GATEWAY_LOST"), "UNAVAILABLE", "GATEWAY_LOST", True),
    (Unavailable("gone", reason="DECODER_LOST"), "UNAVAILABLE", "DECODER_LOST", True),
    (ActorDiedError(), "UNAVAILABLE", "REPLICA_LOST", True),
    (DeviceFault("cuda"), "UNAVAILABLE", "DEVICE_FAULT", True),
    (OutOfMemory("memory"), "UNAVAILABLE", "DEVICE_FAULT", True),
    (NonFiniteOutput("nan"), "UNAVAILABLE", "DEVICE_FAULT", True),
    (BadCheckpoint("damaged"), "INTERNAL", "BAD_CHECKPOINT", False),
    (CausalForcingError("unknown kind"), "INTERNAL", "UNEXPECTED", False),
    (KeyError(SECRET), "INTERNAL", "UNEXPECTED", False),
]


@pytest.mark.parametrize(("error", "code", "reason", "retry"), TABLE, ids=lambda value: type(value).__name__)
def test_every_error_has_its_code_and_reason(error: BaseException, code: str, reason: str, retry: bool) -> None:
    failure = failure_of(error)
    assert (failure.code, failure.reason) == (code, reason)
    assert (failure.retry_after_s is not None) == retry
    assert failure.details.startswith(f"{reason}: ")
    assert failure.error_id


def test_no_kind_of_error_is_left_out() -> None:
    assert {type(error) for error, *_ in TABLE} >= set(_CODES)


def test_an_unexpected_error_shows_only_an_id_that_is_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.ERROR, logger="ray.serve"):
        logging.getLogger("ray.serve").propagate = True
        failure = failure_of(KeyError(SECRET))
    shown = failure.to_proto().SerializeToString()
    assert b"secret" not in shown
    assert b"KeyError" not in shown
    assert failure.error_id in failure.message
    assert failure.error_id in caplog.text


def test_what_a_replica_raised_is_unwrapped() -> None:
    wrapped = RayTaskError("lease", "a long traceback", InvalidRequest("seed", -1, "must be positive"))
    failure = failure_of(wrapped.as_instanceof_cause())
    assert (failure.code, failure.metadata["field"]) == ("INVALID_ARGUMENT", "seed")
    assert "traceback" not in failure.details


def test_a_failure_described_elsewhere_is_passed_on() -> None:
    failure = failure_of(DeviceFault("cuda"))
    assert failure_of(FailedElsewhere(pickle.loads(pickle.dumps(failure)))) == failure


def test_the_message_before_the_status_agrees_with_it() -> None:
    failure = failure_of(InvalidRequest("height", 7, "must be 64", reason="UNSUPPORTED_RESOLUTION"))
    error = failure.to_proto()
    assert error.status.code == grpc.StatusCode.INVALID_ARGUMENT.value[0]
    assert error.status.message == failure.details
    info, bad = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest()
    assert error.status.details[0].Unpack(info)
    assert (info.reason, info.domain) == ("UNSUPPORTED_RESOLUTION", "causal-forcing")
    assert error.status.details[1].Unpack(bad)
    assert bad.field_violations[0].field == "height"
    assert error.error_id == failure.error_id


def test_a_known_retry_time_is_told() -> None:
    failure = failure_of(NoCapacity("full", metadata={"retry_after_s": "42"}))
    retry = error_details_pb2.RetryInfo()
    assert failure.to_proto().status.details[-1].Unpack(retry)
    assert retry.retry_delay.seconds == 42


def test_status_texts_are_short() -> None:
    assert len(failure_of(SessionStateError("x" * 5000)).details) <= 1000


def test_gateway_lost_speaks_for_a_dead_process() -> None:
    assert GATEWAY_LOST.status_code is grpc.StatusCode.UNAVAILABLE
    assert GATEWAY_LOST.details.startswith("GATEWAY_LOST: ")
    assert isinstance(GATEWAY_LOST, Failure)
