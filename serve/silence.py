"""Replicas that say nothing any more: a process that is stopped, or blocked in a driver, neither dies nor answers.

Every generator polls its log in the mailbox at least every few seconds, whatever its device does. When it does not, and
does not answer its own health check either, its gateway ends the process, as Serve would a good deal later: the lease
then ends like that of any generator that died, and the session moves.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Iterator
from typing import Any, TypeVar

from ray.exceptions import RayActorError, RayError

from .detached import detached
from .logs import LOGGER
from .messages import LeaseStarted, Process

LOOK_EVERY_S = 1.0
"""Pause between two looks at the mailbox."""

ANSWER_S = 5.0
"""How long a silent replica may take to answer its health check."""

MAX_KNOWN = 1024
"""Replicas that are remembered, the ones heard last; most of them may be long gone."""

T = TypeVar("T")


class SilenceWatch:
    """Watches the logs of one gateway's running leases.

    Args:
        unread: Asks the mailbox which logs nobody has read for that many seconds.
        silence_s: Seconds without a poll after which a lease's process is asked whether it is well.
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

    @property
    def lease_count(self) -> int:
        """Leases that are watched."""
        return len(self._leases)

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


class AnswerWatch:
    """Waits for a deployment's answers, and ends those of its replicas that are frozen.

    A call that takes long may only wait for its turn, or for much work; so a replica is ended when it does not answer
    its health check either. Only replicas that have answered before are looked at: one that starts may say nothing.

    Args:
        silence_s: How long a call may go without an answer before the replicas are looked at.
        answers: Asks a replica whether it is well; False if it does not answer.
        end: Ends a replica's process.
    """

    def __init__(
        self, silence_s: float, answers: Callable[[str], Awaitable[bool]], end: Callable[[Process], None]
    ) -> None:
        self._silence_s = silence_s
        self._answers = answers
        self._end = end
        self._known: dict[str, Process] = {}
        self._looking: asyncio.Task[None] | None = None

    def heard(self, process: Process) -> None:
        """Take note of a replica that has answered."""
        self._known.pop(process.replica_id, None)
        self._known[process.replica_id] = process
        while len(self._known) > MAX_KNOWN:
            del self._known[next(iter(self._known))]

    async def answer(self, call: Awaitable[T]) -> T:
        """Return a call's answer, however long it takes, as long as the replicas are alive."""
        job = asyncio.ensure_future(_awaited(call))
        try:
            while not (await asyncio.wait([job], timeout=self._silence_s))[0]:
                if self._looking is None or self._looking.done():
                    self._looking = detached(self._look())
                await asyncio.shield(self._looking)
            return job.result()
        finally:
            job.cancel()

    async def _look(self) -> None:
        """End every replica that does not answer."""
        known = list(self._known.values())
        answers = await asyncio.gather(*(self._answers(process.replica_id) for process in known))
        for process, is_well in zip(known, answers, strict=True):
            if not is_well:
                LOGGER.error("replica %s is silent and is ended", process.replica_id)
                self._known.pop(process.replica_id, None)
                self._end(process)


async def _awaited(call: Awaitable[T]) -> T:
    return await call


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
