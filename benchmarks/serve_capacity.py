"""How many sessions one machine's gateway, proxy and decoder carry: 1 to 16 simulated accelerators.

    python benchmarks/serve_capacity.py

Every generator sleeps 101 ms a chunk and every chunk is 4 JPEGs of 60 kB and 0.2 MB of latents; there are as many
generators as sessions. `paced` asks for 16 frames a second (a chunk every 250 ms), `fast` for whatever credit allows.
Efficiency is the chunks of all sessions, divided by as many times the chunks of one session alone. Everything, viewers
included, runs on this machine, so the cores are shared by what a cluster would spread; CPU time a chunk says what each
part needs, and from it follows how many sessions a gateway's core carries.
"""

from __future__ import annotations

import argparse
import asyncio
from itertools import pairwise
from typing import Any

import psutil
from _report import write
from _service import Usage, bottleneck, configured, hot_spots, load, processes, running
from _stats import jain, percentiles
from serve_stream import CHUNK_S, FRAME_BYTES

from serve.config import ServiceConfig

MEDIA_CHUNKS_PER_S = 4.0
"""Chunks a second of a session at 16 frames a second."""

SETTLE_S = 2.0
"""Time at the start of a run, and a second at its end, that is not counted."""


def configuration(replicas: int) -> ServiceConfig:
    """Return a service with that many generators."""
    return configured(
        engine="simulated",
        preset="causal-forcing-framewise",
        simulated={"chunk_ms": 1000 * CHUNK_S, "frame_bytes": FRAME_BYTES, "picture_px": 16},
        generator={"replicas": replicas},
    )


async def run(address: str, sessions: int, pacing: str, seconds: float) -> dict[str, Any]:
    """Return what so many viewers got, and what it cost."""
    usage = Usage()
    watched = await load(address, sessions=sessions, chunks=1 << 30, seconds=seconds, pacing=pacing)
    shares, box = usage.shares(), usage.box()
    seen = watched["sessions"]
    begin, end = max(s["chunk_s"][0] for s in seen) + SETTLE_S, seconds - 1.0
    within = [[at for at in s["chunk_s"] if begin <= at < end] for s in seen]
    rates = [len(chunks) / (end - begin) for chunks in within]
    spans = [after - before for chunks in within for before, after in pairwise(chunks)]
    chunks = sum(len(s["chunk_s"]) for s in seen)
    return {
        "sessions": sessions,
        "pacing": pacing,
        "chunks_per_s": round(sum(rates), 2),
        "fps_of_a_session": round(4 * sum(rates) / sessions, 2),
        "jain_of_fps": jain(rates),
        "chunk_interval_s": percentiles(spans),
        "cpu_share_of_a_core": shares,
        "cpu_ms_per_chunk": {
            part: round(1e3 * s["all"] * watched["seconds"] / chunks, 2) for part, s in shares.items()
        },
        "box_in_use": box,
        "client_cpu_share": watched["client_cpu_share"],
        "bottleneck": bottleneck(shares, box),
    }


async def measure(address: str, arguments: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """Run all loads, smallest first."""
    await load(address, sessions=2, chunks=8)
    runs: dict[str, list[dict[str, Any]]] = {}
    counts = [n for n in (1, 2, 4, 8, 16) if n <= arguments.replicas]
    for pacing in ("paced", "fast"):
        runs[pacing] = []
        for sessions in counts:
            asked = "realtime" if pacing == "paced" else "fast"
            result = await run(address, sessions, asked, arguments.seconds)
            alone = runs[pacing][0]["chunks_per_s"] if runs[pacing] else result["chunks_per_s"]
            result["efficiency"] = round(result["chunks_per_s"] / (sessions * alone), 3)
            runs[pacing].append(result)
            print(f"{pacing} {sessions}: {result['chunks_per_s']} chunks/s, {result['bottleneck']}", flush=True)
    return runs


async def profiles(address: str, sessions: int) -> dict[str, list[dict[str, Any]]]:
    """Return where gateway and proxy spend their time under load."""
    found = {}
    for part in ("gateway", "proxy"):
        watching = asyncio.create_task(load(address, sessions=sessions, chunks=1 << 30, seconds=11))
        await asyncio.sleep(2)
        found[part] = await asyncio.to_thread(hot_spots, processes()[part][0])
        await watching
    return found


def ceiling(runs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Return what a core of each part carries, from its CPU time a chunk in the run that kept it busiest."""
    busiest = max((run for kind in runs.values() for run in kind), key=lambda run: run["chunks_per_s"])
    cost = busiest["cpu_ms_per_chunk"]
    return {
        "at_chunks_per_s": busiest["chunks_per_s"],
        **{
            part: {
                "chunks_per_s_of_a_core": round(1e3 / cost[part], 1),
                "sessions_at_16_fps_of_a_core": round(1e3 / cost[part] / MEDIA_CHUNKS_PER_S, 1),
            }
            for part in ("gateway", "proxy", "mailbox", "decoder", "generator")
            if cost.get(part)
        },
    }


def lines(runs: dict[str, list[dict[str, Any]]], core: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the table's lines."""
    paced, fast = runs["paced"], runs["fast"]
    most = max(run["chunks_per_s"] for run in fast)
    full = next((run for run in fast if run["bottleneck"]), None)
    until = f"{full['bottleneck']} full at {full['sessions']} sessions" if full else "nothing full"
    sixteen = paced[-1]
    return [
        {
            "measure": f"{sixteen['sessions']} simulated generators, paced at 16 FPS: scaling efficiency",
            "value": f"{sixteen['efficiency']} ({sixteen['chunks_per_s']} chunks/s, "
            f"Jain of FPS {sixteen['jain_of_fps']})",
        },
        {
            "measure": "Simulated generators as fast as they can (101 ms a chunk), viewers on the same machine",
            "value": f"at most {most} chunks/s ({until})",
        },
        {
            "measure": "Sessions at 16 FPS that a core of the gateway carries (from its CPU time)",
            "value": f"{core['gateway']['sessions_at_16_fps_of_a_core']} (a core of the proxy: "
            f"{core['proxy']['sessions_at_16_fps_of_a_core']})",
            "headline": True,
        },
    ]


def main() -> None:
    """Measure and store."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--replicas", type=int, default=16, help="most sessions, and generators (default 16)")
    parser.add_argument("--seconds", type=float, default=11, help="length of a run (default 11)")
    parser.add_argument("--profile", action="store_true", help="also profile gateway and proxy")
    arguments = parser.parse_args()
    with running(configuration(arguments.replicas)) as (address, start_s):
        runs = asyncio.run(measure(address, arguments))
        spots = asyncio.run(profiles(address, min(8, arguments.replicas))) if arguments.profile else None
        memory = {
            part: round(max(process.memory_info().rss for process in found) / 1e6)
            for part, found in processes().items()
            if found
        }
    core = ceiling(runs)
    result: dict[str, Any] = {
        "service_start_s": start_s,
        "machine_memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "runs": runs,
        "ceiling": core,
        "resident_mb": memory,
        "readme": lines(runs, core),
    }
    if spots:
        result["hot_spots"] = spots
    write("serve_capacity", result)


if __name__ == "__main__":
    main()
