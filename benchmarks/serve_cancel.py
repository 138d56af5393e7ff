"""How soon a generator is free when its viewer goes, and how soon the service works again when a process is killed.

    python benchmarks/serve_cancel.py --trials 200 --kills 5

A simulated generator of 101 ms a chunk in four steps, frames of 60 kB. A viewer leaves at a random moment: it
half-closes, cancels, loses its connection (both ends are reset), or has not read for half a second, behind a window of
64 KiB, and then cancels; measured until admission can grant the generator to the next one. Then `kill -9` of each kind
of process while a session runs, with one replica of everything and with two: whether the session goes on, and after how
long, or what it ends with and when its generator is free; and the time from the kill to the first chunk of a new
session, which is asked for as soon as the first one has ended, or has made ten chunks more.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import signal
import time
from collections.abc import Awaitable, Callable, Mapping
from itertools import pairwise
from types import MappingProxyType
from typing import Any

import grpc
import psutil
from _holdings import Service
from _relay import relay
from _report import spread, write
from _service import configured, processes, running
from _stats import percentiles
from _visits import Visit, politely, prompt, visit
from serve_stream import CHUNK_S, FRAME_BYTES

from protos.causal_forcing.v1 import video_pb2 as pb
from serve.config import ServiceConfig

STALL_S = 0.5
"""How long a stalled reader has not read when it cancels."""

NARROW = (("grpc.http2.bdp_probe", 0),)
"""Channel option under which the receive window stays at 64 KiB, so that what is not read fills it."""

KILLED = ("generator", "decoder", "text_encoder", "gateway", "proxy", "admission")
"""Processes that are killed."""

PATIENCE_S = 90.0
"""Longest wait for a service to be whole again."""


def configuration(replicas: int) -> ServiceConfig:
    """Return a service with so many replicas of everything."""
    return configured(
        engine="simulated",
        preset="causal-forcing-framewise",
        simulated={"chunk_ms": 1000 * CHUNK_S, "frame_bytes": FRAME_BYTES, "picture_px": 16},
        **{part: {"replicas": replicas} for part in ("gateway", "generator", "text_encoder", "vae_decoder")},
    )


async def freed(address: str, service: Service, leave: Callable[[Visit], Awaitable[None]]) -> float:
    """Return the seconds from a viewer's leaving to the generator's being idle."""
    async with visit(address, credit_chunks=8) as opened:
        await opened.chunks(1)
        await asyncio.sleep(random.uniform(0, CHUNK_S))
        start = time.monotonic()
        await leave(opened)
        return await service.until(lambda counts: counts["idle"] == 1) - start


async def half_close(opened: Visit) -> None:
    """Say that nothing more will come."""
    await opened.call.done_writing()


async def cancel(opened: Visit) -> None:
    """Cancel the call."""
    opened.call.cancel()


async def departures(address: str, service: Service, trials: int) -> dict[str, Any]:
    """Return how soon the generator is free after each way of leaving."""
    times: dict[str, list[float]] = {"half-close": [], "cancel": [], "disconnect": [], "stalled reader": []}
    for _ in range(trials):
        times["half-close"].append(await freed(address, service, half_close))
        times["cancel"].append(await freed(address, service, cancel))
        async with relay(address) as carrying:

            async def cut(_: Visit, carrying: Any = carrying) -> None:  # noqa: ANN401
                carrying.cut()

            times["disconnect"].append(await freed(carrying.address, service, cut))
        times["stalled reader"].append(await stalled(address, service))
    return {name: {"trials": len(values), "until_free_s": percentiles(values)} for name, values in times.items()}


async def stalled(address: str, service: Service) -> float:
    """Return the seconds from a stalled reader's cancel to the generator's being idle."""
    async with visit(address, NARROW, credit_chunks=8) as opened:
        await opened.chunks(1)
        await asyncio.sleep(STALL_S)
        start = time.monotonic()
        opened.call.cancel()
        return await service.until(lambda counts: counts["idle"] == 1) - start


class Watched:
    """A session that is read in the background.

    Attributes:
        chunk_s: When each chunk was complete.
        prompts: When the first chunk of each prompt was complete, by its id.
        end: What it ended with, and when.
    """

    def __init__(self, opened: Visit) -> None:
        self.chunk_s: list[float] = []
        self.prompts: dict[str, float] = {}
        self.end: tuple[str, float] | None = None
        self._opened = opened
        self._news = asyncio.Event()
        self._task = asyncio.create_task(self._read())

    async def _read(self) -> None:
        reason = ""
        try:
            while (message := await self._opened.call.read()) is not grpc.aio.EOF:
                if message.HasField("error"):
                    reason = message.error.reason
                if message.frame.last_in_chunk:
                    self.chunk_s.append(time.monotonic())
                    self.prompts.setdefault(message.frame.prompt_id, self.chunk_s[-1])
                    await self._opened.send(ack=pb.Ack(chunk_index=message.frame.chunk_index))
                self._tell()
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
            pass
        code = await self._opened.call.code()
        details = await self._opened.call.details()
        self.end = (f"{code.name} {reason or details.partition(':')[0]}", time.monotonic())
        self._tell()

    def _tell(self) -> None:
        self._news.set()
        self._news = asyncio.Event()

    async def until(self, is_there: Callable[[Watched], bool]) -> None:
        """Return when something has been seen, or the session is over."""
        async with asyncio.timeout(PATIENCE_S):
            while self.end is None and not is_there(self):
                await self._news.wait()


async def busiest(part: str) -> psutil.Process:
    """Return the process of a part that does the session's work: the one that switches contexts most."""
    found = processes()[part]
    before = [process.num_ctx_switches() for process in found]
    await asyncio.sleep(0.4)
    switches = [sum(p.num_ctx_switches()) - sum(b) for p, b in zip(found, before, strict=True)]
    return found[switches.index(max(switches))]


async def first_chunk(address: str) -> float:
    """Return when a new session had its first chunk; tried again until there is one."""
    deadline = time.monotonic() + PATIENCE_S
    while True:
        try:
            async with visit(address) as opened:
                await opened.chunks(1)
                return time.monotonic()
        except (grpc.aio.AioRpcError, ConnectionError, asyncio.InvalidStateError):
            if time.monotonic() > deadline:
                raise
            await asyncio.sleep(0.02)


async def killed(address: str, service: Service, part: str, replicas: int) -> dict[str, Any]:
    """Kill a process of a part while a session runs; return what became of it, and when a new one had a chunk."""
    async with visit(address) as opened:
        seen = Watched(opened)
        await seen.until(lambda seen: len(seen.chunk_s) >= 6)
        victim = await busiest(part)
        os.kill(victim.pid, signal.SIGKILL)
        start, chunks = time.monotonic(), len(seen.chunk_s)
        if part == "text_encoder":
            await opened.send(prompt=prompt("another fox", "second"))
            await seen.until(lambda seen: "second" in seen.prompts)
        else:
            await seen.until(lambda seen: len(seen.chunk_s) >= chunks + 10)
        fate: dict[str, Any] = {}
        if seen.end is not None:
            free_s = await service.until(lambda counts: counts["idle"] == replicas) - start
            fate = {"ended_with": seen.end[0], "after_s": seen.end[1] - start, "generator_free_s": free_s}
        elif part == "text_encoder":
            fate = {"prompt_shown_s": seen.prompts["second"] - start}
        else:
            after = [start, *seen.chunk_s[chunks:]]
            fate = {"longest_gap_s": max(b - a for a, b in pairwise(after))}
    return {**fate, "new_session_s": await first_chunk(address) - start}


async def whole(address: str, service: Service, replicas: int) -> None:
    """Return when everything that was killed is back and idle."""
    want = {**dict.fromkeys(("gateway", "generator", "text_encoder", "decoder"), replicas), "proxy": 1}
    deadline = time.monotonic() + PATIENCE_S
    while {part: len(processes()[part]) for part in want} != want:
        if time.monotonic() > deadline:
            raise TimeoutError("what was killed does not come back")
        await asyncio.sleep(0.2)
    await service.until_free(replicas)
    for _ in range(2):
        await first_chunk(address)
    await politely(address)
    await service.until_free(replicas)


async def recoveries(address: str, service: Service, replicas: int, kills: int) -> dict[str, Any]:
    """Return what became of sessions whose processes were killed, by part."""
    results: dict[str, Any] = {}
    for part in KILLED:
        fates = []
        for _ in range(kills):
            await whole(address, service, replicas)
            fates.append(await killed(address, service, part, replicas))
        names = sorted({name for fate in fates for name in fate} - {"ended_with"})
        results[part] = {name: spread([fate[name] for fate in fates if name in fate]) for name in names}
        ends = [fate["ended_with"] for fate in fates if "ended_with" in fate]
        results[part] |= {"kills": kills, "went_on": kills - len(ends), "ended_with": sorted(set(ends))}
    return results


GOALS: Mapping[str, float] = MappingProxyType({"free_s": 1.0, "new_session_s": 5.0})
"""What is wanted: a generator free within one second; with a warm spare a new session within five."""


def main() -> None:
    """Measure and store."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=200, help="departures of each kind (default 200)")
    parser.add_argument("--kills", type=int, default=5, help="kills of each kind of process, twice (default 5)")
    arguments = parser.parse_args()
    random.seed(1)
    one, two = configuration(1), configuration(2)
    with running(one) as (address, _):
        left = asyncio.run(departures(address, Service(one), arguments.trials))
        alone = asyncio.run(recoveries(address, Service(one), 1, arguments.kills))
    with running(two) as (address, _):
        spare = asyncio.run(recoveries(address, Service(two), 2, arguments.kills))
    worst = max(entry["until_free_s"]["max"] for entry in left.values())
    write(
        "serve_cancel",
        {
            "goals": dict(GOALS),
            "departures": left,
            "killed_with_one_replica": alone,
            "killed_with_a_spare": spare,
            "readme": [
                {
                    "measure": f"Generator free after its viewer left ({arguments.trials} times in 4 ways): p50 / max",
                    "value": f"{max(e['until_free_s']['p50'] for e in left.values()):.3f} / {worst:.3f} s",
                    "headline": True,
                },
                {
                    "measure": "New session's first chunk after kill -9 of the generator: with a warm spare / without",
                    "value": " / ".join(
                        f"{kind['generator']['new_session_s']['median']:.1f} s" for kind in (spare, alone)
                    ),
                },
            ],
        },
    )


if __name__ == "__main__":
    main()
