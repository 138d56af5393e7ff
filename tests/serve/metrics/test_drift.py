"""The drift score: nothing for a steady stream, and what was put in for one that wanders."""

from __future__ import annotations

import math

import pytest
import torch

from serve.metrics.drift import REFERENCE_S, DriftScore, LatentStats, compare


def stats(mean: float = 0.0, std: float = 1.0) -> LatentStats:
    return LatentStats((mean,) * 16, (std,) * 16)


def test_statistics_are_per_channel_over_frames_and_places() -> None:
    latents = torch.randn(1, 16, 3, 4, 5, generator=torch.Generator().manual_seed(1))
    latents[0, 7] = 3.0
    found = LatentStats.of(latents.bfloat16())
    exact = latents.bfloat16().float()
    for channel in range(16):
        assert found.mean[channel] == pytest.approx(float(exact[0, channel].mean()), abs=1e-5)
        assert found.std[channel] == pytest.approx(float(exact[0, channel].std(correction=0)), abs=1e-5)


def test_the_first_seconds_are_the_reference_and_a_new_scene_begins_anew() -> None:
    score = DriftScore()
    assert score.update(stats(mean=0.0), REFERENCE_S / 2, starts_scene=True) is None
    assert score.update(stats(mean=1.0), REFERENCE_S / 2, starts_scene=False) is None
    assert score.update(stats(mean=0.5), 1.0, starts_scene=False) == (0.0, 0.0)
    assert score.update(stats(mean=1.5, std=math.e), 1.0, starts_scene=False) == pytest.approx((1.0, 1.0))
    assert score.update(stats(mean=9.0), REFERENCE_S, starts_scene=True) is None
    assert score.update(stats(mean=9.0), 1.0, starts_scene=False) == (0.0, 0.0)


def test_one_channel_of_sixteen_counts_a_quarter() -> None:
    moved = LatentStats((2.0, *(0.0,) * 15), (1.0,) * 16)
    assert compare(moved, stats()) == pytest.approx((0.5, 0.0))


def test_a_constant_channel_divides_by_nothing() -> None:
    assert all(map(math.isfinite, compare(stats(std=0.0), stats(std=0.0))))
