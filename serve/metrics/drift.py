"""How far a session's latents have wandered: statistics of each chunk against those of its first seconds.

A stream that degrades (colours saturate, contrast grows) shows it in its latents' channels long before a viewer would
call it broken. A prompt switch moves them, too, so the score is a hint for operators, not a verdict.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

REFERENCE_S = 3.0
"""Seconds of video at a scene's start that later ones are compared with."""

_SMALLEST = 1e-6


@dataclass(frozen=True)
class LatentStats:
    """Mean and standard deviation of each latent channel of one chunk.

    Attributes:
        mean: One number a channel.
        std: One number a channel.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def of(cls, latents: Tensor) -> LatentStats:
        """Return the statistics of latents ``[1, C, F, h, w]``; waits for them."""
        import torch

        channels = latents[0].flatten(1).float()
        std, mean = torch.std_mean(channels, dim=1, correction=0)
        both: list[list[float]] = torch.stack([mean, std]).tolist()
        return cls(tuple(both[0]), tuple(both[1]))


class DriftScore:
    """Compares a session's chunks with its first seconds."""

    def __init__(self) -> None:
        self._first: list[LatentStats] = []
        self._first_s = 0.0
        self._reference: LatentStats | None = None

    def update(self, stats: LatentStats, video_s: float, *, starts_scene: bool) -> tuple[float, float] | None:
        """Return a chunk's scores for mean and standard deviation; None while the reference is being made.

        Args:
            stats: Of the chunk.
            video_s: Seconds of video that it holds.
            starts_scene: Whether to begin anew with it.
        """
        if starts_scene:
            self._first, self._first_s, self._reference = [], 0.0, None
        if self._reference is not None:
            return compare(stats, self._reference)
        self._first.append(stats)
        self._first_s += video_s
        if self._first_s >= REFERENCE_S:
            self._reference = _average(self._first)
            self._first = []
        return None


def compare(stats: LatentStats, reference: LatentStats) -> tuple[float, float]:
    """Return the root mean square over the channels of the mean's shift, and of the log ratio of the deviations."""
    spread = [max(value, _SMALLEST) for value in reference.std]
    shifts = [(a - b) / s for a, b, s in zip(stats.mean, reference.mean, spread, strict=True)]
    ratios = [math.log(max(a, _SMALLEST) / s) for a, s in zip(stats.std, spread, strict=True)]
    return _root_mean_square(shifts), _root_mean_square(ratios)


def _average(stats: Sequence[LatentStats]) -> LatentStats:
    def mean(rows: Sequence[Sequence[float]]) -> tuple[float, ...]:
        return tuple(sum(column) / len(column) for column in zip(*rows, strict=True))

    return LatentStats(mean([one.mean for one in stats]), mean([one.std for one in stats]))


def _root_mean_square(values: Sequence[float]) -> float:
    return math.sqrt(sum(value * value for value in values) / len(values))
