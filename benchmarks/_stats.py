"""The numbers that the serving benchmarks report, from the times at which chunks arrived."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

WARM_UP_CHUNKS = 6
"""A session's first chunks, which are cheaper while the window fills."""


def percentiles(values: Sequence[float], digits: int = 4) -> dict[str, float]:
    """Return the usual percentiles of at least one value (nearest rank)."""
    ordered = sorted(values)
    marks = {"p50": 0.5, "p90": 0.9, "p95": 0.95, "p99": 0.99, "p99.9": 0.999, "max": 1.0}
    return {
        name: round(ordered[min(len(ordered) - 1, int(mark * len(ordered)))], digits) for name, mark in marks.items()
    }


def intervals(chunk_s: Sequence[float]) -> list[float]:
    """Return the times between the chunks of the steady part: without the first six and the last."""
    steady = chunk_s[WARM_UP_CHUNKS:-1]
    return [later - earlier for earlier, later in pairwise(steady)]


def rate(chunk_s: Sequence[float], frames_per_chunk: int) -> float:
    """Return frames a second in the steady part."""
    steady = chunk_s[WARM_UP_CHUNKS:-1]
    return frames_per_chunk * (len(steady) - 1) / (steady[-1] - steady[0])


def jitter(spans: Sequence[float]) -> dict[str, float]:
    """Return percentiles of the differences between consecutive intervals."""
    return percentiles([abs(later - earlier) for earlier, later in pairwise(spans)])


def miss_rate(spans: Sequence[float], deadline_s: float) -> float:
    """Return the share of intervals that are longer than a deadline."""
    return round(sum(span > deadline_s for span in spans) / len(spans), 4)


def viewer(chunk_s: Sequence[float], chunk_media_s: float, buffer_chunks: int) -> dict[str, Any]:
    """Return how a player fares that begins to show when its buffer has so many chunks: underruns and stalled time."""
    clock = chunk_s[buffer_chunks - 1]
    underruns, stalled = 0, 0.0
    for ready in chunk_s:
        if ready > clock + 1e-9:
            underruns += 1
            stalled += ready - clock
            clock = ready
        clock += chunk_media_s
    return {"buffer_chunks": buffer_chunks, "underruns": underruns, "stalled_s": round(stalled, 3)}


def jain(values: Sequence[float]) -> float:
    """Return Jain's index: 1 when all are equal, 1/n when one has everything.

    Source: R. Jain, D. Chiu, W. Hawe, "A Quantitative Measure Of Fairness And Discrimination", DEC-TR-301, 1984.
    """
    squares = len(values) * sum(value * value for value in values)
    return round(sum(values) ** 2 / squares, 4) if squares else 1.0
