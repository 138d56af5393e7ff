"""The service as the benchmarks run it: started here, its processes known by part, its load in their CPU time."""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import psutil

from serve.config import ServiceConfig, load_config
from serve.local import free_port, local_service

PARTS = {
    "proxy": "ray::ProxyActor",
    "haproxy": "haproxy -",
    "gateway": "ray::ServeReplica:causal-forcing:Gateway",
    "mailbox": "ray::_MailboxActor",
    "admission": "ray::_AdmissionActor",
    "text_encoder": "ray::ServeReplica:causal-forcing:TextEncoder",
    "generator": "ray::ServeReplica:causal-forcing:Generator",
    "decoder": "ray::ServeReplica:causal-forcing:VaeDecoder",
    "controller": "ray::ServeController",
    "raylet": "/raylet/raylet",
    "gcs": "/gcs/gcs_server",
}
"""What the command line of each kind of process contains."""

SATURATED = 0.9
"""Share of one core from which a process counts as full: an interpreter cannot use more than one."""


def configured(**fields: Any) -> ServiceConfig:  # noqa: ANN401
    """Return a configuration on free ports."""
    return load_config(None, grpc_port=free_port(), http_port=free_port(), **fields)


@contextmanager
def running(config: ServiceConfig) -> Iterator[tuple[str, float]]:
    """Run the service; give its address and the seconds that it took to start."""
    start = time.perf_counter()
    with local_service(config) as service:
        yield service.address, round(time.perf_counter() - start, 1)


def processes() -> dict[str, list[psutil.Process]]:
    """Return this program's service processes by part."""
    found: dict[str, list[psutil.Process]] = {part: [] for part in PARTS}
    for process in psutil.Process().children(recursive=True):
        try:
            command = " ".join(process.cmdline())
        except psutil.Error:
            continue
        for part, title in PARTS.items():
            if title in command:
                found[part].append(process)
    return found


class Usage:
    """CPU time of every part, from its making to :meth:`shares`."""

    def __init__(self) -> None:
        self._processes = processes()
        self._before = self._read()
        self._box = psutil.cpu_times()
        self._start = time.perf_counter()

    def _read(self) -> dict[str, list[float]]:
        return {part: [sum(p.cpu_times()[:2]) for p in found] for part, found in self._processes.items() if found}

    def shares(self) -> dict[str, dict[str, float]]:
        """Return each part's share of one core: of all its processes, and of the busiest of them."""
        seconds = time.perf_counter() - self._start
        after = self._read()
        shares = {}
        for part, before in self._before.items():
            each = [(b - a) / seconds for a, b in zip(before, after[part], strict=True)]
            shares[part] = {"all": round(sum(each), 3), "busiest": round(max(each), 3)}
        return shares

    def box(self) -> float:
        """Return the share of all cores that was in use, by whatever program."""
        now = psutil.cpu_times()
        busy = [sum(times) - times.idle - times.iowait for times in (self._box, now)]
        total = sum(now) - sum(self._box)
        return round((busy[1] - busy[0]) / total, 3) if total else 0.0


def bottleneck(shares: dict[str, dict[str, float]], box: float) -> str | None:
    """Return what is full: a part with a process on a core of its own, the whole box, or None."""
    busiest = max(shares, key=lambda part: shares[part]["busiest"])
    if shares[busiest]["busiest"] >= SATURATED:
        return busiest
    return f"the box ({os.cpu_count()} cores), {busiest} first" if box >= SATURATED else None


def hot_spots(process: psutil.Process, seconds: int = 8, most: int = 12) -> list[dict[str, Any]]:
    """Return which functions hold a process's interpreter: their own share of the samples (needs py-spy)."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "stacks"
        command = [
            "py-spy",
            "record",
            "--pid",
            str(process.pid),
            "--duration",
            str(seconds),
            "--format",
            "raw",
            "--gil",
        ]
        tool = Path(sys.executable).parent / "py-spy"
        done = subprocess.run([str(tool), *command[1:], "--output", str(path)], capture_output=True, check=False)
        if done.returncode:
            return []
        own: dict[str, int] = {}
        for line in path.read_text().splitlines():
            stack, _, count = line.rpartition(" ")
            leaf = re.sub(r":\d+\)$", ")", stack.rpartition(";")[2])
            own[leaf] = own.get(leaf, 0) + int(count)
    total = sum(own.values()) or 1
    top = sorted(own.items(), key=lambda item: -item[1])[:most]
    return [{"function": name, "share": round(count / total, 3)} for name, count in top]


async def load(address: str, **options: Any) -> dict[str, Any]:  # noqa: ANN401
    """Run ``serve_load.py`` in a process of its own and return what it measured."""
    words = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    program = str(Path(__file__).with_name("serve_load.py"))
    process = await asyncio.create_subprocess_exec(
        sys.executable, program, f"--server={address}", *words, stdout=subprocess.PIPE
    )
    printed, _ = await process.communicate()
    if process.returncode:
        raise RuntimeError(f"the load generator failed: {' '.join(words)}")
    answer: dict[str, Any] = json.loads(printed)
    return answer
