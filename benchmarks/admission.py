"""How much one admission actor can do: the time of its book's work with many tenants, generators and waiting sessions.

    python benchmarks/admission.py                     64 generators, 1,000 waiting sessions of 100 tenants, 16 gateways

A turn is what happens when a session ends: it leaves, its generator reports that it is idle, the place is granted to
the tenant whose turn it is, and every gateway is told where its sessions stand. No Ray, no network: what is left is how
long the one actor that all of it goes through is busy.
"""

from __future__ import annotations

import argparse
import random
import time

from _report import quantiles, write

from serve.admission.book import SETTLE_S, AdmissionBook
from serve.messages import Share, Ticket


class Service:
    """A book whose generators are all taken, and sessions that wait."""

    def __init__(self, generators: int, waiting: int, tenants: int, gateways: int) -> None:
        self._random = random.Random(7)
        self._now_s = 1000.0
        self._tenants = [Share(f"t{number}", weight=self._random.choice((1, 2, 5))) for number in range(tenants)]
        self._gateways = [f"gw{number}" for number in range(gateways)]
        self._count = 0
        self.book = AdmissionBook(max_queued=waiting, now_s=self._now_s - SETTLE_S)
        for number in range(generators):
            self.book.report(f"g{number}", 1, [], self._now_s, budget_bytes=8 << 30)
        self.running = {f"g{number}": "" for number in range(generators)}
        for _ in range(generators + waiting):
            self.enqueue()

    def enqueue(self) -> float:
        """Let a session come, and run it if it has a generator; return the seconds that took."""
        self._count += 1
        name, gateway = f"s{self._count}", self._random.choice(self._gateways)
        ticket = Ticket(
            name,
            gateway,
            float(self._count),
            share=self._random.choice(self._tenants),
            nbytes=self._random.choice((1, 6)) << 30,
        )
        start = time.perf_counter()
        place = self.book.enqueue(ticket, self._now_s)
        took_s = time.perf_counter() - start
        if place.replica_id:
            self._run(name, place.replica_id)
        return took_s

    def turn(self) -> tuple[float, float, bool]:
        """End a session; return the seconds until the next one has its place, and until all gateways know."""
        self._now_s += 1.0
        replica_id = self._random.choice(list(self.running))
        book, now_s = self.book, self._now_s
        start = time.perf_counter()
        book.leave(self.running[replica_id], now_s)
        book.report(replica_id, 1, [], now_s, budget_bytes=8 << 30)
        granted_s = time.perf_counter() - start
        told = [book.places(gateway, now_s) for gateway in self._gateways]
        told_s = time.perf_counter() - start
        granted = [name for places in told for name, place in places.items() if place.replica_id == replica_id]
        for name in granted:
            self._run(name, replica_id)
        return granted_s, told_s, len(granted) == 1

    def _run(self, name: str, replica_id: str) -> None:
        self.book.confirm(name, replica_id, self._now_s)
        self.book.report(replica_id, 1, [name], self._now_s, budget_bytes=8 << 30)
        self.running[replica_id] = name


def main() -> None:
    """Measure and store."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--generators", type=int, default=64, help="all of them taken (default 64)")
    parser.add_argument("--waiting", type=int, default=1000, help="sessions that wait (default 1000)")
    parser.add_argument(
        "--tenants", type=int, default=100, help="whose they are, with weights 1, 2 and 5 (default 100)"
    )
    parser.add_argument("--gateways", type=int, default=16, help="that carry them (default 16)")
    parser.add_argument("--turns", type=int, default=500, help="sessions that end and are replaced (default 500)")
    arguments = parser.parse_args()
    service = Service(arguments.generators, arguments.waiting, arguments.tenants, arguments.gateways)
    turns, joins = [], []
    for _ in range(arguments.turns):
        turns.append(service.turn())
        joins.append(service.enqueue())
    granted, told, never_idle = zip(*turns, strict=True)
    assert all(never_idle), "a generator was idle while sessions waited"
    result = {
        **{name: getattr(arguments, name) for name in ("generators", "waiting", "tenants", "gateways", "turns")},
        "end_to_grant_s": quantiles(granted),
        "end_to_all_gateways_told_s": quantiles(told),
        "join_s": quantiles(joins),
        "sessions_a_second": round(1 / (sum(told) + sum(joins)) * arguments.turns),
    }
    measure = f"Admission with {arguments.waiting} waiting: a session's end to the next grant / sessions a second"
    value = f"{1e3 * result['end_to_grant_s']['p50']:.1f} ms / {result['sessions_a_second']}"
    write("admission", {**result, "readme": [{"measure": measure, "value": value}]})


if __name__ == "__main__":
    main()
