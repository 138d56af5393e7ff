"""Who gets the next generator: the queue, the idle generators and the grants, in one place and without input or output.

A generator is idle when it says so: generators report the sessions they hold, and a grant reserves a place until the
session is seen there, gives up, or its gateway falls silent. Whose turn it is, :mod:`serve.admission.fairness` says;
where there is a place and the memory for it, :mod:`serve.admission.fleet`. Everything here can be rebuilt from what
gateways and generators say, which is how the actor around it (:mod:`serve.admission.actor`) survives its own death.
"""

from __future__ import annotations

from bisect import insort
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from causal_forcing.errors import NoCapacity
from serve.messages import GeneratorDemand, QueuePlace, Ticket

from .fairness import FairShares, Order
from .fleet import Fleet

REPORT_EVERY_S = 1.0
"""How often a generator reports while nothing changes."""

GATEWAY_SILENT_S = 5.0
"""The claims of a gateway that has not asked for this long are dropped; it restores them if it is alive after all."""

SETTLE_S = 1.0
"""After a start nothing is granted for this long, so that running leases are known first."""

RECENT_SESSIONS = 32
"""Sessions whose length the estimate rests on."""

TOLD_AGAIN_S = 0.25
"""While no session's place changes, gateways are told the same for this long; shares move slowly."""

EXPECTED_S = 60.0
"""What a session is charged at first while no session has ended yet, in seconds."""


class AdmissionBook:
    """The queue and the generators. All times are seconds of one clock, given by the caller.

    Attributes:
        revision: Rises whenever a session's place may have changed.
    """

    def __init__(self, max_queued: int, now_s: float) -> None:
        self.revision = 0
        self._max_queued = max_queued
        self._settled_s = now_s + SETTLE_S
        self._shares = FairShares()
        self._waiting: dict[str, list[tuple[float, str]]] = {}
        self._moving: list[tuple[float, str]] = []
        self._tickets: dict[str, Ticket] = {}
        self._fleet = Fleet()
        self._gateways: dict[str, float] = {}
        self._started_s: dict[str, float] = {}
        self._lengths_s: deque[float] = deque(maxlen=RECENT_SESSIONS)
        self._lacks_memory = False
        self._told: dict[str, dict[str, QueuePlace]] | None = None
        self._told_at = (-1, 0.0)

    def enqueue(self, ticket: Ticket, now_s: float) -> QueuePlace:
        """Add a session to the queue and return where it stands, perhaps with a generator already.

        Raises:
            InvalidRequest: If no generator could ever hold it (``SESSION_TOO_LARGE``).
            NoCapacity: If the queue or the tenant's part of it is full; the metadata says when to come back.
        """
        self._gateways[ticket.gateway_id] = now_s
        known = self._tickets.get(ticket.session_id)
        if ticket.is_moving and (known is None or not known.is_moving):
            self.requeue(ticket, now_s)
        elif known is None:
            self._join(ticket, now_s)
        return self.place(ticket.session_id, now_s)

    def restore(
        self, gateway_id: str, tickets: Iterable[Ticket], now_s: float, ledger: Mapping[str, float] | None = None
    ) -> None:
        """Take a gateway's word for its sessions: add the ones not known here and drop the ones it no longer has.

        Of those that are known, what it has said before may have been lost: that a lease began, or that its generator
        is gone. What it may not have heard yet, that a generator is granted, stays.

        Args:
            gateway_id: Whose word it is.
            tickets: All its sessions; a tenant's share is taken from them, known or not.
            now_s: Now.
            ledger: What tenants had had before this book began (see :meth:`ledger`).
        """
        self._gateways[gateway_id] = now_s
        given = {ticket.session_id: ticket for ticket in tickets}
        for session_id, ticket in list(self._tickets.items()):
            if ticket.gateway_id == gateway_id and session_id not in given:
                self._forget(session_id, now_s)
        for ticket in given.values():
            known = self._tickets.get(ticket.session_id)
            if known is not None:
                self._shares.join(ticket.share, now_s, is_new=False)
                self._tickets[ticket.session_id] = replace(known, share=ticket.share)
                self._catch_up(ticket, now_s)
                continue
            self._add(ticket, now_s, knows_all=now_s >= self._settled_s)
            if ticket.replica_id or ticket.is_moving:
                self._start(ticket, now_s - ticket.held_s)
            if not ticket.replica_id:
                self._queue(ticket)
        self._shares.restore(ledger or {})
        self.revision += 1  # shares may have changed, and with them the order
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
        self._fleet.ungrant(session_id)
        self._unqueue(ticket)
        self._tickets[session_id] = ticket = replace(ticket, replica_id=replica_id, is_moving=False)
        self._start(ticket, self._started_s.get(session_id, now_s))
        self._fleet.confirm(session_id, replica_id)

    def refuse(self, session_id: str, replica_id: str, now_s: float) -> None:
        """Put a session back at its old place in the queue because its generator could not be reached."""
        ticket = self._tickets.get(session_id)
        self._fleet.refuse(replica_id)
        if ticket is None or ticket.replica_id != replica_id:
            return
        self._fleet.ungrant(session_id)
        if not ticket.is_moving:
            self._shares.refund(ticket.share.tenant, session_id)
            self._started_s.pop(session_id, None)
        self._tickets[session_id] = ticket = replace(ticket, replica_id="")
        self._queue(ticket)
        self.assign(now_s)

    def requeue(self, ticket: Ticket, now_s: float) -> None:
        """Queue a running session whose generator is lost, before all sessions that have not begun.

        To its tenant's share it is running all the time.
        """
        self._gateways[ticket.gateway_id] = now_s
        if ticket.session_id not in self._tickets:
            self._add(ticket, now_s)
        self._put_back(ticket, now_s)
        self.assign(now_s)

    def leave(self, session_id: str, now_s: float) -> None:
        """Forget a session that ended or gave up waiting; its generator is idle when the generator says so."""
        started = self._started_s.get(session_id)
        if started is not None:
            self._lengths_s.append(now_s - started)
        self._forget(session_id, now_s)
        self.assign(now_s)

    def report(
        self,
        replica_id: str,
        capacity: int,
        sessions: Iterable[str],
        now_s: float,
        *,
        node_id: str = "",
        budget_bytes: int | None = None,
    ) -> None:
        """Take a generator's word for the sessions it holds and the memory it has for them."""
        if self._fleet.report(replica_id, capacity, sessions, now_s, node_id=node_id, budget_bytes=budget_bytes):
            self.revision += 1  # it may show that a session that waits can never be held
        self.assign(now_s)

    def retire(self, replica_id: str) -> None:
        """Forget a generator that is gone; sessions granted to it stay with their gateways, which will refuse it."""
        self._fleet.retire(replica_id)

    def demand(self, running: Sequence[str]) -> GeneratorDemand:
        """Return the need for generators, and take Serve's word for those it keeps (see :meth:`Fleet.keep`)."""
        able = self._fleet.keep(running)
        counts = self.counts()
        full = {r: p.capacity for r, p in able.items() if self._lacks_memory and p.free and p.budget_bytes is not None}
        return GeneratorDemand(
            waiting=counts["waiting"] - counts["blocked"],
            held={replica_id: full.get(replica_id, place.held) for replica_id, place in able.items()},
            nodes={replica_id: place.node_id for replica_id, place in able.items()},
        )

    def expire(self, now_s: float) -> list[str]:
        """Forget generators and gateways that have fallen silent, and grant what can be granted.

        Returns:
            The gateways.
        """
        self._fleet.expire(now_s)
        silent = [gateway_id for gateway_id, seen_s in self._gateways.items() if now_s - seen_s > GATEWAY_SILENT_S]
        for gateway_id in silent:
            del self._gateways[gateway_id]
            for session_id in [s for s, t in self._tickets.items() if t.gateway_id == gateway_id]:
                self._forget(session_id, now_s)
        self.assign(now_s)
        return silent

    def assign(self, now_s: float) -> None:
        """Grant idle generators to waiting sessions, in the order of the tenants' shares."""
        self._lacks_memory = False
        is_empty = not self._waiting and not self._moving
        if now_s < self._settled_s or is_empty or not self._fleet.idle:
            return
        for session_id in self.order(now_s).ready:
            ticket = self._tickets[session_id]
            replica_id = self._fleet.find(session_id)
            if replica_id:
                self._grant(ticket, replica_id, now_s)
            elif self._fleet.idle:
                self._lacks_memory = True
                self._fleet.pass_over(session_id, now_s)
            else:
                return

    def order(self, now_s: float) -> Order:
        """Return who comes when, under the shares and the generator time of now."""
        order = self._shares.order(self._waiting, now_s, self.expected_s)
        return replace(order, ready=(*(session_id for _, session_id in self._moving), *order.ready))

    def place(self, session_id: str, now_s: float) -> QueuePlace:
        """Return where a known session stands."""
        ticket = self._tickets[session_id]
        if ticket.replica_id:
            return QueuePlace(0, None, ticket.replica_id)
        order = self.order(now_s)
        return self._waiting_place(ticket, (*order.ready, *order.blocked).index(session_id), self._turn_s)

    def places(self, gateway_id: str, now_s: float) -> dict[str, QueuePlace]:
        """Return where each session of a gateway stands that is not running yet; up to a quarter of a second old."""
        revision, told_s = self._told_at
        if self._told is None or revision != self.revision or now_s - told_s >= TOLD_AGAIN_S:
            self._told, self._told_at = self._all_places(now_s), (self.revision, now_s)
        return self._told.get(gateway_id, {})

    def tickets(self) -> tuple[Ticket, ...]:
        """Return the claims of all sessions."""
        return tuple(self._tickets.values())

    def is_running(self, session_id: str) -> bool:
        """Return whether a session has a generator, or had one and waits for another."""
        return session_id in self._started_s

    def ledger(self) -> dict[str, float]:
        """Return what each tenant has had, for gateways to remember (see :meth:`restore`)."""
        return self._shares.ledger()

    @property
    def expected_s(self) -> float:
        """How long a session is expected to take, from recent ones."""
        return sum(self._lengths_s) / len(self._lengths_s) if self._lengths_s else EXPECTED_S

    @property
    def is_unused(self) -> bool:
        """Whether neither gateways nor generators are known."""
        return not self._gateways and not self._fleet.generators

    @property
    def oldest_arrival_s(self) -> float | None:
        """When the session that has waited longest came, in seconds since the epoch; None when nobody waits."""
        return min((queue[0][0] for queue in (*self._waiting.values(), self._moving) if queue), default=None)

    def counts(self) -> dict[str, int]:
        """Return what the service's size depends on.

        ``waiting`` sessions, of which ``blocked`` wait for their own tenant's sessions to end, so that a further
        generator would not help them; ``granted`` ones, on their way to a generator, and ``running`` ones; how many
        ``generators`` there are, and how many places in them are ``idle``.
        """
        moving = len(self._moving)
        waiting = sum(len(queue) for queue in self._waiting.values()) + moving
        blocked = len(self._shares.order(self._waiting, 0.0, 0.0).blocked) if self._waiting else 0
        return {
            "waiting": waiting,
            "blocked": blocked,
            "granted": sum(len(place.granted) for place in self._fleet.generators.values()),
            "running": len(self._started_s) - moving,
            "generators": len(self._fleet.generators),
            "idle": self._fleet.idle,
        }

    def _all_places(self, now_s: float) -> dict[str, dict[str, QueuePlace]]:
        """Return what each gateway is told: one order for all of them, because that is what takes time."""
        order = self.order(now_s)
        ahead = {session_id: number for number, session_id in enumerate((*order.ready, *order.blocked))}
        places, turn_s = dict[str, dict[str, QueuePlace]](), self._turn_s
        for session_id, ticket in self._tickets.items():
            if session_id in ahead:
                place = self._waiting_place(ticket, ahead[session_id], turn_s)
            elif session_id not in self._started_s or ticket.is_moving:
                place = QueuePlace(0, None, ticket.replica_id)
            else:
                continue
            places.setdefault(ticket.gateway_id, {})[session_id] = place
        return places

    def _waiting_place(self, ticket: Ticket, ahead: int, turn_s: float | None) -> QueuePlace:
        most = None if ticket.is_moving else self._fleet.too_small_for(ticket)
        return QueuePlace(ahead, None if turn_s is None else (ahead + 1) * turn_s, most_bytes=most)

    @property
    def _turn_s(self) -> float | None:
        """The expected time from one session's end to the next one's, from the length of recent ones."""
        capacity = self._fleet.capacity
        return self.expected_s / capacity if self._lengths_s and capacity else None

    def _join(self, ticket: Ticket, now_s: float) -> None:
        """Add a session that is new; raises if it may not wait."""
        self._fleet.require_size(ticket)
        self._add(ticket, now_s)
        self._queue(ticket)
        self.assign(now_s)
        if not self._tickets[ticket.session_id].replica_id:
            refusal = self._overflow(ticket, now_s)
            if refusal is not None:
                self._forget(ticket.session_id, now_s)
                raise refusal

    def _overflow(self, ticket: Ticket, now_s: float) -> NoCapacity | None:
        """Return why a session that has just been queued may not wait, if so."""
        waiting, mine = sum(map(len, self._waiting.values())), len(self._waiting[ticket.share.tenant])
        limit = ticket.share.max_queued
        if limit is not None and mine > limit:
            reason, held = "QUOTA_EXCEEDED", self._shares.held(ticket.share.tenant)
            text = f"{held} sessions of this tenant run and {mine - 1} wait, its limit"
        elif waiting > self._max_queued:
            reason, text = None, f"all generators are busy and {self._max_queued} sessions are waiting"
        else:
            return None
        wait_s = self.place(ticket.session_id, now_s).estimated_wait_s or 10.0
        return NoCapacity(text, reason=reason, metadata={"retry_after_s": f"{wait_s:.0f}"})

    def _catch_up(self, ticket: Ticket, now_s: float) -> None:
        """Take in what the gateway of a known session has said of it, if that was lost."""
        known = self._tickets[ticket.session_id]
        is_running = ticket.session_id in self._started_s and not known.is_moving
        if ticket.replica_id and not (is_running and known.replica_id == ticket.replica_id):
            self.confirm(ticket.session_id, ticket.replica_id, now_s - ticket.held_s)
        elif ticket.is_moving and not known.is_moving:
            self._put_back(ticket, now_s)

    def _put_back(self, ticket: Ticket, now_s: float) -> None:
        """Queue a known session whose generator is lost, whether or not it is queued already."""
        self._fleet.ungrant(ticket.session_id)
        self._unqueue(self._tickets[ticket.session_id])
        self._tickets[ticket.session_id] = ticket
        if ticket.session_id not in self._started_s:
            self._start(ticket, now_s - ticket.held_s)
        self._queue(ticket)

    def _grant(self, ticket: Ticket, replica_id: str, now_s: float) -> None:
        self._unqueue(ticket)
        self._fleet.grant(ticket.session_id, replica_id)
        self._tickets[ticket.session_id] = replace(ticket, replica_id=replica_id)
        if not ticket.is_moving:
            self._shares.grant(ticket.share.tenant, ticket.session_id, now_s, self.expected_s)

    def _start(self, ticket: Ticket, since_s: float) -> None:
        self._told = None
        self._started_s[ticket.session_id] = since_s
        self._shares.started(ticket.share.tenant, ticket.session_id, since_s, self.expected_s)

    def _add(self, ticket: Ticket, now_s: float, *, knows_all: bool = True) -> None:
        tenant = ticket.share.tenant
        is_new = knows_all and not any(other.share.tenant == tenant for other in self._tickets.values())
        self._shares.join(ticket.share, now_s, is_new=is_new)
        self._tickets[ticket.session_id] = ticket
        self._fleet.know(ticket)

    def _forget(self, session_id: str, now_s: float) -> None:
        self._told = None
        ticket = self._tickets.pop(session_id, None)
        has_started = self._started_s.pop(session_id, None) is not None
        self._fleet.forget(session_id)
        if ticket is None:
            return
        self._unqueue(ticket)
        if has_started:
            self._shares.settle(ticket.share.tenant, session_id, now_s)
        else:
            self._shares.refund(ticket.share.tenant, session_id)
        if not any(other.share.tenant == ticket.share.tenant for other in self._tickets.values()):
            self._shares.part(ticket.share.tenant)

    def _queue(self, ticket: Ticket) -> None:
        queue = self._moving if ticket.is_moving else self._waiting.setdefault(ticket.share.tenant, [])
        insort(queue, (ticket.arrived_s, ticket.session_id))
        self.revision += 1

    def _unqueue(self, ticket: Ticket) -> None:
        """Take a session out of the queue."""
        self._fleet.release(ticket.session_id)
        queue = self._moving if ticket.is_moving else self._waiting.get(ticket.share.tenant, [])
        entry = (ticket.arrived_s, ticket.session_id)
        if entry in queue:
            queue.remove(entry)
            self.revision += 1
        if not queue and not ticket.is_moving:
            self._waiting.pop(ticket.share.tenant, None)
