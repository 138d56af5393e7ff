"""What short sessions leave behind: nothing.

    python benchmarks/serve_leaks.py --sessions 1000

Two simulated generators of 5 ms a chunk, and sessions that end in eight different ways, six at a time. What every
process keeps is compared with what it kept after the first few: claims, leases, mailbox logs, decoder caches, places in
the queue, tasks, threads and open files. Exits with 1 if anything is left.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from collections.abc import Mapping
from itertools import cycle, islice
from typing import Any

from _holdings import Service, memory_mb
from _report import write
from _service import configured, running
from _visits import KINDS

from serve.config import ServiceConfig

GENERATORS, AT_A_TIME, WARM_UP = 2, 6, 5 * len(KINDS)
ALLOWED = {"tasks": 4, "threads": 8, "files": 12}
"""How much of these a process may have more than before: Ray opens and closes connections and threads of its own."""

SETTLE_S = 30.0
"""How long what sessions used may take to be given back."""


def configuration() -> ServiceConfig:
    """Return a service with two simulated generators."""
    return configured(
        engine="simulated",
        simulated={"chunk_ms": 5, "picture_px": 16},
        generator={"replicas": GENERATORS},
    )


async def visit_all(address: str, count: int) -> None:
    """Have so many sessions, some at a time, of every kind in turn."""
    kinds = islice(cycle(KINDS.values()), count)

    async def some() -> None:
        for kind in kinds:
            await kind(address)

    await asyncio.gather(*(some() for _ in range(AT_A_TIME)))


def left_behind(before: Mapping[str, Mapping[str, int]], after: Mapping[str, Mapping[str, int]]) -> dict[str, int]:
    """Return what there is more of than before, and more than allowed, by part and kind."""
    return {
        f"{part} {kind}": amount - before[part].get(kind, 0)
        for part, kinds in after.items()
        for kind, amount in kinds.items()
        if amount - before[part].get(kind, 0) > ALLOWED.get(kind, 0)
    }


async def settled(
    service: Service, before: Mapping[str, Mapping[str, int]]
) -> tuple[dict[str, dict[str, int]], dict[str, int]]:
    """Return what is kept once all is given back, or after half a minute, and what of it is left behind."""
    deadline = time.monotonic() + SETTLE_S
    while True:
        after = await service.holdings()
        left = left_behind(before, after)
        if not left or time.monotonic() > deadline:
            return after, left
        await asyncio.sleep(0.2)


async def measure(address: str, service: Service, sessions: int) -> dict[str, Any]:
    """Return what the sessions have left behind."""
    await visit_all(address, WARM_UP)
    await service.until_free(GENERATORS)
    before, memory_before = await service.holdings(), memory_mb()
    start = time.perf_counter()
    await visit_all(address, sessions)
    seconds = time.perf_counter() - start
    await service.until_free(GENERATORS)
    after, left = await settled(service, before)
    memory = {part: round(amount - memory_before.get(part, 0.0), 1) for part, amount in memory_mb().items()}
    return {
        "sessions": sessions,
        "seconds": round(seconds, 1),
        "left": left,
        "before": before,
        "after": after,
        "memory_grown_mb": memory,
    }


def main() -> None:
    """Measure, and say whether anything is left."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sessions", type=int, default=1000, help="how many (default 1000)")
    parser.add_argument("--print", action="store_true", help="print the result and do not store it")
    arguments = parser.parse_args()
    config = configuration()
    with running(config) as (address, _):
        result = asyncio.run(measure(address, Service(config), arguments.sessions))
    if arguments.print:
        print(json.dumps(result))
    else:
        write("serve_leaks", result)
    sys.exit(bool(result["left"]))


if __name__ == "__main__":
    main()
