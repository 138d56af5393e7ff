"""Whose turn it is: weighted fair shares of generator time over tenants, without input or output.

Each tenant has a virtual time: the generator seconds it has had, divided by its weight. The next generator goes to the
tenant whose virtual time is lowest, and within a tenant to the session that came first. A grant is charged at once with
the length that is expected of it, and settled with its real length at the end, so that neither many short sessions nor
a few long ones get more than their share. A tenant that was away starts at the least that the others have had: absence
earns nothing.

Source: start-time fair queueing (Goyal, Vin, Cheng: "Start-time fair queueing", SIGCOMM 1996), with generator seconds
for bytes and a charge that is settled afterwards, because nobody knows how long a session will be.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from serve.messages import Share


@dataclass
class Account:
    """One tenant's use.

    Attributes:
        share: What it may have.
        settled_s: Virtual time of its finished sessions.
        leases: Sessions with a generator: since when, and the least they are charged.
        is_here: Whether it has sessions, also ones that wait.
    """

    share: Share
    settled_s: float = 0.0
    leases: dict[str, tuple[float, float]] = field(default_factory=dict)
    is_here: bool = True

    def virtual_s(self, now_s: float) -> float:
        """Return the virtual time, running sessions included with at least what they are charged."""
        running = sum(max(least_s, now_s - since_s) for since_s, least_s in self.leases.values())
        return self.settled_s + running / self.share.weight

    def had_s(self, now_s: float) -> float:
        """Return the virtual time without what running sessions are charged in advance."""
        return self.settled_s + sum(now_s - since_s for since_s, _ in self.leases.values()) / self.share.weight

    @property
    def room(self) -> int | None:
        """Sessions that may have a generator beside those that do; None without a limit."""
        limit = self.share.max_sessions
        return None if limit is None else max(0, limit - len(self.leases))


@dataclass(frozen=True)
class Order:
    """Waiting sessions in the order in which they get generators.

    Attributes:
        ready: Those that the next generators go to.
        blocked: Those whose tenants have as many sessions as they may.
    """

    ready: tuple[str, ...]
    blocked: tuple[str, ...]


class FairShares:
    """The tenants' accounts. All times are seconds of one clock, given by the caller."""

    def __init__(self) -> None:
        self._accounts: dict[str, Account] = {}
        self._clock_s = 0.0

    def join(self, share: Share, now_s: float, *, is_new: bool) -> None:
        """Take in what a tenant may have; ``is_new`` says that it has no other session, so it may have been away."""
        self._advance(now_s)
        account = self._accounts.setdefault(share.tenant, Account(share))
        account.share, account.is_here = share, True
        if is_new and not account.leases:
            account.settled_s = max(account.settled_s, self._clock_s)

    def grant(self, tenant: str, session_id: str, now_s: float, expected_s: float) -> None:
        """Charge the length that is expected of a session."""
        self._accounts[tenant].leases[session_id] = (now_s, expected_s)

    def started(self, tenant: str, session_id: str, since_s: float, expected_s: float) -> None:
        """Count a session's time from its real start; it is charged as before, or as expected when it never was."""
        account = self._accounts[tenant]
        _, charged_s = account.leases.get(session_id, (since_s, expected_s))
        account.leases[session_id] = (since_s, charged_s)

    def refund(self, tenant: str, session_id: str) -> None:
        """Take back the charge of a session that never began."""
        self._accounts[tenant].leases.pop(session_id, None)

    def settle(self, tenant: str, session_id: str, now_s: float) -> None:
        """Replace the charge of a session that is over by what it used."""
        self._advance(now_s)
        account = self._accounts[tenant]
        lease = account.leases.pop(session_id, None)
        if lease is not None:
            account.settled_s += max(0.0, now_s - lease[0]) / account.share.weight

    def part(self, tenant: str) -> None:
        """Note that a tenant has no sessions any more; it is remembered until the others have had as much."""
        account = self._accounts.get(tenant)
        if account is not None:
            account.is_here = False
            self._forget()

    def order(self, queues: Mapping[str, Sequence[tuple[float, str]]], now_s: float, expected_s: float) -> Order:
        """Return the order in which waiting sessions get generators if each lasts as long as expected.

        Args:
            queues: Per tenant when its waiting sessions came and their names, the first come first; that also decides
                between tenants that have had the same.
            now_s: Now.
            expected_s: Expected length of a session.
        """
        ready: list[str] = []
        blocked: list[str] = []
        heap = [
            (self._accounts[tenant].virtual_s(now_s), *queue[0], tenant, 0) for tenant, queue in queues.items() if queue
        ]
        heapq.heapify(heap)
        while heap:
            virtual_s, _, session_id, tenant, turn = heapq.heappop(heap)
            account, queue = self._accounts[tenant], queues[tenant]
            has_room = account.room is None or turn < account.room
            (ready if has_room else blocked).append(session_id)
            if turn + 1 < len(queue):
                later_s = virtual_s + expected_s / account.share.weight
                heapq.heappush(heap, (later_s, *queue[turn + 1], tenant, turn + 1))
        return Order(tuple(ready), tuple(blocked))

    def held(self, tenant: str) -> int:
        """Return how many sessions of a tenant have a generator."""
        account = self._accounts.get(tenant)
        return len(account.leases) if account else 0

    def ledger(self) -> dict[str, float]:
        """Return each tenant's settled virtual time, to be remembered elsewhere."""
        return {tenant: account.settled_s for tenant, account in self._accounts.items()}

    def restore(self, ledger: Mapping[str, float]) -> None:
        """Take in a remembered ledger for tenants that are here; what is known already is not lowered."""
        for tenant, settled_s in ledger.items():
            if tenant in self._accounts:
                account = self._accounts[tenant]
                account.settled_s = max(account.settled_s, settled_s)

    def _advance(self, now_s: float) -> None:
        """Move the clock to the least that a tenant with a generator has really had; it never goes back."""
        active = [account.had_s(now_s) for account in self._accounts.values() if account.leases]
        clock_s = min(active, default=0.0)
        if clock_s > self._clock_s:
            self._clock_s = clock_s
            self._forget()

    def _forget(self) -> None:
        """Forget the tenants without sessions that the clock has caught up with: who comes back begins there anyway."""
        self._accounts = {
            tenant: account
            for tenant, account in self._accounts.items()
            if account.is_here or account.leases or account.settled_s > self._clock_s
        }
