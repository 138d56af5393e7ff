"""Every expression of every panel and rule, evaluated by the real Prometheus beside the live service."""

from __future__ import annotations

import asyncio
import math
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import yaml

from serve.client import AsyncVideoClient, Frame, Started, StreamOptions, VideoServiceError
from serve.local import free_port
from serve.metrics.client import client_metrics
from serve.metrics.dashboards import DASHBOARDS
from serve.observe.load import Viewer
from serve.observe.prometheus import Prometheus, prometheus
from serve.observe.rules import expressions
from tests.serve.cluster.conftest import SIZE, Cluster, collect
from tests.serve.collector import collecting

pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.asyncio,
    pytest.mark.skipif(shutil.which("prometheus") is None, reason="Prometheus is not installed"),
]

WITHOUT_DATA = Path(__file__).parents[2] / "monitoring/without_data.yaml"
PATIENCE_S = 150.0
VARIABLES = {
    "$__rate_interval": "1m",
    "$cluster": ".*",
    "$namespace": ".*",
    "$deployment": ".*",
}


def every_expression() -> dict[str, str]:
    """Return the expressions by name; a rule answers 0 instead of nothing, to see whether it has data."""
    rules = {name: re.sub(r"(>|<|==) ", r"\1 bool ", expr) for name, expr in expressions().items()}
    panels = {
        f"{board.title}: {panel.title}: {query.legend}": query.expr
        for board in DASHBOARDS
        for panel in board.panels
        for query in panel.queries
    }
    return {**rules, **{name: with_values(expr) for name, expr in panels.items()}}


def with_values(expr: str) -> str:
    """Return an expression as Grafana sends it when everything is chosen."""
    for name, value in VARIABLES.items():
        expr = expr.replace(name, value)
    return expr


def has_data(server: Prometheus, expr: str) -> bool:
    return any(not math.isnan(float(sample["value"][1])) for sample in server.query(expr))


@contextmanager
def scraped(cluster: Cluster, folder: Path) -> Iterator[tuple[Prometheus, int]]:
    """Run a Prometheus that asks the cluster, and a client's port, every second."""
    port = free_port()
    targets = {"causal-forcing": urlsplit(cluster.metrics_url).netloc, "clients": f"127.0.0.1:{port}"}
    with prometheus(targets, folder, port=free_port(), interval_s=1) as server:
        yield server, port


async def misbehave(cluster: Cluster) -> None:
    """Be refused, be slow, drift by another policy: what well-behaved viewers do not do."""
    with pytest.raises(VideoServiceError):
        async with cluster.session(height=48, width=48) as session:
            await anext(session)
    async with cluster.session(credit_chunks=1) as session:
        async for event in session:
            if isinstance(event, Frame) and event.chunk_index == 3 and event.last_in_chunk:
                await session.pause()
                await asyncio.sleep(0.2)
                await session.resume()
            if isinstance(event, Frame) and event.chunk_index == 6:
                break


async def test_every_expression_is_evaluated_and_has_data(cluster: Cluster, tmp_path: Path) -> None:
    reasons: dict[str, str] = yaml.safe_load(WITHOUT_DATA.read_text())
    wanted = every_expression()
    assert set(reasons) <= set(wanted)
    with scraped(cluster, tmp_path) as (server, port), client_metrics(port) as recorder:
        viewers = [Viewer(cluster.address, recorder, number, seconds=5) for number in range(2)]
        tasks = [asyncio.create_task(viewer.watch_forever()) for viewer in viewers]
        try:
            await misbehave(cluster)
            assert await without_data(server, wanted, set(reasons)) == []
            health = await asyncio.to_thread(server.rules)
            assert {name for name, state in health.items() if state != "ok"} == set()
            assert set(health) == set(expressions())
            assert await asyncio.to_thread(has_data, server, "causal_forcing_client_frames_total > 0")
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
    await cluster.until_free()


async def without_data(server: Prometheus, wanted: dict[str, str], excused: set[str]) -> list[str]:
    """Evaluate everything until all that is not excused has had data; an error in any fails at once."""
    missing = set(wanted)
    deadline_s = time.monotonic() + PATIENCE_S
    while missing - excused and time.monotonic() < deadline_s:
        for name in sorted(missing):
            if await asyncio.to_thread(has_data, server, wanted[name]):
                missing.discard(name)
        await asyncio.sleep(0.5)
    return sorted(missing - excused)


async def test_a_session_is_in_its_clients_trace(cluster: Cluster) -> None:
    trace_id, parent_id = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
    assert cluster.config.observability.tracing is not None
    port = int(cluster.config.observability.tracing.endpoint.rpartition(":")[2])
    asked = [("traceparent", f"00-{trace_id}-{parent_id}-01")]
    options = StreamOptions("a red circle", height=SIZE, width=SIZE)
    with collecting(port) as collector:
        async with AsyncVideoClient(cluster.address, metadata=asked) as client, client.stream(options) as session:
            events, frames = await collect(session, chunks=3)
        async with asyncio.timeout(PATIENCE_S):
            while not collector.named("session"):  # noqa: ASYNC110  (the gateway's exporter has no event for us)
                await asyncio.sleep(0.05)
    started = next(event for event in events if isinstance(event, Started))
    (span,) = collector.named("session")
    assert (span.trace_id.hex(), span.parent_span_id.hex()) == (trace_id, parent_id)
    assert started.session_id in str(span.attributes)
    chunks = [inside for inside in collector.inside(span) if inside.name == "chunk"]
    assert len(chunks) >= len(frames)
    stages = {"denoise", "context", "queue", "decoder call", "send"}
    assert stages <= {inside.name for inside in collector.inside(chunks[0])}
    assert {"decode", "encode"} <= {name.name for name in collector.spans}
    await cluster.until_free()
