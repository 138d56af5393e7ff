"""Times between points of a device's work, without waiting for it."""

from __future__ import annotations

import time

import torch

Mark = float | torch.cuda.Event
"""A point in time: of this machine's clock, or of a GPU's queue."""


def mark(device: torch.device) -> Mark:
    """Return the point in time at which the device has done the work it was given so far."""
    if device.type != "cuda":
        return time.perf_counter()
    event: torch.cuda.Event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    event.record()
    return event


def seconds_between(first: Mark, second: Mark) -> float:
    """Return the seconds from one mark to another of the same device; on a GPU both must have been reached."""
    if isinstance(first, torch.cuda.Event) and isinstance(second, torch.cuda.Event):
        return float(first.elapsed_time(second)) / 1000
    assert isinstance(first, float)
    assert isinstance(second, float)
    return second - first
