"""What the service keeps: entries for sessions, tasks, open files and memory, of every process."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable
from typing import Any

import psutil
from _service import processes

from serve.admission.actor import find
from serve.app import APP_NAME, admission_name
from serve.config import ServiceConfig

OURS = ("proxy", "gateway", "mailbox", "admission", "text_encoder", "generator", "decoder")
"""Processes whose files and memory sessions may leave something in."""

POLL_S = 0.002
"""Pause between two questions to admission; what is timed by them is no more exact than one of its answers."""

PATIENCE_S = 120.0
"""Longest wait for what has to come."""


class Service:
    """A running service, asked from the program that started it."""

    def __init__(self, config: ServiceConfig) -> None:
        self._config = config
        self._admission: Any = None

    async def counts(self) -> dict[str, int]:
        """Return what admission counts; also while it is being restarted."""
        from ray.exceptions import RayActorError

        deadline = time.monotonic() + PATIENCE_S
        while True:
            try:
                self._admission = self._admission or find(admission_name(self._config))
                counts: dict[str, int] = await self._admission.counts.remote()
            except (RayActorError, ValueError):
                self._admission = None
                if time.monotonic() > deadline:
                    raise
                await asyncio.sleep(0.05)
            else:
                return counts

    async def until(self, is_right: Callable[[dict[str, int]], bool]) -> float:
        """Return the monotonic time at which admission's counts were right; raise after two minutes."""
        deadline = time.monotonic() + PATIENCE_S
        while not is_right(counts := await self.counts()):
            if time.monotonic() > deadline:
                raise TimeoutError(f"admission still counts {counts}")
            await asyncio.sleep(POLL_S)
        return time.monotonic()

    async def until_free(self, generators: int) -> float:
        """Return the monotonic time at which nobody waits or runs, and so many generators are idle."""
        free = {"waiting": 0, "granted": 0, "running": 0, "generators": generators, "idle": generators}
        return await self.until(lambda counts: free.items() <= counts.items())

    async def holdings(self) -> dict[str, dict[str, int]]:
        """Return what gateway, decoder and admission keep, and the files that each part's processes have open."""
        from ray import serve

        held: dict[str, dict[str, int]] = {"admission": {**await self.counts()}}
        del held["admission"]["generators"], held["admission"]["idle"]
        for part, deployment in (("gateway", "Gateway"), ("decoder", "VaeDecoder")):
            handle: Any = serve.get_deployment_handle(deployment, APP_NAME)
            held[part] = dict(await handle.holdings.remote())
        for part, found in processes().items():
            if part in OURS:
                held.setdefault(part, {})["files"] = sum(process.num_fds() for process in found)
                held[part]["threads"] = sum(process.num_threads() for process in found)
        return held


def memory_mb() -> dict[str, float]:
    """Return each part's own memory (unique set size), all its processes together, in MB."""
    used: dict[str, float] = {}
    for part, found in processes().items():
        if part in OURS:
            for process in found:
                with contextlib.suppress(psutil.Error):
                    used[part] = used.get(part, 0.0) + process.memory_full_info().uss / 1e6
    return {part: round(amount, 1) for part, amount in used.items()}
