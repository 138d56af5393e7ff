"""A step that does not end, and how long that takes to notice."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from causal_forcing.errors import CausalForcingError, DeviceFault, NonFiniteOutput
from serve.device import DEVICE_FAULTS, LEAST_S, StepClock, Warden, run_within


def test_the_first_steps_have_a_limit_of_their_own_and_later_ones_ten_times_the_median() -> None:
    clock = StepClock(first_s=60)
    for seconds in (2, 1, 3):
        assert clock.limit_s == 60
        clock.took(seconds)
    assert clock.limit_s == 20


def test_a_fast_device_is_given_some_seconds_all_the_same() -> None:
    clock = StepClock(first_s=60)
    for _ in range(5):
        clock.took(0.01)
    assert clock.limit_s == LEAST_S


async def test_a_step_that_does_not_end_is_a_device_fault() -> None:
    pool, end = ThreadPoolExecutor(1), threading.Event()
    with pytest.raises(DeviceFault) as caught:
        await run_within(pool, end.wait, 0.01)
    assert caught.value.reason == "DEVICE_HUNG"
    end.set()


async def test_waiting_for_the_devices_turn_does_not_count() -> None:
    pool, end, entered = ThreadPoolExecutor(1), threading.Event(), threading.Event()

    def hold() -> bool:
        entered.set()
        return end.wait()

    pool.submit(hold)
    await asyncio.to_thread(entered.wait)
    waiting = asyncio.create_task(run_within(pool, lambda: 7, 10.0))
    for _ in range(50):
        await asyncio.sleep(0)
    assert not waiting.done()
    end.set()
    assert await waiting == 7


async def test_an_error_of_the_work_is_the_callers() -> None:
    def fail() -> None:
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        await run_within(ThreadPoolExecutor(1), fail, 1.0)


def raising(error: Exception) -> Callable[[], None]:
    def work() -> None:
        raise error

    return work


@pytest.mark.parametrize("kind", DEVICE_FAULTS)
async def test_a_device_fault_is_told_to_who_asked_and_ends_the_replica(kind: type[CausalForcingError]) -> None:
    ended = list[str]()
    warden = Warden(ThreadPoolExecutor(1), 60.0, told=ended.append, end=lambda: ended.append("end"))
    assert await warden.run(lambda: 7) == 7
    warden.require_healthy()
    with pytest.raises(kind):
        await warden.run(raising(kind("planted")))
    assert ended == [kind.default_reason, "end"]
    with pytest.raises(RuntimeError, match=kind.__name__):
        warden.require_healthy()


async def test_after_a_fault_nothing_is_done_and_nobody_gets_an_answer() -> None:
    pool, entered, end, done = ThreadPoolExecutor(1), threading.Event(), threading.Event(), list[int]()
    warden = Warden(pool, 60.0, end=lambda: None)

    def fail() -> None:
        entered.set()
        end.wait()
        raise NonFiniteOutput("planted")

    failing = asyncio.create_task(warden.run(fail))
    await asyncio.to_thread(entered.wait)
    waiting = asyncio.create_task(warden.run(lambda: done.append(1)))
    end.set()
    with pytest.raises(NonFiniteOutput):
        await failing
    later = asyncio.create_task(warden.run(lambda: done.append(2)))
    await asyncio.get_running_loop().run_in_executor(pool, lambda: None)  # after both of them
    for _ in range(20):
        await asyncio.sleep(0)
    assert (waiting.done(), later.done(), done) == (False, False, [])


async def test_a_replica_whose_step_does_not_end_is_ended() -> None:
    ended, end = asyncio.Event(), threading.Event()
    warden = Warden(ThreadPoolExecutor(1), 0.01, end=ended.set)
    with pytest.raises(DeviceFault) as caught:
        await warden.run(end.wait)
    assert caught.value.reason == "DEVICE_HUNG"
    assert ended.is_set()
    end.set()


async def test_a_fault_is_noticed_although_its_caller_has_left() -> None:
    ended, entered, end = asyncio.Event(), threading.Event(), threading.Event()
    warden = Warden(ThreadPoolExecutor(1), 60.0, end=ended.set)

    def fail() -> None:
        entered.set()
        end.wait()
        raise DeviceFault("planted")

    asked = asyncio.create_task(warden.run(fail))
    await asyncio.to_thread(entered.wait)
    asked.cancel()
    end.set()
    async with asyncio.timeout(20):
        await ended.wait()


async def test_a_mistake_is_no_fault_of_the_device() -> None:
    warden = Warden(ThreadPoolExecutor(1), 60.0, end=lambda: pytest.fail("it was not the device"))
    with pytest.raises(ValueError, match="mistake"):
        await warden.run(raising(ValueError("a mistake")))
    warden.require_healthy()
    assert await warden.run(lambda: 7) == 7


async def test_steps_are_compared_with_others_of_their_kind_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = list[float]()

    async def noted(pool: ThreadPoolExecutor, work: Callable[[], int], limit_s: float) -> int:
        limits.append(limit_s)
        return work()

    monkeypatch.setattr("serve.device.run_within", noted)
    warden = Warden(ThreadPoolExecutor(1), 60.0)
    for kind in ("small", "small", "small", "small", "large", None, None, None, None):
        await warden.run(lambda: 7, kind)
    assert limits == [60.0, 60.0, 60.0, LEAST_S, *[60.0] * 5], "many quick steps do not make a long one suspicious"
