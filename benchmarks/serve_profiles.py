"""What settings of Ray Serve's own do to the cost of a chunk: the same load under several environments.

    python benchmarks/serve_profiles.py --profiles plasma default grpc_proxy haproxy

Each profile is a cluster of its own with four sessions at 16 frames a second on simulated generators, and then ping's
round trip and the time to the first chunk. The number to compare is CPU time a chunk: it changes little with what else
this machine does, and is given part by part and as a ratio to the first profile.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
from typing import Any

from _report import write
from _service import Usage, load, running
from _stats import percentiles
from serve_capacity import configuration, run

PLASMA = {"RAY_max_direct_call_object_size": str(100 << 10)}
ROUTER = {"RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0"}
THREAD = {"RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0"}
HAPROXY = {"RAY_SERVE_ENABLE_HA_PROXY": "1"}

PROFILES: dict[str, dict[str, str]] = {
    "plasma": PLASMA,
    "default": {},
    "router_in_loop": ROUTER,
    "one_loop": {**ROUTER, **THREAD},
    "grpc_proxy": {**ROUTER, "RAY_SERVE_PROXY_USE_GRPC": "1"},
    "haproxy": HAPROXY,
}
"""Environment variables of each profile, above those of ``serve.local``; ``plasma`` is Ray's own default."""


async def measure(address: str, sessions: int, seconds: float) -> dict[str, Any]:
    """Return what a chunk costs and how long a message travels."""
    await load(address, sessions=sessions, chunks=4)
    loaded = await run(address, sessions, "realtime", seconds)
    usage = Usage()
    alone = await load(address, chunks=40, ping=1)
    short = await load(address, chunks=1, repeat=8)
    return {
        "cpu_ms_per_chunk": loaded["cpu_ms_per_chunk"],
        "cpu_ms_per_chunk_all": round(sum(loaded["cpu_ms_per_chunk"].values()), 2),
        "chunks_per_s": loaded["chunks_per_s"],
        "chunk_interval_s": loaded["chunk_interval_s"],
        "ping_s": percentiles(alone["sessions"][0]["round_trip_s"]),
        "ttfc_s": round(statistics.median(s["chunk_s"][0] - s["opened_s"] for s in short["sessions"]), 4),
        "box_in_use": usage.box(),
    }


def in_environment(name: str, arguments: argparse.Namespace) -> dict[str, Any] | str:
    """Run one profile in a program of its own; return its numbers, or why there are none."""
    words = [sys.executable, __file__, "--one", f"--sessions={arguments.sessions}", f"--seconds={arguments.seconds}"]
    environment = {**os.environ, **PROFILES[name]}
    try:
        done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=150, check=True)
    except subprocess.CalledProcessError as error:
        return f"failed: {error.stderr.strip().splitlines()[-1:]}"
    except subprocess.TimeoutExpired:
        return "failed: no end after 150 s"
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def main() -> None:
    """Measure the profiles in turns and store."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--profiles",
        nargs="+",
        choices=PROFILES,
        default=["plasma", "default", "grpc_proxy"],
    )
    parser.add_argument("--sessions", type=int, default=4, help="sessions at 16 frames a second (default 4)")
    parser.add_argument("--seconds", type=float, default=10, help="length of the loaded run (default 10)")
    parser.add_argument("--one", action="store_true", help="measure in this environment and print")
    arguments = parser.parse_args()
    if arguments.one:
        with running(configuration(arguments.sessions)) as (address, _):
            print(json.dumps(asyncio.run(measure(address, arguments.sessions, arguments.seconds))))
        return
    results = {name: in_environment(name, arguments) for name in arguments.profiles}
    measured = {name: result for name, result in results.items() if isinstance(result, dict)}
    first = next(iter(measured.values()))
    for result in measured.values():
        result["cpu_ratio"] = round(result["cpu_ms_per_chunk_all"] / first["cpu_ms_per_chunk_all"], 3)
    result: dict[str, Any] = {"environments": {n: PROFILES[n] for n in results}, "profiles": results}
    shown = ", ".join(f"{name} {r['cpu_ms_per_chunk_all']}" for name, r in measured.items())
    result["readme"] = [{"measure": "CPU time of a chunk in all processes of the service", "value": f"{shown} ms"}]
    write("serve_profiles", result)


if __name__ == "__main__":
    main()
