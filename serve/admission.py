"""Who gets the next generator: the queue, the idle generators and the grants, in one place and without input or output.

A generator is idle when it says so: generators report the sessions they hold, and a grant reserves a place until the
session is seen there, gives up, or its gateway falls silent. Everything here can be rebuilt from what gateways and
generators say, which is how the actor around it (:mod:`serve.admission_actor`) survives its own death.
"""

from __future__ import annotations

from bisect import insort
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from causal_forcing.errors import NoCapacity

from .messages import GeneratorDemand, Place, Ticket

REPORT_EVERY_S = 1.0
"""How often a generator reports while nothing changes."""

GENERATOR_SILENT_S = 5.0
"""A generator that has not reported for this long gets no sessions."""

GATEWAY_SILENT_S = 5.0
"""The claims of a gateway that has not asked for this long are dropped; it restores them if it is alive after all."""

SETTLE_S = 1.0
"""After a start nothing is granted for this long, so that running leases are known first."""

RECENT_SESSIONS = 32
"""Sessions whose length the estimate rests on."""


@dataclass
class GeneratorPlace:
    """What is known of one generator replica.

    Attributes:
        capacity: Sessions it can hold.
        sessions: Sessions it says it holds.
        granted: Sessions that were sent there and not seen yet.
        reported_s: When it last reported.
        refused: A session could not reach it since then.
        node_id: The node it runs on.
        is_kept: Whether Serve keeps it; None until Serve, if it scales generators, has said so.
    """

    capacity: int
    sessions: frozenset[str] = frozenset()
    granted: set[str] = field(default_factory=set)
    reported_s: float = 0.0
    refused: bool = False
    node_id: str = ""
    is_kept: bool | None = None

    @property
    def held(self) -> int:
        """Places that are taken or promised."""
        return len(self.sessions | self.granted)

    @property
    def free(self) -> int:
        """Places that can be granted; a lease that landed elsewhere than granted may take one that was promised."""
        return 0 if self.refused or self.is_kept is False else max(0, self.capacity - self.held)


class AdmissionBook:
    """The queue and the generators. All times are seconds of one clock, given by the caller.

    Attributes:
        revision: Rises whenever a session's place may have changed.
    """

    def __init__(self, max_queued: int, now_s: float) -> None:
        self.revision = 0
        self._max_queued = max_queued
        self._settled_s = now_s + SETTLE_S
        self._waiting: list[tuple[float, str]] = []
        self._tickets: dict[str, Ticket] = {}
        self._generators: dict[str, GeneratorPlace] = {}
        self._gateways: dict[str, float] = {}
        self._started_s: dict[str, float] = {}
        self._lengths_s: deque[float] = deque(maxlen=RECENT_SESSIONS)

    def enqueue(self, ticket: Ticket, now_s: float) -> Place:
        """Add a session to the queue and return where it stands, perhaps with a generator already.

        Raises:
            NoCapacity: If the queue is full; the metadata says when to come back.
        """
        self._gateways[ticket.gateway_id] = now_s
        if ticket.session_id not in self._tickets:
            self._tickets[ticket.session_id] = ticket
            self._queue(ticket)
            self.assign(now_s)
            if len(self._waiting) > self._max_queued and not self._tickets[ticket.session_id].replica_id:
                retry_s = self._estimate(len(self._waiting)) or 10.0
                self._forget(ticket.session_id)
                raise NoCapacity(
                    f"all generators are busy and {self._max_queued} sessions are waiting",
                    metadata={"retry_after_s": f"{retry_s:.0f}"},
                )
        return self.place(ticket.session_id)

    def restore(self, gateway_id: str, tickets: Iterable[Ticket], now_s: float) -> None:
        """Take a gateway's word for its sessions: add the ones not known here and drop the ones it no longer has."""
        self._gateways[gateway_id] = now_s
        given = {ticket.session_id: ticket for ticket in tickets}
        for session_id, ticket in list(self._tickets.items()):
            if ticket.gateway_id == gateway_id and session_id not in given:
                self._forget(session_id)
        for ticket in given.values():
            if ticket.session_id in self._tickets:
                continue
            self._tickets[ticket.session_id] = ticket
            if ticket.replica_id:
                self._started_s[ticket.session_id] = now_s
            else:
                self._queue(ticket)
        self.assign(now_s)

    def seen(self, gateway_id: str, now_s: float) -> bool:
        """Note that a gateway is alive; return whether its claims are known."""
        is_known = gateway_id in self._gateways
        self._gateways[gateway_id] = now_s
        return is_known

    def confirm(self, session_id: str, replica_id: str, now_s: float) -> None:
        """Note that a session's lease began, wherever it landed."""
        ticket = self._tickets.get(session_id)
        if ticket is None:
            return
        self._ungrant(session_id)
        self._unqueue(ticket)
        self._tickets[session_id] = replace(ticket, replica_id=replica_id)
        self._started_s[session_id] = now_s
        place = self._generators.get(replica_id)
        if place is not None:
            place.sessions |= {session_id}

    def refuse(self, session_id: str, replica_id: str, now_s: float) -> None:
        """Put a session back at its old place in the queue because its generator could not be reached."""
        ticket = self._tickets.get(session_id)
        place = self._generators.get(replica_id)
        if place is not None:
            place.refused = True
        if ticket is None or ticket.replica_id != replica_id:
            return
        self._ungrant(session_id)
        self._tickets[session_id] = replace(ticket, replica_id="")
        self._queue(ticket)
        self.assign(now_s)

    def leave(self, session_id: str, now_s: float) -> None:
        """Forget a session that ended or gave up waiting; its generator is idle when the generator says so."""
        started = self._started_s.get(session_id)
        if started is not None:
            self._lengths_s.append(now_s - started)
        self._forget(session_id)
        self.assign(now_s)

    def report(self, replica_id: str, capacity: int, sessions: Iterable[str], now_s: float, node_id: str = "") -> None:
        """Take a generator's word for the sessions it holds."""
        place = self._generators.setdefault(replica_id, GeneratorPlace(capacity, node_id=node_id))
        place.capacity, place.sessions = capacity, frozenset(sessions)
        place.reported_s, place.refused = now_s, False
        self.assign(now_s)

    def retire(self, replica_id: str) -> None:
        """Forget a generator that is gone; sessions granted to it stay with their gateways, which will refuse it."""
        self._generators.pop(replica_id, None)

    def demand(self, running: Iterable[str]) -> GeneratorDemand:
        """Return the need for generators, and take Serve's word for those it keeps.

        A generator that is no longer among them is being stopped: it gets no sessions, and it ends with those it has.
        """
        kept = set(running)
        for replica_id, place in self._generators.items():
            if replica_id in kept:
                place.is_kept = True
            elif place.is_kept:
                place.is_kept = False
        able = {replica_id: place for replica_id, place in self._generators.items() if place.is_kept is not False}
        return GeneratorDemand(
            waiting=len(self._waiting),
            held={replica_id: place.held for replica_id, place in able.items()},
            nodes={replica_id: place.node_id for replica_id, place in able.items()},
        )

    def expire(self, now_s: float) -> None:
        """Forget generators and gateways that have fallen silent, and grant what can be granted."""
        for replica_id, place in list(self._generators.items()):
            if now_s - place.reported_s > GENERATOR_SILENT_S:
                self.retire(replica_id)
        for gateway_id, seen_s in list(self._gateways.items()):
            if now_s - seen_s > GATEWAY_SILENT_S:
                del self._gateways[gateway_id]
                for session_id in [s for s, t in self._tickets.items() if t.gateway_id == gateway_id]:
                    self._forget(session_id)
        self.assign(now_s)

    def assign(self, now_s: float) -> None:
        """Grant idle generators to waiting sessions, first come first served."""
        if now_s < self._settled_s:
            return
        free = [(place.free, replica_id) for replica_id, place in self._generators.items() if place.free > 0]
        for count, replica_id in sorted(free, reverse=True):
            for _, session_id in self._waiting[:count]:
                self._generators[replica_id].granted.add(session_id)
                self._tickets[session_id] = replace(self._tickets[session_id], replica_id=replica_id)
                self.revision += 1
            del self._waiting[:count]

    def place(self, session_id: str) -> Place:
        """Return where a known session stands."""
        ticket = self._tickets[session_id]
        if ticket.replica_id:
            return Place(0, None, ticket.replica_id)
        ahead = self._waiting.index((ticket.arrived_s, session_id))
        return Place(ahead, self._estimate(ahead + 1))

    def places(self, gateway_id: str) -> dict[str, Place]:
        """Return where each session of a gateway stands that is not running yet."""
        return {
            session_id: self.place(session_id)
            for session_id, ticket in self._tickets.items()
            if ticket.gateway_id == gateway_id and session_id not in self._started_s
        }

    @property
    def is_unused(self) -> bool:
        """Whether neither gateways nor generators are known."""
        return not self._gateways and not self._generators

    def counts(self) -> dict[str, int]:
        """Return how many sessions wait and run, and how many generators there are and are idle."""
        return {
            "waiting": len(self._waiting),
            "running": len(self._started_s),
            "generators": len(self._generators),
            "idle": sum(place.free for place in self._generators.values()),
        }

    def _estimate(self, turns: int) -> float | None:
        """Return the expected wait for that many sessions to end, from the length of recent ones."""
        capacity = sum(place.capacity for place in self._generators.values())
        if not self._lengths_s or not capacity:
            return None
        return turns * sum(self._lengths_s) / len(self._lengths_s) / capacity

    def _forget(self, session_id: str) -> None:
        ticket = self._tickets.pop(session_id, None)
        self._started_s.pop(session_id, None)
        self._ungrant(session_id)
        if ticket is not None:
            self._unqueue(ticket)

    def _ungrant(self, session_id: str) -> None:
        for place in self._generators.values():
            place.granted.discard(session_id)

    def _queue(self, ticket: Ticket) -> None:
        insort(self._waiting, (ticket.arrived_s, ticket.session_id))
        self.revision += 1

    def _unqueue(self, ticket: Ticket) -> None:
        entry = (ticket.arrived_s, ticket.session_id)
        if entry in self._waiting:
            self._waiting.remove(entry)
            self.revision += 1
