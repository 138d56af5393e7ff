"""The gateway's own part: who is served, and what the call ends with."""

from __future__ import annotations

import grpc

from causal_forcing.errors import NoCapacity
from serve.gateway.service import set_status
from serve.status import GATEWAY_LOST, failure_of


class Context:
    """Keeps what was set."""

    def set_code(self, code: grpc.StatusCode) -> None:
        self.code = code

    def set_details(self, details: str) -> None:
        self.details = details


def test_the_status_is_that_of_the_last_message() -> None:
    context = Context()
    set_status(context, GATEWAY_LOST)  # type: ignore[arg-type]
    assert (context.code, context.details[:12]) == (grpc.StatusCode.UNAVAILABLE, "GATEWAY_LOST")
    failure = failure_of(NoCapacity("full"))
    set_status(context, failure.to_proto())  # type: ignore[arg-type]
    assert (context.code, context.details) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "NO_SESSION_SLOT: full")
    set_status(context, None)  # type: ignore[arg-type]
    assert context.code is grpc.StatusCode.OK
    assert "GATEWAY_LOST" not in context.details
