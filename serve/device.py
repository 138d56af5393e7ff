"""Work on a device's one thread, with a limit on how long a step may take: a device may hang without an error."""

from __future__ import annotations

import asyncio
import os
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from statistics import median
from typing import TypeVar

from causal_forcing.errors import DeviceFault

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


def end_process(after_s: float) -> None:
    """End this process after a time, whatever its threads do; what Serve has not stopped by then, it finds dead."""
    timer = threading.Timer(after_s, os._exit, [1])
    timer.daemon = True
    timer.start()
