"""Admission as one named actor, and the gateway's and the generator's end of it.

Gateways keep one long poll each (:meth:`sync`) and are told where their waiting sessions stand; generators report. When
the actor dies, Ray starts it again with an empty book and a new epoch; the gateways notice the epoch and restore it.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import ray
from ray.exceptions import RayActorError

from .admission import REPORT_EVERY_S, AdmissionBook
from .detached import detached
from .errors import Unavailable
from .messages import Claim, GeneratorDemand, Place, Share, Ticket
from .status import LOGGER

NAMESPACE = "causal-forcing"
"""Ray namespace of the actor."""

SYNC_TIMEOUT_S = 1.5
"""How long a gateway's poll waits for news; each poll also says that the gateway is alive."""

TELL_EVERY_S = 5.0
"""How often a waiting session is told where it stands while nothing changes."""

RETRY_S = 0.2
"""Pause before a call to an actor that is being restarted is tried again."""

GIVE_UP_S = 15.0
"""After this long without the actor, a session that wants to wait is refused."""

UNUSED_S = 120.0
"""An actor that nobody has talked to for this long ends itself."""

T = TypeVar("T")


@dataclass(frozen=True)
class QueueView:
    """What one gateway is told.

    Attributes:
        epoch: Names one life of the actor.
        version: Revision of the book.
        places: Where each of its sessions stands that has not started.
        is_known: Whether the gateway's claims were known; otherwise it must restore them.
        ledger: What each tenant has had, to be given back to an actor that begins anew.
    """

    epoch: str
    version: int
    places: dict[str, Place]
    is_known: bool
    ledger: dict[str, float]


class _AdmissionActor:
    """An :class:`AdmissionBook` with a clock and readers that wait."""

    def __init__(self, max_queued: int) -> None:
        self._book = AdmissionBook(max_queued, time.monotonic())
        self._epoch = uuid.uuid4().hex
        self._changed = asyncio.Event()
        self._used_s = time.monotonic()
        self._sweeper: asyncio.Task[None] | None = None

    async def enqueue(self, ticket: Ticket) -> Place:
        """Queue a session (see :meth:`AdmissionBook.enqueue`)."""
        with self._change():
            return self._book.enqueue(ticket, time.monotonic())

    async def restore(self, gateway_id: str, tickets: list[Ticket], ledger: dict[str, float]) -> None:
        """Take a gateway's word for its sessions, and for what an earlier life of this actor knew."""
        with self._change():
            self._book.restore(gateway_id, tickets, time.monotonic(), ledger)

    async def confirm(self, session_id: str, replica_id: str) -> None:
        """Note that a lease began."""
        with self._change():
            self._book.confirm(session_id, replica_id, time.monotonic())

    async def refuse(self, session_id: str, replica_id: str) -> None:
        """Queue a session again whose generator could not be reached."""
        with self._change():
            self._book.refuse(session_id, replica_id, time.monotonic())

    async def requeue(self, ticket: Ticket) -> None:
        """Queue a running session whose generator is lost."""
        with self._change():
            self._book.requeue(ticket, time.monotonic())

    async def leave(self, session_id: str) -> None:
        """Forget a session."""
        with self._change():
            self._book.leave(session_id, time.monotonic())

    async def report(
        self,
        replica_id: str,
        capacity: int,
        sessions: list[str],
        node_id: str = "",
        budget_bytes: int | None = None,
    ) -> None:
        """Take a generator's word for its sessions and its memory for them."""
        with self._change():
            now_s = time.monotonic()
            self._book.report(replica_id, capacity, sessions, now_s, node_id=node_id, budget_bytes=budget_bytes)

    async def retire(self, replica_id: str) -> None:
        """Forget a generator that is gone."""
        with self._change():
            self._book.retire(replica_id)

    async def counts(self) -> dict[str, int]:
        """Return what the service's size depends on (see :meth:`AdmissionBook.counts`)."""
        return self._book.counts()

    async def demand(self, running: list[str]) -> GeneratorDemand:
        """Return the need for generators; ``running`` are those that Serve keeps."""
        return self._book.demand(running)

    async def sync(self, gateway_id: str, epoch: str, version: int) -> QueueView:
        """Return the gateway's view as soon as it is not the one of ``version``, or after a few seconds."""
        with self._change():
            is_known = self._book.seen(gateway_id, time.monotonic())
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(SYNC_TIMEOUT_S):
                while is_known and epoch == self._epoch and version == self._book.revision:
                    await self._changed.wait()
        book, now_s = self._book, time.monotonic()
        return QueueView(self._epoch, book.revision, book.places(gateway_id, now_s), is_known, book.ledger())

    @contextlib.contextmanager
    def _change(self) -> Iterator[None]:
        """Run a change of the book; wake the readers if a place changed."""
        if self._sweeper is None:
            self._sweeper = asyncio.create_task(self._sweep())
        self._used_s = time.monotonic()
        before = self._book.revision
        try:
            yield
        finally:
            self._wake(before)

    def _wake(self, before: int) -> None:
        if self._book.revision != before:
            self._changed.set()
            self._changed = asyncio.Event()

    async def _sweep(self) -> None:
        """Expire what has fallen silent, and end the actor when nobody uses it any more."""
        while True:
            await asyncio.sleep(REPORT_EVERY_S)
            before = self._book.revision
            self._book.expire(time.monotonic())
            self._wake(before)
            if self._book.is_unused and time.monotonic() - self._used_s > UNUSED_S:
                ray.kill(ray.get_runtime_context().current_actor)


def connect(name: str, max_queued: int) -> Any:  # noqa: ANN401  (ray's handles are untyped)
    """Return the admission actor of that name, started if there is none.

    It lives until nobody has used it for two minutes; a name therefore stands for one version of the application, so
    that an update never meets its predecessor's book.
    """
    actor: Any = ray.remote(_AdmissionActor)
    named = {"name": name, "namespace": NAMESPACE, "lifetime": "detached", "get_if_exists": True}
    return actor.options(**named, num_cpus=0, max_concurrency=10_000, max_restarts=-1).remote(max_queued)


def find(name: str) -> Any:  # noqa: ANN401  (ray's handles are untyped)
    """Return the admission actor of that name.

    Raises:
        ValueError: If there is none.
    """
    return ray.get_actor(name, namespace=NAMESPACE)


class AdmissionDesk:
    """A gateway's end: joins sessions to the queue and tells them where they stand."""

    def __init__(self, actor: Any, gateway_id: str) -> None:  # noqa: ANN401  (ray's handles are untyped)
        self._actor = actor
        self._gateway_id = gateway_id
        self._tickets: dict[str, Ticket] = {}
        self._started_s: dict[str, float] = {}
        self._places: dict[str, Place] = {}
        self._ledger: dict[str, float] = {}
        self._news = asyncio.Event()
        self._epoch, self._version = "", -1
        self._loop: asyncio.Task[None] | None = None

    async def places(self, claim: Claim) -> AsyncGenerator[Place]:
        """Join the queue and yield where the session stands: at once, on every change, and every few seconds.

        A session that is in the queue already, because it was put back, keeps its place.

        A place with a ``replica_id`` is a grant; the caller then calls :meth:`confirm`, or :meth:`refuse` and goes on
        reading. :meth:`leave` ends it in any case.

        Raises:
            NoCapacity: If the queue, or the tenant's part of it, is full.
            InvalidRequest: If no generator has the memory.
            Unavailable: If admission cannot be reached.
        """
        if self._loop is None or self._loop.done():
            self._loop = detached(self._keep_synced())
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
            yield place

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
        self._places[session_id] = Place(0)
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

    def change_shares(self, share_of: Callable[[str], Share]) -> None:
        """Give every tenant its new share; admission hears of it with the next poll."""
        self._tickets = {s: replace(t, share=share_of(t.share.tenant)) for s, t in self._tickets.items()}
        self._epoch = ""  # as if admission had begun anew: it is told everything

    def close(self) -> None:
        """Stop polling."""
        if self._loop is not None:
            self._loop.cancel()

    async def _keep_synced(self) -> None:
        while True:
            try:
                view: QueueView = await self._actor.sync.remote(self._gateway_id, self._epoch, self._version)
                if view.epoch != self._epoch or not view.is_known:
                    await self._actor.restore.remote(self._gateway_id, self._written_tickets(), self._ledger)
                    self._epoch, self._version = view.epoch, -1
                    continue
            except RayActorError:
                await asyncio.sleep(RETRY_S)
                continue
            self._version, self._ledger = view.version, view.ledger
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
            LOGGER.warning("admission is being restarted; it will be restored")


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
