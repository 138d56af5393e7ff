"""Work on a device's one thread, with a limit on how long a step may take: a device may hang without an error.

A replica whose device has failed is not to be trusted with anything. A generator says so to admission, and its sessions
move; decoders and text encoders hold nothing that cannot be made anew, so theirs end their processes (:class:`Warden`).
"""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable
from concurrent.futures import ThreadPoolExecutor
from statistics import median
from typing import TypeVar

from causal_forcing.errors import DeviceFault, NonFiniteOutput, OutOfMemory

from .detached import detached
from .logs import LOGGER

DEVICE_FAULTS = (DeviceFault, OutOfMemory, NonFiniteOutput)
"""Errors after which a replica is not to be trusted any more."""

ANSWERED_S = 0.5
"""How long a process that gives itself up leaves for its last answer to get out."""

TIMES_MEDIAN = 10
"""A step that takes this many times the usual is taken for one that does not end."""

LEAST_S = 5.0
"""But no step is given up before it has taken this long."""

USUAL_AFTER = 3
"""Steps after which one knows what is usual."""

T = TypeVar("T")


class StepClock:
    """How long a step may take: for the first ones a given time, then a multiple of the median.

    Args:
        first_s: Limit of the first steps, which may have to compile or to allocate.
    """

    def __init__(self, first_s: float) -> None:
        self._first_s = first_s
        self._taken_s: deque[float] = deque(maxlen=32)

    def took(self, seconds: float) -> None:
        """Count a step that ended."""
        self._taken_s.append(seconds)

    @property
    def limit_s(self) -> float:
        """How long the next step may take."""
        if len(self._taken_s) < USUAL_AFTER:
            return self._first_s
        return max(LEAST_S, TIMES_MEDIAN * median(self._taken_s))


async def run_within(pool: ThreadPoolExecutor, work: Callable[[], T], limit_s: float) -> T:
    """Run work on a device's thread; waiting for its turn does not count.

    A cancelled caller leaves; the work goes on before whatever comes next.

    Raises:
        DeviceFault: If it takes longer than the limit (``DEVICE_HUNG``); the thread is then lost.
    """
    loop = asyncio.get_running_loop()
    begun = asyncio.Event()

    def timed() -> T:
        loop.call_soon_threadsafe(begun.set)
        return work()

    job = loop.run_in_executor(pool, timed)
    await begun.wait()
    await asyncio.wait([job], timeout=limit_s)
    if not job.done():
        raise DeviceFault(f"the device has worked for {limit_s:g} s on one step", reason="DEVICE_HUNG")
    return job.result()


class Warden:
    """Runs a replica's device work, and ends the replica with its first fault.

    Who asked for the work that failed is told, and may have it done elsewhere once more. Everyone else waits until the
    process is gone, which is what callers of a replica are prepared for.

    Args:
        pool: The device's thread.
        first_s: Limit of the first steps of each kind, and of steps of no kind.
        told: Is told the fault's reason.
        end: Ends the process.
    """

    def __init__(
        self,
        pool: ThreadPoolExecutor,
        first_s: float,
        told: Callable[[str], None] = lambda _: None,
        end: Callable[[], None] = lambda: end_process(ANSWERED_S),
    ) -> None:
        self._told = told
        self._pool = pool
        self._first_s = first_s
        self._clocks: dict[Hashable, StepClock] = {}
        self._end = end
        self._fault = ""

    async def run(self, work: Callable[[], T], kind: Hashable = None) -> T:
        """Return what the work returns; a cancelled caller leaves, the work goes on before whatever comes next.

        Args:
            work: A step.
            kind: Steps of one kind take about equally long, and are compared with each other.

        Raises:
            DeviceFault: If it failed, or took too long; likewise ``OutOfMemory`` and ``NonFiniteOutput``.
        """
        clock = StepClock(self._first_s)
        if kind is not None:
            clock = self._clocks.setdefault(kind, clock)
        job = detached(self._run(work, clock))
        result: T = await asyncio.shield(job)
        return result

    def require_healthy(self) -> None:
        """Raise after a device fault.

        Raises:
            RuntimeError: With the fault's name.
        """
        if self._fault:
            raise RuntimeError(f"the device is not to be trusted after {self._fault}")

    async def _run(self, work: Callable[[], T], clock: StepClock) -> T:
        def timed() -> T:
            if self._fault:
                raise _GivenUp
            start = time.perf_counter()
            try:
                done = work()
            except DEVICE_FAULTS as error:
                self._fault = type(error).__name__  # at once, for the next work waits for this thread
                raise
            clock.took(time.perf_counter() - start)
            return done

        try:
            return await run_within(self._pool, timed, clock.limit_s)
        except DEVICE_FAULTS as error:
            self._fault = self._fault or type(error).__name__
            LOGGER.error("this replica ends itself after %s", str(error))
            self._told(error.reason)
            self._end()
            raise
        except _GivenUp:
            return await asyncio.Event().wait()  # type: ignore[return-value]  # it never returns


class _GivenUp(Exception):
    """Raised on the device's thread for work that comes after a fault."""


def end_process(after_s: float) -> None:
    """End this process after a time, whatever its threads do; what Serve has not stopped by then, it finds dead."""
    timer = threading.Timer(after_s, os._exit, [1])
    timer.daemon = True
    timer.start()
