"""What every process of the service measures of itself, some seconds apart: pauses, memory, cost."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from serve.detached import detached

from .definitions import Role
from .recorder import Recorder
from .sinks import RaySink

if TYPE_CHECKING:
    from serve.config import ServiceConfig

TICK_S = 1.0
"""Time between two looks: Ray's shortest report interval, in each of which a gauge has to be said."""


class CollectorWatch:
    """Adds up the garbage collector's pauses.

    It only does arithmetic when the collector runs: that may be inside of any lock, also one of the metrics'.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._began_s = self._paused_s = self._longest_s = 0.0

    def __call__(self, phase: str, _info: dict[str, int]) -> None:
        """Take note (a callback of :data:`gc.callbacks`)."""
        if phase == "start":
            self._began_s = self._clock()
        else:
            pause_s = self._clock() - self._began_s
            self._paused_s += pause_s
            self._longest_s = max(self._longest_s, pause_s)

    def take(self) -> tuple[float, float]:
        """Return the sum of the pauses and the longest one since the last call."""
        taken = (self._paused_s, self._longest_s)
        self._paused_s = self._longest_s = 0.0
        return taken


class ProcessMeter:
    """Looks at the process now and then.

    Args:
        recorder: Where it goes.
        price_per_hour: Of a replica like this one.
        currency: Of the price.
        device: ``cuda`` to look at the GPU, too.
        also: What else to do at each look, given the seconds since the last.
        clock: Seconds on a clock that only goes forward.
    """

    def __init__(
        self,
        recorder: Recorder,
        *,
        price_per_hour: float = 0.0,
        currency: str = "USD",
        device: str = "cpu",
        also: tuple[Callable[[float], None], ...] = (),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._recorder = recorder
        self._price_per_s = price_per_hour / 3600
        self._currency = currency
        self._device = device
        self._also = also
        self._clock = clock
        self._looked_s = clock()
        self.collector = CollectorWatch()

    def tick(self) -> None:
        """Look once."""
        now_s = self._clock()
        elapsed_s, self._looked_s = now_s - self._looked_s, now_s
        self._recorder.collected(*self.collector.take())
        self._recorder.elapsed(elapsed_s)
        if self._price_per_s:
            self._recorder.cost(self._price_per_s * elapsed_s, self._currency)
        if self._device == "cuda":
            measure_gpu(self._recorder)
        for look in self._also:
            look(elapsed_s)

    async def run(self) -> None:
        """Look again and again."""
        gc.callbacks.append(self.collector)
        try:
            while True:
                await asyncio.sleep(TICK_S)
                self.tick()
        finally:
            gc.callbacks.remove(self.collector)


def measure_gpu(recorder: Recorder) -> None:
    """Record the memory of this process's GPU, and how busy it is if nvidia-ml-py is installed and the driver says."""
    import torch

    free, total = torch.cuda.mem_get_info()
    recorder.gpu_memory(
        allocated=torch.cuda.memory_allocated(), reserved=torch.cuda.memory_reserved(), free=free, total=total
    )
    try:
        import pynvml
    except ModuleNotFoundError:
        return
    with contextlib.suppress(pynvml.NVMLError):  # a part of a divided GPU has no utilisation of its own
        recorder.gpu_utilisation(torch.cuda.utilization() / 100)


def replica_recorder(role: Role) -> Recorder:
    """Return the recorder of a Serve replica."""
    recorder = Recorder(RaySink())
    recorder.begin(role, Role.REPLICA)
    return recorder


def watch_replica(
    recorder: Recorder, config: ServiceConfig, role: Role, *also: Callable[[float], None]
) -> asyncio.Task[None]:
    """Begin to look at a replica's process; needs the running event loop.

    Args:
        recorder: Where it goes.
        config: The service.
        role: What the replica is.
        also: See :class:`ProcessMeter`.
    """
    meter = ProcessMeter(
        recorder,
        price_per_hour=config.observability.price_per_replica_hour.of(role),
        currency=config.observability.currency,
        device="cpu" if role is Role.GATEWAY or config.engine == "simulated" else config.device,
        also=also,
    )
    return detached(meter.run())
