"""The generators as admission knows them: their places, their memory, and where the next session fits."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from causal_forcing.errors import InvalidRequest
from serve.messages import Ticket

GENERATOR_SILENT_S = 5.0
"""A generator that has not reported for this long gets no sessions."""

PASSED_OVER_S = 10.0
"""A session that is too large for what is free is passed over for this long; then a generator is kept for it."""


def stop_order(running: Sequence[str], nodes: Mapping[str, str]) -> list[str]:
    """Return generators in the order in which Serve would stop them.

    Nodes with the fewest replicas first, and on one node the newest first; nodes with equally many as they got their
    first one, so that with one generator a node the *oldest* goes first. Serve counts replicas of all deployments and
    spares the head node; here only generators are known, so on a mixed cluster the order is a guess. A wrong guess
    stops a generator that has a session: it gets no other, and ends when the session does.

    Source: ``_get_replicas_to_stop`` in ``ray/serve/_private/deployment_scheduler.py`` (Ray 2.60); a test asks it.

    Args:
        running: Oldest first.
        nodes: Node of each; one that is not known counts as a node of its own.
    """
    by_node: dict[str, list[str]] = {}
    for replica in running:
        by_node.setdefault(nodes.get(replica, replica), []).insert(0, replica)
    return [replica for replicas in sorted(by_node.values(), key=len) for replica in replicas]


@dataclass
class GeneratorState:
    """What is known of one generator replica.

    Attributes:
        capacity: Sessions it can hold.
        budget_bytes: Memory for sessions; None where nobody counts.
        sessions: Sessions it says it holds.
        granted: Sessions that were sent there and not seen yet.
        reported_s: When it last reported.
        refused: A session could not reach it since then.
        node_id: The node it runs on.
        is_kept: Whether Serve keeps it; None until Serve, if it scales generators, has said so.
        kept_for: The large session that it is kept for, if any.
    """

    capacity: int
    budget_bytes: int | None = None
    sessions: frozenset[str] = frozenset()
    granted: set[str] = field(default_factory=set)
    reported_s: float = 0.0
    refused: bool = False
    node_id: str = ""
    is_kept: bool | None = None
    kept_for: str = ""

    @property
    def held(self) -> int:
        """Places that are taken or promised."""
        return len(self.sessions | self.granted)

    @property
    def free(self) -> int:
        """Places that can be granted; a lease that landed elsewhere than granted may take one that was promised."""
        return 0 if self.refused or self.is_kept is False else max(0, self.capacity - self.held)

    def could_hold(self, nbytes: int) -> bool:
        """Return whether a session fits when nothing else is there."""
        return self.budget_bytes is None or nbytes <= self.budget_bytes


def too_large(nbytes: int, most_bytes: int) -> InvalidRequest:
    """Return what a session is told that needs more memory than any generator has for sessions."""
    allowed = f"a generator has {most_bytes} bytes for sessions; ask for a smaller size, window or sink"
    return InvalidRequest("window_frames", f"{nbytes} bytes", allowed, reason="SESSION_TOO_LARGE")


class Fleet:
    """All generators. Times are seconds of one clock, given by the caller.

    Attributes:
        generators: By replica.
    """

    def __init__(self) -> None:
        self.generators: dict[str, GeneratorState] = {}
        self._nbytes: dict[str, int] = {}
        self._leaving: set[str] = set()
        self._passed_over_s: dict[str, float] = {}
        self._stays: dict[str, int] = {}

    @property
    def capacity(self) -> int:
        """Sessions that all of them can hold."""
        return sum(generator.capacity for generator in self.generators.values())

    @property
    def idle(self) -> int:
        """Places that can be granted."""
        return sum(generator.free for generator in self.generators.values())

    def report(
        self,
        replica_id: str,
        capacity: int,
        sessions: Iterable[str],
        now_s: float,
        *,
        node_id: str = "",
        budget_bytes: int | None = None,
    ) -> bool:
        """Take a generator's word for the sessions it holds and the memory it has for them; return if that is news."""
        is_new = replica_id not in self.generators or self.generators[replica_id].budget_bytes != budget_bytes
        generator = self.generators.setdefault(replica_id, GeneratorState(capacity, node_id=node_id))
        before, generator.sessions = generator.sessions, frozenset(sessions)
        self._free(before - generator.sessions)
        generator.capacity, generator.budget_bytes = capacity, budget_bytes
        generator.reported_s, generator.refused = now_s, False
        return is_new

    def retire(self, replica_id: str) -> None:
        """Forget a generator that is gone."""
        generator = self.generators.pop(replica_id, None)
        if generator is not None:
            self._free(generator.sessions)

    def expire(self, now_s: float) -> None:
        """Forget generators that have fallen silent."""
        for replica_id, generator in list(self.generators.items()):
            if now_s - generator.reported_s > GENERATOR_SILENT_S:
                self.retire(replica_id)

    def keep(self, running: Sequence[str]) -> dict[str, GeneratorState]:
        """Take Serve's word for those it keeps, oldest first, and return those that take sessions.

        A generator that is no longer among them is being stopped: it gets no sessions, and it ends with those it has.
        """
        kept = set(running)
        nodes = {replica_id: generator.node_id for replica_id, generator in self.generators.items()}
        self._stays = {replica_id: rank for rank, replica_id in enumerate(stop_order(running, nodes))}
        for replica_id, generator in self.generators.items():
            if replica_id in kept:
                generator.is_kept = True
            elif generator.is_kept:
                generator.is_kept = False
        return {
            replica_id: generator for replica_id, generator in self.generators.items() if generator.is_kept is not False
        }

    def require_size(self, ticket: Ticket) -> None:
        """Check that some generator could hold a session.

        Raises:
            InvalidRequest: If there are generators, and none of them could (``SESSION_TOO_LARGE``).
        """
        most = self.too_small_for(ticket)
        if most is not None:
            raise too_large(ticket.nbytes, most)

    def too_small_for(self, ticket: Ticket) -> int | None:
        """Return the most memory for sessions that a generator has, if none could ever hold a session; else None."""
        generators = self.generators.values()
        if not generators or any(generator.could_hold(ticket.nbytes) for generator in generators):
            return None
        return max(generator.budget_bytes or 0 for generator in generators)

    def know(self, ticket: Ticket) -> None:
        """Take in what a session needs."""
        self._nbytes[ticket.session_id] = ticket.nbytes
        self._leaving.discard(ticket.session_id)

    def forget(self, session_id: str) -> None:
        """Forget a session, its grant included; that its place and its memory are free, its generator says."""
        self.ungrant(session_id)
        self.release(session_id)
        self._leaving.add(session_id)
        if not any(session_id in generator.sessions for generator in self.generators.values()):
            self._free({session_id})

    def find(self, session_id: str) -> str:
        """Return the emptiest generator that a session fits in; empty if there is none.

        Of those that are equally empty, the one that Serve would stop last: so that the idle ones can be stopped.
        """
        fitting = [
            (generator.free, self._stays.get(replica_id, -1), replica_id)
            for replica_id, generator in self.generators.items()
            if generator.free and generator.kept_for in ("", session_id) and self._has_memory(generator, session_id)
        ]
        return max(fitting)[-1] if fitting else ""

    def pass_over(self, session_id: str, now_s: float) -> None:
        """Let smaller sessions go first for a while, then keep the generator with the most memory left."""
        since_s = self._passed_over_s.setdefault(session_id, now_s)
        generators = self.generators.values()
        if now_s - since_s < PASSED_OVER_S or any(generator.kept_for == session_id for generator in generators):
            return
        candidates = [p for p in generators if not p.kept_for and p.could_hold(self._nbytes.get(session_id, 0))]
        if candidates:
            best = max(candidates, key=lambda generator: (generator.budget_bytes or 0) - self._used_bytes(generator))
            best.kept_for = session_id

    def grant(self, session_id: str, replica_id: str) -> None:
        """Promise a place."""
        self.generators[replica_id].granted.add(session_id)
        self.release(session_id)

    def ungrant(self, session_id: str) -> None:
        """Take a promise back."""
        for generator in self.generators.values():
            generator.granted.discard(session_id)

    def release(self, session_id: str) -> None:
        """Keep no generator for a session any more."""
        self._passed_over_s.pop(session_id, None)
        for generator in self.generators.values():
            if generator.kept_for == session_id:
                generator.kept_for = ""

    def confirm(self, session_id: str, replica_id: str) -> None:
        """Note that a session is where it said."""
        generator = self.generators.get(replica_id)
        if generator is not None:
            generator.sessions |= {session_id}

    def refuse(self, replica_id: str) -> None:
        """Give a generator nothing until it reports again: it could not be reached."""
        generator = self.generators.get(replica_id)
        if generator is not None:
            generator.refused = True

    def _free(self, sessions: Iterable[str]) -> None:
        """Note that sessions are in no generator any more; those that are not forgotten may come back."""
        for session_id in self._leaving.intersection(sessions):
            self._leaving.discard(session_id)
            self._nbytes.pop(session_id, None)

    def _has_memory(self, generator: GeneratorState, session_id: str) -> bool:
        needed = self._used_bytes(generator) + self._nbytes.get(session_id, 0)
        return generator.budget_bytes is None or needed <= generator.budget_bytes

    def _used_bytes(self, generator: GeneratorState) -> int:
        return sum(self._nbytes.get(session_id, 0) for session_id in generator.sessions | generator.granted)
