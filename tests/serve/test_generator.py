"""One lease: credit, prompts, stopping, and how it ends."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import pytest

from causal_forcing.errors import DeviceFault
from causal_forcing.prompts import PromptUpdate, SwitchPolicy, WeightedPrompt
from serve.config import load_config
from serve.device import LEAST_S
from serve.engines import GeneratorEngine
from serve.generator import Controls, GeneratorService, Lease
from serve.mailbox import MailboxRoom
from serve.messages import (
    Credit,
    GeneratedChunk,
    LeaseEnded,
    LeaseEvent,
    LeaseRequest,
    LeaseStarted,
    PackedEmbedding,
    PackedTensor,
    SetPaused,
    SetPrompt,
    StartFrom,
    Stop,
)
from serve.model_engines import ModelGenerator
from serve.simulated import SimulatedGenerator
from tests.serve.fakes import RemoteMailbox, ScriptedEngine, embedding, latents, simulated, update


class BlockedEngine(ScriptedEngine):
    """A device that is in the middle of a step until it is let go."""

    def __init__(self) -> None:
        super().__init__()
        self.entered, self.leave = threading.Event(), threading.Event()
        self.was_told_to_stop = False

    def generate(self, should_stop: Callable[[], bool]) -> GeneratedChunk | None:
        self.entered.set()
        self.leave.wait()
        self.was_told_to_stop = should_stop()
        return None


@dataclass
class Bench:
    """A lease with its mailbox."""

    engine: GeneratorEngine = field(default_factory=lambda: SimulatedGenerator(simulated()))
    credit_chunks: int = 2
    idle_timeout_s: float = 60.0
    frames_per_second: float | None = None

    def __post_init__(self) -> None:
        self.room = MailboxRoom()
        self.room.open("s")
        self.request = LeaseRequest(
            replica_id="g",
            session_id="s",
            config=simulated().model_preset.session_config(seed=1),
            credit_chunks=self.credit_chunks,
            mailbox=RemoteMailbox(self.room),
            idle_timeout_s=self.idle_timeout_s,
            frames_per_second=self.frames_per_second,
            log_id="s",
        )
        self.worker = ThreadPoolExecutor(1)
        self.lease = Lease(self.request, self.engine, self.worker)

    def prompt(self, name: str) -> None:
        new = embedding(name)
        self.room.put("s", SetPrompt(update(prompt_id=name), (name,), (new,)))

    async def next_chunk(self, events: AsyncGenerator[LeaseEvent]) -> GeneratedChunk:
        event = await anext(events)
        assert isinstance(event, GeneratedChunk), event
        return event

    async def nothing_comes(self, events: AsyncGenerator[LeaseEvent]) -> asyncio.Task[LeaseEvent]:
        """Let everything that can run, run; return the wait for the next event, still waiting."""
        task = asyncio.ensure_future(anext(events))
        for _ in range(50):
            await asyncio.sleep(0)
            await asyncio.get_running_loop().run_in_executor(self.worker, lambda: None)
        assert not task.done()
        return task


async def test_exactly_the_credit_is_generated_ahead() -> None:
    bench = Bench(credit_chunks=2)
    bench.prompt("a")
    async with aclosing(bench.lease.events()) as events:
        indices = [(await bench.next_chunk(events)).index for _ in range(2)]
        waiting = await bench.nothing_comes(events)
        bench.room.put("s", Credit(0))
        third = await waiting
        assert isinstance(third, GeneratedChunk)
        assert [*indices, third.index] == [0, 1, 2]
        waiting = await bench.nothing_comes(events)
        bench.room.put("s", Stop())
        assert await waiting == LeaseEnded(None)
    await bench.lease.close()


async def test_nothing_is_generated_before_the_first_prompt() -> None:
    bench = Bench()
    async with aclosing(bench.lease.events()) as events:
        waiting = await bench.nothing_comes(events)
        bench.prompt("a")
        first = await waiting
        assert isinstance(first, GeneratedChunk)
        assert (first.prompt_id, first.prompt_applied) == ("a", True)
    await bench.lease.close()


async def test_the_newest_prompt_is_applied_and_the_others_are_told() -> None:
    bench = Bench(credit_chunks=1)
    bench.prompt("a")
    async with aclosing(bench.lease.events()) as events:
        first = await bench.next_chunk(events)
        waiting = await bench.nothing_comes(events)
        for name in "bcd":
            bench.prompt(name)
        bench.room.put("s", Credit(0))
        second = await waiting
        assert isinstance(second, GeneratedChunk)
        bench.room.put("s", Credit(1))
        third = await bench.next_chunk(events)
    await bench.lease.close()
    assert [(c.prompt_id, c.prompt_applied, c.superseded) for c in (first, second, third)] == [
        ("a", True, ()),
        ("d", True, ("b", "c")),
        ("d", False, ()),
    ]


async def test_a_paused_lease_makes_nothing_until_it_is_resumed() -> None:
    bench = Bench(credit_chunks=8)
    bench.prompt("a")
    bench.room.put("s", SetPaused(True))
    async with aclosing(bench.lease.events()) as events:
        waiting = await bench.nothing_comes(events)
        bench.room.put("s", SetPaused(False))
        first = await waiting
        assert isinstance(first, GeneratedChunk)
        assert first.index == 0
    await bench.lease.close()


async def test_a_paced_lease_waits_for_the_time_of_its_next_chunk_and_hears_messages_meanwhile() -> None:
    bench = Bench(credit_chunks=8, frames_per_second=0.001)
    bench.prompt("a")
    async with aclosing(bench.lease.events()) as events:
        await bench.next_chunk(events)
        waiting = await bench.nothing_comes(events)
        bench.prompt("b")
        await asyncio.sleep(0)
        assert not waiting.done()
        bench.room.put("s", Stop())
        assert await waiting == LeaseEnded(None)
    await bench.lease.close()


@pytest.mark.parametrize("compiles", [True, False])
async def test_a_step_that_may_compile_has_the_time_of_a_first_one(
    monkeypatch: pytest.MonkeyPatch, compiles: bool
) -> None:
    limits = list[float]()

    async def noted(pool: ThreadPoolExecutor, work: Callable[[], object], limit_s: float) -> object:
        limits.append(limit_s)
        return await asyncio.get_running_loop().run_in_executor(pool, work)

    monkeypatch.setattr("serve.generator.run_within", noted)
    bench = Bench(credit_chunks=12)
    bench.lease = Lease(bench.request, bench.engine, bench.worker, 60.0, compiles=compiles)
    bench.prompt("a")
    async with aclosing(bench.lease.events()) as events:
        for _ in range(12):
            await bench.next_chunk(events)
        cut = await bench.nothing_comes(events)
        bench.room.put("s", SetPrompt(update(policy=SwitchPolicy.SCENE_CUT), ("a",), ()))
        bench.room.put("s", Credit(100))
        await cut
        for _ in range(9):
            await bench.next_chunk(events)
    await bench.lease.close()
    opening, first, filling, first_full, cut_and_filling = 1, 3, 9, 2, 9
    if compiles:
        assert limits == [60.0] * (opening + filling + first_full) + [LEAST_S] + [60.0] * cut_and_filling + [LEAST_S]
    else:
        assert limits == [60.0] * (opening + first) + [LEAST_S] * (len(limits) - opening - first)


class Overtaken(PromptUpdate):
    """A prompt during whose replacement something else happens."""

    meanwhile: ClassVar[list[Callable[[], object]]] = []

    def __getattribute__(self, name: str) -> Any:
        if name == "prompt_id" and Overtaken.meanwhile:
            Overtaken.meanwhile.pop()()
        return super().__getattribute__(name)


async def test_a_prompt_is_shown_or_replaced_and_never_both() -> None:
    controls, session, superseded = Controls(), ScriptedEngine(), list[str]()
    device = threading.Thread(target=lambda: superseded.extend(controls.take_prompt(session)))

    def take() -> None:
        device.start()
        device.join(0.1)  # it has to wait until the other prompt is there

    first = Overtaken((WeightedPrompt("a fox"),), prompt_id="first")
    controls.apply(SetPrompt(first, ("a",), (embedding("a"),)))
    Overtaken.meanwhile.append(take)
    controls.apply(SetPrompt(update(prompt_id="second"), ("a",), ()))
    await asyncio.to_thread(device.join)
    assert (superseded, session.updates) == (["first"], ["second"])
    assert not controls.has_prompt


async def test_a_start_image_is_chunk_0_and_the_model_goes_on_from_it() -> None:
    bench = Bench(engine=ScriptedEngine())
    given = latents([42])
    bench.room.put("s", StartFrom(given))
    bench.prompt("a")
    async with aclosing(bench.lease.events()) as events:
        first, second = [await bench.next_chunk(events) for _ in range(2)]
    await bench.lease.close()
    assert first.latents is given
    assert (first.index, first.prompt_id, second.index) == (0, "a", 1)
    assert second.latents.data[0, 0, 0, 0, 0] == 1


def test_a_stop_ends_a_chunk_between_two_steps() -> None:
    session = SimulatedGenerator(simulated()).open(simulated().model_preset.session_config())
    asked: list[bool] = []

    def should_stop() -> bool:
        asked.append(True)
        return len(asked) == 3

    session.update_prompt(update(), [embedding("a")])
    assert session.generate(should_stop) is None
    assert len(asked) == 3


async def test_closing_waits_for_the_step_under_way() -> None:
    engine = BlockedEngine()
    bench = Bench(engine=engine)
    bench.prompt("a")
    events = bench.lease.events()
    waiting = asyncio.ensure_future(anext(events))
    await asyncio.to_thread(engine.entered.wait)
    waiting.cancel()  # what Serve does when the gateway's call is cancelled
    closing = asyncio.create_task(bench.lease.close())
    for _ in range(50):
        await asyncio.sleep(0)
    assert not closing.done()
    engine.leave.set()
    await closing
    assert engine.was_told_to_stop


async def test_a_device_fault_is_told_and_remembered() -> None:
    bench = Bench(engine=ScriptedEngine([None, DeviceFault("cuda error")]), credit_chunks=8)
    bench.prompt("a")
    async with aclosing(bench.lease.events()) as events:
        await bench.next_chunk(events)
        ended = await anext(events)
    assert isinstance(ended, LeaseEnded)
    assert ended.failure is not None
    assert (ended.failure.code, ended.failure.reason) == ("UNAVAILABLE", "DEVICE_FAULT")
    assert isinstance(bench.lease.error, DeviceFault)
    await bench.lease.close()


class RecordingEngine(ScriptedEngine):
    """Sessions that note whose turn it is; the first step waits until every session is there."""

    def __init__(self, sessions: int) -> None:
        super().__init__()
        self.turns: list[str] = []
        self._opened = 0
        self._sessions = sessions

    def open(self, config: object) -> ScriptedEngine:
        session = RecordedSession(self)
        self._opened += 1
        return session

    @property
    def is_full(self) -> bool:
        return self._opened == self._sessions


class RecordedSession(ScriptedEngine):
    def __init__(self, engine: RecordingEngine) -> None:
        super().__init__()
        self._engine = engine
        self.index = 0

    def generate(self, should_stop: Callable[[], bool]) -> GeneratedChunk | None:
        if self._engine.is_full:
            self._engine.turns.append(self.updates[-1])
        return super().generate(should_stop)


async def test_sessions_on_one_device_take_turns_chunk_by_chunk() -> None:
    engine, count = RecordingEngine(3), 3
    benches = [Bench(engine=engine, credit_chunks=1 << 20) for _ in range(count)]
    for bench in benches:
        bench.lease = Lease(bench.request, engine, benches[0].worker)

    async def play(bench: Bench, name: str) -> None:
        bench.prompt(name)
        async with aclosing(bench.lease.events()) as events:
            for _ in range(40):
                await bench.next_chunk(events)
        await bench.lease.close()

    await asyncio.gather(*(play(bench, name) for bench, name in zip(benches, "abc", strict=True)))
    turns = "".join(engine.turns)
    together = turns[: 3 * (min(turns.rindex(name) for name in "abc") // 3)]
    assert len(together) >= 60
    for start in range(len(together) - 2 * count):
        assert set(together[start : start + 2 * count]) == set("abc"), "two rounds without a session's turn"


async def alone_or_together(names: str) -> dict[str, list[bytes]]:
    """Return each session's latents, five chunks with a prompt switch, with these sessions on one embedded model."""
    config = load_config(None, sizes=[[32, 32]], generator={"sessions_per_replica": 2})
    engine, worker = ModelGenerator(config), ThreadPoolExecutor(1)
    size = config.model_preset.transformer

    async def play(name: str) -> list[bytes]:
        room = MailboxRoom()
        room.open(name)
        session = config.model_preset.session_config(height=32, width=32, seed=ord(name), window_frames=4)
        request = LeaseRequest("g", name, session, 2, RemoteMailbox(room), 60.0, name)
        numbers = np.random.default_rng(ord(name)).standard_normal((2, 1, size.text_len, size.text_dim))
        keys = [f"{name}{index}" for index in range(2)]
        prompts = [
            PackedEmbedding(k, PackedTensor(n.astype(np.float32), "float32"))
            for k, n in zip(keys, numbers, strict=True)
        ]
        lease = Lease(request, engine, worker)
        made = []
        room.put(name, SetPrompt(update(prompt_id=keys[0]), (keys[0],), (prompts[0],)))
        async with aclosing(lease.events()) as events:
            async for event in events:
                assert isinstance(event, GeneratedChunk)
                made.append(event.latents.data.tobytes())
                if len(made) == 5:
                    break
                if len(made) == 2:  # without credit for more, so the switch comes before the third chunk
                    room.put(name, SetPrompt(update(prompt_id=keys[1]), (keys[1],), (prompts[1],)))
                    room.put(name, Credit(8))
        await lease.close()
        return made

    results = await asyncio.gather(*(play(name) for name in names))
    return dict(zip(names, results, strict=True))


async def test_a_session_alone_equals_the_same_session_beside_another_bit_for_bit() -> None:
    together = await alone_or_together("ab")
    assert together["a"] != together["b"]
    assert together["a"] == (await alone_or_together("a"))["a"]
    assert together["b"] == (await alone_or_together("b"))["b"]


async def test_a_lost_mailbox_ends_the_lease() -> None:
    bench = Bench(credit_chunks=1)
    bench.prompt("a")
    async with aclosing(bench.lease.events()) as events:
        await bench.next_chunk(events)
        bench.room.close("s")
        ended = await anext(events)
    assert isinstance(ended, LeaseEnded)
    assert ended.failure is not None
    assert ended.failure.reason == "GATEWAY_LOST"
    await bench.lease.close()


async def test_a_gateway_that_leaves_the_lease_without_work_loses_it() -> None:
    bench = Bench(credit_chunks=1, idle_timeout_s=0.01)
    bench.prompt("a")
    async with aclosing(bench.lease.events()) as events:
        await bench.next_chunk(events)
        ended = await anext(events)
    assert isinstance(ended, LeaseEnded)
    assert ended.failure is not None
    assert ended.failure.reason == "GATEWAY_LOST"
    await bench.lease.close()


@pytest.mark.parametrize("messages", [0, 3])
async def test_a_stop_before_the_first_chunk_ends_the_lease(messages: int) -> None:
    bench = Bench()
    for number in range(messages):
        bench.prompt(str(number))
    bench.room.put("s", Stop())
    async with aclosing(bench.lease.events()) as events:
        assert [event async for event in events] == [LeaseEnded(None)]
    await bench.lease.close()


class Reports:
    """Keeps what was reported."""

    def __init__(self) -> None:
        self.held: list[str] = []
        self.is_closed = False
        self.answers, self.was_removed = asyncio.Event(), asyncio.Event()
        self.answers.set()

    async def add(self, session_id: str) -> None:
        self.held.append(session_id)
        await self.answers.wait()

    async def remove(self, session_id: str) -> None:
        self.held.remove(session_id)
        self.was_removed.set()

    async def close(self) -> None:
        self.is_closed = True


def service_of(bench: Bench) -> tuple[GeneratorService, Reports]:
    reports = Reports()
    return GeneratorService(bench.engine, bench.worker, "g1", reports), reports


async def test_a_lease_is_reported_before_it_says_who_serves_it_and_after_it_ended() -> None:
    bench = Bench()
    service, reports = service_of(bench)
    bench.prompt("a")
    async with aclosing(service.lease(bench.request)) as events:
        assert await anext(events) == LeaseStarted("g1")
        assert reports.held == ["s"]
        bench.room.put("s", Stop())
        assert [event async for event in events][-1] == LeaseEnded(None)
    assert reports.held == []
    service.require_healthy()


async def test_a_session_is_opened_and_its_prompt_read_while_admission_is_told() -> None:
    bench = Bench()
    service, reports = service_of(bench)
    is_told = asyncio.Event()

    async def add(session_id: str) -> None:
        await is_told.wait()

    reports.add = add  # type: ignore[method-assign]
    bench.prompt("a")
    async with aclosing(service.lease(bench.request)) as events:
        started = await bench.nothing_comes(events)
        assert bench.room.unread(for_s=0.0) == [], "its log is read"
        is_told.set()
        assert await started == LeaseStarted("g1")
        await bench.next_chunk(events)
        reports.held.append("s")


async def test_a_lease_that_is_cancelled_while_admission_is_told_reads_nothing_more() -> None:
    bench = Bench()
    service, reports = service_of(bench)
    entered = asyncio.Event()

    async def add(session_id: str) -> None:
        reports.held.append(session_id)
        entered.set()
        await asyncio.Event().wait()

    reports.add = add  # type: ignore[method-assign]
    first = asyncio.ensure_future(anext(service.lease(bench.request)))
    await entered.wait()
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    assert reports.held == []
    assert bench.room.unread(for_s=0.0) == ["s"], "nobody reads its log any more"


async def test_an_abandoned_lease_frees_its_place() -> None:
    bench = Bench()
    service, reports = service_of(bench)
    bench.prompt("a")
    events = service.lease(bench.request)
    await anext(events)
    await events.aclose()
    assert reports.held == []


async def test_after_a_device_fault_the_place_stays_taken_and_the_replica_is_unhealthy() -> None:
    bench = Bench(engine=ScriptedEngine([DeviceFault("cuda error")]))
    service, reports = service_of(bench)
    bench.prompt("a")
    async with aclosing(service.lease(bench.request)) as events:
        assert [type(event) async for event in events] == [LeaseStarted, LeaseEnded]
    assert reports.held == ["s"]
    with pytest.raises(RuntimeError, match="DeviceFault"):
        service.require_healthy()


async def turns() -> None:
    """Let everything that can run, run."""
    for _ in range(50):
        await asyncio.sleep(0)


async def test_a_lease_that_is_cancelled_twice_during_a_step_frees_its_place() -> None:
    bench = Bench(engine=BlockedEngine())
    service, reports = service_of(bench)
    bench.prompt("a")
    events = service.lease(bench.request)
    await anext(events)
    call = asyncio.ensure_future(anext(events))
    await asyncio.to_thread(bench.engine.entered.wait)  # type: ignore[attr-defined]
    call.cancel()  # the proxy, for the client
    await turns()
    call.cancel()  # the gateway, for the session
    await turns()
    assert reports.held == ["s"]
    bench.engine.leave.set()  # type: ignore[attr-defined]
    async with asyncio.timeout(20):
        await reports.was_removed.wait()
    assert reports.held == []


async def test_a_lease_that_is_cancelled_before_admission_knows_of_it_frees_its_place() -> None:
    bench = Bench()
    service, reports = service_of(bench)
    reports.answers.clear()
    call = asyncio.ensure_future(anext(service.lease(bench.request)))
    await turns()
    assert reports.held == ["s"]
    call.cancel()
    async with asyncio.timeout(20):
        await reports.was_removed.wait()
    assert reports.held == []
