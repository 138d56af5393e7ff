"""The whole service on this machine: a Ray cluster of its own, started and stopped with the calling process."""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from causal_forcing.errors import InvalidRequest

from .config import ServiceConfig
from .errors import Unavailable
from .pools import pool_resource

OBJECT_STORE_BYTES = 256 << 20
"""Shared memory for what travels between processes: a few chunks a session."""

ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_SERVE_LOG_TO_STDERR": "0",
    "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "1",
    "RAY_DEDUP_LOGS": "0",
    "RAY_max_direct_call_object_size": str(1 << 20),  # chunks travel in calls, not by shared memory: a quarter less CPU
    "RAY_task_events_report_interval_ms": "0",  # a record of every call for a dashboard that is not there
    "TOKENIZERS_PARALLELISM": "false",
}
"""What Ray's processes inherit, unless it is set already."""


@dataclass(frozen=True)
class LocalService:
    """A running service.

    Attributes:
        address: ``host:port`` for gRPC clients.
        metrics_url: What Prometheus scrapes.
    """

    address: str
    metrics_url: str


@contextmanager
def local_service(config: ServiceConfig, *, verbose: bool = False) -> Iterator[LocalService]:
    """Start the service on this machine and stop everything that was started, however the block ends.

    Ray's ports are open to the network on every interface; with ``peers: loopback`` (the default) the gateway answers
    callers on this machine only.

    Args:
        config: The service.
        verbose: Whether the logs of all processes go to this one's output.

    Raises:
        InvalidRequest: If a port is taken.
    """
    metrics_port = config.observability.metrics_port or free_port()
    ports = {"grpc_port": config.grpc_port, "http_port": config.http_port, "metrics_port": metrics_port}
    for name, port in ports.items():
        require_free_port(name, port)
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    import ray
    from ray import serve as _  # noqa: F401  (it sets its loggers' levels when it is imported)

    level = logging.INFO if verbose else logging.ERROR
    for name in ("ray", "ray.serve"):
        logging.getLogger(name).setLevel(level)
    try:
        _start_ray(config, metrics_port, verbose=verbose)
        deploy(config)
        yield LocalService(f"127.0.0.1:{config.grpc_port}", f"http://127.0.0.1:{metrics_port}/metrics")
    finally:
        ray.shutdown()


def _start_ray(config: ServiceConfig, metrics_port: int, *, verbose: bool) -> None:
    """Start a cluster of our own; Ray gives a busy machine half a minute, so a second try often helps."""
    import ray

    on_terminate = signal.getsignal(signal.SIGTERM)
    for attempts_left in (1, 0):
        try:
            ray.init(
                address="local",  # never a cluster that happens to be there
                include_dashboard=False,
                log_to_driver=verbose,
                logging_level=logging.INFO if verbose else logging.ERROR,
                object_store_memory=OBJECT_STORE_BYTES,
                resources={pool_resource(pool): 1 for pool in config.placement.pools},  # this machine is all of them
                _metrics_export_port=metrics_port,
            )
        except Exception as error:  # Ray raises a bare Exception when it runs out of time
            ray.shutdown()
            if attempts_left == 0:
                message = f"Ray did not start on this machine: {error}"
                raise Unavailable(message, reason="RAY_NOT_STARTED") from error
        else:
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGTERM, on_terminate)  # Ray has put its own in its place
            return


def deploy(config: ServiceConfig) -> None:
    """Start Serve on the connected cluster and run the application; returns when it is ready."""
    from ray import serve
    from ray.serve.config import HTTPOptions, gRPCOptions

    from .app import APP_NAME, SERVICER, build

    serve.start(
        http_options=HTTPOptions(host="127.0.0.1", port=config.http_port),
        grpc_options=gRPCOptions(port=config.grpc_port, grpc_servicer_functions=[SERVICER]),
    )
    serve.run(build(config), name=APP_NAME, route_prefix="/")


def free_port() -> int:
    """Return a port that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def require_free_port(name: str, port: int) -> None:
    """Check that nobody listens on a port.

    Raises:
        InvalidRequest: If somebody does (field ``name``).
    """
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("0.0.0.0", port))  # where Serve's gRPC proxy listens
        except OSError as error:
            raise InvalidRequest(name, port, "must be a free port; another program listens on it") from error
