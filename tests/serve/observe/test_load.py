"""The viewers of `make observe`."""

from __future__ import annotations

import asyncio
import contextlib

from serve.metrics import MemorySink, Recorder
from serve.observe.load import Viewer
from tests.serve.fakes import FakeBackends
from tests.serve.server import serving


async def until(sink: MemorySink, *key: str) -> None:
    async with asyncio.timeout(60):
        while not sink.values.get(key):  # noqa: ASYNC110  (a sink has no event for us)
            await asyncio.sleep(0.01)


async def watch(address: str, sink: MemorySink, *key: str) -> None:
    """Let a viewer of short sessions watch until something was counted."""
    viewer = asyncio.create_task(Viewer(address, Recorder(sink), 1, seconds=0.5).watch_forever())
    await until(sink, *key)
    viewer.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await viewer


async def test_a_viewer_watches_one_session_after_the_other() -> None:
    sink, backends = MemorySink(), FakeBackends()
    async with serving(backends) as address:
        await watch(address, sink, "client_sessions_total", "ended")
    assert sink.values["client_frames_total",] > 0
    assert sink.observed["client_time_to_first_frame_seconds",]
    assert backends.is_clean


async def test_a_service_that_is_not_there_is_counted() -> None:
    sink = MemorySink()
    await watch("127.0.0.1:1", sink, "client_sessions_total", "error")
    assert ("client_frames_total",) not in sink.values
