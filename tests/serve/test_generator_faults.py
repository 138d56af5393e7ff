"""Devices that fail, hang or produce nonsense, planted in the simulated engine; and a lease that goes on elsewhere."""

from __future__ import annotations

import asyncio
import gc
import shutil
import weakref
from collections.abc import Iterator
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path

import pytest

from causal_forcing.config import SessionConfig
from serve.config import ServiceConfig
from serve.gateway.memory import SessionMemory
from serve.generator import GeneratorService, Lease
from serve.messages import Credit, GeneratedChunk, LeaseEnded, LeaseStarted, Stop
from serve.simulated import SimulatedGenerator, SimulatedSession
from tests.serve.fakes import embedding, simulated, update
from tests.serve.test_generator import Bench, Reports

CAUSES = {"nan": "NON_FINITE_OUTPUT", "oom": "OUT_OF_MEMORY", "cuda": "DEVICE_FAULT", "hang": "DEVICE_HUNG"}


@pytest.fixture
def planted(tmp_path: Path) -> Iterator[Path]:
    """A folder for faults; a step that hangs ends when it goes."""
    yield tmp_path
    shutil.rmtree(tmp_path, ignore_errors=True)


def faulty(folder: Path) -> ServiceConfig:
    return simulated(simulated={"chunk_ms": 0, "fault_dir": str(folder)})


@pytest.mark.parametrize("fault", CAUSES)
async def test_a_device_fault_ends_the_lease_and_the_replica_is_to_be_replaced(fault: str, planted: Path) -> None:
    bench, reports, faults = Bench(engine=SimulatedGenerator(faulty(planted))), Reports(), list[str]()
    service = GeneratorService(
        bench.engine, bench.worker, "g1", reports, first_chunk_s=0.05, on_fault=lambda: faults.append("fault")
    )
    bench.prompt("a")
    async with aclosing(service.lease(bench.request)) as events:
        assert await anext(events) == LeaseStarted("g1")
        assert isinstance(await anext(events), GeneratedChunk)
        (planted / fault).touch()
        bench.room.put("s", Credit(0))
        rest = [event async for event in events]
    assert isinstance(rest[-1], LeaseEnded)
    assert rest[-1].failure is not None
    assert (rest[-1].failure.code, rest[-1].failure.reason) == ("UNAVAILABLE", "DEVICE_FAULT")
    assert rest[-1].failure.metadata["cause"] == CAUSES[fault]
    assert rest[-1].failure.retry_after_s is not None
    assert (reports.is_closed, reports.held, faults) == (True, ["s"], ["fault"])
    with pytest.raises(RuntimeError, match="not to be trusted"):
        service.require_healthy()
    assert not (planted / fault).exists()


class Watched(SimulatedGenerator):
    """Keeps weak references to its sessions: what holds a user's gigabytes in a real engine."""

    def __init__(self, config: ServiceConfig) -> None:
        super().__init__(config)
        self.opened: list[weakref.ref[SimulatedSession]] = []

    def open(self, config: SessionConfig) -> SimulatedSession:
        session = super().open(config)
        self.opened.append(weakref.ref(session))
        return session


@pytest.mark.parametrize("fault", [*CAUSES, "error"])
async def test_a_sessions_memory_is_given_back_after_a_fault(fault: str, planted: Path) -> None:
    engine = Watched(faulty(planted))
    bench = Bench(engine=engine)
    service = GeneratorService(bench.engine, bench.worker, "g1", Reports(), first_chunk_s=0.05)
    bench.prompt("a")
    async with aclosing(service.lease(bench.request)) as events:
        assert await anext(events) == LeaseStarted("g1")
        assert isinstance(await anext(events), GeneratedChunk)
        (planted / fault).touch()
        bench.room.put("s", Credit(0))
        rest = [event async for event in events]
        assert engine.opened[0]() is not None
    assert isinstance(rest[-1], LeaseEnded)
    if fault == "hang":
        shutil.rmtree(planted)  # the step ends; until then its thread holds the session
    del events, rest, bench.lease
    await asyncio.get_running_loop().run_in_executor(bench.worker, int)  # the device's thread lets go of its last step
    async with asyncio.timeout(20):
        while engine.opened[0]() is not None:
            gc.collect()
            await asyncio.sleep(0.01)


async def test_an_error_that_is_not_the_devices_leaves_the_replica_in_service(planted: Path) -> None:
    bench, reports = Bench(engine=SimulatedGenerator(faulty(planted))), Reports()
    service = GeneratorService(bench.engine, bench.worker, "g1", reports)
    (planted / "error").touch()
    bench.prompt("a")
    async with aclosing(service.lease(bench.request)) as events:
        ended = [event async for event in events][-1]
    assert isinstance(ended, LeaseEnded)
    assert ended.failure is not None
    assert (ended.failure.code, ended.failure.reason) == ("INTERNAL", "UNEXPECTED")
    assert "planted" not in ended.failure.message
    service.require_healthy()
    assert reports.held == []


async def test_a_hang_is_found_although_the_client_has_left(planted: Path) -> None:
    bench, reports, faulted = Bench(engine=SimulatedGenerator(faulty(planted))), Reports(), asyncio.Event()
    service = GeneratorService(bench.engine, bench.worker, "g1", reports, first_chunk_s=0.05, on_fault=faulted.set)
    (planted / "hang").touch()
    bench.prompt("a")
    events = service.lease(bench.request)
    await anext(events)
    chunk = asyncio.ensure_future(anext(events))
    async with asyncio.timeout(20):
        while (planted / "hang").exists():  # noqa: ASYNC110  (the device's thread has no event for us)
            await asyncio.sleep(0.01)
    chunk.cancel()
    with pytest.raises(asyncio.CancelledError):
        await chunk
    async with asyncio.timeout(20):
        await faulted.wait()


async def test_a_lease_goes_on_where_another_one_was_seen_last() -> None:
    lost, kept = Bench(), SessionMemory(simulated().model_preset.session_config(seed=1))
    lost.prompt("a")
    async with aclosing(lost.lease.events()) as events:
        for _ in range(2):
            chunk = await lost.next_chunk(events)
            kept.commit(chunk)
    await lost.lease.close()
    first = chunk
    kept.show(0, update(prompt_id="a"), (embedding("a"),))
    bench = Bench()
    bench.request = replace(bench.request, resume=kept.resume())
    bench.lease = Lease(bench.request, bench.engine, bench.worker)
    bench.room.put("s", Credit(1))
    async with aclosing(bench.lease.events()) as events:
        chunks = [await bench.next_chunk(events) for _ in range(2)]
        waiting = await bench.nothing_comes(events)
        bench.room.put("s", Stop())
        assert await waiting == LeaseEnded(None)
    await bench.lease.close()
    assert [(c.index, c.prompt_id, c.prompt_applied, c.starts_scene) for c in chunks] == [
        (2, "a", False, False),
        (3, "a", False, False),
    ]
    assert chunks[0].point.cursor.end == first.point.cursor.end + chunks[0].latents.frames
