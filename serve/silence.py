"""Generators that say nothing any more: a process that is stopped, or blocked in a driver, neither dies nor answers.

Every generator polls its log in the mailbox at least every few seconds, whatever its device does. When it does not, and
does not answer its own health check either, its gateway ends the process, as Serve would a good deal later: the lease
then ends like that of any generator that died, and the session moves.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

from ray.exceptions import RayActorError, RayError

from .detached import detached
from .logs import LOGGER
from .messages import LeaseStarted

LOOK_EVERY_S = 1.0
"""Pause between two looks at the mailbox."""

ANSWER_S = 5.0
"""How long a silent generator may take to answer its health check."""


class SilenceWatch:
    """Watches the logs of one gateway's running leases.

    Args:
        unread: Asks the mailbox which logs nobody has read for that many seconds.
        silence_s: How many.
        answers: Asks a replica whether it is well; False if it does not answer.
        end: Ends the process that a lease runs in.
    """

    def __init__(
        self,
        unread: Callable[[float], Awaitable[list[str]]],
        silence_s: float,
        answers: Callable[[str], Awaitable[bool]],
        end: Callable[[LeaseStarted], None],
    ) -> None:
        self._unread = unread
        self._silence_s = silence_s
        self._answers = answers
        self._end = end
        self._leases: dict[str, LeaseStarted] = {}
        self._loop: asyncio.Task[None] | None = None

    @contextlib.contextmanager
    def over(self, log_id: str, lease: LeaseStarted) -> Iterator[None]:
        """Watch the generator that reads a log, for as long as the block lasts."""
        if self._loop is None or self._loop.done():
            self._loop = detached(self._watch())
        self._leases[log_id] = lease
        try:
            yield
        finally:
            del self._leases[log_id]

    async def _watch(self) -> None:
        while self._leases:
            await asyncio.sleep(LOOK_EVERY_S)
            with contextlib.suppress(RayActorError):  # without its mailbox the gateway's sessions end anyway
                await self.look()

    async def look(self) -> None:
        """End every watched generator that is silent and does not answer."""
        unread = await self._unread(self._silence_s)
        silent = {lease.replica_id: lease for log_id in unread if (lease := self._leases.get(log_id)) is not None}
        for replica_id, lease in silent.items():
            if not await self._answers(replica_id):
                LOGGER.error("generator %s has been silent for %g s and is ended", replica_id, self._silence_s)
                self._end(lease)


async def answers_its_health_check(replica: Any) -> bool:  # noqa: ANN401  (ray's handles are untyped)
    """Return whether a Serve replica's actor (None: it is gone) says anything about its health, good or bad."""
    if replica is None:
        return True
    try:
        async with asyncio.timeout(ANSWER_S):
            await replica.check_health.remote()
    except TimeoutError:
        return False
    except RayError:
        return True  # it is dead, or says that it is not well: either way Serve knows
    return True
