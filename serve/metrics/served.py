"""Metrics of a process outside of Ray, on a port of its own through prometheus-client."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from causal_forcing.errors import InvalidRequest

from .definitions import Role
from .recorder import Recorder
from .sinks import PrometheusSink


@contextmanager
def served_metrics(port: int, *roles: Role) -> Iterator[Recorder]:
    """Serve what the recorder is told at ``http://127.0.0.1:port/metrics`` for as long as the block runs.

    Args:
        port: Where to.
        roles: Whose series exist from the start.

    Raises:
        InvalidRequest: If the port cannot be had (field ``metrics_port``).
    """
    from prometheus_client import CollectorRegistry, start_http_server

    registry = CollectorRegistry()
    try:
        server, thread = start_http_server(port, addr="127.0.0.1", registry=registry)
    except (OSError, OverflowError):
        raise InvalidRequest("metrics_port", port, "must be a free port, 1 to 65535") from None
    recorder = Recorder(PrometheusSink(registry))
    recorder.begin(*roles)
    try:
        yield recorder
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
