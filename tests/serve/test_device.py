"""A step that does not end, and how long that takes to notice."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from causal_forcing.errors import DeviceFault
from serve.device import LEAST_S, StepClock, run_within


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
