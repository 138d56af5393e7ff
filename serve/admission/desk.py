"""A gateway's end of admission: joins sessions to the queue, tells them where they stand, and restores the queue."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import replace
from typing import Any, Protocol, TypeVar

from ray.exceptions import RayActorError

from serve.detached import detached
from serve.errors import Unavailable
from serve.logs import LOGGER
from serve.messages import Claim, Progress, QueuePlace, SessionView, Share, Ticket

from .actor import QueueView
from .fleet import too_large

TELL_EVERY_S = 5.0
"""How often a waiting session is told where it stands while nothing changes."""

RETRY_S = 0.2
"""Pause before a call to an actor that is being restarted is tried again."""

GIVE_UP_S = 15.0
"""After this long without the actor, a session that wants to wait is refused."""

T = TypeVar("T")


class Carrier(Protocol):
    """A gateway's sessions, as its desk needs them."""

    def progress(self) -> dict[str, Progress]:
        """Return what each session has had."""
        ...

    def end(self, session_id: str) -> None:
        """End a session because an operator wants it; without effect when it is over."""
        ...


class AdmissionDesk:
    """A gateway's end: joins sessions to the queue and tells them where they stand."""

    def __init__(
        self,
        actor: Any,  # noqa: ANN401  (calls are made as ray's handles make them)
        gateway_id: str,
        is_current: Callable[[], bool] = lambda: True,
    ) -> None:
        """Take the actor's handle.

        Args:
            actor: Admission's handle.
            gateway_id: Unique id of the gateway's replica.
            is_current: Whether the gateway's version of the application is the one in service; may block.
        """
        self._actor = actor
        self._gateway_id = gateway_id
        self._is_current = is_current
        self._look: asyncio.Task[bool] | None = None
        self._carrier: Carrier | None = None
        self._tickets: dict[str, Ticket] = {}
        self._started_s: dict[str, float] = {}
        self._places: dict[str, QueuePlace] = {}
        self._ledger: dict[str, float] = {}
        self._news = asyncio.Event()
        self._epoch, self._version = "", -1
        self._loop: asyncio.Task[None] | None = None

    def carry(self, carrier: Carrier) -> None:
        """Say whose sessions these are, so that admission hears what they have had."""
        self._carrier = carrier

    def start(self) -> None:
        """Begin to poll, unless that is so already; needs the running event loop.

        Also a gateway without sessions polls: admission ends itself when it hears of nobody.
        """
        if self._loop is None or self._loop.done():
            self._loop = detached(self._keep_synced())

    async def places(self, claim: Claim) -> AsyncGenerator[QueuePlace]:
        """Join the queue and yield where the session stands: at once, on every change, and every few seconds.

        A session that is in the queue already, because it was put back, keeps its place.

        A place with a ``replica_id`` is a grant; the caller then calls :meth:`confirm`, or :meth:`refuse` and goes on
        reading. :meth:`leave` ends it in any case.

        Raises:
            NoCapacity: If the queue, or the tenant's part of it, is full.
            InvalidRequest: If no generator has the memory, which may show when the first one has started.
            Unavailable: If admission cannot be reached, or if another version of the application has taken over: its
                generators are not in this queue, and those that are will stop (``REPLICA_DRAINING``).
        """
        self.start()
        session_id = claim.session_id
        new = Ticket(session_id, self._gateway_id, time.time(), share=claim.share, nbytes=claim.nbytes)
        ticket = self._tickets.setdefault(session_id, new)
        place = self._places[session_id] = await self._insist(lambda: self._actor.enqueue.remote(ticket))
        yield place
        while session_id in self._tickets:
            known = None if place.replica_id else place  # a grant that was given back may come again
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(TELL_EVERY_S):
                    while self._places.get(session_id, known) == known:
                        await self._news.wait()
            place = self._places.get(session_id, place)
            if place.most_bytes is not None:
                raise too_large(claim.nbytes, place.most_bytes)
            if not place.replica_id and await self._is_replaced():
                raise Unavailable("a new version of the service has taken over", reason="REPLICA_DRAINING")
            yield place

    @property
    def ticket_count(self) -> int:
        """Sessions that wait or run."""
        return len(self._tickets)

    async def confirm(self, session_id: str, replica_id: str) -> None:
        """Say that the lease began."""
        self._tickets[session_id] = replace(self._tickets[session_id], replica_id=replica_id, is_moving=False)
        self._started_s.setdefault(session_id, time.monotonic())
        self._places.pop(session_id, None)
        await self._tell(self._actor.confirm.remote(session_id, replica_id))

    async def refuse(self, session_id: str, replica_id: str, *, gone: bool) -> None:
        """Give a grant back; ``gone`` says that the generator is dead."""
        if gone:
            await self._tell(self._actor.retire.remote(replica_id))
        self._places[session_id] = QueuePlace(0)
        await self._tell(self._actor.refuse.remote(session_id, replica_id))

    async def requeue(self, session_id: str, replica_id: str) -> None:
        """Say that a running session has lost its generator, which is not to be used any more.

        Its place in the queue is before everyone who has not begun; :meth:`places` goes on from there.
        """
        held_s = time.monotonic() - self._started_s.get(session_id, time.monotonic())
        ticket = replace(self._tickets[session_id], replica_id="", is_moving=True, held_s=held_s)
        self._tickets[session_id] = ticket
        await self.retire(replica_id)
        await self._tell(self._actor.requeue.remote(ticket))

    async def leave(self, session_id: str) -> None:
        """Say that the session is over or gave up."""
        if self._tickets.pop(session_id, None) is not None:
            self._places.pop(session_id, None)
            self._started_s.pop(session_id, None)
            await self._tell(self._actor.leave.remote(session_id))

    async def retire(self, replica_id: str) -> None:
        """Say that a generator is dead."""
        await self._tell(self._actor.retire.remote(replica_id))

    async def sessions(self) -> list[SessionView]:
        """Return all sessions of the service, up to two seconds old.

        Raises:
            Unavailable: If admission cannot be reached.
        """
        return list(await self._insist(self._actor.sessions.remote))

    async def end(self, session_id: str) -> bool:
        """Have a session ended, wherever it is carried; return whether it is known.

        Raises:
            Unavailable: If admission cannot be reached.
        """
        return bool(await self._insist(lambda: self._actor.end.remote(session_id)))

    async def spend_prompt(self, tenant: str, per_minute: int) -> float:
        """Count a tenant's prompt; return 0, or the seconds after which it may come again.

        While admission is being restarted nobody counts.
        """
        try:
            return float(await self._actor.spend_prompt.remote(tenant, per_minute))
        except RayActorError:
            return 0.0

    def change_shares(self, share_of: Callable[[str], Share]) -> None:
        """Give every tenant its new share; admission hears of it with the next poll."""
        self._tickets = {s: replace(t, share=share_of(t.share.tenant)) for s, t in self._tickets.items()}
        self._restore()

    def close(self) -> None:
        """Stop polling."""
        if self._loop is not None:
            self._loop.cancel()

    def _restore(self) -> None:
        """Have admission told everything with the next poll, as if it had begun anew."""
        self._epoch = ""

    async def _is_replaced(self) -> bool:
        """Return whether another version has taken over; all who ask at a time share one look at it."""
        if self._look is None or self._look.done():
            self._look = detached(asyncio.to_thread(self._is_current))
        return not await asyncio.shield(self._look)

    async def _keep_synced(self) -> None:
        while True:
            try:
                progress = self._carrier.progress() if self._carrier is not None else {}
                view: QueueView = await self._actor.sync.remote(self._gateway_id, self._epoch, self._version, progress)
                if view.epoch != self._epoch or not view.is_known:
                    self._epoch, self._version = view.epoch, -1  # first: what changes meanwhile is told again
                    await self._actor.restore.remote(self._gateway_id, self._written_tickets(), self._ledger)
                    continue
            except RayActorError:
                self._restore()
                await asyncio.sleep(RETRY_S)
                continue
            self._version, self._ledger = view.version, view.ledger
            if self._carrier is not None:
                for session_id in view.ending:
                    self._carrier.end(session_id)
            self._places.update({s: place for s, place in view.places.items() if s in self._tickets})
            self._news.set()
            self._news = asyncio.Event()

    def _written_tickets(self) -> list[Ticket]:
        """Return the tickets, with how long their leases have run."""
        now_s = time.monotonic()
        return [replace(t, held_s=now_s - self._started_s.get(s, now_s)) for s, t in self._tickets.items()]

    async def _insist(self, call: Callable[[], Awaitable[T]]) -> T:
        """Return a call's answer, repeated while the actor is being restarted."""
        deadline = time.monotonic() + GIVE_UP_S
        while True:
            try:
                return await call()
            except RayActorError as error:
                if time.monotonic() > deadline:
                    raise Unavailable("admission cannot be reached", reason="ADMISSION_LOST") from error
                await asyncio.sleep(RETRY_S)

    async def _tell(self, call: Awaitable[object]) -> None:
        """Wait for a call whose loss is made good by the next restore."""
        try:
            await call
        except RayActorError:
            LOGGER.warning("admission was not reached; it will be restored")
            self._restore()
