"""Admission as one named actor, which gateways and generators reach through its handle.

Gateways keep one long poll each (:meth:`sync`; :mod:`serve.admission.desk`) and are told where their waiting sessions
stand; generators report (:mod:`serve.admission.reporter`). When the actor dies, Ray starts it again with an empty book
and a new epoch; the gateways notice the epoch and restore it.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import ray

from serve.access.config import UsageConfig
from serve.access.rates import TenantRates
from serve.access.usage import UsageRecord, UsageWriter
from serve.config import ServiceConfig
from serve.messages import GeneratorDemand, Progress, QueuePlace, SessionView, Ticket
from serve.metrics import SILENT, RaySink, Recorder
from serve.pools import in_pool

from .book import REPORT_EVERY_S, AdmissionBook
from .directory import Directory
from .handle import AdmissionHandle

NAMESPACE = "causal-forcing"
"""Ray namespace of the actor."""

SYNC_TIMEOUT_S = 1.5
"""How long a gateway's poll waits for news; each poll also says that the gateway is alive."""

UNUSED_S = 120.0
"""An actor that nobody has talked to for this long ends itself."""


@dataclass(frozen=True)
class QueueView:
    """What one gateway is told.

    Attributes:
        epoch: Names one life of the actor.
        version: Revision of the book.
        places: Where each of its sessions stands that has not started.
        is_known: Whether the gateway's claims were known; otherwise it must restore them.
        ledger: What each tenant has had, to be given back to an actor that begins anew.
        ending: Its sessions that an operator wants ended.
    """

    epoch: str
    version: int
    places: dict[str, QueuePlace]
    is_known: bool
    ledger: dict[str, float]
    ending: tuple[str, ...] = ()


class _AdmissionActor:
    """An :class:`AdmissionBook` with a clock, a :class:`Directory`, and readers that wait."""

    def __init__(
        self, max_queued: int, preset: str = "", usage: UsageConfig | None = None, recorder: Recorder = SILENT
    ) -> None:
        self._recorder = recorder
        self._book = AdmissionBook(max_queued, time.monotonic())
        self._directory = Directory(self._book)
        self._rates = TenantRates()
        self._preset = preset
        self._usage = UsageWriter(usage, "admission")
        self._epoch = uuid.uuid4().hex
        self._changed = asyncio.Event()
        self._used_s = time.monotonic()
        self._sweeper: asyncio.Task[None] | None = None

    async def enqueue(self, ticket: Ticket) -> QueuePlace:
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

    async def sessions(self) -> list[SessionView]:
        """Return all sessions (see :meth:`Directory.views`)."""
        return self._directory.views(time.monotonic(), time.time())

    async def end(self, session_id: str) -> bool:
        """Have a session ended; return whether it is known."""
        with self._change():
            return self._directory.end(session_id)

    async def spend_prompt(self, tenant: str, per_minute: int) -> float:
        """Count a tenant's prompt; return 0, or the seconds after which it may come again."""
        return self._rates.spend(tenant, per_minute, time.monotonic())

    async def sync(self, gateway_id: str, epoch: str, version: int, progress: dict[str, Progress]) -> QueueView:
        """Return the gateway's view as soon as it is not the one of ``version``, or after a few seconds."""
        with self._change():
            is_known = self._book.seen(gateway_id, time.monotonic())
        self._directory.tell(gateway_id, progress)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(SYNC_TIMEOUT_S):
                while is_known and epoch == self._epoch and version == self._book.revision:
                    await self._changed.wait()
        book, now_s = self._book, time.monotonic()
        ending = self._directory.ending(gateway_id)
        return QueueView(self._epoch, book.revision, book.places(gateway_id, now_s), is_known, book.ledger(), ending)

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

    def _expire(self, now_s: float) -> None:
        """Forget what has fallen silent, and write the bills of gateways that are not coming back."""
        views = self._directory.views(now_s, time.time())
        self._directory.lose(self._book.expire(now_s), views, now_s)
        self._rates.forget(now_s)
        for view in self._directory.final(now_s):
            self._usage.write(
                UsageRecord(
                    session_id=view.session_id,
                    tenant=view.tenant,
                    preset=self._preset,
                    age_s=view.age_s,
                    end="GATEWAY_LOST",
                    progress=view.progress,
                    complete=False,
                )
            )

    async def _sweep(self) -> None:
        """Expire what has fallen silent, and end the actor when nobody uses it any more."""
        while True:
            await asyncio.sleep(REPORT_EVERY_S)
            before = self._book.revision
            self._expire(time.monotonic())
            self._wake(before)
            self._record()
            if self._book.is_unused and time.monotonic() - self._used_s > UNUSED_S:
                ray.kill(ray.get_runtime_context().current_actor)

    def _record(self) -> None:
        oldest_s = self._book.oldest_arrival_s
        waited_s = 0.0 if oldest_s is None else max(0.0, time.time() - oldest_s)
        self._recorder.admission(self._book.counts(), waited_s)


def connect(name: str, config: ServiceConfig) -> AdmissionHandle:
    """Return a handle of the admission actor of that name, which is started if there is none, and when it has ended.

    It lives until nobody has used it for two minutes; a name therefore stands for one version of the application, so
    that an update never meets its predecessor's book. It runs beside the gateways, whose nodes are not taken away while
    there are any, as those of generators without sessions are.
    """
    return AdmissionHandle(partial(_start, name, config))


def _start(name: str, config: ServiceConfig) -> Any:  # noqa: ANN401  (ray's handles are untyped)
    """Return the actor of that name, started if there is none."""
    actor: Any = ray.remote(_AdmissionActor)
    recorder = Recorder(RaySink({"application": NAMESPACE, "deployment": "Admission", "replica": name}))
    named = {"name": name, "namespace": NAMESPACE, "lifetime": "detached", "get_if_exists": True}
    where = in_pool(config.placement.gateway)
    told = (config.limits.max_queued_sessions, config.preset, config.usage, recorder)
    return actor.options(**named, resources=where, num_cpus=0, max_concurrency=10_000, max_restarts=-1).remote(*told)


def find(name: str) -> Any:  # noqa: ANN401  (ray's handles are untyped)
    """Return the admission actor of that name.

    Raises:
        ValueError: If there is none.
    """
    return ray.get_actor(name, namespace=NAMESPACE)
