"""A generator's end of admission: says which sessions are here."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

from ray.exceptions import RayActorError

from serve.detached import detached

from .book import REPORT_EVERY_S


class Reporter:
    """A generator's end: reports its sessions whenever they change, and every second."""

    def __init__(
        self,
        actor: Any,  # noqa: ANN401  (ray's handles are untyped)
        replica_id: str,
        capacity: int,
        node_id: str = "",
        budget_bytes: int | None = None,
    ) -> None:
        self._actor = actor
        self._replica_id = replica_id
        self._capacity = capacity
        self._node_id = node_id
        self._budget_bytes = budget_bytes
        self._sessions: set[str] = set()
        self._changed = asyncio.Event()
        self._waiting: list[asyncio.Event] = []
        self._loop: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to report; needs the running event loop."""
        self._loop = detached(self._keep_reporting())

    async def add(self, session_id: str) -> None:
        """Report a new session; returns when admission knows, or cannot be reached."""
        self._sessions.add(session_id)
        await self._report()

    async def remove(self, session_id: str) -> None:
        """Report that a session is over; returns when admission knows, or cannot be reached."""
        self._sessions.discard(session_id)
        await self._report()

    async def close(self) -> None:
        """Report that no session can come here any more; returns when admission knows, or cannot be reached."""
        self._capacity = 0
        await self._report()

    async def _report(self) -> None:
        reported = asyncio.Event()
        self._waiting.append(reported)
        self._changed.set()
        await reported.wait()

    async def _keep_reporting(self) -> None:
        while True:
            self._changed.clear()
            waiting, self._waiting = self._waiting, []
            with contextlib.suppress(RayActorError):  # it is being restarted; the next report tells it all
                told = (self._replica_id, self._capacity, sorted(self._sessions), self._node_id, self._budget_bytes)
                await self._actor.report.remote(*told)
            for reported in waiting:
                reported.set()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(REPORT_EVERY_S):
                    await self._changed.wait()
