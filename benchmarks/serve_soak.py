"""Whether the service's memory is flat while viewers come and go and type.

    python benchmarks/serve_soak.py --minutes 10

Two simulated generators of 101 ms a chunk and 60 kB a frame, six users. Each comes back as soon as its session is
over, watches for a random while, waits in the queue when it must, changes the prompt now and then or ten times at once,
pauses, and leaves in one of four ways. The memory that each part's processes have to themselves is read 120 times. It
counts as flat when the median of its last quarter is above that of its second quarter by at most 6 MB, or 5 % where
that is more; the first quarter is for filling caches. At the end nothing of any session may be left. Exits with 1 if
either does not hold, or if a session failed.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import sys
import time
from typing import Any

import grpc
from _holdings import Service, memory_mb
from _report import write
from _service import configured, running
from _visits import Visit, prompt, visit
from serve_leaks import ALLOWED, settled
from serve_stream import CHUNK_S, FRAME_BYTES

from protos.causal_forcing.v1 import video_pb2 as pb
from serve.config import ServiceConfig

GENERATORS, USERS = 2, 6
SAMPLES = 120
"""Readings of memory in one run."""

FLAT_SHARE, FLAT_MB = 0.05, 6.0
"""What memory may grow by, of the whole and beside it: interpreters and Ray's buffers grow in steps of megabytes."""

STORM = 10
"""Prompts that are sent at once."""


def configuration() -> ServiceConfig:
    """Return a service with two simulated generators, whose queue holds all users."""
    return configured(
        engine="simulated",
        preset="causal-forcing-framewise",
        simulated={"chunk_ms": 1000 * CHUNK_S, "frame_bytes": FRAME_BYTES, "picture_px": 16},
        generator={"replicas": GENERATORS},
    )


class User:
    """Comes back until the time is over.

    Attributes:
        seen: Sessions, chunks, prompts and errors so far.
    """

    def __init__(self, address: str, number: int, until_s: float) -> None:
        self.seen = {"sessions": 0, "chunks": 0, "prompts": 0, "errors": 0}
        self._address = address
        self._random = random.Random(number)
        self._until_s = until_s

    async def run(self) -> None:
        """Have sessions, one after another."""
        while time.monotonic() < self._until_s:
            self.seen["sessions"] += 1
            try:
                async with visit(self._address, seed=self._random.randrange(1 << 30)) as opened:
                    await self._watch(opened)
                    await self._leave(opened)
            except (grpc.aio.AioRpcError, ConnectionError, asyncio.InvalidStateError):
                self.seen["errors"] += 1

    async def _watch(self, opened: Visit) -> None:
        for _ in range(self._random.randrange(1, 40)):
            await opened.chunks(1)
            self.seen["chunks"] += 1
            match self._random.randrange(12):
                case 0:
                    await self._say(opened, 1)
                case 1:
                    await self._say(opened, STORM)
                case 2:
                    await opened.send(pause=pb.Pause())
                    await opened.send(resume=pb.Resume())

    async def _say(self, opened: Visit, count: int) -> None:
        for _ in range(count):
            self.seen["prompts"] += 1
            text = f"a {self._random.randrange(10_000)}"
            await opened.send(prompt=prompt(text, f"p{self.seen['prompts']}"))

    async def _leave(self, opened: Visit) -> None:
        match self._random.randrange(4):
            case 0:
                await opened.send(end=pb.End())
                await opened.rest()
            case 1:
                await opened.call.done_writing()
                await opened.rest()
            case 2:
                opened.call.cancel()


async def sample(every_s: float, until_s: float) -> list[dict[str, float]]:
    """Return each part's memory, read again and again."""
    readings = []
    while time.monotonic() < until_s:
        await asyncio.sleep(every_s)
        readings.append(await asyncio.to_thread(memory_mb))
    return readings


def growth(values: list[float]) -> dict[str, float | bool]:
    """Return how much memory grew from the second quarter to the last, and whether that counts as flat."""
    quarter = len(values) // 4
    before, after = statistics.median(values[quarter : 2 * quarter]), statistics.median(values[-quarter:])
    grown = after - before
    return {
        "second_quarter_mb": round(before, 1),
        "last_quarter_mb": round(after, 1),
        "grown_mb": round(grown, 1),
        "is_flat": grown <= max(FLAT_MB, FLAT_SHARE * before),
    }


async def soak(address: str, service: Service, minutes: float) -> dict[str, Any]:
    """Have users come and go; return what they saw, how memory went, and what is left."""
    warm = User(address, USERS, time.monotonic() + 1.0)
    await warm.run()
    await service.until_free(GENERATORS)
    before = await service.holdings()
    until_s = time.monotonic() + 60 * minutes
    users = [User(address, number, until_s) for number in range(USERS)]
    readings, *_ = await asyncio.gather(sample(60 * minutes / SAMPLES, until_s), *(user.run() for user in users))
    await service.until_free(GENERATORS)
    _, left = await settled(service, before)
    memory = {part: growth([reading[part] for reading in readings]) for part in readings[0]}
    return {
        "minutes": minutes,
        "users": USERS,
        "generators": GENERATORS,
        "seen": {name: sum(user.seen[name] for user in users) for name in users[0].seen},
        "memory": memory,
        "is_flat": all(entry["is_flat"] for entry in memory.values()),
        "left": left,
        "allowed": ALLOWED,
        "readings_mb": {part: [reading[part] for reading in readings] for part in readings[0]},
    }


def main() -> None:
    """Measure, store, and say whether memory was flat and nothing is left."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10, help="how long (default 10)")
    arguments = parser.parse_args()
    config = configuration()
    with running(config) as (address, _):
        result = asyncio.run(soak(address, Service(config), arguments.minutes))
    write("serve_soak", result)
    sys.exit(not result["is_flat"] or bool(result["left"]) or bool(result["seen"]["errors"]))


if __name__ == "__main__":
    main()
