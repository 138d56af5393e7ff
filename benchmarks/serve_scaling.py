"""Generators that come and go with sessions: how long a session waits for one, and who waits.

    python benchmarks/serve_scaling.py

Simulated generators of 101 ms a chunk, none at first and four at most. Measured: the time from a session's request to
its first chunk when there is no generator at all, when all are taken and one more has to start, and when one is warm; a
real model adds the time to load its weights, which nothing here stands for. Then eight users on the four generators,
who come back as soon as their session has ended: how their waits and frame rates compare (Jain's index, 1 is equal),
and how many were refused.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
from typing import Any

from _report import spread, write
from _service import configured, load, processes, running
from _stats import jain
from serve_stream import CHUNK_S, FRAME_BYTES

from serve.config import ServiceConfig

GENERATORS, USERS = 4, 8
SCALE_DOWN_S = 1.0


def configuration() -> ServiceConfig:
    """Return a service that starts without generators."""
    return configured(
        engine="simulated",
        preset="causal-forcing-framewise",
        simulated={"chunk_ms": 1000 * CHUNK_S, "frame_bytes": FRAME_BYTES, "picture_px": 16},
        generator={"autoscaling": {"min_replicas": 0, "max_replicas": GENERATORS, "downscale_delay_s": SCALE_DOWN_S}},
    )


async def until_none_is_left() -> None:
    """Return when no generator runs."""
    while processes()["generator"]:  # noqa: ASYNC110  (another process has no event for us)
        await asyncio.sleep(0.2)


def first_chunk_s(session: dict[str, Any]) -> float:
    """Return the time from a session's request to its first complete chunk."""
    waited: float = session["chunk_s"][0] - session["opened_s"]
    return waited


async def starts(address: str, trials: int) -> dict[str, Any]:
    """Return the waits for a first chunk from zero, one above what is there, and warm."""
    from_zero, one_more, warm = [], [], []
    for _ in range(trials):
        await until_none_is_left()
        from_zero.append(first_chunk_s((await load(address, chunks=4))["sessions"][0]))
        warm.append(first_chunk_s((await load(address, chunks=4))["sessions"][0]))
        holding = asyncio.create_task(load(address, chunks=1 << 30, seconds=12))
        await asyncio.sleep(2.0)
        one_more.append(first_chunk_s((await load(address, chunks=4))["sessions"][0]))
        await holding
    return {
        "from_zero_to_first_chunk_s": spread(from_zero),
        "one_more_to_first_chunk_s": spread(one_more),
        "warm_to_first_chunk_s": spread(warm),
    }


async def fairness(address: str, seconds: float) -> dict[str, Any]:
    """Return how users who come back at once share too few generators."""
    await load(address, sessions=GENERATORS, chunks=1 << 30, seconds=10, pacing="realtime")  # all of them are there
    options = {"sessions": USERS, "chunks": 12, "repeat": 1 << 20, "until": seconds, "pacing": "realtime"}
    watched = await load(address, **options)
    users: dict[int, list[dict[str, Any]]] = {}
    for session in watched["sessions"]:
        users.setdefault(session["user"], []).append(session)
    served = {user: [s for s in sessions if s["started_s"]] for user, sessions in users.items()}
    waits = [statistics.mean(s["started_s"] - s["opened_s"] for s in sessions) for sessions in served.values()]
    rates = [
        statistics.mean(4 * (len(s["chunk_s"]) - 1) / (s["chunk_s"][-1] - s["chunk_s"][0]) for s in sessions)
        for sessions in served.values()
    ]
    return {
        "users": USERS,
        "generators": GENERATORS,
        "sessions": len(watched["sessions"]),
        "refused": sum(bool(s["error"]) for s in watched["sessions"]),
        "mean_wait_of_a_user_s": spread(waits),
        "fps_of_a_user": spread(rates),
        "jain_of_waits": jain(waits),
        "jain_of_fps": jain(rates),
        "jain_of_sessions": jain([float(len(sessions)) for sessions in served.values()]),
    }


def main() -> None:
    """Measure and store."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=3, help="starts from zero, and above (default 3)")
    parser.add_argument("--seconds", type=float, default=30, help="length of the fairness run (default 30)")
    arguments = parser.parse_args()
    with running(configuration()) as (address, start_s):
        started = asyncio.run(starts(address, arguments.trials))
        fair = asyncio.run(fairness(address, arguments.seconds))
    zero, more = (started[name]["median"] for name in ("from_zero_to_first_chunk_s", "one_more_to_first_chunk_s"))
    result = {
        "service_start_s": start_s,
        "starts": started,
        "fairness": fair,
        "readme": [
            {
                "measure": "First chunk when a simulated generator has to start: from zero / one more",
                "value": f"{zero:.1f} / {more:.1f} s (warm: {started['warm_to_first_chunk_s']['median']:.2f} s)",
            },
            {
                "measure": f"{USERS} users who share {GENERATORS} generators: Jain's index of waits / frame rates",
                "value": f"{fair['jain_of_waits']} / {fair['jain_of_fps']}",
            },
        ],
    }
    write("serve_scaling", result)


if __name__ == "__main__":
    main()
