"""Writes a benchmark's result as JSON beside what it was measured on."""

from __future__ import annotations

import json
import os
import platform
import signal
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def quantiles(values: Sequence[float]) -> dict[str, float]:
    """Return median, 99th percentile and maximum of at least one value."""
    ordered = sorted(values)
    at = min(len(ordered) - 1, int(0.99 * len(ordered)))
    return {"p50": round(statistics.median(ordered), 4), "p99": round(ordered[at], 4), "max": round(ordered[-1], 4)}


def spread(values: Sequence[float]) -> dict[str, float]:
    """Return median, minimum and maximum."""
    low, high = min(values), max(values)
    return {"median": round(statistics.median(values), 3), "min": round(low, 3), "max": round(high, 3)}


@contextmanager
def paused_training() -> Iterator[bool]:
    """Stop a training that runs in the background meanwhile; say whether there was one."""
    path = Path.home() / ".cache/causal-forcing/training/process_group"
    try:
        group = int(path.read_text())
        state = Path(f"/proc/{group}/stat").read_text().rpartition(")")[2].split()[0]
        os.killpg(group, signal.SIGSTOP)
    except (OSError, ValueError):
        yield False
        return
    if state == "T":  # somebody else stopped it, and will let it go on
        yield True
        return
    try:
        yield True
    finally:
        with suppress(ProcessLookupError):
            os.killpg(group, signal.SIGCONT)


def write(name: str, result: dict[str, Any]) -> None:
    """Print a result and store it under ``benchmarks/results/NAME.json``."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    document = {
        "commit": commit.stdout.strip(),
        "command": " ".join(["python", *(Path(w).name if Path(w).is_absolute() else w for w in sys.argv)]),
        "hardware": {
            "cpus": os.cpu_count(),
            "machine": platform.machine(),
            "processor": _processor(),
            "load": round(os.getloadavg()[0], 2),
        },
        **result,
    }
    text = json.dumps(document, indent=2) + "\n"
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(text)
    print(text, end="")


def _processor() -> str:
    """Return the processor's name, or nothing where the system does not tell."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return ""
