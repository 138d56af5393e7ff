"""Flow matching: noise levels, and the two conversions the sampler needs.

The model predicts the velocity ``v = noise - x0`` of ``x = (1 - sigma) * x0 + sigma * noise``; its timestep input is
``1000 * sigma``.

Source: thu-ml/Causal-Forcing@1fc7bbc (flow-matching scheduler, shift 5); the shift itself is from Esser et al. 2024
(arXiv 2403.03206).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from causal_forcing.config import DEFAULT_SHIFT

TRAIN_STEPS = 1000
"""Rows of the table of noise levels the model was trained on."""

CONTEXT_TIMESTEP = 0.0
"""Timestep of the pass that writes clean keys and values."""


@dataclass(frozen=True)
class NoiseLevel:
    """One denoising step.

    Attributes:
        sigma: Share of noise, in (0, 1].
        timestep: What the model is told, ``1000 * sigma``.
    """

    sigma: float
    timestep: float


def shifted(u: Tensor, shift: float) -> Tensor:
    """Return the noise levels of unshifted ones, each in 0 to 1; a shift above 1 moves them up."""
    return shift * u / (1 + (shift - 1) * u)


def sigma_table(shift: float = DEFAULT_SHIFT) -> Tensor:
    """Return the 1000 training noise levels, descending from 1, float32."""
    return shifted(torch.linspace(1.0, 0.0, TRAIN_STEPS + 1)[:-1], shift)


def timestep_table(shift: float = DEFAULT_SHIFT) -> Tensor:
    """Return the timesteps of :func:`sigma_table`, float32."""
    return sigma_table(shift) * TRAIN_STEPS


def warp_steps(steps: Sequence[int], shift: float = DEFAULT_SHIFT) -> tuple[NoiseLevel, ...]:
    """Return the noise levels of denoising steps written in unshifted units, e.g. 750 becomes timestep 937.5.

    Args:
        steps: Integers from 1 to 1000 (step ``n`` is row ``1000 - n`` of the table).
        shift: Timestep shift.
    """
    sigmas, timesteps = sigma_table(shift), timestep_table(shift)
    return tuple(NoiseLevel(float(sigmas[TRAIN_STEPS - n]), float(timesteps[TRAIN_STEPS - n])) for n in steps)


def to_x0(x: Tensor, velocity: Tensor, sigma: float) -> Tensor:
    """Return the clean estimate ``x - sigma * velocity`` in the dtype of ``x``, computed in float64."""
    return (x.double() - sigma * velocity.double()).to(x.dtype)


def renoise(x0: Tensor, noise: Tensor, sigma: float) -> Tensor:
    """Return ``(1 - sigma) * x0 + sigma * noise`` in the dtype of ``x0``, computed in float32."""
    return ((1.0 - sigma) * x0.float() + sigma * noise.float()).to(x0.dtype)
