"""Several sessions on one device: how many have 16 frames a second when they take turns, a chunk each.

    python benchmarks/serve_sharing.py
    python benchmarks/serve_sharing.py --engine tiny --vae lightvae --places 9   # the embedded model on this machine

One simulated generator of 101 ms a chunk with `sessions_per_replica` places, and 1, 2, 3, ... viewers who ask for 16
frames a second: a chunk every 250 ms. By arithmetic two fit (2 x 101 ms), three do not. Reported for each number are
frames a second, the intervals between chunks, the share of them within a chunk's media time and a quarter, what viewers
with a buffer of two chunks felt, and how equal the shares are (Jain's index). With `tiny` the device is this machine,
which also runs the service and the viewers.
"""

from __future__ import annotations

import argparse
import asyncio
from typing import Any

from _report import write
from _service import configured, load, running
from _stats import WARM_UP_CHUNKS, intervals, jain, miss_rate, percentiles, rate, viewer
from serve_stream import CHUNK_S, DEADLINE_S, FRAME_BYTES

from serve.config import ServiceConfig

ENOUGH_FPS = 15.8
"""From which on a session counts as having 16 frames a second: the pace is kept to a chunk, not to a millisecond."""


def configuration(engine: str, vae: str, places: int) -> ServiceConfig:
    """Return a service with one generator for so many sessions."""
    if engine == "tiny":
        return configured(preset="tiny", vae=vae, generator={"sessions_per_replica": places})
    return configured(
        engine="simulated",
        preset="causal-forcing-framewise",
        simulated={"chunk_ms": 1000 * CHUNK_S, "frame_bytes": FRAME_BYTES, "picture_px": 16},
        generator={"sessions_per_replica": places},
    )


async def share(address: str, sessions: int, chunks: int) -> dict[str, Any]:
    """Return what so many viewers got of one device."""
    watched = await load(address, sessions=sessions, chunks=chunks, pacing="realtime")
    seen = watched["sessions"]
    rates = [round(rate(s["chunk_s"], 4), 2) for s in seen]
    spans = [span for s in seen for span in intervals(s["chunk_s"])]
    viewers = [viewer(s["chunk_s"][WARM_UP_CHUNKS:], DEADLINE_S, 2) for s in seen]
    return {
        "sessions": sessions,
        "fps": rates,
        "jain_of_fps": jain(rates),
        "chunk_interval_s": percentiles(spans),
        "within_1.25_chunk_times": round(1 - miss_rate(spans, 1.25 * DEADLINE_S), 4),
        "stalled_s_of_viewers_with_two_chunks": [v["stalled_s"] for v in viewers],
        "ttfc_s": percentiles([s["chunk_s"][0] - s["opened_s"] for s in seen]),
    }


async def measure(address: str, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Return what each number of viewers got."""
    await load(address, sessions=arguments.places, chunks=4)
    return [await share(address, sessions, arguments.chunks) for sessions in range(1, arguments.places + 1)]


def lines(device: str, runs: list[dict[str, Any]], *, headline: bool) -> list[dict[str, Any]]:
    """Return the table's lines."""
    served = [run for run in runs if min(run["fps"]) >= ENOUGH_FPS]
    most = served[-1] if served else None
    shared = ", ".join(f"{run['sessions']}: {min(run['fps'])}" for run in runs)
    sessions = most["sessions"] if most else 0
    interval = f" (chunk interval p99 {1e3 * most['chunk_interval_s']['p99']:.0f} ms)" if most else ""
    return [
        {
            "measure": f"Sessions at 16 FPS on {device}",
            "value": f"{sessions}{interval}; slowest session's FPS by number of sessions: {shared}",
            "headline": headline,
        }
    ]


def main() -> None:
    """Measure and store."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", choices=("tiny", "simulated"), default="simulated", help="what to serve")
    parser.add_argument("--vae", choices=("wan", "lightvae"), default="wan", help="decoder of tiny (default wan)")
    parser.add_argument("--places", type=int, default=4, help="sessions that the generator takes (default 4)")
    parser.add_argument("--chunks", type=int, default=46, help="chunks of each session (default 46)")
    arguments = parser.parse_args()
    simulated = arguments.engine == "simulated"
    device = "one simulated device (101 ms a chunk)" if simulated else f"this machine: tiny, {arguments.vae}"
    with running(configuration(arguments.engine, arguments.vae, arguments.places)) as (address, start_s):
        runs = asyncio.run(measure(address, arguments))
    name = "serve_sharing" if simulated else f"serve_sharing_tiny_{arguments.vae}"
    rows = lines(device, runs, headline=not simulated and arguments.vae == "wan")
    write(name, {"service_start_s": start_s, "runs": runs, "readme": rows})


if __name__ == "__main__":
    main()
