"""What a generator does with its time."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from .recorder import SILENT, Recorder

if TYPE_CHECKING:
    from serve.messages import GeneratedChunk


class GeneratorMeter:
    """Adds up how long a generator is busy, held or idle, and records its chunks; used on the event loop alone.

    Args:
        recorder: Where it goes.
        clock: Seconds on a clock that only goes forward.
    """

    def __init__(self, recorder: Recorder = SILENT, clock: Callable[[], float] = time.monotonic) -> None:
        self._recorder = recorder
        self._clock = clock
        self._state, self._since_s = "idle", clock()
        self._leases = self._jobs = 0
        self._caches: dict[str, int] = {}

    def leased(self) -> None:
        """A session has begun."""
        self._leases += 1
        self._update()

    def freed(self, session_id: str) -> None:
        """A session is over, and the device no longer at work for it."""
        self._leases -= 1
        self._caches.pop(session_id, None)
        self._recorder.cache("kv", sum(self._caches.values()))
        self._update()

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """Enclose work of the device."""
        self._jobs += 1
        self._update()
        try:
            yield
        finally:
            self._jobs -= 1
            self._update()

    def made(self, chunk: GeneratedChunk, session_id: str, cache_bytes: int) -> None:
        """A chunk was made; the session's keys and values take this much memory."""
        self._caches[session_id] = cache_bytes
        self._recorder.stage("denoise", chunk.denoise_s - chunk.context_s)
        self._recorder.stage("context", chunk.context_s)
        self._recorder.cache("kv", sum(self._caches.values()))
        if chunk.recaches:
            self._recorder.recached(chunk.recaches)

    def failed(self, reason: str) -> None:
        """The device is not to be trusted any more."""
        self._recorder.device_fault(reason)

    def look(self, _elapsed_s: float = 0.0) -> None:
        """Record the time until now."""
        now_s = self._clock()
        if now_s > self._since_s:
            self._recorder.generator_spent(self._state, now_s - self._since_s)
        self._since_s = now_s

    def _update(self) -> None:
        self.look()
        self._state = "busy" if self._jobs else "held" if self._leases else "idle"
