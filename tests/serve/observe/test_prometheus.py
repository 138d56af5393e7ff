"""A Prometheus of our own: what it keeps, and how it fails."""

from __future__ import annotations

import asyncio
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from causal_forcing.errors import InvalidRequest
from serve.errors import Unavailable
from serve.local import free_port
from serve.metrics.client import client_metrics
from serve.observe.prometheus import Prometheus, prometheus
from serve.observe.rules import expressions

needs_prometheus = pytest.mark.skipif(shutil.which("prometheus") is None, reason="Prometheus is not installed")


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Prometheus]:
    """A Prometheus that asks a client's port every second."""
    port = free_port()
    with client_metrics(port) as recorder:
        recorder.client_frame(100)
        with prometheus({"clients": f"127.0.0.1:{port}"}, tmp_path, port=free_port(), interval_s=1) as server:
            yield server


async def until(server: Prometheus, expr: str) -> float:
    """Return an expression's first value."""
    async with asyncio.timeout(60):
        while not (found := await asyncio.to_thread(server.query, expr)):  # noqa: ASYNC110  (it has no event for us)
            await asyncio.sleep(0.1)
    return float(found[0]["value"][1])


@needs_prometheus
async def test_what_is_ours_is_kept_and_the_rest_is_not(server: Prometheus) -> None:
    frames = 'causal_forcing_client_frames_total{job="clients", namespace="local", ray_cluster="local"}'
    assert await until(server, frames) == 1
    assert await until(server, 'up{job="clients"}') == 1
    assert await until(server, 'count({__name__=~"ray_.*|python_.*"}) or vector(0)') == 0


@needs_prometheus
async def test_rules_are_loaded_and_evaluated(server: Prometheus) -> None:
    async with asyncio.timeout(60):
        while "unknown" in (health := await asyncio.to_thread(server.rules)).values():  # noqa: ASYNC110
            await asyncio.sleep(0.1)
    assert health == dict.fromkeys(expressions(), "ok")


@needs_prometheus
def test_what_is_not_promql_is_told(server: Prometheus) -> None:
    with pytest.raises(InvalidRequest, match="parse error"):
        server.query("sum by (")


@needs_prometheus
def test_a_port_that_is_taken_is_told(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(InvalidRequest, match="port: got"), prometheus({}, tmp_path, port=port, interval_s=1):
            pass


@needs_prometheus
def test_a_prometheus_that_ends_at_once_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serve.observe.prometheus.write_groups", lambda path: path.write_text("groups: 5"))
    with pytest.raises(Unavailable, match="did not start"), prometheus({}, tmp_path, port=free_port(), interval_s=1):
        pass


def test_a_prometheus_that_is_not_there_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(InvalidRequest, match="must be installed"), prometheus({}, tmp_path, port=1, interval_s=1):
        pass
